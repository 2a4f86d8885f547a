"""Time a function: warm-up, repeats, median and spread."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one call.

    Attributes:
        median_s: of all repeats.
        mean_s: of all repeats: what many calls take together.
        best_s: the fastest repeat: what the machine can do when nothing else runs on it.
        spread: half the distance between the quartiles, as a share of the median.
        repeats: how many were timed.
    """

    median_s: float
    mean_s: float
    best_s: float
    spread: float
    repeats: int


def present_device() -> torch.device:
    """What measurements run on: the current GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rank_threads(world_size: int) -> int:
    """Threads with which each of ``world_size`` ranks will compute on a CPU.

    As many as this process has if it is a rank, or if ``OMP_NUM_THREADS`` says how many; else as
    torchrun starts them, with one where it starts more than one.
    """
    told = "LOCAL_WORLD_SIZE" in os.environ or "OMP_NUM_THREADS" in os.environ
    return torch.get_num_threads() if told or world_size == 1 else 1


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Compute with ``number`` threads, then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def elapsed_s(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, on the device's own clock."""
    if device.type == "cuda":
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def summarise(samples: list[float]) -> Timing:
    median = statistics.median(samples)
    if len(samples) < 4:
        low, high = min(samples), max(samples)
    else:
        low, _, high = statistics.quantiles(samples, n=4)
    return Timing(
        median_s=median, mean_s=statistics.fmean(samples), best_s=min(samples),
        spread=(high - low) / 2 / median if median else 0.0, repeats=len(samples),
    )  # fmt: skip


def time_calls(
    function: Callable[[], object],
    *,
    device: torch.device | None = None,
    warm_up: int = 2,
    repeats: int = 7,
    max_s: float = 2.0,
) -> Timing:
    """Median seconds of ``function()``: at least three repeats, none more after ``max_s``."""
    where = device or present_device()
    for _ in range(warm_up):
        function()
    samples: list[float] = []
    while len(samples) < repeats and (len(samples) < 3 or sum(samples) < max_s):
        samples.append(elapsed_s(function, where))
    return summarise(samples)


Clock = Callable[[Callable[[], object]], float]
"""Seconds that one call of a function takes, by some way of measuring."""


def alone(function: Callable[[], object]) -> float:
    """The fastest of several calls: what the device does when nothing else is on it."""
    return time_calls(function, max_s=1.0).best_s


def together(function: Callable[[], object], window_s: float = 0.3) -> float:
    """Seconds per call while all ranks of the process group call it, on average over the ranks.

    Processes that share cores take turns of a few milliseconds, so the fastest call would be one
    that had a core to itself; over a window of many turns each has its part.
    """
    for _ in range(2):
        function()
    dist.barrier()
    calls, start = 0, time.perf_counter()
    while (spent_s := time.perf_counter() - start) < window_s or calls < 3:
        function()
        calls += 1
    mean = torch.tensor([spent_s / calls], dtype=torch.float64)
    dist.all_reduce(mean)
    return float(mean.item()) / dist.get_world_size()


def environment(device: torch.device | None = None) -> dict[str, str]:
    """Everything outside a graph that its time depends on."""
    where = device or present_device()
    facts = {"torch": str(torch.__version__), "threads": str(torch.get_num_threads())}
    if where.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(where)
        facts["cuda"] = str(torch.version.cuda)
        facts["driver"] = _driver()
        facts["tf32"] = torch.get_float32_matmul_precision()
    else:
        facts["device"] = f"cpu {_cpu_model()} {torch.backends.cpu.get_cpu_capability()}"
    return facts


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0] if path.exists() else "unknown"


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
