"""Every pipeline schedule on 4 processes of this machine: predicted, measured, and against torch.

A small decoder is cut into 4 stages, or 8 chunks, and trained under every schedule with 1 to 32
micro-batches, all schedules taking turns. Printed are

* for each number of micro-batches, the simulated and the measured seconds of a step, and how well
  they agree in the order of schedules (Spearman's rank correlation). The simulation has the seconds
  of each part of the model, measured in one process by itself, those of a processor for each end of
  a transfer, measured on a pipeline of stages that do nothing, and how much slower ranks are that
  compute at the same time on the cores of this machine;
* what a step takes relative to torch's own classes, used by hand on the same stages with the same
  optimizer: the median ratio over rounds in which both ran one after the other, in seconds, and in
  seconds of processors over all ranks, which other programs on the machine disturb less.

Run ``python -m benchmarks.pipelines`` (``--quick`` for fewer numbers of micro-batches).
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
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

from autoshard.capture import capture
from autoshard.cluster import find
from autoshard.options import Constraints
from autoshard.parallel import Parallel
from autoshard.plan.plan import Plan
from autoshard.plan.search import find_plan
from autoshard.runtime import optimizer
from autoshard.runtime.mesh import Mesh
from autoshard.runtime.split_backward import backward_of_inputs
from autoshard.schedule import Action, Schedule, gradient, needs
from autoshard.schedules import SCHEDULES, by_name, homes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # processes that are started once and run functions

import ranks  # noqa: E402

RANKS = 4
STEPS = 4
"""Of one schedule at a stretch."""
VOCAB, LENGTH, WIDTH, HEADS, BLOCKS = 256, 96, 192, 4, 8
NAMES = [
    name
    for name, kind in SCHEDULES.items()
    if not kind.stale and name not in ("none", "zb-1p")  # zb-1p is zb-h1
]
"""The synchronous ones."""
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


# -- the model, whole and in parts ----------------------------------------------------------------


class Block(nn.Module):
    """Attention and a feed-forward network, each after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.after = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, c))
        return x + self.down(functional.gelu(self.up(self.after(x))))


class Head(nn.Module):
    """From activations to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.norm(x))
        return logits


class Decoder(nn.Module):
    """Embedding, blocks and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = Head()

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

    def stages(self, count: int) -> list[nn.Sequential]:
        """The same as ``count`` stages of as many blocks, by hand."""
        each = BLOCKS // count
        parts = [list(self.blocks[k * each : (k + 1) * each]) for k in range(count)]
        return [
            nn.Sequential(*p)
            for p in ([self.embed, *parts[0]], *parts[1:-1], [*parts[-1], self.head])
        ]


def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder()


def batch(num_micro_batches: int) -> dict[str, Tensor]:
    """One sample per micro-batch."""
    generator = torch.Generator().manual_seed(num_micro_batches)
    shape = (num_micro_batches, LENGTH)
    return {n: torch.randint(VOCAB, shape, generator=generator) for n in ("ids", "labels")}


def num_stages(name: str) -> int:
    return RANKS * SCHEDULES[name].least_virtual


def plan_of(program: Any, name: str) -> Plan:
    """Equal blocks in every stage, as by hand."""
    count = num_stages(name)
    each = BLOCKS // count
    sizes = (each + 1, *[each] * (count - 2), each + 1)
    pins = {"pp": RANKS, "dp": 1, "tp": 1, "schedule": name, "micro_batch_size": 1,
            "virtual_stages": SCHEDULES[name].least_virtual, "stages": sizes,
            "recompute": "none"}  # fmt: skip
    return find_plan(
        program, cluster=find("cpu"), world_size=RANKS, constraints=Constraints.of(pins)
    )


# -- prediction -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """Seconds of a part of the model and one micro-batch, in one process by itself.

    Attributes:
        inputs_s, weights_s: of a backward that is split in two.
    """

    forward_s: float
    backward_s: float
    inputs_s: float
    weights_s: float

    def __add__(self, other: Part) -> Part:
        return Part(
            self.forward_s + other.forward_s, self.backward_s + other.backward_s,
            self.inputs_s + other.inputs_s, self.weights_s + other.weights_s,
        )  # fmt: skip

    def lasts_s(self, action: Action) -> float:
        return {
            "F": self.forward_s, "B": self.backward_s, "I": self.inputs_s, "W": self.weights_s
        }[action.kind]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Machine:
    """What ranks on this machine take from each other.

    Attributes:
        rates: by how many ranks compute at once, how fast each does, next to one alone.
        send_s: from one rank to another.
        message_s: of a processor, for each end of a transfer.
    """

    rates: tuple[float, ...]
    send_s: float
    message_s: float


def timed_part(module: nn.Module, x: Tensor, repeats: int = 30) -> Part:
    """The least of several runs: what other programs do to the machine only adds."""
    times: list[tuple[float, float, float, float]] = []
    x = x.detach().requires_grad_(x.is_floating_point())
    for _ in range(repeats):
        begun = time.perf_counter()
        y = module(x)
        forward = time.perf_counter() - begun
        ones = torch.ones_like(y)
        begun = time.perf_counter()
        y.backward(ones)
        backward = time.perf_counter() - begun
        y = module(x)
        begun = time.perf_counter()
        _, late = backward_of_inputs([y], [ones], [x])
        split = time.perf_counter()
        late.run()
        times.append((forward, backward, split - begun, time.perf_counter() - split))
    return Part(*(min(column) for column in zip(*times, strict=True)))


def parts() -> dict[str, Part]:
    made, x = model(), torch.randn(1, LENGTH, WIDTH)
    ids = batch(1)["ids"]
    return {
        "embed": timed_part(made.embed, ids),
        "block": timed_part(made.blocks[0], x),
        "head": timed_part(made.head, x),
    }


def stage_parts(known: Mapping[str, Part], count: int) -> list[Part]:
    found = []
    for k in range(count):
        own = [known["block"]] * (BLOCKS // count)
        own += [known["embed"]] * (k == 0) + [known["head"]] * (k == count - 1)
        found.append(functools.reduce(Part.__add__, own))
    return found


def on_shared_cores(schedule: Schedule, stages: Sequence[Part], machine: Machine) -> float:
    """Seconds of a step if ranks that compute at the same time share the cores of a machine.

    With a core per rank and messages that cost no processor it is
    :func:`autoshard.cost_models.pipeline.simulate`.
    """
    home = schedule.homes
    waiting = [deque(actions) for actions in schedule.ranks]
    done: dict[Action, float] = {}
    left: dict[int, float] = {}
    now = 0.0

    def ready_s(action: Action) -> float:
        """When its inputs are there; infinite if they are not made yet."""
        latest = 0.0
        for other in needs(action, schedule.num_stages):
            between = machine.send_s if home[other.stage] != home[action.stage] else 0.0
            latest = max(latest, done.get(other, float("inf")) + between)
        return latest

    def work_s(action: Action) -> float:
        """Of a processor: the computation, and this rank's ends of what comes and goes."""
        stage, last = action.stage, schedule.num_stages - 1
        beside = [k for k in (stage - 1, stage + 1) if 0 <= k <= last and home[k] != home[stage]]
        ends = 0 if action.kind == "W" else len(beside)
        return stages[stage].lasts_s(action) + ends * machine.message_s

    while any(waiting):
        ready = {r: ready_s(q[0]) for r, q in enumerate(waiting) if q and r not in left}
        for rank, at in ready.items():
            if at <= now:
                left[rank] = work_s(waiting[rank][0])
        rate = machine.rates[len(left) - 1] if left else 1.0
        ends = [now + rest / rate for rest in left.values()]
        until = min([*ends, *(at for at in ready.values() if at > now)])
        for rank in list(left):
            left[rank] -= (until - now) * rate
            if left[rank] <= 1e-12:
                del left[rank]
                action = waiting[rank].popleft()
                done[gradient(action) if action.kind == "B" else action] = until
        now = until
    return now


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank."""

    def placed(values: Sequence[float]) -> list[float]:
        return [
            sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2
            for value in values
        ]

    a, b = placed(one), placed(other)
    try:
        return statistics.correlation(a, b)
    except statistics.StatisticsError:  # all are equal: there is no order
        return float("nan")


# -- on a rank ------------------------------------------------------------------------------------


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


def transfer(repeats: int = 50) -> float:
    """Seconds to send a stage's output from rank 0 to rank 1; half of the least round trip."""
    x, best = torch.zeros(1, LENGTH, WIDTH), float("inf")
    for _ in range(repeats):
        dist.barrier()
        begun = time.perf_counter()
        if dist.get_rank() == 0:
            dist.send(x, 1)
            dist.recv(x, 1)
        elif dist.get_rank() == 1:
            dist.recv(x, 0)
            dist.send(x, 0)
        best = min(best, time.perf_counter() - begun)
    return best / 2


class Scale(nn.Module):
    """A stage that does next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


def message(steps: int = 10, num_micro_batches: int = 16) -> float:
    """Processor seconds of this rank per end of a transfer, in torch's 1F1B of empty stages."""
    torch.set_num_threads(1)
    act = torch.empty(1, LENGTH, WIDTH, device="meta", requires_grad=True)
    rank, group = dist.get_rank(), dist.group.WORLD
    stage = PipelineStage(
        Scale(), rank, RANKS, torch.device("cpu"), group=group, input_args=act, output_args=act
    )
    schedule = Schedule1F1B(
        stage, num_micro_batches, loss_fn=lambda y, _: y.sum(), scale_grads=False
    )
    x = torch.ones(num_micro_batches, LENGTH, WIDTH)
    arguments = (x,) if rank == 0 else ()
    keywords = {"target": x} if rank == RANKS - 1 else {}
    schedule.step(*arguments, **keywords)
    dist.barrier()
    used = time.process_time()
    for _ in range(steps):
        schedule.step(*arguments, **keywords)
    ends = 2 * num_micro_batches * ((rank > 0) + (rank < RANKS - 1))
    return (time.process_time() - used) / steps / ends


def seconds_of_a_block(busy: int, repeats: int = 20) -> float:
    """Of forward and backward while so many ranks do the same; 0 on the others."""
    torch.set_num_threads(1)
    block, x = model().blocks[0], torch.randn(1, LENGTH, WIDTH)
    times = []
    dist.barrier()
    if dist.get_rank() < busy:
        for _ in range(repeats):
            begun = time.perf_counter()
            block(x).sum().backward()
            times.append(time.perf_counter() - begun)
    dist.barrier()
    return statistics.mean(times[repeats // 4 :]) if times else 0.0


def this_machine(pool: ranks.Pool) -> Machine:
    send_s, message_s = pool.run(transfer)[0], statistics.mean(pool.run(message))
    seconds = [max(pool.run(seconds_of_a_block, busy)) for busy in range(1, RANKS + 1)]
    return Machine(tuple(min(1.0, seconds[0] / s) for s in seconds), send_s, message_s)


# -- the tables -----------------------------------------------------------------------------------


def main() -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.pipelines")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=7, help="turns of every schedule")
    parser.add_argument("--quick", action="store_true", help="4 and 16 micro-batches, 3 rounds")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    args = parser.parse_args()
    counts = [4, 16] if args.quick else args.micro_batches
    rounds = min(args.rounds, 3) if args.quick else args.rounds
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    known = parts()
    pool = ranks.Pool(RANKS)
    results = {}
    try:
        machine = this_machine(pool)
        for m in counts:
            program = capture(model(), example_inputs=batch(m), model_name="decoder")
            plans = {name: plan_of(program, name) for name in NAMES}
            per_rank = pool.run(measure, m, plans, program, rounds, timeout_s=900)
            results[m] = _row(m, known, machine, per_rank)
            if not args.json:
                _show(m, results[m], cores)
    finally:
        pool.close()
    ratios, used = (
        [r for row in results.values() for r in row[kind].values()]
        for kind in ("to_torch", "processors_to_torch")
    )
    correlations = [row["correlation"] for row in results.values()]
    summary = {
        "mean_correlation": statistics.mean(correlations),
        "median_to_torch": statistics.median(ratios),
        "median_processors_to_torch": statistics.median(used),
    }
    if args.json:
        print(json.dumps({"summary": summary, "micro_batches": results}, indent=1))
    else:
        print(
            f"rank correlation of predicted and measured order: "
            f"{', '.join(f'{c:.2f}' for c in correlations)}, mean "
            f"{summary['mean_correlation']:.2f}; step time to torch's own classes, median: "
            f"{summary['median_to_torch']:.3f}, of processor seconds "
            f"{summary['median_processors_to_torch']:.3f}"
        )
    return 0


def _row(
    m: int, known: Mapping[str, Part], machine: Machine, per_rank: Sequence[Any]
) -> dict[str, Any]:
    rounds, losses = per_rank[0]
    far = {name: loss for name, loss in losses.items() if abs(loss - losses["naive"]) > 1e-4}
    if far:
        raise AssertionError(f"these steps did something else: {far}, not {losses['naive']}")
    seconds = {name: [wall for wall, _ in own] for name, own in rounds.items()}
    processors = {
        name: [sum(found[name][k][1] for found, _ in per_rank) for k in range(len(own))]
        for name, own in rounds.items()
    }
    predicted = {}
    for name in NAMES:
        schedule = by_name(name, RANKS, m, SCHEDULES[name].least_virtual)
        stages = stage_parts(known, schedule.num_stages)
        predicted[name] = on_shared_cores(schedule, stages, machine)
    measured = {name: min(seconds[name]) for name in NAMES}
    order = [predicted[n] for n in NAMES], [measured[n] for n in NAMES]
    return {
        "predicted_s": predicted,
        "measured_s": measured,
        "to_torch": _to_torch(seconds),
        "processors_to_torch": _to_torch(processors),
        "correlation": spearman(*order),
    }


def _to_torch(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median ratio of each schedule to torch's own of the same round."""
    found = {}
    for name in NAMES:
        if f"torch {name}" in seconds:
            pairs = zip(seconds[name], seconds[f"torch {name}"], strict=True)
            found[name] = statistics.median(ours / theirs for ours, theirs in pairs)
    return found


def _show(m: int, row: Mapping[str, Any], cores: int) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{m} micro-batches, {RANKS} processes on {cores} cores; rank correlation "
    table = Table(title=f"{title}{row['correlation']:.2f}", title_justify="left")
    for column in ("schedule", "predicted ms", "measured ms", "to torch's own", "processors"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for name in sorted(NAMES, key=lambda n: float(row["measured_s"][n])):
        ratios = [row[kind].get(name) for kind in ("to_torch", "processors_to_torch")]
        table.add_row(
            name, f"{1e3 * row['predicted_s'][name]:.1f}", f"{1e3 * row['measured_s'][name]:.1f}",
            *("" if ratio is None else f"{ratio:.3f}" for ratio in ratios),
        )  # fmt: skip
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
