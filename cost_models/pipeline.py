"""Seconds of a pipeline schedule: every action as early as its rank and its inputs allow.

A forward waits for the same micro-batch's forward one stage earlier, a backward for the gradient of
the stage's output, which the stage after makes (and for its own forward); between ranks a transfer
lies in between, which overlaps with the computing of both ranks. For equal stages without
transfers the result is the closed form ``(m + p - 1)(f + b)`` of GPipe (Huang et al. 2019, section
2.2) and of 1F1B with flush (Narayanan et al. 2021, section 2.2), whose bubble is ``(p - 1) /
(m + p - 1)`` of the step; the tests hold the other schedules against the figures of their papers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoshard.errors import OptionError
from autoshard.schedule import Action, Schedule, dry_run, gradient, needs


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """One stage and one micro-batch.

    Attributes:
        backward_s: in all, gradients of weights included.
        send_s: until what the stage sends forward has arrived; its gradient takes as long back.
        weight_s: the part of backward that makes gradients of weights, where that is an action of
            its own.
    """

    forward_s: float
    backward_s: float
    send_s: float = 0.0
    weight_s: float = 0.0

    def lasts_s(self, action: Action) -> float:
        """Seconds of an action of this stage."""
        match action.kind:
            case "F":
                return self.forward_s
            case "B":
                return self.backward_s
            case "I":
                return self.backward_s - self.weight_s
            case "W":
                return self.weight_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What a schedule takes.

    Attributes:
        step_s: until the last rank is done.
        busy_s: per rank what it computes.
        end_s: per rank when its last action ends.
        span_s: per rank from its first action to the end of its last.
        bubble: share of all ranks' time in which they wait.
        in_flight: per stage the most micro-batches whose activations it holds at once.
        timeline: every action with its start and end, in an order that respects time per rank.
    """

    step_s: float
    busy_s: tuple[float, ...]
    end_s: tuple[float, ...]
    span_s: tuple[float, ...]
    bubble: float
    in_flight: tuple[int, ...]
    timeline: tuple[tuple[Action, float, float], ...]

    def finish_s(self, stage: int) -> float:
        """When a stage's last backward ends: from then on its gradients can be reduced."""
        return max((end for a, _, end in self.timeline if a.stage == stage), default=0.0)


def simulate(schedule: Schedule, stages: Sequence[StageSeconds]) -> Simulation:
    """Run a schedule on the clock.

    Args:
        schedule: see :mod:`autoshard.schedule`.
        stages: one entry per stage.

    Raises:
        OptionError: if the schedule is no valid one, or ``stages`` has another length.
    """
    if len(stages) != schedule.num_stages:
        raise OptionError(
            f"expected the seconds of {schedule.num_stages} stages but got {len(stages)}; "
            "give one StageSeconds per stage"
        )
    run = dry_run(schedule)
    home = schedule.homes
    num_ranks = len(schedule.ranks)
    first_s: list[float | None] = [None] * num_ranks
    free_s = [0.0] * num_ranks
    busy_s = [0.0] * num_ranks
    done_s: dict[Action, float] = {}
    timeline = []
    for action in run.order:
        stage, rank = action.stage, home[action.stage]
        start = free_s[rank]
        for other in needs(action, schedule.num_stages):
            sent = stages[min(stage, other.stage)].send_s if home[other.stage] != rank else 0.0
            start = max(start, done_s[other] + sent)
        lasts = stages[stage].lasts_s(action)
        free_s[rank] = start + lasts
        done_s[gradient(action) if action.kind == "B" else action] = start + lasts
        busy_s[rank] += lasts
        if first_s[rank] is None:
            first_s[rank] = start
        timeline.append((action, start, start + lasts))
    step_s = max(free_s)
    whole = step_s * num_ranks
    return Simulation(
        step_s=step_s, busy_s=tuple(busy_s), end_s=tuple(free_s),
        span_s=tuple(end - (start or 0.0) for start, end in zip(first_s, free_s, strict=True)),
        bubble=1 - sum(busy_s) / whole if whole else 0.0,
        in_flight=run.in_flight, timeline=tuple(timeline),
    )  # fmt: skip


def held_at_peak(
    schedule: Schedule, saved_bytes: Sequence[float], kept_bytes: Sequence[float] | None = None
) -> tuple[float, ...]:
    """Bytes that each stage holds for backward at the time when its rank holds most.

    Args:
        saved_bytes: per stage what one micro-batch leaves for backward.
        kept_bytes: per stage what of it (and of its gradients) remains from ``I`` to ``W``;
            ``None``: all of it.
    """
    kept_bytes = saved_bytes if kept_bytes is None else kept_bytes
    found = [0.0] * schedule.num_stages
    for actions in schedule.ranks:
        now = dict.fromkeys((a.stage for a in actions), 0.0)
        most = -1.0
        for action in actions:
            saved, kept = saved_bytes[action.stage], kept_bytes[action.stage]
            now[action.stage] += {"F": saved, "B": -saved, "I": kept - saved, "W": -kept}[
                action.kind
            ]
            if sum(now.values()) > most:
                most = sum(now.values())
                for stage, held in now.items():
                    found[stage] = held
    return tuple(found)


def bubble_share(num_stages: int, num_micro_batches: int) -> float:
    """``(p - 1) / (m + p - 1)``: what GPipe and 1F1B wait, with equal stages and free transfers."""
    return (num_stages - 1) / (num_micro_batches + num_stages - 1)


def step_bound_s(stages: Sequence[StageSeconds], num_micro_batches: int) -> float:
    """What no synchronous schedule with one stage per rank can beat.

    The slowest stage computes all micro-batches, after the first has come to it and before the
    last has gone back from it: ``max_s (m t_s + sum of the other stages before it)``.
    """
    times = [s.forward_s + s.backward_s for s in stages]
    bound = ahead = 0.0
    for stage, own in zip(stages, times, strict=True):
        bound = max(bound, ahead + num_micro_batches * own)
        ahead += stage.forward_s + stage.backward_s + 2 * stage.send_s
    return bound
