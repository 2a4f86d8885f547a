"""Building blocks of rules whose strategies do not follow from letters alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from autoshard.ir import Op, Value
from autoshard.placement.state import P, R, S, State, V
from autoshard.placement.strategy import Hints, Strategy, leaves_a_rank_empty, uniform


def whole(value: Value, state: State) -> State:
    """``state`` (``R`` or ``V``) for a value with a gradient; without one, they are the same."""
    return state if value.type.differentiable else R


def may_split(value: Value, state: State, n: int, *, padded: bool = False) -> bool:
    """Each rank gets something of each block, without padding unless that is ``padded``."""
    size = value.type.shape[state.dim]
    if state.blocks:
        return sum(state.blocks) == size and all(b > 0 and b % n == 0 for b in state.blocks)
    return not leaves_a_rank_empty(size, n) and (padded or size % n == 0)


def base(op: Op, linear: Iterable[Sequence[int]] = ()) -> Iterator[Strategy]:
    """Replicated, varying, and partial for each group of operands in which the op is linear."""
    yield uniform(op, R)
    yield uniform(op, V)
    for group in linear:
        if all(op.operands[i].type.differentiable for i in group) and all(
            o.type.differentiable for o in op.outputs
        ):
            yield Strategy(
                tuple(P if i in group else whole(v, V) for i, v in enumerate(op.operands)),
                tuple(P for _ in op.outputs),
            )


def block_options(hints: Hints, places: Iterable[tuple[Value, int]]) -> list[tuple[int, ...]]:
    """No blocks, then the blocks that any of these dims has a hint for, in a fixed order."""
    options: set[tuple[int, ...]] = set()
    for value, dim in places:
        options |= hints.get((value.name, dim), frozenset())
    return [(), *sorted(options - {()})]


def unchanged(
    op: Op, n: int, hints: Hints, source: int, target: int, *, padded: bool = True
) -> Iterator[Strategy]:
    """A dim of the only operand that every output has whole and in the same order."""
    value = op.operands[0]
    places = [(value, source), *((o, target) for o in op.outputs)]
    for blocks in block_options(hints, places):
        if may_split(value, S(source, blocks), n, padded=padded):
            others = tuple(whole(v, V) for v in op.operands[1:])
            yield Strategy(
                (S(source, blocks), *others), tuple(S(target, blocks) for _ in op.outputs)
            )
