"""Cutting a program into pipeline stages, with what each of them recomputes.

Variables
    ``n[r, e, s]`` integer: so many segments of run ``r`` are in stage ``s`` under entry ``e`` of
    the run's recompute menu.
Objective, seconds of one step with ``M`` micro-batches
    ``sum_s seconds[s] + (M - 1) max_s seconds[s] + 2 sum sends + max_s step[s]``: the first
    micro-batch passes through all stages and back, the others follow at the pace of the slowest
    stage, and what a stage does after its last backward comes on top. That is the closed form of
    GPipe and of 1F1B with flush for equal stages, and the leading term otherwise;
    :func:`autoshard.cost_models.pipeline.simulate` gives the exact figure of a schedule.
Constraints
    every segment is in one stage, and stages are consecutive; each has a segment with parameters;
    parameters, ties, activations of the micro-batches in flight and the largest workspace of a
    stage fit into the device.

[Note: bottleneck paths] Stated as one integer program this has weak bounds: 126 layers on 16
stages were still 4 % apart after 10 s in HiGHS and in CP-SAT. It falls apart, however, into a
knapsack per content of a stage (:mod:`autoshard.plan.stage_mixes`) and a shortest path through
the positions where stages begin (:mod:`autoshard.plan.stage_paths`). Its two maxima are bounds on
single arcs, so they are found by solving the path under ever lower bounds, until what could still
be gained is less than what was found. The result is the optimum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from autoshard.errors import OptionError
from autoshard.plan.solver import INFINITY, Floats, Status
from autoshard.plan.stage_mixes import Content, Mixes
from autoshard.plan.stage_paths import Paths
from autoshard.plan.stage_problem import Choice, Run, Slot, StageProblem, Tie

__all__ = [
    "Choice",
    "Run",
    "Slot",
    "StageChoice",
    "StageProblem",
    "StageSplit",
    "Tie",
    "evaluate_stages",
    "split_stages",
]


_FEW_MIXES, _MANY_MIXES = 128, 512
"""Mixes kept per content, at first and when that did not settle it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChoice:
    """One stage: how many segments of each run under which entry, and what that takes."""

    counts: Mapping[Slot, int]
    forward_s: float
    backward_s: float
    send_s: float
    step_s: float
    memory_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSplit:
    """The best split, or why there is none.

    Attributes:
        stages: empty if infeasible.
        bound_s: no split within the memory takes less, by the same formula.
        status: ``feasible`` if mixes were thinned out (see :mod:`autoshard.plan.stage_mixes`) and
            the optimum may have been among them.
        missing_bytes: if infeasible for memory, what each stage lacks where the worst of them lacks
            least; empty if there are fewer segments with parameters than stages.
        beaten: there is no split within the time limit that was given, whatever the reason.
    """

    status: Status
    stages: tuple[StageChoice, ...]
    step_s: float
    bound_s: float
    missing_bytes: tuple[float, ...] = ()
    beaten: bool = False

    @property
    def gap(self) -> float:
        return (self.step_s - self.bound_s) / self.step_s if self.stages else INFINITY


def split_stages(
    problem: StageProblem, *, gap: float = 1e-4, limit_s: float = INFINITY
) -> StageSplit:
    """The split with the shortest step among those that fit into memory.

    Args:
        gap: a split that is known to be so close to the optimum, relatively, is good enough.
        limit_s: slower splits are of no interest: that there is no faster one is found out sooner.

    Raises:
        OptionError: for a schedule that is unknown, or numbers of stages or micro-batches below 1.
    """
    _validate(problem)
    limit_s = min(limit_s, _even_s(problem) * (1 + 1e-9))
    few = Mixes(problem, most=_FEW_MIXES, limit_s=_slowest_s(problem, limit_s))
    split, thinned = _solve(problem, few)
    if not thinned or split.gap <= gap or not split.stages:
        return split
    # Now it is known how slow a stage of a better split can be, which leaves few contents.
    limit_s = _slowest_s(problem, min(limit_s, split.step_s))
    better, _ = _solve(problem, Mixes(problem, most=_MANY_MIXES, limit_s=limit_s))
    best = min((split, better), key=lambda s: s.step_s)
    bound_s = min(best.step_s, max(split.bound_s, better.bound_s))
    exact = bound_s >= best.step_s * (1 - 1e-9)
    return replace(best, bound_s=bound_s, status="optimal" if exact else "feasible")


def _even_s(problem: StageProblem) -> float:
    """Seconds of a step whose stages have as many segments each and recompute nothing that makes
    them slower; infinite if that is no split, or does not fit."""
    order = [r for r, run in enumerate(problem.runs) for _ in range(run.count)]
    fastest = [min(enumerate(run.menu), key=lambda e: e[1].seconds)[0] for run in problem.runs]
    places = [len(order) * s // problem.num_stages for s in range(problem.num_stages + 1)]
    counts = [Counter((r, fastest[r]) for r in order[a:b]) for a, b in pairwise(places)]
    if not all(any(problem.runs[r].has_parameters for r, _ in own) for own in counts):
        return INFINITY
    step_s, stages = evaluate_stages(problem, counts)
    fits = all(stage.memory_bytes <= problem.memory_bytes for stage in stages)
    return step_s if fits else INFINITY


def _slowest_s(problem: StageProblem, limit_s: float) -> float:
    """No stage of a split that takes less than ``limit_s`` takes longer than this."""
    fastest_s = sum(run.count * min(c.seconds for c in run.menu) for run in problem.runs)
    if problem.num_micro_batches > 1:
        limit_s = (limit_s - fastest_s) / (problem.num_micro_batches - 1)
    return limit_s * (1 + 1e-9) if limit_s > 0 else 0.0


def _solve(problem: StageProblem, mixes: Mixes) -> tuple[StageSplit, bool]:
    """The best split that these mixes allow, and whether some of them were thinned out."""
    paths = _paths(problem, mixes)
    cuts = _shortest_step(paths, problem.num_micro_batches)
    bound_s = INFINITY
    if mixes.thinned:
        relaxed = _paths(problem, mixes, optimistic=True)
        fastest = _shortest_step(relaxed, problem.num_micro_batches)
        if fastest is not None:
            total, slowest, tail = relaxed.parts(fastest)
            bound_s = total + (problem.num_micro_batches - 1) * slowest + tail
    if cuts is None:
        beaten = mixes.limit_s < INFINITY
        missing = () if beaten else _missing(problem, mixes)
        return replace(_nothing(missing, bound_s), beaten=beaten), bool(mixes.thinned)
    counts = []
    for stage, content in enumerate(mixes.content(a, b) for a, b in pairwise(cuts)):
        mix = mixes.fastest(content, problem.in_flight(stage))
        assert mix is not None, "the path has only arcs with a mix"
        counts.append(mix.counts)
    step_s, stages = evaluate_stages(problem, counts)
    exact = bound_s >= step_s * (1 - 1e-9)
    split = StageSplit(
        status="optimal" if exact else "feasible",
        stages=stages,
        step_s=step_s,
        bound_s=min(bound_s, step_s),
    )
    return split, bool(mixes.thinned)


def _nothing(missing_bytes: tuple[float, ...], bound_s: float) -> StageSplit:
    return StageSplit(
        status="infeasible", stages=(), step_s=INFINITY, bound_s=bound_s,
        missing_bytes=missing_bytes,
    )  # fmt: skip


def evaluate_stages(
    problem: StageProblem, counts: Sequence[Mapping[Slot, int]]
) -> tuple[float, tuple[StageChoice, ...]]:
    """Seconds of a step and the stages of a given split: the program's own objective, directly."""
    stages = []
    for stage, own in enumerate(counts):
        entries = {
            slot: (problem.runs[slot[0]], problem.runs[slot[0]].menu[slot[1]], number)
            for slot, number in own.items()
            if number
        }
        present = {r for r, _ in entries}
        saved = sum(k * e.saved_bytes for _, e, k in entries.values())
        last = stage == len(counts) - 1
        stages.append(
            StageChoice(
                counts={slot: k for slot, k in own.items() if k},
                forward_s=sum(k * e.forward_s for _, e, k in entries.values()),
                backward_s=sum(k * e.backward_s for _, e, k in entries.values()),
                send_s=0.0 if last or not present else problem.runs[max(present)].send_s,
                step_s=sum(k * run.step_s for run, _, k in entries.values()),
                memory_bytes=problem.stage_bytes
                + sum(k * run.parameter_bytes for run, _, k in entries.values())
                + sum(t.parameter_bytes for t in problem.ties if present & set(t.runs))
                + problem.in_flight(stage) * saved
                + max((e.workspace_bytes for _, e, _ in entries.values()), default=0.0),
            )
        )
    seconds = [s.forward_s + s.backward_s for s in stages]
    step_s = sum(seconds) + (problem.num_micro_batches - 1) * max(seconds)
    step_s += 2 * sum(s.send_s for s in stages) + max(s.step_s for s in stages)
    return step_s, tuple(stages)


def _validate(problem: StageProblem) -> None:
    if problem.schedule not in {"none", "gpipe", "1f1b"}:
        raise OptionError(
            f"schedule expects none, gpipe or 1f1b but got {problem.schedule!r}; name one of them"
        )
    for name in ("num_stages", "num_micro_batches"):
        if getattr(problem, name) < 1:
            raise OptionError(
                f"{name} expects a positive number but got {getattr(problem, name)}; "
                "ask for 1 or more"
            )


def _paths(problem: StageProblem, mixes: Mixes, *, optimistic: bool = False) -> Paths:
    """Arcs priced by their fastest mix, or by less than that where mixes were thinned out."""

    def price(content: Content, in_flight: Floats) -> Floats:
        seconds = mixes.seconds(content, in_flight)
        if optimistic and content in mixes.thinned and mixes.has_parameters(content):
            least = np.where(mixes.fits(content, in_flight), mixes.least_s(content), INFINITY)
            return np.minimum(least, seconds)
        return seconds

    return Paths.of(problem, mixes, price)


def _shortest_step(paths: Paths, num_micro_batches: int) -> list[int] | None:
    """The cuts of the shortest step; see the note on bottleneck paths."""
    least_tail = paths.least_tail()
    best, best_s = None, INFINITY
    limit = INFINITY
    while (cuts := _under_tail(paths, num_micro_batches, limit)) is not None:
        total, slowest, tail = paths.parts(cuts)
        pace_s = total + (num_micro_batches - 1) * slowest
        if pace_s + tail < best_s:
            best, best_s = cuts, pace_s + tail
        # A lower limit on the tail cannot make the rest shorter.
        if pace_s + least_tail >= best_s:
            break
        limit = float(np.nextafter(tail, -INFINITY))
    return best


def _under_tail(paths: Paths, num_micro_batches: int, tail_s: float) -> list[int] | None:
    """Cuts of least ``sum + (M - 1) max`` among arcs whose tail keeps within a limit."""
    cuts = paths.shortest(INFINITY, tail_s)
    if cuts is None:
        return None
    least, weight = paths.least_pace(tail_s), num_micro_batches - 1
    least_total = paths.parts(cuts)[0]
    best = paths.shortest(least, tail_s)
    assert best is not None, "the least limit has a path"
    total, slowest, _ = paths.parts(best)
    best_s = total + weight * slowest
    limit = (best_s - least_total) / weight if weight else INFINITY
    while (cuts := paths.shortest(limit, tail_s)) is not None:
        total, slowest, _ = paths.parts(cuts)
        if total + weight * slowest < best_s:
            best, best_s = cuts, total + weight * slowest
        # Lower limits on the pace give larger sums.
        if total + weight * least >= best_s:
            break
        limit = min(float(np.nextafter(slowest, -INFINITY)), (best_s - total) / weight)
    return best


def _missing(problem: StageProblem, mixes: Mixes) -> tuple[float, ...]:
    """Bytes that each stage lacks if the worst of them is to lack least.

    Empty if memory is not the reason.
    """

    def lack(content: Content, in_flight: Floats) -> Floats:
        if not mixes.has_parameters(content):
            return np.full(len(in_flight), INFINITY)
        return np.maximum(0.0, mixes.least_bytes(content, in_flight) - problem.memory_bytes)

    paths = Paths.of(problem, mixes, lack, stop_early=False)
    cuts = paths.shortest(paths.least_pace(INFINITY), INFINITY)
    return () if cuts is None else tuple(paths.along(cuts))
