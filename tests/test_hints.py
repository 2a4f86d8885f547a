"""Block hints: from where a program cuts a dim, back to the parameters that make it."""

from __future__ import annotations

import pytest
import torch
from rule_harness import make_op

from autoshard.ir import Graph, Op, TensorType, Value
from autoshard.placement import registry
from autoshard.placement.hints import MAX_HINTS_PER_DIM, block_hints


class Builder:
    """A straight-line graph, op by op."""

    def __init__(self) -> None:
        self.ops: list[Op] = []

    def __call__(self, target: str, *args: object, **kwargs: object) -> Value | tuple[Value, ...]:
        op = make_op(target, args, kwargs)
        self.ops.append(op)
        return op.outputs if len(op.outputs) > 1 else op.output

    def graph(self, *outputs: Value) -> Graph:
        made = {v.name for op in self.ops for v in op.outputs}
        taken = {v.name: v for op in self.ops for v in op.operands if v.name not in made}
        return Graph((), tuple(taken.values()), tuple(self.ops), outputs)


def weight(name: str, *shape: int) -> Value:
    return Value(name, TensorType(shape, torch.float64, differentiable=True, parametric=True))


def test_fused_projection_that_is_split() -> None:
    """GPT-2: one product, three tensors of one size."""
    b = Builder()
    x = b("aten.view.default", weight("x", 2, 4, 8), (8, 8))
    y = b("aten.addmm.default", weight("bias", 24), x, weight("weight", 8, 24))
    y = b("aten.view.default", y, (2, 4, 24))
    q, k, v = b("aten.split.Tensor", y, 8, 2)  # type: ignore[misc]
    hints = block_hints(b.graph(q, k, v))
    assert (8, 8, 8) in hints["weight", 1]
    assert (8, 8, 8) in hints["bias", 0]
    linear = b.ops[1]
    texts = {str(s) for s in registry.strategies(linear, 4, hints)}
    assert "S(0;8,8,8), V, S(1;8,8,8) -> S(1;8,8,8)" in texts


def test_grouped_queries_with_unequal_blocks() -> None:
    b = Builder()
    y = b("aten.linear.default", weight("x", 2, 4, 8), weight("weight", 16, 8), None)
    q, k, v = b("aten.split_with_sizes.default", y, (8, 4, 4), -1)  # type: ignore[misc]
    assert (8, 4, 4) in block_hints(b.graph(q, k, v))["weight", 0]


def test_view_with_a_leading_count_then_unbind() -> None:
    """timm: ``qkv(x).reshape(B, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)``."""
    b = Builder()
    y = b("aten.linear.default", weight("x", 2, 4, 8), weight("weight", 24, 8), weight("bias", 24))
    y = b("aten.reshape.default", y, (2, 4, 3, 4, 2))
    y = b("aten.permute.default", y, (2, 0, 3, 1, 4))
    q, k, v = b("aten.unbind.int", y)  # type: ignore[misc]
    hints = block_hints(b.graph(q, k, v))
    assert (8, 8, 8) in hints["weight", 0]
    assert (8, 8, 8) in hints["bias", 0]


def test_gate_and_up_cut_by_slices() -> None:
    b = Builder()
    y = b("aten.linear.default", weight("x", 4, 8), weight("weight", 16, 8), None)
    gate = b("aten.slice.Tensor", y, 1, 0, 8)
    up = b("aten.slice.Tensor", y, 1, 8, 16)
    out = b("aten.mul.Tensor", b("aten.silu.default", gate), up)
    assert (8, 8) in block_hints(b.graph(out))["weight", 0]  # type: ignore[arg-type]


def test_concatenation_carries_blocks_forwards() -> None:
    """Channels of a skip connection: the next layer's input channels are two blocks."""
    b = Builder()
    y = b("aten.cat.default", (weight("a", 2, 8, 4), weight("b", 2, 4, 4)), 1)
    y = b("aten.relu.default", y)
    y = b("aten.transpose.int", y, 1, 2)
    y = b("aten.linear.default", y, weight("weight", 8, 12), None)
    assert (8, 4) in block_hints(b.graph(y))["weight", 1]  # type: ignore[arg-type]


def test_hints_stay_few() -> None:
    b = Builder()
    x = weight("x", 24)
    for sizes in ((12, 12), (8, 8, 8), (8, 16), (16, 8), (6, 18), (18, 6), (20, 4)):
        b("aten.split_with_sizes.default", x, sizes, 0)
    b("aten.split.Tensor", x, 1, 0)
    hints = block_hints(b.graph())
    assert len(hints["x", 0]) == MAX_HINTS_PER_DIM
    assert all(len(blocks) <= 8 and sum(blocks) == 24 for blocks in hints["x", 0])


def test_hints_are_the_same_on_every_call() -> None:
    b = Builder()
    y = b("aten.linear.default", weight("x", 2, 4, 8), weight("weight", 24, 8), None)
    y = b("aten.view.default", y, (2, 4, 3, 8))
    graph = b.graph(y)  # type: ignore[arg-type]
    assert block_hints(graph) == block_hints(graph)


@pytest.mark.parametrize("target", ["aten.relu.default", "aten.tanh.default"])
def test_no_cut_no_hint(target: str) -> None:
    b = Builder()
    y = b(target, weight("x", 8, 8))
    assert not block_hints(b.graph(y))  # type: ignore[arg-type]
