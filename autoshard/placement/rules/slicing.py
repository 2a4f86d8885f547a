"""Ops that cut a dim into pieces: ``slice``, ``split``, ``select``, ``pad`` and their kin.

The dim that is cut may itself be split, blockwise: if every piece is made of whole blocks, each
rank cuts its part of the piece out of its own part. That is how a fused projection is used.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from autoshard.ir import Op
from autoshard.placement.candidates import base, block_options, may_split, unchanged
from autoshard.placement.named import LETTERS, arguments, fresh_letters, with_arguments
from autoshard.placement.registry import localises, rule, strategies_for
from autoshard.placement.state import S
from autoshard.placement.strategy import Hints, Signature, Strategy

Piece = tuple[int, int]
"""Start and end along the dim that is cut."""

SLICES = ("aten.slice.Tensor", "aten.narrow.default")
SPLITS = (
    "aten.split.Tensor", "aten.split.sizes", "aten.split_with_sizes.default",
    "aten.unsafe_split.Tensor", "aten.unsafe_split_with_sizes.default", "aten.chunk.default",
    "aten.unsafe_chunk.default", "aten.tensor_split.sections", "aten.tensor_split.indices",
)  # fmt: skip


def slice_bounds(op: Op, dim: int) -> tuple[int, int, int]:
    """Start, end and step of a slice or narrow, counted from the front and within the dim."""
    given = arguments(op)
    size = op.operands[0].type.shape[dim]
    if op.target == "aten.narrow.default":
        start = given["start"] + (size if given["start"] < 0 else 0)
        return start, start + given["length"], 1
    start, end, step = slice(given["start"], given["end"], given["step"]).indices(size)
    return start, max(start, end), step


def cut_dim(op: Op) -> int:
    """The dim along which an op cuts, counted from the front."""
    dim: int = arguments(op)["dim"]
    return dim % op.operands[0].type.ndim


def pieces_of(op: Op) -> tuple[Piece, ...]:
    """Where each output begins and ends; only for outputs without gaps."""
    dim = cut_dim(op)
    if op.target in SLICES:
        return (slice_bounds(op, dim)[:2],)
    ends = list(itertools.accumulate(o.type.shape[dim] for o in op.outputs))
    return tuple(zip([0, *ends], ends, strict=False))


def blocks_within(blocks: Sequence[int], piece: Piece) -> tuple[int, ...] | None:
    """The blocks that make up a piece; ``None`` if it begins or ends inside a block."""
    ends = [0, *itertools.accumulate(blocks)]
    start, end = piece
    if start not in ends or end not in ends or start == end:
        return None
    return tuple(blocks[ends.index(start) : ends.index(end)])


def block_candidates(op: Op, hints: Hints, pieces: Sequence[Piece]) -> Iterator[tuple[int, ...]]:
    """Ways to split the dim that is cut: at the cuts alone, and finer where there are hints."""
    value, dim = op.operands[0], cut_dim(op)
    size = value.type.shape[dim]
    bounds = sorted({0, size, *itertools.chain.from_iterable(pieces)})
    cuts = [b - a for a, b in itertools.pairwise(bounds)]
    yield tuple(cuts)
    yield from (b for b in block_options(hints, [(value, dim)]) if sum(b) == size)
    for out, (start, end) in zip(op.outputs, pieces, strict=True):
        for blocks in block_options(hints, [(out, dim)]):
            if sum(blocks) == end - start:
                finer = {(start, end): blocks}
                yield tuple(
                    itertools.chain.from_iterable(
                        finer.get((a, b), (b - a,)) for a, b in itertools.pairwise(bounds)
                    )
                )


def cut_strategies(op: Op, n: int, hints: Hints) -> Iterator[Strategy]:
    """Strategies that split the dim that is cut into whole blocks per piece."""
    value, dim = op.operands[0], cut_dim(op)
    pieces = pieces_of(op)
    for blocks in block_candidates(op, hints, pieces):
        inside = [blocks_within(blocks, piece) for piece in pieces]
        if all(b % n == 0 and b for b in blocks) and all(i is not None for i in inside):
            yield Strategy(
                (S(dim, blocks),), tuple(S(dim, found) for found in inside if found is not None)
            )
    if all(piece == (0, value.type.shape[dim]) for piece in pieces):
        yield from unchanged(op, n, hints, dim, dim)  # nothing is cut off: padding may stay


def others_unchanged(op: Op, n: int, hints: Hints, cut: Iterable[int]) -> Iterator[Strategy]:
    """Strategies that split a dim that the op leaves alone."""
    for dim in range(op.operands[0].type.ndim):
        if dim not in cut:
            yield from unchanged(op, n, hints, dim, dim)


@strategies_for(*SLICES)
def cut_out(op: Op, n: int, hints: Hints) -> Iterable[Strategy]:
    yield from base(op, linear=[(0,)])
    dim = cut_dim(op)
    yield from others_unchanged(op, n, hints, [dim])
    start, end, step = slice_bounds(op, dim)
    if step == 1:
        yield from cut_strategies(op, n, hints)
    elif start < step and end == op.operands[0].type.shape[dim]:
        yield from _every_other(op, n, hints, dim, step)


def _every_other(op: Op, n: int, hints: Hints, dim: int, step: int) -> Iterator[Strategy]:
    """Elements at regular distance over the whole dim: a part of whole steps keeps its share."""
    value = op.operands[0]
    for blocks in block_options(hints, [(value, dim)]):
        if may_split(value, S(dim, blocks), n * step):
            yield Strategy((S(dim, blocks),), (S(dim, tuple(b // step for b in blocks)),))


@localises(*SLICES)
def cut_out_locally(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
    """Bounds within the local part, always written out: an ``end`` beyond it hides mistakes."""
    dim = cut_dim(op)
    start, end, step = slice_bounds(op, dim)
    if strategy.inputs[0].is_split and strategy.inputs[0].dim == dim:
        length = local.output.type.shape[dim]
        start = start // n if step == 1 else start
        end = start + length if step == 1 else local.operands[0].type.shape[dim]
    if op.target == "aten.narrow.default":
        return with_arguments(local, start=start, length=end - start)
    return with_arguments(local, start=start, end=end)


@strategies_for(*SPLITS)
def split(op: Op, n: int, hints: Hints) -> Iterable[Strategy]:
    yield from base(op, linear=[(0,)])
    yield from others_unchanged(op, n, hints, [cut_dim(op)])
    yield from cut_strategies(op, n, hints)


@localises(*SPLITS)
def split_locally(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
    """With explicit local sizes: a number of chunks could divide a part in another way."""
    dim = cut_dim(op)
    sizes = tuple(o.type.shape[dim] for o in local.outputs)
    return replace(
        local, target="aten.split_with_sizes.default", args=(local.args[0], sizes, dim), kwargs=()
    )


# ----------------------------------------------------------------- one dim taken or changed


def one_dim_fixed(op: Op, dims: Iterable[int], *, linear: bool = True) -> Signature:
    """Output dims are input dims, of which ``dims`` may not be split (and may change size)."""
    fresh = fresh_letters()
    source = LETTERS[: op.operands[0].type.ndim]
    held = [source[d] for d in dims]
    target = "".join(next(fresh) if letter in held else letter for letter in source)
    fixed = frozenset(held) | frozenset(target) - frozenset(source)
    return Signature(
        (source, *("".join(next(fresh) for _ in v.type.shape) for v in op.operands[1:])),
        tuple(target for _ in op.outputs),
        fixed,
        ((0,),) if linear else (),
        frozenset(source) - frozenset(held),
    )


@rule("aten.select.int", "aten.unbind.int")
def select(op: Op) -> Signature:
    source = LETTERS[: op.operands[0].type.ndim]
    taken = source[cut_dim(op)]
    target = source.replace(taken, "")
    return Signature(
        (source,), tuple(target for _ in op.outputs), frozenset(taken), ((0,),), frozenset(target)
    )


@rule("aten.flip.default", "aten.roll.default")
def reorder(op: Op) -> Signature:
    ndim = op.operands[0].type.ndim
    dims = arguments(op)["dims"]
    changed = (dims,) if isinstance(dims, int) else dims
    return one_dim_fixed(op, {d % ndim for d in changed} if changed else range(ndim))


@rule("aten.constant_pad_nd.default", "aten.pad.default")
def pad(op: Op) -> Signature:
    """Pairs from the last dim backwards; a dim with a pair of zeros is left alone."""
    given = arguments(op)
    ndim = op.operands[0].type.ndim
    pairs = list(zip(given["pad"][::2], given["pad"][1::2], strict=True))
    changed = [ndim - 1 - i for i, pair in enumerate(pairs) if pair != (0, 0)]
    constant = given.get("mode", "constant") == "constant"
    return one_dim_fixed(op, changed, linear=not (constant and given["value"]))


@rule("aten.unfold.default")
def unfold(op: Op) -> Signature:
    """Windows along a dim; their elements are a new last dim."""
    dim = arguments(op)["dimension"] % op.operands[0].type.ndim
    sig = one_dim_fixed(op, [dim])
    window = next(letter for letter in fresh_letters() if letter not in sig.fixed)
    return replace(sig, outputs=(sig.outputs[0] + window,), fixed=sig.fixed | {window})


@rule("aten.diagonal.default")
def diagonal(op: Op) -> Signature:
    """The diagonal becomes the last dim."""
    given = arguments(op)
    ndim = op.operands[0].type.ndim
    pair = {given["dim1"] % ndim, given["dim2"] % ndim}
    source = LETTERS[:ndim]
    rest = "".join(letter for d, letter in enumerate(source) if d not in pair)
    new = next(fresh_letters())
    held = frozenset(source) - frozenset(rest)
    return Signature((source,), (rest + new,), held | {new}, ((0,),), frozenset(rest))


@rule("aten.tril.default", "aten.triu.default")
def triangle(op: Op) -> Signature:
    ndim = op.operands[0].type.ndim
    letters = LETTERS[:ndim]
    rest = frozenset(letters[:-2])
    return Signature((letters,), (letters,), frozenset(letters[-2:]), ((0,),), rest)
