"""The ops of whole models as they are captured, with the block hints of their layers."""

from __future__ import annotations

import pytest
import zoo
from rule_harness import integers, prove

from autoshard.capture.capture import capture
from autoshard.ir import Op
from autoshard.placement import registry
from autoshard.placement.hints import block_hints

RANDOM = ("aten.rand", "aten.dropout", "aten.bernoulli")
MAX_ELEMENTS = 50_000  # keeps the test short; the same ops occur on smaller tensors as well


def call_of(op: Op) -> str:
    """The call without the names of its operands."""
    types = [str(v.type) for v in op.operands]
    return f"{op.target} {op.map(lambda v: v.type).args} {op.kwargs} {types}"


@pytest.mark.parametrize("name", ["nanogpt", "mixtral", "t5"])
def test_every_strategy_of_every_op_of_a_model(name: str) -> None:
    model, batch, loss_fn = zoo.build(name)
    program = capture(model, example_inputs=batch, loss_fn=loss_fn)
    seen: set[str] = set()
    for layer in program.classes:
        hints = block_hints(layer.graph)
        for op in layer.graph.ops:
            elements = sum(v.type.numel for v in (*op.operands, *op.outputs))
            if call_of(op) in seen or elements > MAX_ELEMENTS:
                continue
            seen.add(call_of(op))
            assert registry.has_rule(op), f"{op} has no rule"
            values = not op.target.startswith(RANDOM)
            prove(op, 2, hints=hints, make_inputs=integers(2)(op), values=values)
    assert len(seen) > 20
