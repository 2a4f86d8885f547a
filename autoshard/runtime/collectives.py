"""The conversions of a tensor from one state to another on a mesh axis, forward and backward.

One function per entry of the table in :mod:`autoshard.placement.conversion`; each is an autograd
function whose backward is written out, over the functional collectives of torch. (Those have
backwards of their own, which are adjoint to the sum of all ranks' losses; here there is one global
loss, and the states say what a gradient holds.)

All functions take local tensors and the name of a mesh axis. On an axis of one rank each is the
identity. ``dim`` may be any dim; with ``blocks`` each block of it is split on its own; where a
size does not divide, local parts are ``ceil(size / n)`` long and end in zeros. Results are
contiguous and share no storage with their operands, unless the conversion moves nothing forward.

[Note: stacked] Communication always runs on tensors ``[n, *part]`` with one entry per rank, which
every backend takes without another copy; cutting and joining along ``dim`` happens on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from autoshard.placement.state import local_size
from autoshard.runtime.mesh import Mesh, current

_functional = torch.ops._c10d_functional


# -- communication on stacked tensors -------------------------------------------------------------


def sum_over(x: Tensor, mesh: Mesh, axis: str) -> Tensor:
    """The sum of ``x`` over the ranks of ``axis``; no gradient. Bools are or-ed."""
    if mesh.size(axis) == 1:
        return x
    wire = x.to(torch.uint8) if x.dtype == torch.bool else x
    name = mesh.group(axis).group_name
    out = cast(
        Tensor, _functional.wait_tensor(_functional.all_reduce(wire.contiguous(), "sum", name))
    )
    return out.bool() if x.dtype == torch.bool else out


def stack_over(x: Tensor, mesh: Mesh, axis: str) -> Tensor:
    """``[n, *x.shape]``: every rank's ``x`` in order; no gradient."""
    n = mesh.size(axis)
    if n == 1:
        return x.unsqueeze(0)
    flat = x.contiguous().unsqueeze(0)
    name = mesh.group(axis).group_name
    out = _functional.wait_tensor(_functional.all_gather_into_tensor(flat, n, name))
    return cast(Tensor, out)


def _reduce_stacked(stacked: Tensor, mesh: Mesh, axis: str) -> Tensor:
    """Entry ``r`` of every rank's stack, summed, on rank ``r``."""
    wire = stacked.to(torch.uint8) if stacked.dtype == torch.bool else stacked
    n, name = mesh.size(axis), mesh.group(axis).group_name
    out = cast(
        Tensor, _functional.wait_tensor(_functional.reduce_scatter_tensor(wire, "sum", n, name))
    )
    return out.squeeze(0).to(stacked.dtype)


def _exchange_stacked(stacked: Tensor, mesh: Mesh, axis: str) -> Tensor:
    """Entry ``r`` goes to rank ``r``; what comes from rank ``r`` is entry ``r``."""
    n, name = mesh.size(axis), mesh.group(axis).group_name
    ones = [1] * n
    out = _functional.wait_tensor(_functional.all_to_all_single(stacked, ones, ones, name))
    return cast(Tensor, out)


# -- cutting and joining on this rank -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a dim of ``size`` is cut among the ranks of an axis."""

    mesh: Mesh
    axis: str
    dim: int
    size: int
    blocks: tuple[int, ...]

    @property
    def n(self) -> int:
        return self.mesh.size(self.axis)

    @property
    def rank(self) -> int:
        return self.mesh.rank(self.axis)

    @property
    def is_even(self) -> bool:
        return len(self.blocks) == 1 and self.size % self.n == 0

    def _pieces(self, whole: Tensor, rank: int) -> list[Tensor]:
        pieces, start = [], 0
        for block in self.blocks:
            width = local_size(block, self.n)
            begin, end = min(rank * width, block), min((rank + 1) * width, block)
            pieces.append(whole.narrow(self.dim, start + begin, end - begin))
            if end - begin < width:
                pieces.append(self._zeros(whole, width - (end - begin)))
            start += block
        return pieces

    def take(self, whole: Tensor, rank: int) -> Tensor:
        """The part of ``rank``, padded with zeros; may be a view."""
        pieces = self._pieces(whole, rank)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part as a tensor of its own, so that the whole can be freed."""
        pieces = self._pieces(whole, self.rank)
        if len(pieces) == 1:
            return pieces[0].clone(memory_format=torch.contiguous_format)
        return torch.cat(pieces, self.dim).contiguous()

    def stack(self, whole: Tensor) -> Tensor:
        """``[n, *part]``: what each rank would hold."""
        if self.is_even and self.dim == 0:
            shape = (self.n, self.size // self.n, *whole.shape[1:])
            return whole.contiguous().view(shape)
        return torch.stack([self.take(whole, rank) for rank in range(self.n)])

    def join(self, stacked: Tensor) -> Tensor:
        """The whole from ``[n, *part]``, without the padding."""
        if self.is_even and self.dim == 0:
            return stacked.flatten(0, 1)
        if self.is_even:
            return torch.cat(stacked.unbind(0), self.dim)
        pieces, start = [], 0
        for block in self.blocks:
            width = local_size(block, self.n)
            for rank in range(self.n):
                begin, end = min(rank * width, block), min((rank + 1) * width, block)
                pieces.append(stacked[rank].narrow(self.dim, start, end - begin))
            start += width
        return torch.cat(pieces, self.dim)

    def place(self, part: Tensor) -> Tensor:
        """A whole that holds ``part`` where it belongs and zeros elsewhere."""
        pieces, offset = [], 0
        for block in self.blocks:
            width = local_size(block, self.n)
            begin, end = min(self.rank * width, block), min((self.rank + 1) * width, block)
            pieces.append(self._zeros(part, begin))
            pieces.append(part.narrow(self.dim, offset, end - begin))
            pieces.append(self._zeros(part, block - end))
            offset += width
        return torch.cat(pieces, self.dim)

    def _zeros(self, like: Tensor, size: int) -> Tensor:
        return like.new_zeros((*like.shape[: self.dim], size, *like.shape[self.dim + 1 :]))


def _cut(x: Tensor, axis: str, dim: int, size: int, blocks: Sequence[int]) -> _Cut:
    return _Cut(current(), axis, dim % x.ndim, size, tuple(blocks) or (size,))


def _alone(axis: str) -> bool:
    return current().size(axis) == 1


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    apply: Any = function.apply
    return cast(Tensor, apply(*args))


# -- autograd functions: one per pair of motions --------------------------------------------------


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str) -> Tensor:
        ctx.mesh, ctx.axis = current(), axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return sum_over(grad, ctx.mesh, ctx.axis), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str) -> Tensor:
        return sum_over(x, current(), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _SumBoth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str) -> Tensor:
        ctx.mesh, ctx.axis = current(), axis
        return sum_over(x, ctx.mesh, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return sum_over(grad, ctx.mesh, ctx.axis), None


class _Scale(torch.autograd.Function):
    """Forward times ``forward_scale``, backward times ``backward_scale``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_scale: float, backward_scale: float) -> Tensor:
        ctx.scale = backward_scale
        return x.view_as(x) if forward_scale == 1 else x * forward_scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad if ctx.scale == 1 else grad * ctx.scale, None, None


class _TakeJoin(torch.autograd.Function):
    """Slice / all-gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: _Cut) -> Tensor:
        ctx.cut = cut
        return cut.own(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.cut.join(stack_over(grad, ctx.cut.mesh, ctx.cut.axis)), None


class _TakePlace(torch.autograd.Function):
    """Slice / pad with zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: _Cut) -> Tensor:
        ctx.cut = cut
        return cut.own(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.cut.place(grad), None


class _PlaceTake(torch.autograd.Function):
    """Pad with zeros / slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: _Cut) -> Tensor:
        ctx.cut = cut
        return cut.place(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.cut.own(grad), None


class _JoinTake(torch.autograd.Function):
    """All-gather / slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: _Cut) -> Tensor:
        ctx.cut = cut
        return cut.join(stack_over(x, cut.mesh, cut.axis))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.cut.own(grad), None


class _JoinReduce(torch.autograd.Function):
    """All-gather / reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: _Cut) -> Tensor:
        ctx.cut = cut
        return cut.join(stack_over(x, cut.mesh, cut.axis))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        cut: _Cut = ctx.cut
        return _reduce_stacked(cut.stack(grad), cut.mesh, cut.axis), None


class _ReduceJoin(torch.autograd.Function):
    """Reduce-scatter / all-gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: _Cut) -> Tensor:
        ctx.cut = cut
        return _reduce_stacked(cut.stack(x), cut.mesh, cut.axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.cut.join(stack_over(grad, ctx.cut.mesh, ctx.cut.axis)), None


class _Exchange(torch.autograd.Function):
    """All-to-all / all-to-all: split by ``source`` before, by ``target`` after."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: _Cut, target: _Cut) -> Tensor:
        ctx.source, ctx.target = source, target
        return source.join(_exchange_stacked(target.stack(x), source.mesh, source.axis))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        source, target = ctx.source, ctx.target
        whole = target.join(_exchange_stacked(source.stack(grad), source.mesh, source.axis))
        return whole, None, None


# -- the conversions ------------------------------------------------------------------------------


def all_reduce_gradient(x: Tensor, *, axis: str) -> Tensor:
    """``R -> V``: identity / all-reduce (Megatron's *f*)."""
    return x if _alone(axis) else _apply(_SumGradient, x, axis)


def split(x: Tensor, dim: int, blocks: Sequence[int] = (), *, axis: str) -> Tensor:
    """``R -> S(dim)``: this rank's part / all-gather."""
    return x if _alone(axis) else _apply(_TakeJoin, x, _cut(x, axis, dim, x.shape[dim], blocks))


def share(x: Tensor, *, axis: str) -> Tensor:
    """``R -> P``: an n-th / identity. Integers and bools are kept on the first rank only."""
    return _share(x, axis, backward_shares=False)


def share_gradient(x: Tensor, *, axis: str) -> Tensor:
    """``V -> R``: identity / an n-th, an addend of a gradient that every rank has whole."""
    return x if _alone(axis) else _apply(_Scale, x, 1.0, 1 / current().size(axis))


def split_varying(x: Tensor, dim: int, blocks: Sequence[int] = (), *, axis: str) -> Tensor:
    """``V -> S(dim)``: this rank's part / zeros elsewhere."""
    return x if _alone(axis) else _apply(_TakePlace, x, _cut(x, axis, dim, x.shape[dim], blocks))


def share_varying(x: Tensor, *, axis: str) -> Tensor:
    """``V -> P``: an n-th / an n-th."""
    return _share(x, axis, backward_shares=True)


def _share(x: Tensor, axis: str, *, backward_shares: bool) -> Tensor:
    if _alone(axis):
        return x
    if not (x.is_floating_point() or x.is_complex()):
        return x if current().rank(axis) == 0 else torch.zeros_like(x)
    scale = 1 / current().size(axis)
    return _apply(_Scale, x, scale, scale if backward_shares else 1.0)


def all_gather_replicated(
    x: Tensor, dim: int, size: int, blocks: Sequence[int] = (), *, axis: str
) -> Tensor:
    """``S(dim) -> R``: all-gather / this rank's part. ``size`` is the whole size of ``dim``."""
    return x if _alone(axis) else _apply(_JoinTake, x, _cut(x, axis, dim, size, blocks))


def all_gather(x: Tensor, dim: int, size: int, blocks: Sequence[int] = (), *, axis: str) -> Tensor:
    """``S(dim) -> V``: all-gather / reduce-scatter. ``size`` is the whole size of ``dim``."""
    return x if _alone(axis) else _apply(_JoinReduce, x, _cut(x, axis, dim, size, blocks))


def all_to_all(
    x: Tensor,
    source_dim: int,
    target_dim: int,
    size: int,
    source_blocks: Sequence[int] = (),
    target_blocks: Sequence[int] = (),
    *,
    axis: str,
) -> Tensor:
    """``S(source_dim) -> S(target_dim)``: all-to-all both ways.

    ``size`` is the whole size of ``source_dim``; ``target_dim`` is whole in ``x``.
    """
    if _alone(axis):
        return x
    source = _cut(x, axis, source_dim, size, source_blocks)
    target = _cut(x, axis, target_dim, x.shape[target_dim], target_blocks)
    return _apply(_Exchange, x, source, target)


def pad(x: Tensor, dim: int, size: int, blocks: Sequence[int] = (), *, axis: str) -> Tensor:
    """``S(dim) -> P``: zeros outside this rank's part / this rank's part."""
    return x if _alone(axis) else _apply(_PlaceTake, x, _cut(x, axis, dim, size, blocks))


def all_reduce(x: Tensor, *, axis: str) -> Tensor:
    """``P -> R``: all-reduce / identity (Megatron's *g*)."""
    return x if _alone(axis) else _apply(_Sum, x, axis)


def all_reduce_both(x: Tensor, *, axis: str) -> Tensor:
    """``P -> V``: all-reduce / all-reduce."""
    return x if _alone(axis) else _apply(_SumBoth, x, axis)


def reduce_scatter(x: Tensor, dim: int, blocks: Sequence[int] = (), *, axis: str) -> Tensor:
    """``P -> S(dim)``: reduce-scatter / all-gather."""
    return x if _alone(axis) else _apply(_ReduceJoin, x, _cut(x, axis, dim, x.shape[dim], blocks))
