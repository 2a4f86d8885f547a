"""Ops that put tensors together: ``cat``, ``stack``, ``where``, writing one into another."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from autoshard.ir import Arg, Op, Value
from autoshard.placement.candidates import base, block_options, may_split
from autoshard.placement.named import (
    LETTERS,
    arguments,
    broadcast_letters,
    fresh_letters,
    operand_names,
    with_arguments,
)
from autoshard.placement.registry import localises, rule, strategies_for
from autoshard.placement.rules.slicing import blocks_within
from autoshard.placement.state import S
from autoshard.placement.strategy import Hints, Signature, Strategy

CATS = ("aten.cat.default", "aten.concat.default", "aten.concatenate.default")


@strategies_for(*CATS)
def cat(op: Op, n: int, hints: Hints) -> Iterable[Strategy]:
    """Along the joined dim every operand may be split: the output is then split blockwise."""
    everything = tuple(range(len(op.operands)))
    yield from base(op, linear=[everything])
    ndim = op.output.type.ndim
    if any(v.type.ndim != ndim for v in op.operands):
        return  # old-style empty tensors, which fit any shape
    joined = arguments(op)["dim"] % ndim
    for dim in range(ndim):
        if dim == joined:
            yield from _along_the_joined_dim(op, n, hints, dim)
            continue
        places = [(v, dim) for v in (*op.operands, op.output)]
        for blocks in block_options(hints, places):
            if may_split(op.output, S(dim, blocks), n, padded=True):
                yield Strategy(tuple(S(dim, blocks) for _ in op.operands), (S(dim, blocks),))


def _along_the_joined_dim(op: Op, n: int, hints: Hints, dim: int) -> Iterator[Strategy]:
    sizes = [v.type.shape[dim] for v in op.operands]
    ends = list(itertools.accumulate(sizes))
    pieces = list(zip([0, *ends], ends, strict=False))
    options = [tuple(sizes), *block_options(hints, [(op.output, dim)])]
    for i, value in enumerate(op.operands):
        for blocks in block_options(hints, [(value, dim)]):
            options.append((*sizes[:i], *(blocks or (sizes[i],)), *sizes[i + 1 :]))
    for blocks in options:
        inside = [blocks_within(blocks, piece) for piece in pieces]
        if sum(blocks) == ends[-1] and all(b and b % n == 0 for b in blocks) and all(inside):
            yield Strategy(tuple(S(dim, found or ()) for found in inside), (S(dim, blocks),))


@rule("aten.stack.default")
def stack(op: Op) -> Signature:
    """The new dim counts the operands, so it stays whole."""
    letters = LETTERS[: op.operands[0].type.ndim]
    dim = arguments(op)["dim"] % op.output.type.ndim
    new = next(fresh_letters())
    return Signature(
        tuple(letters for _ in op.operands),
        (letters[:dim] + new + letters[dim:],),
        frozenset(new),
        (tuple(range(len(op.operands))),),
        frozenset(letters),
    )


# --------------------------------------------------------------------------- masks


def _is_zero(arg: Arg) -> bool:
    return not isinstance(arg, Value) and arg == 0


@rule(
    "aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther",
    "aten.masked_fill.Scalar", "aten.masked_fill.Tensor",
)  # fmt: skip
def choose(op: Op) -> Signature:
    """Elementwise with broadcasting; linear in what is chosen from, if all else is zero."""
    given = arguments(op)
    names = operand_names(op)
    inputs, output, fixed = broadcast_letters(
        [v.type.shape for v in op.operands], op.output.type.shape
    )
    sources = ("self", "value") if op.target.startswith("aten.masked_fill") else ("self", "other")
    linear = all(isinstance(given[s], Value) or _is_zero(given[s]) for s in sources)
    group = tuple(i for i, name in enumerate(names) if name in sources)
    return Signature(inputs, (output,), fixed, (group,) if linear else (), frozenset(output))


# ----------------------------------------------------------------- writing into a tensor


def _written_pair(op: Op, held: frozenset[int]) -> Signature:
    """Both tensors with the same letters but for ``held`` dims of the first."""
    fresh = fresh_letters()
    letters = LETTERS[: op.operands[0].type.ndim]
    fixed = frozenset(letters[d] for d in held)
    rest = frozenset(letters) - fixed
    if op.target.startswith("aten.select_scatter"):
        other = "".join(letter for letter in letters if letter not in fixed)
    else:
        other = "".join(next(fresh) if letter in fixed else letter for letter in letters)
    unknown = fixed | (frozenset(other) - frozenset(letters))
    return Signature((letters, other), (letters,), unknown, ((0, 1),), rest)


@rule("aten.slice_scatter.default", "aten.select_scatter.default")
def write_slice(op: Op) -> Signature:
    return _written_pair(op, frozenset([arguments(op)["dim"] % op.output.type.ndim]))


@localises("aten.slice_scatter.default")
def write_slice_locally(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
    """The dim that is written to is never split; its bounds are written out."""
    given = arguments(op)
    size = op.output.type.shape[given["dim"] % op.output.type.ndim]
    start, end, _ = slice(given["start"], given["end"], given["step"]).indices(size)
    return with_arguments(local, start=start, end=end)
