"""The four states of a tensor on one mesh axis, and what each rank then holds.

| state | forward value | gradient |
|---|---|---|
| ``R`` replicated | whole, the same everywhere | whole, the same everywhere |
| ``V`` varying use | whole, the same everywhere | an addend; the true gradient is the sum |
| ``S(d)`` split | the part along dim ``d`` | the same part |
| ``P`` partial | an addend; the true value is the sum | whole, the same everywhere |

A tensor that no gradient flows through is never ``V``: there ``R`` and ``V`` are one state.

``S(d, blocks)`` splits each block of dim ``d`` on its own: with blocks ``(q, k, v)`` a rank holds
its part of q, then of k, then of v, which is how a fused projection is split by heads.

Sizes that do not divide are rounded up: every rank holds ``ceil(size / n)`` and the surplus at the
end is padding that an op must be declared able to take (a vocabulary, see ``Signature.padded``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class State:
    """One tensor on one mesh axis; prints and parses as ``R``, ``V``, ``P``, ``S(1)``."""

    kind: Literal["R", "V", "S", "P"]
    dim: int = -1
    blocks: tuple[int, ...] = ()

    @property
    def is_split(self) -> bool:
        return self.kind == "S"

    @property
    def is_whole(self) -> bool:
        """Every rank holds the same whole forward value."""
        return self.kind in "RV"

    def __str__(self) -> str:
        if not self.is_split:
            return self.kind
        blocks = f";{','.join(map(str, self.blocks))}" if self.blocks else ""
        return f"S({self.dim}{blocks})"

    @staticmethod
    def parse(text: str) -> State:
        """The inverse of ``str``.

        Raises:
            ValueError: if the text is no state.
        """
        if text in {"R", "V", "P"}:
            return State(text)  # type: ignore[arg-type]
        if text.startswith("S(") and text.endswith(")"):
            dim, _, blocks = text[2:-1].partition(";")
            if dim.isdigit():
                return S(int(dim), tuple(int(b) for b in blocks.split(",") if b))
        raise ValueError(f"expected a state R, V, P, S(dim) or S(dim;blocks) but got {text!r}")


R = State("R")
V = State("V")
P = State("P")


def S(dim: int, blocks: Sequence[int] = ()) -> State:
    """Split along ``dim``; one block is the same as none."""
    return State("S", dim, tuple(blocks) if len(blocks) > 1 else ())


def local_size(size: int, n: int) -> int:
    return -(-size // n)


def local_shape(shape: Sequence[int], state: State, n: int) -> tuple[int, ...]:
    """What one of ``n`` ranks holds of a tensor of ``shape``, padding included."""
    if not state.is_split:
        return tuple(shape)
    sizes = state.blocks or (shape[state.dim],)
    local = sum(local_size(b, n) for b in sizes)
    return (*shape[: state.dim], local, *shape[state.dim + 1 :])


def divides(shape: Sequence[int], state: State, n: int) -> bool:
    """No padding is needed."""
    if not state.is_split:
        return True
    return all(b % n == 0 for b in (state.blocks or (shape[state.dim],)))


def ranges(size: int, state: State, n: int, rank: int) -> tuple[tuple[int, int], ...]:
    """The index ranges ``[start, stop)`` of the split dim that ``rank`` holds, without padding."""
    found = []
    start = 0
    for block in state.blocks or (size,):
        width = local_size(block, n)
        begin, end = min(rank * width, block), min((rank + 1) * width, block)
        found.append((start + begin, start + end))
        start += block
    return tuple(found)


def take_part(tensor: torch.Tensor, state: State, n: int, rank: int) -> torch.Tensor:
    """The part of a whole tensor that ``rank`` holds under a split, without padding."""
    if not state.is_split:
        return tensor
    parts = [
        tensor.narrow(state.dim, begin, end - begin)
        for begin, end in ranges(tensor.shape[state.dim], state, n, rank)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, state.dim)


def join_parts(parts: Sequence[torch.Tensor], state: State, size: int) -> torch.Tensor:
    """The whole tensor from every rank's part along a dim of ``size``; the inverse of `take_part`.

    Parts may carry padding at their ends (and, with blocks, at the end of each block).
    """
    n = len(parts)
    out_shape = list(parts[0].shape)
    out_shape[state.dim] = size
    whole = parts[0].new_empty(out_shape)
    for rank, part in enumerate(parts):
        offset = 0
        blocks = state.blocks or (size,)
        for (begin, end), block in zip(ranges(size, state, n, rank), blocks, strict=True):
            whole.narrow(state.dim, begin, end - begin).copy_(
                part.narrow(state.dim, offset, end - begin)
            )
            padded = part.shape[state.dim] == sum(local_size(b, n) for b in blocks)
            offset += local_size(block, n) if padded else end - begin
    return whole
