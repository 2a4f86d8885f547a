"""Seconds of collectives: alpha-beta costs of rings, trees and pairwise exchange, by tier.

``alpha`` is a link's latency per message, ``beta`` its seconds per byte. Formulas: Thakur,
Rabenseifner & Gropp (2005), "Optimization of Collective Communication Operations in MPICH",
section 4, and Chan, Heimlich, Purkayastha & van de Geijn (2007), "Collective communication: theory,
practice, and experience", section 4; the split of latency over nodes follows NCCL's tuning model,
which charges a ring ``nodes - 1`` network steps and the rest at the node's latency.

``nbytes`` is always the size of the whole tensor of which ranks hold parts: the result of an
all-gather, the operand of a reduce-scatter and of an all-reduce, all parts together for an
all-to-all; for ``send`` the message.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Literal

from autoshard.cluster import Device, Level, Link
from autoshard.cost_models.compute import way_s
from autoshard.cost_models.products import NOTHING, Way
from autoshard.cost_models.work import motion_way
from autoshard.errors import InternalError
from autoshard.ir import Op, TensorType
from autoshard.placement.conversion import COLLECTIVES, Motion, conversion
from autoshard.placement.state import State, local_shape

_NORMAL = NormalDist()
_WAITS = {"all_gather": 0.5, "reduce_scatter": 0.5}
"""Halves of an all-reduce, with little between them, wait once together (Korthikanti et al. 2022,
section 4.2.2: sequence parallelism costs no more than the all-reduces that it replaces)."""
Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


def collective_s(kind: Collective, nbytes: float, link: Link) -> float:
    """Seconds of one collective among the ranks of ``link``, all groups of the axis at once.

    Args:
        kind: which collective.
        nbytes: of the whole tensor, see the module's docstring.
        link: from :func:`autoshard.cluster.link`.
    """
    n = link.group_size
    if n <= 1 or nbytes <= 0:
        return 0.0
    if kind == "send":
        last = link.levels[-1]
        return last.latency(kind) + nbytes / last.rate(kind)
    if kind == "all_to_all":
        return _all_to_all_s(nbytes / n, link)
    share_s = nbytes * (n - 1) / n / link.ring_rate(kind)
    if kind in ("all_gather", "reduce_scatter"):
        return _ring_latency_s(kind, link.levels) + share_s
    if kind == "all_reduce":
        ring_s = 2 * _ring_latency_s(kind, link.levels) + 2 * share_s
        tree_s = 2 * _tree_latency_s(kind, link.levels) + 2 * nbytes / link.ring_rate(kind)
        return min(ring_s, tree_s)
    raise InternalError(f"no such collective: {kind}")


def waiting_s(link: Link) -> float:
    """Seconds that a rank waits until the last one has come to a collective between its ops.

    Ranks come at normally distributed times, since hosts launch kernels at uneven pace. Of
    collectives one after another, such as those that reduce gradients at a step's end, only the
    first waits.
    """
    if link.group_size <= 1 or not link.jitter_s:
        return 0.0
    return link.jitter_s * late_last(link.group_size)


def late_last(n: int) -> float:
    """How late the last of ``n`` is that come at normally distributed times, in deviations.

    ``quantile((n - 3/8) / (n + 1/4))``: Blom (1958), "Statistical Estimates and Transformed
    Beta-Variables", within 5 % for all ``n``.
    """
    return _NORMAL.inv_cdf((n - 0.375) / (n + 0.25))


def _ring_latency_s(kind: Collective, levels: tuple[Level, ...]) -> float:
    """``n - 1`` steps: those from unit to unit at their own latency, the rest further in."""
    total, outer = 0.0, 1
    for level in reversed(levels):
        total += outer * (level.size - 1) * level.latency(kind)
        outer *= level.size
    return total


def _tree_latency_s(kind: Collective, levels: tuple[Level, ...]) -> float:
    """The height of a double binary tree of nodes, which still carries the full bandwidth.

    Sanders, Speck & Traeff (2009), "Two-tree algorithms for full bandwidth broadcast, reduction
    and scan"; NCCL's trees across nodes are these. Within a node its trees are chains.
    """
    total = 0.0
    for level in levels:
        steps = level.size - 1 if level.chained else math.ceil(math.log2(level.size))
        total += steps * level.latency(kind)
    return total


def _all_to_all_s(local_bytes: float, link: Link) -> float:
    """Pairwise exchange for long messages, Bruck's algorithm for short ones (Thakur, section 4.3).

    A rank keeps ``1/n`` of what it holds; of the rest, what goes to other units takes its own share
    of that level's link, all levels at once.
    """
    n = link.group_size
    transfer_s, latency_s = 0.0, 0.0
    for level in link.levels:
        inside = min(n, level.members * level.size)
        part = local_bytes * (inside - level.members) / n
        transfer_s = max(transfer_s, part / level.rate("all_to_all"))
        latency_s += (level.size - 1) * level.latency("all_to_all")
    pairwise_s = latency_s + transfer_s
    last = link.levels[-1]
    rounds = math.ceil(math.log2(n))
    bruck_s = rounds * (last.latency("all_to_all") + local_bytes / 2 / last.rate("all_to_all"))
    return min(pairwise_s, bruck_s)


def conversion_s(
    source: State, target: State, value_type: TensorType, n: int, link: Link, device: Device
) -> tuple[float, float]:
    """Forward and backward seconds of passing a value from one state to another on an axis.

    Args:
        source: the state that it is in.
        target: the state that it is needed in.
        value_type: its type where it is whole on this axis (local on the axes already applied).
        n: size of the axis.
        link: the axis's links.
        device: where slices, pads and reorderings run.

    Raises:
        KeyError: if there is no way in one step.
    """
    step = conversion(source, target)
    if step is None or n == 1:
        return 0.0, 0.0
    forward_s = _motion_s(step.forward, source, target, value_type, n, link, device)
    if not value_type.differentiable:
        return forward_s, 0.0
    return forward_s, _motion_s(step.backward, target, source, value_type, n, link, device)


def _motion_s(
    motion: Motion,
    source: State,
    target: State,
    value_type: TensorType,
    n: int,
    link: Link,
    device: Device,
) -> float:
    whole = float(value_type.nbytes)
    source_bytes = whole * _share(source, value_type, n)
    target_bytes = whole * _share(target, value_type, n)
    peak = 1.0  # motions have no arithmetic
    if motion not in COLLECTIVES:
        return way_s(motion_way(motion, source_bytes, target_bytes), device, peak)
    moved = {"all_reduce": source_bytes, "all_gather": source_bytes * n}.get(motion)
    if moved is None:
        moved = source_bytes if motion == "reduce_scatter" else source_bytes * n
    kind: Collective = motion  # type: ignore[assignment]
    reorder = NOTHING
    for state, num_bytes in ((source, source_bytes), (target, target_bytes)):
        if _scattered(state, value_type):
            held = max(source_bytes, target_bytes) if motion != "all_to_all" else num_bytes
            reorder = Way((), 0.0, reorder.bytes + 2 * held, reorder.kernels + 1)
    wait_s = _WAITS.get(motion, 1.0) * waiting_s(link)
    return wait_s + collective_s(kind, moved, link) + way_s(reorder, device, peak)


def _share(state: State, value_type: TensorType, n: int) -> float:
    """Share of the whole that a rank holds, padding included."""
    if not state.is_split or value_type.numel == 0:
        return 1.0
    local = local_shape(value_type.shape, state, n)[state.dim]
    return local / value_type.shape[state.dim]


def _scattered(state: State, value_type: TensorType) -> bool:
    """A rank's part is not contiguous in the whole, so the collective needs a reordering copy."""
    if not state.is_split:
        return False
    return bool(state.blocks) or math.prod(value_type.shape[: state.dim]) > 1


def inner_collectives_s(op: Op, links: Mapping[str, Link]) -> tuple[float, float]:
    """Forward and backward seconds of what an op of the runtime communicates within itself.

    Conversions are not meant (:func:`conversion_s`); other ops communicate nothing.

    Args:
        op: localised.
        links: by name, of the axes that it may be split over.
    """
    axes = op.keywords.get("axes", (op.keywords.get("axis"),))
    forward_s = backward_s = 0.0
    for axis in axes:
        if axis in links:
            own = _inner_s(op, links[axis])
            wait_s = waiting_s(links[axis])
            forward_s += own[0] + (wait_s if own[0] else 0.0)
            backward_s += own[1] + (wait_s if own[1] else 0.0)
    gathered = op.keywords.get("gathered")
    if gathered is not None and gathered in links:
        own = _gathered_s(op, links[gathered])
        forward_s, backward_s = forward_s + own[0], backward_s + own[1]
    return forward_s, backward_s


def _inner_s(op: Op, link: Link) -> tuple[float, float]:
    if op.target == "autoshard.vocab_parallel_cross_entropy":
        # Normaliser and target logit of every row (and their sum, if smoothed), from every rank.
        rows = op.operands[1].type.numel
        facts = (
            3 if op.keywords.get("label_smoothing", op.args[4] if len(op.args) > 4 else 0) else 2
        )
        gathered = 4.0 * facts * rows * link.group_size
        return collective_s("all_gather", gathered, link), 0.0
    if op.target == "autoshard.sparse_experts":
        if op.keywords.get("way") != "exchange":
            return 0.0, 0.0
        # Every choice of every token goes to its expert and comes back.
        x = op.operands[0].type
        once_s = 2 * collective_s("all_to_all", _chosen_bytes(op) * link.group_size, link)
        return once_s, once_s if x.differentiable else 0.0
    if op.target == "autoshard.batch_norm":
        # Sums and squares per channel, and the same two of the gradient.
        once_s = collective_s("all_reduce", 8.0 * op.operands[0].type.shape[1], link)
        return once_s, once_s if op.output.type.differentiable else 0.0
    return 0.0, 0.0


def _gathered_s(op: Op, link: Link) -> tuple[float, float]:
    """Tokens that have come to their experts, of which each rank has a part of the width.

    Narayanan et al. 2021 split a layer so; Megatron gathers tokens after they have travelled, so
    that each travels once, and scatters the sum of what the parts make of them.
    """
    whole = _chosen_bytes(op) * link.group_size
    once_s = sum(collective_s(kind, whole, link) for kind in ("all_gather", "reduce_scatter"))
    return once_s, once_s if op.operands[0].type.differentiable else 0.0


def _chosen_bytes(op: Op) -> float:
    """A rank's tokens, once per choice."""
    x, choices = op.operands[0].type, op.operands[2].type.shape[-1]
    return float(choices * x.nbytes)
