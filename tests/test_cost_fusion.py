"""Groups of elementwise ops: what enters and leaves them is what they move."""

from __future__ import annotations

import torch

from autoshard.cost_models.fusion import fused_works
from autoshard.cost_models.products import NOTHING
from autoshard.cost_models.work import work_of
from autoshard.ir import Arg, Graph, Op, TensorType, Value

BF16 = torch.bfloat16
SIZE = 64 * 64 * 2


def value(name: str, *, parametric: bool = False) -> Value:
    return Value(name, TensorType((64, 64), BF16, True, True, parametric))


def op(name: str, target: str, *args: Arg) -> Op:
    return Op(name, f"aten.{target}", args, (), (value(name),))


def graph(*ops: Op, outputs: tuple[str, ...]) -> Graph:
    made = {v.name: v for o in ops for v in o.outputs}
    given = {v.name: v for o in ops for v in o.operands if v.name not in made}
    return Graph(
        inputs=tuple(v for v in given.values() if not v.type.parametric),
        parameters=tuple(v for v in given.values() if v.type.parametric),
        ops=ops, outputs=tuple(made[name] for name in outputs),
    )  # fmt: skip


X, W = value("x"), value("w", parametric=True)


def test_a_chain_moves_its_ends_once() -> None:
    chain = graph(
        op("a", "gelu.default", X), op("b", "mul.Tensor", value("a"), value("y")),
        op("c", "neg.default", value("b")), outputs=("c",),
    )  # fmt: skip
    works = fused_works(chain)
    assert works["a"].forward == works["b"].forward == NOTHING
    assert works["c"].forward.bytes == 3 * SIZE  # x and y in, c out
    assert works["c"].forward.kernels == works["c"].backward.kernels == 1
    assert works["c"].backward.bytes == 5 * SIZE  # the gradient of c, x and y, and their gradients
    assert sum(work_of(o).forward.bytes for o in chain.ops) > works["c"].forward.bytes


def test_what_is_used_outside_is_written() -> None:
    works = fused_works(
        graph(op("a", "gelu.default", X), op("b", "neg.default", value("a")), outputs=("a", "b"))
    )
    assert works["b"].forward.bytes == 3 * SIZE


def test_products_part_groups() -> None:
    """The sum at the end joins nothing before the product, though the residual reaches it."""
    parted = graph(
        op("a", "gelu.default", X), op("b", "neg.default", value("a")),
        op("p", "mm.default", value("b"), W), op("c", "add.Tensor", value("p"), value("b")),
        op("d", "relu.default", value("c")), outputs=("d",),
    )  # fmt: skip
    works = fused_works(parted)
    assert works["p"] == work_of(parted.ops[2])
    assert works["a"].forward == works["c"].forward == NOTHING
    assert works["b"].forward.bytes == 2 * SIZE
    assert works["d"].forward.bytes == 3 * SIZE


def test_an_op_alone_stays_as_it_is() -> None:
    alone = graph(
        op("a", "gelu.default", X), op("p", "mm.default", value("a"), W),
        op("v", "view.default", value("p")), op("s", "softmax.int", value("v"), -1), outputs=("s",),
    )  # fmt: skip
    assert fused_works(alone) == {o.name: work_of(o) for o in alone.ops}
