"""From class costs to the stage program of one configuration, and back to stages of segments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from autoshard.cost_models.costs import CostModel
from autoshard.cost_models.state import StateBytes
from autoshard.errors import OptionError
from autoshard.options import ASYNCHRONOUS
from autoshard.plan.class_costs import ClassCosts
from autoshard.plan.plan import Assignment
from autoshard.plan.priced_segments import PricedSegments
from autoshard.plan.recompute import MenuEntry
from autoshard.plan.replicated_choice import ReplicatedChoice
from autoshard.plan.request import Request
from autoshard.plan.scheduled_stages import (
    Counts,
    ScheduledProblem,
)
from autoshard.plan.space import Configuration
from autoshard.plan.stage_costs import StageCosts
from autoshard.plan.staged_plan import Beaten, Infeasible, StagedPlan, infeasible
from autoshard.plan.stages import (
    Run,
    StageChoice,
    StageProblem,
    Tie,
    evaluate_stages,
    split_stages,
)
from autoshard.plan.weight_split import WeightWork, weight_work
from autoshard.schedules import SCHEDULES, WeightSplit

WORTH_IT = 1e-3
"""A more complicated data-parallel mode must make a step faster by more than this share."""


def choose_stages(
    request: Request,
    configuration: Configuration,
    assignments: Mapping[str, Assignment],
    classes: Mapping[str, ClassCosts],
    costs: CostModel,
    *,
    exactly: bool = False,
    limit_s: float = float("inf"),
    modes: Collection[str] | None = None,
) -> StagedPlan | Infeasible | Beaten:
    """The fastest data-parallel mode and stage split that fits; modes are tried simplest first.

    Args:
        modes: those that may fit, if that is known.
        exactly: find out what is missing to the byte, which takes longer, where nothing fits.
        limit_s: slower plans are of no interest.
    """
    beaten: Beaten | None = None
    best: StagedPlan | None = None
    nearest: Infeasible | None = None
    for mode in configuration.data_parallel:
        if modes and mode not in modes:
            continue
        priced = "ddp" if mode in ASYNCHRONOUS else mode
        prices = StageCosts(request, configuration, classes, costs, priced)
        choice = _Choice(request, configuration, assignments, classes, prices)
        worth_s = min(limit_s, best.step_s * (1 - WORTH_IT) if best else limit_s)
        if choice.least_s() >= worth_s:
            beaten = beaten or choice.beaten(limit_s, unhindered=True)
            continue
        found = choice.run(exactly, worth_s)
        if isinstance(found, Beaten):
            beaten = choice.beaten(limit_s, unhindered=False)
        elif isinstance(found, StagedPlan):
            if best is None or found.step_s < best.step_s * (1 - WORTH_IT):
                best = found
        elif nearest is None or found.missing_bytes < nearest.missing_bytes:
            nearest = found
    found_one = best or beaten or nearest
    assert found_one is not None, "there is at least one mode"
    return found_one


@dataclass(slots=True)
class _Choice:
    """One configuration under one data-parallel mode."""

    request: Request
    configuration: Configuration
    assignments: Mapping[str, Assignment]
    classes: Mapping[str, ClassCosts]
    prices: StageCosts
    parts: PricedSegments = field(init=False)
    problem: StageProblem = field(init=False)

    def __post_init__(self) -> None:
        self.parts = PricedSegments(self.request, self.classes, self.prices)
        self.problem = self._problem()

    def least_s(self) -> float:
        """No split takes less, whatever memory it needs."""
        if self.configuration.workers:
            return 0.0  # replicas and their schedules have no such form
        p, runs = self.configuration.mesh.pp, self.problem.runs
        work_s = sum(run.count * min(c.seconds for c in run.menu) for run in runs)
        step_s = sum(run.count * run.step_s for run in runs)
        equal_s = (self.configuration.paces * work_s + step_s) / p
        return max(equal_s, self.configuration.least_s(work_s))

    def beaten(self, limit_s: float, *, unhindered: bool) -> Beaten:
        return Beaten(
            configuration=self.configuration, limit_s=limit_s, unhindered=unhindered
        )  # fmt: skip

    def run(self, exactly: bool, limit_s: float) -> StagedPlan | Infeasible | Beaten:
        pinned = self.request.constraints.stages
        if self.configuration.workers:
            return ReplicatedChoice(
                self.request, self.configuration, self.assignments, self.parts,
                self.problem.stage_bytes,
            ).run(pinned)  # fmt: skip
        if not SCHEDULES[self.configuration.schedule].closed_form:
            return self._scheduled(pinned, limit_s)
        if pinned is not None:
            return self._pinned(pinned)
        lacking = self._lacking_at_least()
        if lacking > 0 and not exactly:
            return replace(infeasible(self.configuration, lacking, 0), exact=False)
        split = split_stages(self.problem, limit_s=limit_s)
        if split.beaten:
            return self.beaten(limit_s, unhindered=False)
        if split.stages:
            return self._staged(split.stages, split.step_s, split.bound_s)
        if not split.missing_bytes:
            return self._too_few()
        missing = max(split.missing_bytes)
        return infeasible(self.configuration, missing, split.missing_bytes.index(missing))

    def _lacking_at_least(self) -> float:
        """Bytes that every stage lacks even if all were equal; a quick test."""
        least = sum(
            run.count * (run.parameter_bytes + min(c.saved_bytes for c in run.menu))
            for run in self.problem.runs
        )
        least += sum(tie.parameter_bytes for tie in self.problem.ties)
        least /= self.problem.num_stages
        return least + self.problem.stage_bytes - self.problem.memory_bytes

    # -- the problem ------------------------------------------------------------------------------

    def _problem(self) -> StageProblem:
        shared = (c for c in self.request.program.classes if c.kind == "shared")
        return StageProblem(
            runs=tuple(map(self._run_of, self.parts.groups)),
            num_stages=self.configuration.num_stages,
            num_micro_batches=self.configuration.num_micro_batches,
            memory_bytes=float(self.request.memory_bytes),
            schedule=self._closed_form(),
            ties=tuple(self._ties()),
            stage_bytes=float(
                sum(v.type.nbytes for c in shared for v in self.classes[c.name].graph.outputs)
            ),
        )

    def _closed_form(self) -> Literal["none", "gpipe", "1f1b"]:
        """The schedule whose closed form cuts are chosen by."""
        name = self.configuration.schedule
        return name if name in ("none", "gpipe", "1f1b") else "1f1b"  # type: ignore[return-value]

    def _run_of(self, group: Sequence[int]) -> Run:
        layer = self.parts.layer(group[0])
        return Run(
            count=len(group),
            menu=tuple(self.prices.choice(layer, entry) for entry in self.parts.menu(layer)),
            parameter_bytes=float(
                self.prices.state(*self.parts.own_types(group[0])).total + layer.buffer_bytes
            ),
            has_parameters=bool(layer.parameters),
            step_s=sum(self.prices.once_per_step(layer)),
            send_s=self.prices.send_s(self.parts.cuts[group[-1]]),
        )

    def _ties(self) -> Iterator[Tie]:
        for name, users in self.parts.tied.items():
            kind = self.parts.tied_type(name)
            if kind is not None:
                runs = tuple(
                    i for i, group in enumerate(self.parts.groups) if set(group) & set(users)
                )
                yield Tie(runs=runs, parameter_bytes=float(self.prices.state([kind]).total))

    # -- the answer -------------------------------------------------------------------------------

    def _staged(
        self, choices: tuple[StageChoice, ...], step_s: float, bound_s: float
    ) -> StagedPlan:
        stages, homes = self._segments(choices), self.configuration.homes
        used = [0.0] * self.configuration.mesh.pp
        for home, choice in zip(homes, choices, strict=True):
            used[home] += choice.memory_bytes
        return StagedPlan(
            program=self.request.program, configuration=self.configuration,
            data_parallel=self.prices.mode, assignments=self.assignments, classes=self.classes,
            stages=stages, choices=choices, state=tuple(self._states_of(stages)),
            transient_bytes=self.prices.transient_bytes,
            send_bytes=(*(self.parts.cuts[own[-1][0]] for own in stages[:-1]), 0),
            tails=tuple(map(self._tail, stages)), weight_s=(0.0,) * len(stages),
            split=WeightSplit(), step_s=step_s, bound_s=bound_s, peak_bytes=int(max(used)),
            ends_together=self.request.software.ends_together,
        )  # fmt: skip

    def _tail(self, stage: Sequence[tuple[int, MenuEntry]]) -> tuple[float, float]:
        pairs = [self.prices.once_per_step(self.parts.layer(index)) for index, _ in stage]
        return sum(p[0] for p in pairs), sum(p[1] for p in pairs)

    def _scheduled(
        self, pinned: Sequence[int] | None, limit_s: float
    ) -> StagedPlan | Infeasible | Beaten:
        """Stages of a schedule that is simulated."""
        configuration = self.configuration
        problem = ScheduledProblem(
            stages=self.problem, name=configuration.schedule, num_ranks=configuration.mesh.pp,
            work=tuple(self._work(group[0]) for group in self.parts.groups),
            virtual_stages=configuration.virtual_stages,
        )  # fmt: skip
        cuts = None if pinned is None else self._cuts_of(pinned)
        if problem.least_s(cuts) >= limit_s:
            return self.beaten(limit_s, unhindered=True)
        choices, lacking = problem.best(cuts)
        if not lacking:
            return self._too_few()
        if max(lacking) > 0:
            return infeasible(self.configuration, max(lacking), lacking.index(max(lacking)))
        if problem.least_of(choices) >= limit_s:
            return self.beaten(limit_s, unhindered=False)
        weight_s = tuple(problem.weight_s(choice) for choice in choices)
        staged = replace(self._staged(choices, 0.0, 0.0), weight_s=weight_s, split=problem.split)
        step_s, bound_s = staged.pipeline.step_s, max(self.least_s(), problem.least_s(cuts))
        return replace(staged, step_s=step_s, bound_s=min(step_s, bound_s))

    def _work(self, index: int) -> WeightWork:
        work = weight_work(self.parts.layer(index).graph, self.prices.costs)
        pace = self.configuration.pace(self.request.cluster.device)
        return replace(work, seconds=pace * work.seconds)

    def _too_few(self) -> Infeasible:
        return Infeasible(
            configuration=self.configuration, missing_bytes=float("inf"), stage=0,
            reason=f"{self.problem.num_stages} stages need as many parts with parameters",
        )  # fmt: skip

    def _segments(
        self, choices: Sequence[StageChoice]
    ) -> tuple[tuple[tuple[int, MenuEntry], ...], ...]:
        """The segments that counts by run and entry stand for."""
        taken = [0] * len(self.parts.groups)
        stages = []
        for choice in choices:
            own: list[tuple[int, MenuEntry]] = []
            for (run, entry), number in sorted(choice.counts.items()):
                group = self.parts.groups[run]
                menu = self.parts.menu(self.parts.layer(group[0]))
                own += [(i, menu[entry]) for i in group[taken[run] : taken[run] + number]]
                taken[run] += number
            stages.append(tuple(sorted(own, key=lambda pair: pair[0])))
        return tuple(stages)

    def _states_of(self, stages: Sequence[Sequence[tuple[int, MenuEntry]]]) -> Iterator[StateBytes]:
        """Of each stage; what a rank's stages share counts for the first of them."""
        seen: dict[int, set[str]] = {}
        for home, stage in zip(self.configuration.homes, stages, strict=True):
            indices = {index for index, _ in stage}
            own = {name for name, users in self.parts.tied.items() if indices & set(users)}
            both = [self.parts.own_types(index) for index in sorted(indices)]
            types = [t for own_types, _ in both for t in own_types]
            experts = [t for _, own_experts in both for t in own_experts]
            kinds = (self.parts.tied_type(n) for n in sorted(own - seen.setdefault(home, set())))
            seen[home] |= own
            types += [kind for kind in kinds if kind is not None]
            yield self.prices.state(types, experts)

    def _pinned(self, pinned: Sequence[int]) -> StagedPlan | Infeasible:
        """Stages of given lengths; each takes the first recompute entry under which it fits."""
        order = self._order(pinned)
        counts: list[dict[tuple[int, int], int]] = []
        start = 0
        for stage, length in enumerate(pinned):
            runs = order[start : start + length]
            start += length
            own, lacking = self._first_fit(runs, counts, len(pinned) - stage - 1)
            if lacking > 0:
                return infeasible(self.configuration, lacking, stage)
            counts.append(own)
        step_s, choices = evaluate_stages(self.problem, counts)
        unhindered = [
            Counter((run, 0) for run, _ in own.elements()) for own in map(Counter, counts)
        ]
        return self._staged(choices, step_s, evaluate_stages(self.problem, unhindered)[0])

    def _order(self, pinned: Sequence[int]) -> list[int]:
        """The run of every segment, for stages of these lengths."""
        order = [run for run, group in enumerate(self.parts.groups) for _ in group]
        fits = sum(pinned) == len(order) and len(pinned) == self.problem.num_stages
        if not fits or min(pinned) < 1:
            raise OptionError(
                f"constraint stages={tuple(pinned)} expects {self.problem.num_stages} positive "
                f"numbers that add up to {len(order)} segments; a plan without this pin lists them"
            )
        return order

    def _cuts_of(self, pinned: Sequence[int]) -> list[Counts]:
        """Numbers of segments by run, for stages of these lengths."""
        order = iter(self._order(pinned))
        stages = [Counter(next(order) for _ in range(length)) for length in pinned]
        return [tuple(own[run] for run in range(len(self.parts.groups))) for own in stages]

    def _first_fit(
        self, runs: Sequence[int], before: Sequence[dict[tuple[int, int], int]], after: int
    ) -> tuple[dict[tuple[int, int], int], float]:
        """The entries of one stage, and the bytes that it lacks even under the last of them."""
        lacking = 0.0
        own: dict[tuple[int, int], int] = {}
        for entry in range(max((len(self.problem.runs[r].menu) for r in runs), default=1)):
            own = {}
            for run in runs:
                slot = (run, min(entry, len(self.problem.runs[run].menu) - 1))
                own[slot] = own.get(slot, 0) + 1
            trial = [*before, own, *({} for _ in range(after))]
            used = evaluate_stages(self.problem, trial)[1][len(before)].memory_bytes
            lacking = used - self.problem.memory_bytes
            if lacking <= 0:
                break
        return own, lacking
