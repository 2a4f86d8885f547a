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
from autoshard.schedule import Action, Kind, Schedule, dry_run, gradient, needs


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


@dataclass(frozen=True, slots=True)
class Course:
    """A schedule's actions in an order that respects what each waits for, ready for the clock.

    Attributes:
        num_ranks: of the pipeline.
        actions: in that order.
        steps: of each its rank, where :func:`_durations` has its seconds, and what it needs: the
            index of an action, and the stage whose transfer lies in between (-1: none).
        in_flight: see :class:`Simulation`.
    """

    num_ranks: int
    actions: tuple[Action, ...]
    steps: tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]
    in_flight: tuple[int, ...]

    @staticmethod
    def of(schedule: Schedule) -> Course:
        """Dry-run a schedule.

        Raises:
            OptionError: it is no valid one.
        """
        run = dry_run(schedule)
        home = schedule.homes
        place: dict[Action, int] = {}
        steps = []
        for index, action in enumerate(run.order):
            rank = home[action.stage]
            needed = tuple(
                (place[o], -1 if home[o.stage] == rank else min(action.stage, o.stage))
                for o in needs(action, schedule.num_stages)
            )
            steps.append((rank, _KINDS * action.stage + _PLACE[action.kind], needed))
            place[gradient(action) if action.kind == "B" else action] = index
        return Course(len(schedule.ranks), run.order, tuple(steps), run.in_flight)

    def clocked(self, stages: Sequence[StageSeconds]) -> tuple[list[float], list[float]]:
        """When each rank begins its first action, and when each action ends."""
        durations = _durations(stages)
        sends = [*(s.send_s for s in stages), 0.0]  # -1 is the last
        free_s = [0.0] * self.num_ranks
        first_s: list[float | None] = [None] * self.num_ranks
        ends = [0.0] * len(self.steps)
        for index, (rank, duration, needed) in enumerate(self.steps):
            start = free_s[rank]
            for other, sender in needed:
                arrives = ends[other] + sends[sender]
                if arrives > start:
                    start = arrives
            if first_s[rank] is None:
                first_s[rank] = start
            free_s[rank] = ends[index] = start + durations[duration]
        return [start or 0.0 for start in first_s], ends


_PLACE: dict[Kind, int] = {"F": 0, "B": 1, "I": 2, "W": 3}
_KINDS = len(_PLACE)


def _durations(stages: Sequence[StageSeconds]) -> list[float]:
    """Of every kind of action of every stage."""
    return [s.lasts_s(Action(0, kind, 0)) for s in stages for kind in _PLACE]


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
    course = Course.of(schedule)
    first_s, ends = course.clocked(stages)
    durations = _durations(stages)
    free_s, busy_s = [0.0] * course.num_ranks, [0.0] * course.num_ranks
    timeline = []
    for action, end, (rank, duration, _) in zip(course.actions, ends, course.steps, strict=True):
        free_s[rank] = end
        busy_s[rank] += durations[duration]
        timeline.append((action, end - durations[duration], end))
    step_s = max(free_s)
    whole = step_s * course.num_ranks
    return Simulation(
        step_s=step_s, busy_s=tuple(busy_s), end_s=tuple(free_s),
        span_s=tuple(end - start for start, end in zip(first_s, free_s, strict=True)),
        bubble=1 - sum(busy_s) / whole if whole else 0.0,
        in_flight=course.in_flight, timeline=tuple(timeline),
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
