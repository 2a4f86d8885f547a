"""A cluster file for the present machine, by measurement: what ``autoshard profile`` does.

Alone this measures the device (links are then the nearest preset's, and the file says so), on every
rank of a process group the links as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from autoshard.cluster import Cluster, Device, Tier, check, core_share, find, this_machine
from autoshard.cost_models.collective import late_last
from autoshard.errors import AutoshardError, OptionError
from autoshard.profile.links import LinkFit, measure_links, tier_from
from autoshard.profile.measure import Failure
from autoshard.profile.timing import (
    Clock,
    alone,
    elapsed_s,
    environment,
    present_device,
    together,
)
from autoshard.runtime.host_memory import keep_freed_memory

_DTYPES = {
    "f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16,
}  # fmt: skip


def measure_device(
    clock: Clock = alone, *, matrix: int | None = None, stream_bytes: int | None = None
) -> Device:
    """Rates, bandwidth and launch overhead of the present device.

    The measured rates are what is reached, so the efficiencies are 1, but for attention, which is
    measured as a share of the rate of products.

    Args:
        clock: how calls are timed.
        matrix: rows and columns of the products; by default enough to fill the device.
        stream_bytes: size of the tensors that are streamed; by default beyond caches.
    """
    where = present_device()
    on_gpu = where.type == "cuda"
    if not on_gpu:
        keep_freed_memory()  # as ranks do
    side = matrix or (8192 if on_gpu else 1024)
    size = stream_bytes or (2**30 if on_gpu else 24 * 2**20)
    rates = {}
    for name, dtype in _DTYPES.items():
        # Some have no units of their own there, and take a hundred times as long.
        slow = dtype == (torch.float64 if on_gpu else torch.float16)
        narrow = side // 4 if slow else side
        rate = _product_rate(narrow, dtype, where, clock)
        if rate is not None:
            rates[name] = rate
    if not rates:
        raise AutoshardError(
            f"expected at least one dtype whose matrix products run on {where} but got none; "
            "check the installation of torch"
        )
    best = torch.bfloat16 if on_gpu and "bf16" in rates else torch.float32
    peak = rates["bf16" if best == torch.bfloat16 else "f32"]
    source = torch.ones(size // 4, device=where)
    target = torch.zeros_like(source)
    written_s = clock(lambda: target.add_(source))
    made_s = clock(lambda: source + target)
    return Device(
        name=environment(where)["device"], memory_bytes=_memory_bytes(where), kind=where.type,
        bytes_per_s=3 * size / min(written_s, made_s), flops_per_s=rates, matmul_efficiency=1.0,
        memory_efficiency=min(1.0, written_s / made_s), launch_s=_launch_s(where, clock),
        attention_efficiency=min(1.0, _attention_rate(best, where, clock) / peak),
    )  # fmt: skip


def write_cluster(path: str | os.PathLike[str], *, name: str | None = None) -> Cluster:
    """Measure the present machine and write its cluster file.

    With an initialised process group every rank calls this, links are measured, too, and rank 0
    writes; the same cluster is returned on every rank. All ranks must have equal devices. Where
    they share the cores of a CPU they are measured all at once, as they will run.

    Raises:
        OptionError: if a figure came out impossible.
        AutoshardError: if links could not be measured.
    """
    running = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    shares = running and present_device().type == "cpu"
    device = measure_device(together if shares else alone)
    if shares:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        device = replace(device, share=core_share(processes * torch.get_num_threads()))
    host = name or f"measured {device.name}"
    if running:
        tiers, remarks = _measured_tiers()
        device = replace(device, jitter_s=measure_jitter(together if shares else alone))
        cluster = Cluster(name=host, device=device, tiers=tiers, source=remarks)
        shared = [cluster]
        dist.broadcast_object_list(shared, src=0)
        cluster = shared[0]
    else:
        base = _nearest(device)
        cluster = Cluster(
            name=host, device=device, tiers=base.tiers,
            source=f"device measured; links of preset {base.name}, not measured: run under "
            "torchrun to measure them",
        )  # fmt: skip
    check(cluster)
    if not running or dist.get_rank() == 0:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        cluster.save(path)
    return cluster


def measure_jitter(clock: Clock, rounds: int = 200) -> float:
    """How unevenly ranks come to a collective that stands between ops: ``Device.jitter_s``.

    All ranks compute and reduce in turns. What a turn takes beyond computing by itself and reducing
    by itself is waiting, of which :func:`autoshard.cost_models.collective.waiting_s` has the
    standard deviation that it comes from.
    """
    where = present_device()
    side = 4096 if where.type == "cuda" else 512  # about a layer
    a, small = torch.ones(side, side, device=where), torch.ones(2**14, device=where)

    def turns(number: int, compute: bool, reduce: bool) -> None:
        for _ in range(number):
            if compute:
                a @ a
            if reduce:
                dist.all_reduce(small)

    def seconds(compute: bool, reduce: bool) -> float:
        turns(3, compute, reduce)
        dist.barrier()
        return elapsed_s(lambda: turns(rounds, compute, reduce), where) / rounds

    waited_s = seconds(True, True) - clock(lambda: a @ a) - seconds(False, True)
    mean = torch.tensor([max(0.0, waited_s)], dtype=torch.float64, device=where)
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    return float(mean.item()) / late_last(dist.get_world_size())


def _measured_tiers() -> tuple[tuple[Tier, ...], str]:
    """The node's tier, and the network's among equal local ranks of all nodes at once."""
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    local = local or dist.get_world_size()
    rank, mine = dist.get_rank(), {}
    layout: list[tuple[str, int, list[list[int]]]] = []
    if local > 1:
        nodes = [list(range(i, i + local)) for i in range(0, world, local)]
        layout.append(("node", 0 if local == world else local, nodes))
    if local < world:
        across = [list(range(i, world, local)) for i in range(local)]
        layout.append(("network", 0, across))
    tiers = []
    remarks = []
    for name, size, members in layout:
        for ranks in members:
            group = dist.new_group(ranks)
            if rank in ranks:
                mine[name] = group
        fits = measure_links(mine[name])
        tier = tier_from(name, size, fits)
        if isinstance(tier, Failure):
            raise AutoshardError(
                f"expected to measure the links of tier {name!r} but every collective failed: "
                f"{tier.reason}; check the process group's backend"
            )
        tiers.append(tier)
        remarks += [_remark(name, kind, fit) for kind, fit in fits.items()]
    return tuple(tiers), "measured: " + "; ".join(remarks)


def _remark(tier: str, kind: str, fit: LinkFit | Failure) -> str:
    if isinstance(fit, Failure):
        return f"{tier} {kind} failed ({fit.reason})"
    return f"{tier} {kind} fits within {fit.error:.0%}"


def _product_rate(
    side: int, dtype: torch.dtype, device: torch.device, clock: Clock
) -> float | None:
    """Operations per second of square products; ``None`` if the device cannot do them."""
    try:
        a = torch.ones(side, side, dtype=dtype, device=device)
        a @ a
    except (RuntimeError, NotImplementedError):
        return None
    return 2.0 * side**3 / clock(lambda: a @ a)


def _attention_rate(dtype: torch.dtype, device: torch.device, clock: Clock) -> float:
    rows, heads, size = (4096, 32, 128) if device.type == "cuda" else (512, 8, 64)
    q = torch.ones(1, heads, rows, size, dtype=dtype, device=device)
    call: Callable[[], Tensor] = lambda: F.scaled_dot_product_attention(q, q, q)  # noqa: E731
    return 4.0 * heads * rows * rows * size / clock(call)


def _launch_s(device: torch.device, clock: Clock) -> float:
    x = torch.ones(8, device=device)

    def chain() -> None:
        y = x
        for _ in range(500):
            y = y + 1.0

    return clock(chain) / 500


def _memory_bytes(device: torch.device) -> int:
    """Of a GPU all but 2 GiB for context and communication; of a CPU a core's share."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) - 2 * 2**30
    return this_machine().device.memory_bytes


def _nearest(device: Device) -> Cluster:
    if device.kind == "cpu":
        return find("cpu")
    try:
        return this_machine()
    except OptionError:
        return replace(find("h100"), name="h100")
