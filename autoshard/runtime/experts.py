"""Sparse experts: every token goes through the few feed-forward networks that a router chose.

One op in the graph, since what it does inside depends on the router's choices: tokens are sorted by
expert, each expert takes its run of them, and the results are added up with the router's scores.
``sparse_experts`` is also what models call: captured whole, while a loop over experts or a gather
of every token's weights is not what an accelerator should run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed._functional_collectives as _functional
import torch.nn.functional as F
from torch import Tensor

from autoshard.errors import OptionError
from autoshard.runtime.mesh import Mesh, current

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "relu": F.relu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip
OWN, EXCHANGE = "own", "exchange"
"""Ways to split experts over ranks: each works on the tokens of its own and what comes out is an
addend, or tokens are split, too, and travel to their experts and back."""
GATHERED, FOLDED = "gathered", "folded"
"""Ways to split experts that are spread over data ranks once more, over tensor ranks that have
parts of the tokens: by width, so that tokens are gathered where they arrive (Megatron-Core's expert
tensor parallelism), or by expert, so that tokens travel among both kinds of ranks (its folding; Liu
et al. 2025, "MoE Parallel Folding")."""
EXPERTS, FOLDED_EXPERTS = "ep", "ep.tp"
"""Axes over which tokens travel in plans that spread experts."""


def sparse_experts(
    x: Tensor,
    scores: Tensor,
    chosen: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str = "silu",
    *,
    way: str = "",
    num_experts: int = 0,
    axis: str = "",
) -> Tensor:
    """``sum_j scores[..., j] * expert[chosen[..., j]](x)``.

    An expert is ``down(act(up(x)))``, or with twice as wide an ``up`` gated: its first half goes
    through the activation and multiplies the second.

    Args:
        x: ``[..., hidden]``.
        scores: ``[..., choices]``, what the router gives each choice.
        chosen: ``[..., choices]``, experts by number.
        up: ``[experts, width, hidden]``, or ``2 * width`` if gated.
        down: ``[experts, hidden, width]``.
        activation: one of ``ACTIVATIONS``.
        way: empty where a rank has all experts; see ``OWN`` and ``EXCHANGE``.
        num_experts: over all ranks of ``axis``, where they are split.

    Raises:
        OptionError: for another activation.
    """
    if activation not in ACTIVATIONS:
        raise OptionError(
            f"sparse_experts expects an activation of {', '.join(ACTIVATIONS)} but got "
            f"{activation!r}; choose one of them"
        )
    if torch.compiler.is_exporting():
        whole: Tensor = torch.ops.autoshard.sparse_experts(x, scores, chosen, up, down, activation)
        return whole
    tokens, hidden = x.reshape(-1, x.shape[-1]), x.shape[-1]
    choices = chosen.shape[-1]
    experts = chosen.reshape(-1)
    first = up.shape[0] * current().rank(axis) if way == OWN else 0
    mine = torch.argsort(experts, stable=True)
    counts = torch.bincount(experts, minlength=num_experts or up.shape[0])
    if way == OWN:
        before = int(counts[:first].sum())
        counts = counts[first : first + up.shape[0]]
        mine = mine[before : before + int(counts.sum())]
    rows = tokens[mine // choices]
    if way == EXCHANGE:
        results = _elsewhere(rows, counts, up, down, activation, axis)
    else:
        results = _by_expert(rows, counts.tolist(), up, down, activation)
    weighted = results * scores.reshape(-1, 1)[mine]
    summed = tokens.new_zeros(tokens.shape[0], hidden, dtype=weighted.dtype)
    return summed.index_add(0, mine // choices, weighted).reshape(x.shape)


def _by_expert(
    rows: Tensor, counts: Sequence[int], up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """Each expert on its run of rows, which are sorted by expert."""
    gated = up.shape[1] == 2 * down.shape[2]
    results = []
    for expert, own in enumerate(torch.split(rows, list(counts))):
        inner = F.linear(own, up[expert])
        if gated:
            gate, inner = inner.chunk(2, -1)
            inner = ACTIVATIONS[activation](gate) * inner
        else:
            inner = ACTIVATIONS[activation](inner)
        results.append(F.linear(inner, down[expert]))
    return torch.cat(results)


def _elsewhere(
    rows: Tensor, counts: Tensor, up: Tensor, down: Tensor, activation: str, axis: str
) -> Tensor:
    """Send rows to the ranks of their experts, and take what comes back."""
    mesh, own = current(), up.shape[0]
    n = mesh.size(axis)
    arriving = _exchange_now(counts, [own] * n, [own] * n, mesh, axis).view(n, own)
    sent, received = counts.view(n, own).sum(1).tolist(), arriving.sum(1).tolist()
    rows = _Exchange.apply(rows, received, sent, mesh, axis)  # type: ignore[no-untyped-call]
    experts = torch.arange(own, device=rows.device).repeat(n)
    by_expert = torch.argsort(experts.repeat_interleave(arriving.flatten()), stable=True)
    sizes = arriving.sum(0).tolist()
    results = _by_expert(rows[by_expert], sizes, up, down, activation)
    results = torch.empty_like(results).index_copy(0, by_expert, results)
    back: Tensor = _Exchange.apply(results, sent, received, mesh, axis)  # type: ignore[no-untyped-call]
    return back


def _exchange_now(
    x: Tensor, received: Sequence[int], sent: Sequence[int], mesh: Mesh, axis: str
) -> Tensor:
    """Rows in order of ranks; so many go to each and come from each."""
    name = mesh.group(axis).group_name
    out = _functional.all_to_all_single(x.contiguous(), list(received), list(sent), name)
    result: Any = _functional.wait_tensor(out)  # type: ignore[no-untyped-call]
    return cast(Tensor, result)


class _Exchange(torch.autograd.Function):
    """Rows go to other ranks; their gradients come back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, received: list[int], sent: list[int], mesh: Mesh, axis: str
    ) -> Tensor:
        ctx.way_back = (sent, received, mesh, axis)
        return _exchange_now(x, received, sent, mesh, axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange_now(gradients[0], *ctx.way_back), None, None, None, None


@torch.library.custom_op("autoshard::sparse_experts", mutates_args=())
def _captured(
    x: Tensor, scores: Tensor, chosen: Tensor, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    return sparse_experts(x, scores, chosen, up, down, activation)


@_captured.register_fake
def _(
    x: Tensor, scores: Tensor, chosen: Tensor, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    return torch.empty_like(x)
