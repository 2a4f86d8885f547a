"""Ops that read the same elements in the same order under another shape: ``view`` and its kin.

A split of a dim hands out runs of consecutive elements: ``outer`` times (once per index of the
dims before it) the run lengths ``blocks * inner``. A view keeps the order of elements, so a split
of an input dim is the split of an output dim exactly if their runs are the same. Dims are compared
within the smallest groups of neighbours whose sizes multiply to the same number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from autoshard.ir import Op
from autoshard.placement.candidates import base, block_options, may_split
from autoshard.placement.named import arguments, with_arguments
from autoshard.placement.registry import localises, strategies_for
from autoshard.placement.state import S, State
from autoshard.placement.strategy import Hints, Strategy

MAX_BLOCKS = 32
"""More blocks than these are not worth a strategy: they stand for splits of an inner dim."""

VIEWS = (
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
    "aten.view_copy.default",
)
FLATTENS = (
    "aten.flatten.using_ints",
    "aten.ravel.default",
    "aten.unflatten.int",
    "aten.view_as.default",
    "aten.reshape_as.default",
)


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring dims on both sides with the same number of elements."""

    source: tuple[int, ...]
    target: tuple[int, ...]


def groups(source: Sequence[int], target: Sequence[int]) -> tuple[Group, ...]:
    """The finest matching of dims of two shapes with equal numbers of elements (none may be 0).

    Dims of size 1 stand alone or with a neighbour; they are never split, so it does not matter.
    """
    found = []
    i = j = 0
    while i < len(source) or j < len(target):
        first_i, first_j = i, j
        left = right = 1
        while left != right or (i, j) == (first_i, first_j):
            if j == len(target) or (i < len(source) and left <= right):
                left, i = left * source[i], i + 1
            else:
                right, j = right * target[j], j + 1
        found.append(Group(tuple(range(first_i, i)), tuple(range(first_j, j))))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Runs:
    """``count`` repetitions of a shortest pattern of run lengths."""

    count: int
    pattern: tuple[int, ...]


def runs_of(shape: Sequence[int], dims: Sequence[int], state: State) -> Runs:
    """The runs of elements that a split hands out, within a group of dims."""
    outer = math.prod(shape[d] for d in dims if d < state.dim)
    inner = math.prod(shape[d] for d in dims if d > state.dim)
    lengths = tuple(b * inner for b in state.blocks or (shape[state.dim],))
    period = next(
        p
        for p in range(1, len(lengths) + 1)
        if len(lengths) % p == 0 and lengths[:p] * (len(lengths) // p) == lengths
    )
    return Runs(outer * len(lengths) // period, lengths[:period])


def splits_with_runs(shape: Sequence[int], dims: Sequence[int], runs: Runs) -> Iterator[State]:
    """Every split of one of ``dims`` that hands out these runs."""
    for dim in dims:
        outer = math.prod(shape[d] for d in dims if d < dim)
        inner = math.prod(shape[d] for d in dims if d > dim)
        if runs.count % outer or any(length % inner for length in runs.pattern):
            continue
        repeats = runs.count // outer
        if repeats * len(runs.pattern) <= MAX_BLOCKS:
            yield S(dim, tuple(length // inner for length in runs.pattern) * repeats)


def view_splits(source: Sequence[int], target: Sequence[int], state: State) -> Iterator[State]:
    """The splits of ``target`` that a view makes of the split ``state`` of ``source``."""
    if 0 in source or sum(state.blocks or (source[state.dim],)) != source[state.dim]:
        return
    for group in groups(source, target):
        if state.dim in group.source:
            runs = runs_of(source, group.source, state)
            yield from splits_with_runs(target, group.target, runs)


@strategies_for(*VIEWS, *FLATTENS)
def view(op: Op, n: int, hints: Hints) -> Iterable[Strategy]:
    """Splits carry over where the runs of elements are the same on both sides."""
    yield from base(op, linear=[(0,)])
    value, out = op.operands[0], op.output
    for left, right in _pairs(op, hints):
        padded = _spans_group(value.type.shape, out.type.shape, left, right)
        if may_split(value, left, n, padded=padded) and may_split(out, right, n, padded=padded):
            # the second operand of view_as gives nothing but its shape
            yield Strategy((left, *(right for _ in op.operands[1:])), (right,))


def _pairs(op: Op, hints: Hints) -> Iterator[tuple[State, State]]:
    """Splits of the input and of the output that are the same, found from either side."""
    value, out = op.operands[0], op.output
    source, target = value.type.shape, out.type.shape
    for dim in range(len(source)):
        for blocks in block_options(hints, [(value, dim)]):
            for state in view_splits(source, target, S(dim, blocks)):
                yield S(dim, blocks), state
    for dim in range(len(target)):
        for blocks in block_options(hints, [(out, dim), *((v, dim) for v in op.operands[1:])]):
            for state in view_splits(target, source, S(dim, blocks)):
                yield state, S(dim, blocks)


def _spans_group(source: Sequence[int], target: Sequence[int], left: State, right: State) -> bool:
    """The dim passes unchanged: its group has no other dim, but for sizes of 1."""
    group = next(g for g in groups(source, target) if left.dim in g.source)
    total = math.prod(source[d] for d in group.source)
    return source[left.dim] == total == target[right.dim]


@localises(*VIEWS)
def explicit_shape(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
    """The local output shape, always written out: a ``-1`` would adapt to any mistake.

    ``reshape``, because a local part need not be laid out in memory as the whole tensor is.
    """
    shape = local.output.type.shape
    return replace(local, target="aten.reshape.default", args=(local.args[0], shape), kwargs=())


@localises("aten.view_as.default")
def any_layout(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
    """The other operand has the local shape."""
    return replace(local, target="aten.reshape_as.default")


@localises("aten.unflatten.int")
def explicit_sizes(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
    given = arguments(op)
    ndim = op.operands[0].type.ndim
    dim = given["dim"] % ndim
    count = op.output.type.ndim - ndim + 1
    return with_arguments(local, sizes=local.output.type.shape[dim : dim + count])
