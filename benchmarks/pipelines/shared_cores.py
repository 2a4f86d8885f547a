"""What a schedule takes on ranks that share the cores of a machine, by simulation."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoshard.runtime.split_backward import backward_of_inputs
from autoshard.schedule import Action, Schedule, gradient, needs
from benchmarks.pipelines.model import BLOCKS, LENGTH, WIDTH, batch, model


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
