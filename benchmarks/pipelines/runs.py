"""Schedules in turn on a rank: the project's runtime, and torch's own classes used by hand."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)
from torch.nn import functional

from autoshard.parallel import Parallel
from autoshard.plan.plan import Plan
from autoshard.runtime import optimizer
from autoshard.runtime.mesh import Mesh
from autoshard.schedules import SCHEDULES, homes
from benchmarks.pipelines.model import LENGTH, RANKS, VOCAB, WIDTH, batch, model, num_stages

STEPS = 4
"""Of one schedule at a stretch."""
BY_HAND: dict[str, Callable[..., Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved-1f1b": ScheduleInterleaved1F1B,
    "looped-bfs": ScheduleLoopedBFS,
    "interleaved-zb": ScheduleInterleavedZeroBubble,
    "zb-v": ScheduleZBVZeroBubble,
    "dualpipe-v": ScheduleDualPipeV,
}
"""Torch's own classes."""


class ByHand:
    """The same stages on torch's own schedule class, as its documentation shows it."""

    def __init__(self, name: str, num_micro_batches: int, group: dist.ProcessGroup) -> None:
        count, rank = num_stages(name), dist.get_rank()
        modules = model().stages(count)
        act = torch.empty(1, LENGTH, WIDTH, device="meta", requires_grad=True)
        ids = torch.empty(1, LENGTH, dtype=torch.long, device="meta")
        logits = torch.empty(1, LENGTH, VOCAB, device="meta", requires_grad=True)
        placed = homes(name, RANKS, SCHEDULES[name].least_virtual)
        self.first, self.last = placed[0] == rank, placed[-1] == rank
        mine = [k for k, home in enumerate(placed) if home == rank]
        stages = [
            PipelineStage(
                modules[k], k, count, torch.device("cpu"), group=group,
                input_args=act if k else ids, output_args=act if k < count - 1 else logits,
            )
            for k in mine
        ]  # fmt: skip
        single = SCHEDULES[name].least_virtual == 1
        self.schedule = BY_HAND[name](
            stages[0] if single else stages, num_micro_batches, loss_fn=self._loss,
            scale_grads=False,
        )  # fmt: skip
        self.scale = 1 / num_micro_batches
        parameters = [p for k in mine for p in modules[k].parameters()]
        self.optimizer = optimizer.factory("adamw")(parameters)

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output.flatten(0, 1), target.flatten()) * self.scale

    def step(self, given: Mapping[str, Tensor]) -> float:
        self.optimizer.zero_grad()
        losses: list[Tensor] = []
        arguments = (given["ids"],) if self.first else ()
        keywords = {"target": given["labels"], "losses": losses} if self.last else {}
        self.schedule.step(*arguments, return_outputs=False, **keywords)
        self.optimizer.step()
        # As a user who logs the loss does, on all ranks.
        loss = torch.stack(losses).sum().detach() if self.last else torch.zeros(())
        dist.all_reduce(loss)
        return float(loss)


def ways(num_micro_batches: int, plans: Mapping[str, Plan], program: Any) -> dict[str, Any]:
    """Name -> something with a ``step``; torch's own have names that begin with ``torch``."""
    mesh = Mesh.create({"pp": RANKS, "dp": 1, "tp": 1})
    given = batch(num_micro_batches)
    found: dict[str, Any] = {}
    for name, plan in plans.items():
        parallel = Parallel(model(), program, plan, optimizer="adamw")
        parallel.__dict__["mesh"] = mesh  # one for all: every group has threads of its own
        found[name] = functools.partial(parallel.step, given)
        if name in BY_HAND and torch_runs(name, num_micro_batches):
            made = ByHand(name, num_micro_batches, mesh.group("pp"))
            found[f"torch {name}"] = functools.partial(made.step, given)
    return found


def torch_runs(name: str, m: int) -> bool:
    """Whether torch's class takes so many micro-batches."""
    if name == "1f1b":
        return m >= RANKS
    if name in ("interleaved-1f1b", "interleaved-zb"):
        return m % max(1, m // RANKS) == 0
    return name != "dualpipe-v" or m >= 2 * RANKS


def measure(
    num_micro_batches: int, plans: Mapping[str, Plan], program: Any, rounds: int
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, float]]:
    """All ways in turn, several rounds of a few steps each, as training makes them.

    Returns:
        Per way and round the seconds of a step and this rank's processor seconds in it; the loss of
        its first step.
    """
    torch.set_num_threads(1)
    gc.disable()
    made = ways(num_micro_batches, plans, program)
    losses = {name: step() for name, step in made.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, step in made.items():
            dist.barrier()
            begun, used = time.perf_counter(), time.process_time()
            for _ in range(STEPS):
                step()
            used = time.process_time() - used
            dist.barrier()
            lasted = time.perf_counter() - begun
            found[name].append((lasted / STEPS, used / STEPS))
        gc.collect()
    gc.enable()
    return found, losses
