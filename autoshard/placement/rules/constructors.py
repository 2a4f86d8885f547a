"""Ops that make tensors out of nothing: constants and ranges.

A tensor whose elements are all alike may be made in parts. Ranges depend on where the
part begins: they are made whole, and a split of them costs nothing but a slice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from autoshard.ir import Op, Value
from autoshard.placement.candidates import block_options, may_split, whole
from autoshard.placement.named import LETTERS, with_arguments
from autoshard.placement.registry import localises, rule, strategies_for
from autoshard.placement.state import P, R, S, State, V
from autoshard.placement.strategy import Hints, Signature, Strategy, uniform

ALIKE = (
    "aten.zeros.default", "aten.ones.default", "aten.full.default", "aten.empty.memory_format",
)  # fmt: skip
LIKE_OPERAND = (
    "aten.zeros_like.default", "aten.ones_like.default", "aten.full_like.default",
    "aten.empty_like.default",
)  # fmt: skip
NEW = (
    "aten.new_zeros.default", "aten.new_ones.default", "aten.new_full.default",
    "aten.new_empty.default",
)  # fmt: skip


@rule(*ALIKE)
def alike(op: Op) -> Signature:
    return Signature((), (LETTERS[: op.output.type.ndim],))


@localises(*ALIKE, *NEW)
def local_size_given(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
    return with_arguments(local, size=local.output.type.shape)


@rule(
    "aten.arange.default", "aten.arange.start", "aten.arange.start_step", "aten.linspace.default",
    "aten.eye.default", "aten.eye.m", "aten.scalar_tensor.default",
    "aten.tril_indices.default", "aten.triu_indices.default",
)  # fmt: skip
def ordered(op: Op) -> None:
    """Elements differ by their place, so every rank makes all of them."""
    return None


@strategies_for(*LIKE_OPERAND)
def like_operand(op: Op, n: int, hints: Hints) -> Iterable[Strategy]:
    """Of the operand only the shape is read: addends will do for it."""
    yield uniform(op, R)
    yield uniform(op, V)
    value, out = op.operands[0], op.output
    for dim in range(out.type.ndim):
        for blocks in block_options(hints, [(value, dim), (out, dim)]):
            if may_split(value, S(dim, blocks), n, padded=True):
                yield Strategy((S(dim, blocks),), (S(dim, blocks),))
    if value.type.dtype.is_floating_point:
        yield Strategy((P,), (R,))


@strategies_for(*NEW)
def new(op: Op, n: int, hints: Hints) -> Iterable[Strategy]:
    """Of the operand only the type is read: its state and the output's are independent."""
    yield uniform(op, R)
    yield uniform(op, V)
    operand, out = op.operands[0], op.output
    given = [whole(operand, V), *_plain_splits(op.operands[0], n)]
    made = [R, *_plain_splits(out, n)]
    for source in given:
        yield from (Strategy((source,), (target,)) for target in made)
    if operand.type.dtype.is_floating_point:
        yield from (Strategy((P,), (target,)) for target in made)


def _plain_splits(value: Value, n: int) -> Iterator[State]:
    return (S(d) for d in range(value.type.ndim) if may_split(value, S(d), n))
