"""Ops that a rank runs on its part and that no single ATen op does."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from autoshard.errors import InternalError
from autoshard.runtime.mesh import current


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    axis: str,
) -> torch.Tensor:
    """Grouped-query attention of this rank's query heads, where every rank has all key heads.

    Of use where the ranks outnumber the key heads, or do not divide them: each rank narrows keys
    and values to the heads that its own queries read.

    Args:
        query: ``[..., heads / ranks, queries, dim]``, this rank's heads.
        key: ``[..., key heads, keys, dim]``, whole; ``value`` likewise.
        attn_mask: as for ``scaled_dot_product_attention``, with this rank's heads if it has any.
        axis: the mesh axis over which the query heads are split.

    Returns:
        ``[..., heads / ranks, queries, dim of value]``.
    """
    mesh = current()
    heads, key_heads = query.shape[-3], key.shape[-3]
    group = heads * mesh.size(axis) // key_heads  # query heads that read one key head
    first = heads * mesh.rank(axis)
    begin, end = first // group, (first + heads - 1) // group + 1
    key, value = key.narrow(-3, begin, end - begin), value.narrow(-3, begin, end - begin)
    if heads % group and group % heads:  # the first or last group is not whole
        read = torch.arange(first, first + heads, device=query.device) // group - begin
        key, value = key.index_select(-3, read), value.index_select(-3, read)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=key.shape[-3] != heads,
    )


def row_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = True,
    *,
    scale: float | None = None,
    axis: str,
) -> torch.Tensor:
    """Causal attention of this rank's queries to the keys of all positions.

    Context parallelism that gathers keys and values (Llama 3: Dubey et al. 2024, section 3.3.2).

    Args:
        query: ``[..., heads, queries / ranks, dim]``, this rank's run of positions.
        key: ``[..., key heads, keys, dim]``, whole; ``value`` likewise.
        attn_mask: none: what is causal needs no other.
        axis: the mesh axis over which the queries are split.

    Returns:
        ``[..., heads, queries / ranks, dim of value]``.
    """
    if attn_mask is not None or not is_causal:
        raise InternalError("row_attention expects causal attention without another mask")
    rows = query.shape[-2]
    first = current().rank(axis) * rows
    places = torch.arange(first, first + rows, device=query.device)
    seen = places[:, None] >= torch.arange(key.shape[-2], device=query.device)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        seen,
        dropout_p,
        scale=scale,
        enable_gqa=query.ndim > 2 and key.shape[-3] != query.shape[-3],
    )


def embedding_bag(
    weight: torch.Tensor, ids: torch.Tensor, mode: str = "sum", padding_idx: int | None = None
) -> torch.Tensor:
    """One row per bag of ids, all bags of one size: ``[bags, size]`` ids give ``[bags, features]``.

    Args:
        mode: ``"sum"``, ``"mean"`` or ``"max"`` of the rows of ``weight`` that a bag names.
    """
    return F.embedding_bag(ids, weight, mode=mode, padding_idx=padding_idx)
