"""Everything that ``autoshard.<name>`` in a graph can mean: the conversions, and special ops.

A special op stands where the plain op on local tensors would be wrong. All take local tensors;
``axis`` is the mesh axis that splits the dim in question, ``axes`` several of them, outermost
first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from autoshard.placement.state import local_size
from autoshard.runtime.collectives import (
    all_gather,
    all_gather_replicated,
    all_reduce,
    all_reduce_both,
    all_reduce_gradient,
    all_to_all,
    pad,
    reduce_scatter,
    share,
    share_gradient,
    share_varying,
    split,
    split_varying,
    stack_over,
    sum_over,
)
from autoshard.runtime.experts import sparse_experts
from autoshard.runtime.local_ops import embedding_bag, grouped_attention, row_attention
from autoshard.runtime.mesh import Mesh, current
from autoshard.runtime.random import seeded
from autoshard.runtime.recompute import keep, not_kept, recompute, recomputing

__all__ = [
    "all_gather",
    "all_gather_replicated",
    "all_reduce",
    "all_reduce_both",
    "all_reduce_gradient",
    "all_to_all",
    "batch_norm",
    "count_targets",
    "embedding_bag",
    "grouped_attention",
    "keep",
    "pad",
    "partial_mean",
    "recompute",
    "recomputing",
    "reduce_scatter",
    "row_attention",
    "seeded",
    "share",
    "share_gradient",
    "share_varying",
    "sparse_experts",
    "split",
    "split_varying",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_embedding",
]  # fmt: skip


def partial_mean(
    x: Tensor, dims: Sequence[int] | int | None, keepdim: bool = False, n: int = 1
) -> Tensor:
    """The mean over dims of which one is split among ``n`` ranks: an addend of the true mean."""
    over = (dims,) if isinstance(dims, int) else tuple(dims or range(x.ndim))
    return x.mean(over, keepdim) / n


def count_targets(target: Tensor, weight: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """What a mean cross entropy divides by: how many targets count, or the sum of their weights.

    Returns:
        A 0-dim tensor of ``weight``'s dtype, or float32; an addend where ``target`` is split.
    """
    counted = target != ignore_index
    if weight is None:
        return counted.sum().to(torch.float32)
    return (weight[target.where(counted, 0)] * counted).sum()


# -- a vocabulary split over ranks ----------------------------------------------------------------


def _own_classes(axis: str, size: int) -> tuple[int, int, int]:
    """First class of this rank, how many it has, and how many places it has for them."""
    mesh = current()
    width = local_size(size, mesh.size(axis))
    first = min(mesh.rank(axis) * width, size)
    return first, min(first + width, size) - first, width


def vocab_parallel_embedding(
    ids: Tensor, weight: Tensor, padding_idx: int = -1, *, axis: str, size: int
) -> Tensor:
    """Rows of a table whose dim 0 is split; an addend: zeros for the ids of other ranks.

    Args:
        weight: ``[ceil(size / n), features]``; rows beyond the vocabulary are never used.
        padding_idx: the id whose row gets no gradient; -1 for none.
        size: of the whole vocabulary. Ids outside it fail an assertion, as in a plain embedding.
    """
    first, count, _ = _own_classes(axis, size)
    torch._assert_async(((ids >= 0) & (ids < size)).all())
    local = ids - first
    elsewhere = (local < 0) | (local >= count)
    here = padding_idx - first
    rows = F.embedding(local.masked_fill(elsewhere, 0), weight, here if 0 <= here < count else None)
    return rows.masked_fill(elsewhere.unsqueeze(-1), 0)


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    axis: str,
    size: int,
) -> Tensor:
    """Summed cross entropy of logits whose class dim is split; the whole loss on every rank.

    Saves the logits and one number per row for backward, and communicates a few numbers per row
    in forward and nothing in backward (Shoeybi et al. 2019, section 3).

    Args:
        logits: ``[samples, ceil(size / n), ...]``; classes beyond ``size`` are not looked at.
        target: ``[samples, ...]``: classes of the whole vocabulary, or ``ignore_index``.
        weight: ``[size]``, the whole of it on every rank.
        size: number of classes. Other targets fail an assertion.
    """
    if logits.ndim > 2:
        logits = logits.movedim(1, -1)
    rows = logits.reshape(-1, logits.shape[-1])
    arguments = (weight, ignore_index, label_smoothing, axis, size)
    apply: Any = _VocabParallelCrossEntropy.apply
    return cast(Tensor, apply(rows, target.reshape(-1), *arguments))


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        smoothing: float,
        axis: str,
        size: int,
    ) -> Tensor:
        mesh = current()
        first, count, _ = _own_classes(axis, size)
        counted = target != ignore_index
        torch._assert_async(((target >= 0) & (target < size) | ~counted).all())
        own = _in_full(logits[:, :count])
        local = target - first
        elsewhere = (local < 0) | (local >= count) | ~counted
        local = local.masked_fill(elsewhere, 0)
        class_weight = None if weight is None else weight.to(own.dtype)
        own_weight = None if class_weight is None else class_weight[first : first + count]

        facts = [_logsumexp(own)]
        facts.append(_pick(own, local).masked_fill(elsewhere, 0))
        if smoothing:
            facts.append(own.sum(1) if own_weight is None else own @ own_weight)
        everyone = stack_over(torch.stack(facts), mesh, axis)  # [n, facts, rows]
        normaliser = torch.logsumexp(everyone[:, 0], 0)
        total_weight = size if class_weight is None else class_weight.sum()

        scale = counted.to(own.dtype)
        if class_weight is not None:
            scale = scale * class_weight[target.where(counted, 0)]
        loss = ((normaliser - everyone[:, 1].sum(0)) * scale * (1 - smoothing)).sum()
        if smoothing:
            smooth = normaliser * total_weight - everyone[:, 2].sum(0)
            loss = loss + (smooth * counted).sum() * (smoothing / size)
        ctx.save_for_backward(logits, local, elsewhere, counted, scale, normaliser, own_weight)
        ctx.count, ctx.smoothing = count, smoothing
        ctx.smooth_per_class = smoothing / size
        ctx.total_weight = total_weight
        return loss.to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, local, elsewhere, counted, scale, normaliser, own_weight = ctx.saved_tensors
        smooth_part = counted.to(scale.dtype) * ctx.smooth_per_class
        target_part = scale * (1 - ctx.smoothing)
        row = target_part + smooth_part * ctx.total_weight
        own = _in_full(logits[:, : ctx.count])
        out = (own - normaliser.unsqueeze(1)).exp_()
        out *= row.unsqueeze(1)
        if ctx.count:
            picked = target_part.masked_fill(elsewhere, 0)
            out.scatter_add_(1, local.unsqueeze(1), -picked.unsqueeze(1))
        if ctx.smoothing:
            classes = out.new_ones(ctx.count) if own_weight is None else own_weight
            out -= torch.outer(smooth_part, classes)
        out *= grad
        out = F.pad(out, (0, logits.shape[1] - ctx.count)).to(logits.dtype)
        return out, None, None, None, None, None, None


def _in_full(x: Tensor) -> Tensor:
    """In the precision in which losses and statistics are computed."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _logsumexp(own: Tensor) -> Tensor:
    if own.shape[1] == 0:  # a rank whose places are all padding
        return own.new_full((own.shape[0],), float("-inf"))
    return torch.logsumexp(own, 1)


def _pick(own: Tensor, local: Tensor) -> Tensor:
    if own.shape[1] == 0:
        return own.new_zeros(own.shape[0])
    return own.gather(1, local.unsqueeze(1)).squeeze(1)


# -- batch norm over ranks ------------------------------------------------------------------------


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *,
    axes: Sequence[str] = (),
) -> Tensor:
    """Batch norm with the statistics of all ranks of ``axes``, which hold equally many samples.

    Running statistics are updated once: not when a layer is recomputed. The gradients of weight
    and bias are those of this rank's samples: addends on ``axes``.

    Args:
        x: ``[samples, channels, ...]``; dims other than channels are split over ``axes``.
    """
    mesh = current()
    if not training and running_mean is not None:
        return torch.batch_norm(
            x, weight, bias, running_mean, running_var, False, momentum, eps, True
        )
    apply: Any = _BatchNorm.apply
    y, mean, var = apply(x, weight, bias, eps, mesh, tuple(axes))
    if running_mean is not None and running_var is not None and not recomputing():
        count = _count(x, mesh, axes)
        with torch.no_grad(), not_kept():
            unbiased = var * (count / (count - 1) if count > 1 else float("nan"))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return cast(Tensor, y)


def _count(x: Tensor, mesh: Mesh, axes: Sequence[str]) -> int:
    count = x.numel() // x.shape[1]
    for axis in axes:
        count *= mesh.size(axis)
    return count


class _BatchNorm(torch.autograd.Function):
    """Normalisation by global statistics, which it returns too."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        mesh: Mesh,
        axes: tuple[str, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        dims = [dim for dim in range(x.ndim) if dim != 1]
        var, mean = torch.var_mean(_in_full(x), dims, correction=0)
        for axis in axes:
            if mesh.size(axis) > 1:  # Chan et al. 1979: exact, unlike a sum of squares
                means, variances = stack_over(torch.stack([mean, var]), mesh, axis).unbind(1)
                mean = means.mean(0)
                var = variances.mean(0) + (means - mean).square().mean(0)
        y = torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, True)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps))
        ctx.mesh, ctx.axes, ctx.has_bias = mesh, axes, bias is not None
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        x, weight, mean, inverse = ctx.saved_tensors
        dims = [dim for dim in range(x.ndim) if dim != 1]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        full = _in_full(grad)
        normal = (_in_full(x) - mean.view(shape)) * inverse.view(shape)
        sums = torch.stack([full.sum(dims), (full * normal).sum(dims)])
        total = sums
        for axis in ctx.axes:
            total = sum_over(total, ctx.mesh, axis)
        per_sample = total / _count(x, ctx.mesh, ctx.axes)
        out = full - per_sample[0].view(shape) - normal * per_sample[1].view(shape)
        out = out * (inverse if weight is None else inverse * weight).view(shape)
        return (
            out.to(x.dtype),
            None if weight is None else sums[1].to(weight.dtype),
            sums[0].to(grad.dtype if weight is None else weight.dtype) if ctx.has_bias else None,
            None,
            None,
            None,
        )
