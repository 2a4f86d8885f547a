"""Ops that read or write at places given by index tensors.

The dim that is indexed into stays whole, since an index may point anywhere. The dims of the index
itself may be split: each rank then looks up (or adds) its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autoshard.ir import Arg, Op, Value
from autoshard.placement.named import (
    LETTERS,
    arguments,
    broadcast_letters,
    fresh_letters,
    named_signature,
)
from autoshard.placement.registry import rule
from autoshard.placement.strategy import Signature


def _letters(ndim: int) -> tuple[str, str]:
    """Letters for one tensor, and as many for a second one."""
    return LETTERS[:ndim], LETTERS[ndim : 2 * ndim]


@rule("aten.index_select.default")
def index_select(op: Op) -> Signature:
    given = arguments(op)
    letters, _ = _letters(given["self"].type.ndim)
    dim = given["dim"] % len(letters)
    index = "Z" if given["index"].type.ndim else ""
    out = letters[:dim] + (index or next(fresh_letters())) + letters[dim + 1 :]
    fixed = {letters[dim]} | (set(out) - set(letters) - {"Z"})
    rest = "".join(letter for letter in letters if letter not in fixed)
    return named_signature(
        op, {"self": letters, "index": index}, out, fixed=fixed, linear=[["self"]], padded=rest
    )


def _beside(shape: Sequence[int], other: Sequence[int], letters: str, spare: str, dim: int) -> str:
    """Letters of a tensor that lies along another one but for ``dim`` and dims of other size."""
    return "".join(
        letters[d] if d != dim and shape[d] == other[d] else spare[d] for d in range(len(shape))
    )


@rule("aten.gather.default")
def gather(op: Op) -> Signature | None:
    """``out[i][j] = self[i][index[i][j]]``: dims beside the indexed one go together."""
    given = arguments(op)
    ndim = given["self"].type.ndim
    if ndim == 0 or given["index"].type.ndim != ndim:
        return None
    dim = given["dim"] % ndim
    letters, spare = _letters(ndim)
    shape, index = given["self"].type.shape, given["index"].type.shape
    out = _beside(index, shape, letters, spare, dim)
    # where the index is shorter than self, its elements meet the first ones of self only
    fixed = set(letters) - set(out) | {spare[d] for d in range(ndim) if d != dim}
    return named_signature(op, {"self": letters, "index": out}, out, fixed=fixed, linear=[["self"]])


SCATTERS = (
    "aten.scatter.src", "aten.scatter.value", "aten.scatter_add.default", "aten.scatter.reduce",
    "aten.scatter_reduce.two",
)  # fmt: skip


@rule(*SCATTERS)
def scatter(op: Op) -> Signature | None:
    """``out = self; out[i][index[i][j]] = src[i][j]`` (or ``+=``, then self is an addend)."""
    given = arguments(op)
    ndim = op.output.type.ndim
    tensors = [v for v in given.values() if isinstance(v, Value)]
    if ndim == 0 or any(v.type.ndim != ndim for v in tensors):
        return None
    dim = given["dim"] % ndim
    letters, spare = _letters(ndim)
    named = {k: v.type.shape for k, v in given.items() if isinstance(v, Value)}
    agree = {d for d in range(ndim) if d != dim and len({s[d] for s in named.values()}) == 1}
    index = "".join(letters[d] if d in agree else spare[d] for d in range(ndim))
    adds = op.target == "aten.scatter_add.default"
    split_index = {spare[dim]} if adds else set()
    fixed = (set(letters) | set(spare)) - {letters[d] for d in agree} - split_index
    linear: list[list[str]] = [["self", "src"]]
    if op.target == "aten.scatter.value":
        linear = [["self"]] if given["value"] == 0 else []
    elif not adds and op.target != "aten.scatter.src":
        linear = []
    letters_of = {"self": letters, "index": index, "src": index}
    return named_signature(
        op, letters_of, letters, fixed=fixed, linear=linear, addends=["self"] if adds else []
    )


@rule("aten.index_add.default", "aten.index_copy.default")
def index_add(op: Op) -> Signature | None:
    """Rows of a source added to (or put in place of) indexed rows."""
    given = arguments(op)
    ndim = op.output.type.ndim
    if ndim == 0 or given["index"].type.ndim != 1:
        return None
    dim = given["dim"] % ndim
    letters, _ = _letters(ndim)
    adds = op.target == "aten.index_add.default"
    source = letters[:dim] + "Z" + letters[dim + 1 :]
    fixed = {letters[dim]} | (set() if adds else {"Z"})
    return named_signature(
        op, {"self": letters, "index": "Z", "source": source}, letters, fixed=fixed,
        linear=[["self", "source"]], addends=["self"] if adds else [],
    )  # fmt: skip


@rule("aten.index_fill.int_Scalar")
def index_fill(op: Op) -> Signature | None:
    given = arguments(op)
    letters, _ = _letters(op.output.type.ndim)
    if not letters or given["index"].type.ndim != 1:
        return None
    fixed = {letters[given["dim"] % len(letters)], "Z"}
    linear = [["self"]] if given["value"] == 0 else []
    return named_signature(op, {"self": letters, "index": "Z"}, letters, fixed=fixed, linear=linear)


# ------------------------------------------------------------------- x[i, :, j] and x[i, :, j] = y


@dataclass(frozen=True, slots=True)
class _Subscript:
    """Letters of a subscript: of the tensor, of each index, and of the elements it selects."""

    tensor: str
    indices: tuple[str, ...]
    selected: str
    looked_up: frozenset[str]
    stretched: frozenset[str]


def _subscript(tensor: Value, indices: tuple[Arg, ...]) -> _Subscript | None:
    """How ``tensor[indices]`` lines up dims; ``None`` for boolean masks, whose count is data.

    The dims of the indices, broadcast together, come where the first index stands if all indices
    are neighbours, else first of all.
    """
    given = [(d, index) for d, index in enumerate(indices) if isinstance(index, Value)]
    if not given or any(v.type.dtype in (torch.bool, torch.uint8) for _, v in given):
        return None
    shapes = [v.type.shape for _, v in given]
    together = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    of_indices, broadcasted, stretched = broadcast_letters(shapes, together)
    letters = LETTERS[len(together) : len(together) + tensor.type.ndim]
    dims = [d for d, _ in given]
    neighbours = dims == list(range(dims[0], dims[0] + len(dims)))
    rest = [letter for d, letter in enumerate(letters) if d not in dims]
    at = dims[0] if neighbours else 0
    return _Subscript(
        letters,
        of_indices,
        "".join(rest[:at]) + broadcasted + "".join(rest[at:]),
        frozenset(letters[d] for d in dims),
        stretched,
    )


@rule("aten.index.Tensor")
def index(op: Op) -> Signature | None:
    given = arguments(op)
    found = _subscript(given["self"], given["indices"])
    if found is None:
        return None
    return Signature(
        (found.tensor, *found.indices),
        (found.selected,),
        found.looked_up | found.stretched,
        ((0,),),
    )


@rule("aten.index_put.default", "aten._index_put_impl.default")
def index_put(op: Op) -> Signature | None:
    """``self[indices] = values``, or ``+=``: only then may each rank add its share."""
    given = arguments(op)
    found = _subscript(given["self"], given["indices"])
    if found is None:
        return _masked_put(op)
    where = dict(zip(found.selected, _selected_shape(op, found), strict=True))
    shape = given["values"].type.shape
    tail = found.selected[len(found.selected) - len(shape) :]
    fresh = (letter for letter in fresh_letters() if letter not in found.stretched)
    values = "".join(
        letter if size == where[letter] else next(fresh)
        for letter, size in zip(tail, shape, strict=True)
    )
    fixed = found.looked_up | found.stretched | (frozenset(values) - frozenset(tail))
    if not given["accumulate"]:
        fixed |= frozenset("".join(found.indices))
    return Signature(
        (found.tensor, *found.indices, values), (found.tensor,), fixed,
        ((0, len(op.operands) - 1),), addends=frozenset([0] if given["accumulate"] else []),
    )  # fmt: skip


def _selected_shape(op: Op, found: _Subscript) -> tuple[int, ...]:
    sizes = dict(zip(found.tensor, op.operands[0].type.shape, strict=True))
    shapes = (v.type.shape for v in op.operands[1:-1])
    together = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    rest = "".join(letter for letter in found.selected if letter not in sizes)
    sizes.update(zip(rest, together, strict=True))
    return tuple(sizes[letter] for letter in found.selected)


def _masked_put(op: Op) -> Signature | None:
    """One number written where a mask over leading dims holds: elementwise along all dims."""
    given = arguments(op)
    masks = [v for v in given["indices"] if isinstance(v, Value)]
    number = given["values"]
    if len(given["indices"]) != 1 or len(masks) != 1 or masks[0].type.dtype != torch.bool:
        return None
    if number.type.numel != 1:
        return None
    letters, spare = _letters(op.output.type.ndim)
    return Signature(
        (letters, letters[: masks[0].type.ndim], spare[: number.type.ndim]), (letters,),
        frozenset(spare), ((0, 2),),
    )  # fmt: skip


# --------------------------------------------------------------------------- search


@rule("aten.bucketize.Tensor")
def bucketize(op: Op) -> Signature:
    letters, _ = _letters(op.output.type.ndim)
    return named_signature(
        op, {"self": letters, "boundaries": "Z"}, letters, fixed=["Z"], padded=letters
    )


@rule("aten.searchsorted.Tensor")
def searchsorted(op: Op) -> Signature:
    """Rows of sorted numbers, or one row for all, and rows of numbers to find."""
    given = arguments(op)
    letters, _ = _letters(op.output.type.ndim)
    rows = letters[:-1] + "Z" if given["sorted_sequence"].type.ndim > 1 else "Z"
    return named_signature(op, {"sorted_sequence": rows, "self": letters}, letters, fixed=["Z"])
