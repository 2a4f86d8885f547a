"""Which parts of a whole tensor a rank holds: the index arithmetic below checkpoints.

A parameter at rest is first split along one dim over ``tp`` (in blocks, perhaps); data parallelism
may then split the rows (dim 0) of that local part over ``dp``, as ``torch.chunk`` does. What a rank
is left with is a list of boxes of the whole tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from autoshard.placement.state import S, local_size, ranges


@dataclass(frozen=True, slots=True)
class Split:
    """A parameter's split over ``tp``: the dim, and the sizes of blocks split each on its own.

    Without blocks the size need not divide: parts are those of ``torch.chunk``, without padding.
    """

    dim: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned part of a tensor: its first index and its size along every dim."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """This part of ``tensor``, as a view."""
        for dim, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            tensor = tensor.narrow(dim, offset, size)
        return tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements that a rank holds: where they lie in the whole and where in its local tensor."""

    whole: Box
    local: Box


@dataclass(frozen=True, slots=True)
class Place:
    """A rank's coordinate on an axis and the number of ranks there."""

    rank: int = 0
    n: int = 1


def tp_ranges(shape: Sequence[int], split: Split | None, tp: Place) -> tuple[tuple[int, int], ...]:
    """The index ranges along the split dim (dim 0 without a split) of the part over ``tp``."""
    if split is None:
        return ((0, shape[0]),) if shape else ()
    return ranges(shape[split.dim], S(split.dim, split.blocks), tp.n, tp.rank)


def tp_shape(shape: Sequence[int], split: Split | None, tp: Place) -> tuple[int, ...]:
    """Shape of the part over ``tp``, without padding."""
    if split is None:
        return tuple(shape)
    size = sum(end - begin for begin, end in tp_ranges(shape, split, tp))
    return (*shape[: split.dim], size, *shape[split.dim + 1 :])


def chunk_range(size: int, place: Place) -> tuple[int, int]:
    """The range that ``torch.chunk`` gives a rank; empty where there are too few elements."""
    width = local_size(size, place.n)
    return min(place.rank * width, size), min((place.rank + 1) * width, size)


def pieces(
    shape: Sequence[int], split: Split | None, tp: Place = Place(), dp: Place = Place()
) -> tuple[Piece, ...]:
    """What a rank holds of a tensor of ``shape``; empty if nothing.

    Args:
        dp: how the rows of the local part are split further; one rank if they are not.
    """
    if not shape:
        return (Piece(Box((), ()), Box((), ())),)
    dim = split.dim if split else 0
    local = tp_shape(shape, split, tp)
    first, last = chunk_range(local[0], dp)
    found = []
    start = 0
    for begin, end in tp_ranges(shape, split, tp):
        if dim == 0:
            low, high = max(first, start), min(last, start + end - begin)
            rows, whole_row, along, local_along = high - low, begin + low - start, 0, 0
        else:
            rows, whole_row, low = last - first, first, first
            along, local_along = begin, start
        start, width = start + end - begin, end - begin
        sizes = (rows, *shape[1:]) if dim == 0 else (rows, *shape[1:dim], width, *shape[dim + 1 :])
        if min(sizes) <= 0:
            continue
        whole_at, local_at = [0] * len(shape), [0] * len(shape)
        whole_at[dim], local_at[dim] = along, local_along
        whole_at[0], local_at[0] = whole_row, low - first
        found.append(Piece(Box(tuple(whole_at), sizes), Box(tuple(local_at), sizes)))
    return tuple(found)
