"""Measure the links of a process group: alpha and beta of every kind of collective.

Every rank of the group calls these; of each rank the median counts where ranks share the cores of
a CPU, else the fastest repeat (others are disturbed), of the ranks the slowest. The fit inverts
:mod:`autoshard.cost_models.collective`: ``seconds = steps * alpha + wire_bytes / rate``, with the
steps and bytes that those formulas charge, by least squares on several sizes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from autoshard.cluster import COLLECTIVE_KINDS, Tier, core_share
from autoshard.profile.measure import Failure
from autoshard.profile.timing import elapsed_s, present_device

SIZES = (4 * 2**10, 64 * 2**10, 2**20, 8 * 2**20)
"""Bytes of the whole tensor that are tried; multiples of 4 times any sensible group size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFit:
    """One kind of collective on one group.

    Attributes:
        latency_s: alpha, per step.
        bytes_per_s: per rank and direction.
        error: largest relative distance between the fit and a measurement.
        samples: bytes of the whole tensor -> seconds.
    """

    kind: str
    latency_s: float
    bytes_per_s: float
    error: float
    samples: Mapping[int, float]


def measure_links(
    group: dist.ProcessGroup | None = None,
    *,
    sizes: Sequence[int] = SIZES,
    repeats: int = 7,
    device: torch.device | None = None,
) -> dict[str, LinkFit | Failure]:
    """Fit every kind of collective among the ranks of ``group`` (``None``: all ranks).

    Send is between the group's first two ranks; every rank gets every result.
    """
    where = device or present_device()
    n = dist.get_world_size(group)
    found: dict[str, LinkFit | Failure] = {}
    for kind in COLLECTIVE_KINDS:
        if n < 2:
            found[kind] = Failure(reason="a group of one rank has no links")
            continue
        try:
            samples = {
                size: _slowest(_typical_s(kind, size, group, where, repeats), group, where)
                for size in sizes
            }
            found[kind] = fit(kind, n, samples)
        except (RuntimeError, NotImplementedError) as error:
            found[kind] = Failure(reason=str(error).splitlines()[0])
    return found


def fit(kind: str, n: int, samples: Mapping[int, float]) -> LinkFit:
    """Alpha and rate from seconds by size, minimising relative errors; neither is negative."""
    sizes = numpy.array(sorted(samples), dtype=float)
    seconds = numpy.array([samples[int(s)] for s in sizes])
    steps, share = _shape(kind, n)
    matrix = numpy.stack([numpy.full_like(sizes, steps), share * sizes], axis=1)
    weighted = matrix / seconds[:, None]
    solution, *_ = numpy.linalg.lstsq(weighted, numpy.ones_like(seconds), rcond=None)
    alpha, beta = float(solution[0]), float(solution[1])
    if alpha < 0:
        alpha, beta = 0.0, _alone(weighted[:, 1])
    elif beta <= 0:  # too small sizes to see the bandwidth: the largest one bounds it
        alpha, beta = _alone(weighted[:, 0]), float(seconds[-1] / (share * sizes[-1]))
    predicted = matrix @ numpy.array([alpha, beta])
    return LinkFit(
        kind=kind, latency_s=alpha, bytes_per_s=1 / beta,
        error=float(numpy.max(numpy.abs(predicted / seconds - 1))), samples=dict(samples),
    )  # fmt: skip


def _alone(column: numpy.ndarray) -> float:
    """The best single coefficient of relative errors."""
    return float(column.sum() / (column**2).sum())


def _shape(kind: str, n: int) -> tuple[float, float]:
    """Steps and share of the whole tensor on the wire, as the cost model charges them."""
    if kind == "send":
        return 1.0, 1.0
    if kind == "all_reduce":
        return 2.0 * (n - 1), 2.0 * (n - 1) / n
    if kind == "all_to_all":
        return float(n - 1), (n - 1) / n**2
    return float(n - 1), (n - 1) / n


def tier_from(name: str, size: int, fits: Mapping[str, LinkFit | Failure]) -> Tier | Failure:
    """A tier of a cluster file: the fastest kind's rate, and the others as shares of it.

    A kind that failed is taken to be as slow as the slowest that was measured.
    """
    good = {kind: f for kind, f in fits.items() if isinstance(f, LinkFit)}
    if not good:
        reasons = {f.reason for f in fits.values() if isinstance(f, Failure)}
        return Failure(reason="; ".join(sorted(reasons)) or "nothing was measured")
    rate = max(f.bytes_per_s for f in good.values())
    slowest = min(f.bytes_per_s for f in good.values())
    shares = {
        kind: (good[kind].bytes_per_s if kind in good else slowest) / rate
        for kind in COLLECTIVE_KINDS
    }
    latency_s = float(numpy.median([f.latency_s for f in good.values()]))
    return Tier(name=name, size=size, bytes_per_s=rate, latency_s=latency_s, efficiency=shares)


def _typical_s(
    kind: str, size: int, group: dist.ProcessGroup | None, device: torch.device, repeats: int
) -> float:
    call = _call(kind, size, group, device)
    samples = []
    for _ in range(2 + repeats):
        dist.barrier(group)
        samples.append(elapsed_s(call, device))
    if device.type == "cpu" and core_share(dist.get_world_size(group)) < 1:
        return statistics.median(samples[2:])
    return min(samples[2:])


def _slowest(seconds: float, group: dist.ProcessGroup | None, device: torch.device) -> float:
    value = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX, group)
    return float(value.item())


def _call(
    kind: str, size: int, group: dist.ProcessGroup | None, device: torch.device
) -> Callable[[], object]:
    n = dist.get_world_size(group)
    numel = max(n * n, size // 4 // (n * n) * n * n)
    whole = torch.ones(numel, device=device)
    part = torch.ones(numel // n, device=device)
    if kind == "all_reduce":
        return lambda: dist.all_reduce(whole, group=group)
    if kind == "all_gather":  # its name from torch 2.13 on, and before
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return lambda: gather(whole, part, group=group)
    if kind == "reduce_scatter":
        reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return lambda: reduce(part, whole, group=group)
    if kind == "all_to_all":
        other = torch.empty_like(part)
        return lambda: dist.all_to_all_single(other, part, group=group)
    return lambda: _send(whole, group)


def _send(message: Tensor, group: dist.ProcessGroup | None) -> None:
    rank = dist.get_rank(group)
    if rank == 0:
        dist.send(message, group=group, group_dst=1)
    elif rank == 1:
        dist.recv(message, group=group, group_src=0)
