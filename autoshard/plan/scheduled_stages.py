"""Stages of a pipeline whose schedule is simulated: several chunks per rank, or a split backward.

The stage program (:mod:`autoshard.plan.stages`) knows the closed form of one stage per rank and
full backwards, and there each stage has a device's memory to itself. Here the chunks of a rank
share it. So the cuts are those of the stage program for stages of equal length, all without
recomputation or all with the most of it; under the least recomputation with which every rank's
chunks fit together, each rank then takes the least that its own chunks need. The price is what the
simulated schedule takes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from autoshard.cost_models.pipeline import Course, StageSeconds, held_at_peak
from autoshard.plan.stage_bounds import Looped, least_of
from autoshard.plan.stage_problem import Slot, StageProblem
from autoshard.plan.stages import StageChoice, evaluate_stages, split_stages
from autoshard.plan.weight_split import WeightWork
from autoshard.schedule import Schedule
from autoshard.schedules import SCHEDULES, WeightSplit, by_name, homes

Counts = tuple[int, ...]
"""Segments of each run in one stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSeconds:
    """What a pipeline's step takes.

    Attributes:
        step_s: with the work after the last backward.
        sends_s: the part that transfers make it longer by.
        slowest: the rank that computes most.
        busy_s: what that rank computes.
    """

    step_s: float
    sends_s: float
    slowest: int
    busy_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """A schedule by name, with what it is made for.

    Attributes:
        together: all ranks end a step together, whatever the schedule allows.
    """

    schedule: str
    num_ranks: int
    num_micro_batches: int
    virtual_stages: int = 1
    split: WeightSplit | None = None
    together: bool = True

    def of(self, num_micro_batches: int) -> Pipeline:
        """The same for so many micro-batches; equal if the schedules are."""
        split = self.split if SCHEDULES[self.schedule].splits else None
        return replace(self, num_micro_batches=num_micro_batches, split=split)

    @property
    def few(self) -> int:
        """Micro-batches after which a schedule with a flush repeats itself; of others all."""
        m, p = self.num_micro_batches, self.num_ranks
        return min(m, 4 * p + m % p) if SCHEDULES[self.schedule].flushes else m


@functools.lru_cache(maxsize=64)
def _made(pipeline: Pipeline) -> Schedule:
    return by_name(
        pipeline.schedule, pipeline.num_ranks, pipeline.num_micro_batches,
        pipeline.virtual_stages, pipeline.split,
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _course(pipeline: Pipeline) -> Course:
    """Prepared once for all the seconds that its stages may take."""
    return Course.of(_made(pipeline))


def pipeline_seconds(
    pipeline: Pipeline, stages: Sequence[StageSeconds], tail_s: Sequence[float]
) -> PipelineSeconds:
    """Simulate a step.

    Of many micro-batches the first ones are simulated: what later ones add repeats itself.

    Args:
        tail_s: per stage what follows its rank's last backward: reduction, optimizer.
    """
    p, m = pipeline.num_ranks, pipeline.num_micro_batches
    tails = [0.0] * p
    busy_s = [0.0] * p
    kind = SCHEDULES[pipeline.schedule]
    for stage, home in enumerate(homes(pipeline.schedule, p, pipeline.virtual_stages)):
        tails[home] += tail_s[stage]
        busy_s[home] += m * (stages[stage].forward_s + stages[stage].backward_s)

    def simulated_s(times: Sequence[StageSeconds], num_micro_batches: int) -> float:
        course = _course(pipeline.of(num_micro_batches))
        begins, ends = course.clocked(times)
        last = [0.0] * p
        for (rank, _, _), end in zip(course.steps, ends, strict=True):
            last[rank] = end
        zeros = [0.0] * p if kind.flushes or pipeline.together else begins
        return max(e - zero + tail for e, zero, tail in zip(last, zeros, tails, strict=True))

    def step_s(times: Sequence[StageSeconds]) -> float:
        few, period = pipeline.few, 2 * p
        if m <= few + period:
            return simulated_s(times, m)
        begun, more = simulated_s(times, few), simulated_s(times, few + period)
        return more + (m - few - period) / period * (more - begun)

    whole_s = step_s(stages)
    slowest = max(range(p), key=lambda r: busy_s[r] + tails[r])
    return PipelineSeconds(
        step_s=whole_s, slowest=slowest, busy_s=busy_s[slowest],
        sends_s=max(0.0, whole_s - step_s([replace(s, send_s=0.0) for s in stages])),
    )  # fmt: skip


def stage_seconds(choices: Sequence[StageChoice], weight_s: Sequence[float]) -> list[StageSeconds]:
    """What the simulation needs of each stage."""
    return [
        StageSeconds(
            forward_s=c.forward_s, backward_s=c.backward_s, send_s=c.send_s, weight_s=own
        )
        for c, own in zip(choices, weight_s, strict=True)
    ]  # fmt: skip


@dataclass(slots=True, kw_only=True)
class ScheduledProblem:
    """A stage program whose stages lie on ranks as a schedule says.

    Attributes:
        stages: of all chunks; its own schedule says nothing.
        name: of the schedule.
        work: by run, what can be put off of one segment's backward.
        split: how backward falls into two parts, on average.
        schedule: fitted to that; the first micro-batches of it, until it repeats itself.
    """

    stages: StageProblem
    name: str
    num_ranks: int
    virtual_stages: int
    work: tuple[WeightWork, ...]
    split: WeightSplit = field(init=False)
    schedule: Schedule = field(init=False)
    _by_entry: dict[int, list[Counts] | None] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.split = self._split()
        pipeline = Pipeline(
            schedule=self.name, num_ranks=self.num_ranks, split=self.split,
            num_micro_batches=self.stages.num_micro_batches, virtual_stages=self.virtual_stages,
        )  # fmt: skip
        self.schedule = _made(pipeline.of(pipeline.few))

    def _split(self) -> WeightSplit:
        runs = self.stages.runs
        weight_s = sum(run.count * w.seconds for run, w in zip(runs, self.work, strict=True))
        kept = sum(run.count * w.bytes_kept for run, w in zip(runs, self.work, strict=True))
        whole_s = sum(run.count * run.menu[0].seconds for run in runs)
        saved = sum(run.count * run.menu[0].saved_bytes for run in runs)
        if not weight_s or not kept or not saved:
            return WeightSplit()
        return WeightSplit(patience=(whole_s - weight_s) / weight_s, kept=kept / saved)

    def best(
        self, pinned: Sequence[Counts] | None
    ) -> tuple[tuple[StageChoice, ...], tuple[float, ...]]:
        """The stages, and per rank the bytes that it lacks; nothing if there are too few runs.

        Args:
            pinned: per stage its segments of each run; ``None``: to be chosen.
        """
        last = max(len(run.menu) for run in self.stages.runs) - 1
        leanest = pinned or self._cuts(last)
        if leanest is None:
            return (), ()
        choices = self._placed(leanest, [last] * self.num_ranks)
        lacking = self._lacking(choices)
        if max(lacking) > 0:
            return choices, lacking
        for entry in range(last + 1):
            cuts = pinned or self._cuts(entry)
            if cuts is None:
                return (), ()
            choices = self._placed(cuts, [entry] * self.num_ranks)
            lacking = self._lacking(choices)
            if max(lacking) <= 0:
                choices = self._placed(cuts, self._least_entries(cuts, entry))
                return choices, self._lacking(choices)
        return choices, lacking

    def least_s(self, pinned: Sequence[Counts] | None) -> float:
        """No step takes less with any of the cuts, whatever is recomputed.

        A rank computes all micro-batches; more is known where all ranks wait for each other at the
        end of a step (:func:`autoshard.plan.stage_bounds.least_of`).
        """
        last = max(len(run.menu) for run in self.stages.runs) - 1
        found = [pinned] if pinned else [self._cuts(0), self._cuts(last)]
        return min((self._least_of(cuts) for cuts in found if cuts is not None), default=0.0)

    def _least_of(self, cuts: Sequence[Counts]) -> float:
        counts = [
            {self._fastest(r): number for r, number in enumerate(own) if number} for own in cuts
        ]
        return self.least_of(evaluate_stages(self.stages, counts)[1])

    def least_of(self, choices: Sequence[StageChoice]) -> float:
        """No step with these stages takes less."""
        computes_s, tail_s = [0.0] * self.num_ranks, [0.0] * self.num_ranks
        for home, choice in zip(self.schedule.homes, choices, strict=True):
            computes_s[home] += choice.forward_s + choice.backward_s
            tail_s[home] += choice.step_s
        m = self.stages.num_micro_batches
        looped = Looped(self.name, self.num_ranks, m, self.virtual_stages)
        if looped.waits:
            return least_of(looped, stage_seconds(choices, [0.0] * len(choices)), tail_s)
        return max(m * own + tail for own, tail in zip(computes_s, tail_s, strict=True))

    def _fastest(self, run: int) -> Slot:
        menu = self.stages.runs[run].menu
        return run, min(range(len(menu)), key=lambda entry: menu[entry].seconds)

    def weight_s(self, choice: StageChoice) -> float:
        """The part of a stage's backward that makes gradients of weights and can be put off."""
        if self._recomputes(choice):
            return 0.0
        return sum(k * self.work[r].seconds for (r, _), k in choice.counts.items())

    def _recomputes(self, choice: StageChoice) -> bool:
        return any(self.stages.runs[r].menu[e].recomputes for r, e in choice.counts)

    def _cuts(self, entry: int) -> list[Counts] | None:
        """Stages of equal length, as near as may be, without recompute or with the most of it.

        What lies between recomputes what is cheap, and is cut as if it did not.
        """
        last = max(len(run.menu) for run in self.stages.runs) - 1
        entry = entry if entry == last else 0
        if entry not in self._by_entry:
            self._by_entry[entry] = self._cut(entry)
        return self._by_entry[entry]

    def _cut(self, entry: int) -> list[Counts] | None:
        runs = tuple(
            replace(run, menu=(run.menu[min(entry, len(run.menu) - 1)],))
            for run in self.stages.runs
        )
        split = split_stages(
            replace(self.stages, runs=runs, memory_bytes=float("inf"), schedule="1f1b")
        )
        if not split.stages:
            return None
        return [tuple(s.counts.get((r, 0), 0) for r in range(len(runs))) for s in split.stages]

    def _least_entries(self, cuts: Sequence[Counts], most: int) -> list[int]:
        """Per rank the first entry under which its chunks fit; ranks do not share memory."""
        entries = [most] * self.num_ranks
        for entry in reversed(range(most)):
            lacking = self._lacking(self._placed(cuts, [entry] * self.num_ranks))
            entries = [
                entry if own <= 0 else before for own, before in zip(lacking, entries, strict=True)
            ]
        return entries

    def _placed(self, cuts: Sequence[Counts], entries: Sequence[int]) -> tuple[StageChoice, ...]:
        """The stages under an entry per rank, each with its part of its rank's memory."""
        homes = self.schedule.homes
        counts: list[Mapping[Slot, int]] = [
            {
                (r, min(entries[homes[stage]], len(self.stages.runs[r].menu) - 1)): number
                for r, number in enumerate(own)
                if number
            }
            for stage, own in enumerate(cuts)
        ]
        _, choices = evaluate_stages(self.stages, counts)
        memory = self._memory(choices)
        return tuple(
            replace(choice, memory_bytes=bytes_)
            for choice, bytes_ in zip(choices, memory, strict=True)
        )

    def _lacking(self, choices: Sequence[StageChoice]) -> tuple[float, ...]:
        used = [0.0] * self.num_ranks
        for home, choice in zip(self.schedule.homes, choices, strict=True):
            used[home] += choice.memory_bytes
        return tuple(bytes_ - self.stages.memory_bytes for bytes_ in used)

    def _memory(self, choices: Sequence[StageChoice]) -> list[float]:
        """Each stage's part of its rank's peak; what a rank has once counts for its first stage."""
        runs, homes = self.stages.runs, self.schedule.homes
        saved = [
            sum(k * runs[r].menu[e].saved_bytes for (r, e), k in c.counts.items()) for c in choices
        ]
        kept = [
            0.0
            if self._recomputes(c)
            else sum(k * self.work[r].bytes_kept for (r, _), k in c.counts.items())
            for c in choices
        ]
        held = held_at_peak(self.schedule, saved, kept)
        workspace = [
            max((runs[r].menu[e].workspace_bytes for r, e in c.counts), default=0.0)
            for c in choices
        ]
        memory = []
        for stage, choice in enumerate(choices):
            others = [s for s in range(len(choices)) if homes[s] == homes[stage]]
            present = {r for r, _ in choice.counts}
            before = {r for s in others if s < stage for r, _ in choices[s].counts}
            own = sum(k * runs[r].parameter_bytes for (r, _), k in choice.counts.items())
            own += sum(
                tie.parameter_bytes
                for tie in self.stages.ties
                if present & set(tie.runs) and not before & set(tie.runs)
            )
            if stage == others[0]:
                own += self.stages.stage_bytes + max(workspace[s] for s in others)
            memory.append(own + held[stage])
        return memory
