"""Measure the links of a process group: alpha and beta of every kind of collective.

Every rank of the group calls these. Collectives are timed one after the other, without a barrier
before each: a barrier wakes all ranks, and on a CPU they then take a third of what they do in
training. Of the ranks the slowest counts. The fit inverts
:mod:`autoshard.cost_models.collective`: ``seconds = steps * alpha + wire_bytes / rate``, with the
steps and bytes that those formulas charge a group within the outermost tier, by least squares on
several sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from autoshard.cluster import COLLECTIVE_KINDS, Tier
from autoshard.profile.measure import Failure
from autoshard.profile.timing import elapsed_s, present_device

SIZES = (4 * 2**10, 64 * 2**10, 2**20, 8 * 2**20, 32 * 2**20)
"""Bytes of the whole tensor that are tried; multiples of 4 times any sensible group size. The
largest is a bucket of gradients, beyond the caches of a CPU."""
_FEWEST, _MOST = 3, 1000
_MOST_ROUNDS = 5
_LEAST_S = 1e-7
"""A latency that is lost in the noise of its measurement is not 0 all the same."""


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
    window_s: float = 0.15,
    device: torch.device | None = None,
) -> dict[str, LinkFit | Failure]:
    """Fit every kind of collective among the ranks of ``group`` (``None``: all ranks).

    Send is between the group's first two ranks; every rank gets every result.

    Args:
        window_s: how long each kind and size is measured, about.
    """
    where = device or present_device()
    n = dist.get_world_size(group)
    found: dict[str, LinkFit | Failure] = {}
    for kind in COLLECTIVE_KINDS:
        if n < 2:
            found[kind] = Failure(reason="a group of one rank has no links")
            continue
        try:
            samples = {size: _typical_s(kind, size, group, where, window_s) for size in sizes}
            found[kind] = fit(kind, n, samples)
        except (RuntimeError, NotImplementedError) as error:
            found[kind] = Failure(reason=str(error).splitlines()[0])
    return found


def fit(kind: str, n: int, samples: Mapping[int, float]) -> LinkFit:
    """Alpha and rate from seconds by size, minimising relative errors; neither is negative.

    Of a kind with several algorithms each size takes the one that is fastest under the fit, as the
    cost model does.
    """
    sizes = numpy.array(sorted(samples), dtype=float)
    seconds = numpy.array([samples[int(s)] for s in sizes])
    ways = numpy.array(_ways(kind, n))
    chosen = numpy.zeros(len(sizes), dtype=int)
    for _ in range(_MOST_ROUNDS):
        matrix = ways[chosen] * numpy.stack([numpy.ones_like(sizes), sizes], axis=1)
        alpha, beta = _solved(matrix, seconds)
        of_all = alpha * ways[:, 0] + beta * sizes[:, None] * ways[:, 1]
        before, chosen = chosen, of_all.argmin(axis=1)
        if (before == chosen).all():
            break
    predicted = of_all.min(axis=1)
    return LinkFit(
        kind=kind, latency_s=alpha, bytes_per_s=1 / beta,
        error=float(numpy.max(numpy.abs(predicted / seconds - 1))), samples=dict(samples),
    )  # fmt: skip


def _solved(matrix: numpy.ndarray, seconds: numpy.ndarray) -> tuple[float, float]:
    """Alpha and beta by least squares of relative errors."""
    weighted = matrix / seconds[:, None]
    solution, *_ = numpy.linalg.lstsq(weighted, numpy.ones_like(seconds), rcond=None)
    alpha, beta = float(solution[0]), float(solution[1])
    if alpha < 0:
        return 0.0, _alone(weighted[:, 1])
    if beta <= 0:  # too small sizes to see the bandwidth: the largest one bounds it
        return _alone(weighted[:, 0]), float(seconds[-1] / matrix[-1, 1])
    return alpha, beta


def _alone(column: numpy.ndarray) -> float:
    """The best single coefficient of relative errors."""
    return float(column.sum() / (column**2).sum())


def _ways(kind: str, n: int) -> list[tuple[float, float]]:
    """Steps, and the share of the whole tensor on the wire, of each algorithm of the cost model."""
    rounds = math.ceil(math.log2(n))
    if kind == "send":
        return [(1.0, 1.0)]
    if kind == "all_reduce":
        return [(2.0 * (n - 1), 2.0 * (n - 1) / n), (2.0 * rounds, 2.0)]
    if kind == "all_to_all":
        return [(float(n - 1), (n - 1) / n**2), (float(rounds), rounds / (2.0 * n))]
    return [(float(n - 1), (n - 1) / n)]


def tier_from(name: str, size: int, fits: Mapping[str, LinkFit | Failure]) -> Tier | Failure:
    """A tier of a cluster file: the fastest kind's rate and the median latency, of which the other
    kinds have shares and multiples.

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
    latency_s = max(_LEAST_S, float(numpy.median([f.latency_s for f in good.values()])))
    factors = {kind: f.latency_s / latency_s for kind, f in good.items()}
    return Tier(
        name=name, size=size, bytes_per_s=rate, latency_s=latency_s, efficiency=shares,
        latency_factor=factors,
    )  # fmt: skip


def _typical_s(
    kind: str, size: int, group: dist.ProcessGroup | None, device: torch.device, window_s: float
) -> float:
    call = _call(kind, size, group, device)

    def mean_s(calls: int) -> float:
        def all_calls() -> None:
            for _ in range(calls):
                call()

        dist.barrier(group)
        return _slowest(elapsed_s(all_calls, device) / calls, group, device)

    mean_s(_FEWEST)
    about_s = mean_s(_FEWEST)  # the same on all ranks, so all make as many calls
    return mean_s(min(_MOST, max(_FEWEST, round(window_s / about_s))))


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
