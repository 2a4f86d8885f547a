"""From class costs to the stage program of one configuration, and back to stages of segments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal

from autoshard.cost_models.costs import CostModel
from autoshard.cost_models.state import StateBytes
from autoshard.errors import OptionError
from autoshard.ir import Program, TensorType
from autoshard.plan.class_costs import ClassCosts
from autoshard.plan.plan import Assignment
from autoshard.plan.recompute import MenuEntry
from autoshard.plan.request import Request
from autoshard.plan.scheduled_stages import (
    Counts,
    Pipeline,
    PipelineSeconds,
    ScheduledProblem,
    pipeline_seconds,
    stage_seconds,
)
from autoshard.plan.space import Configuration
from autoshard.plan.stage_costs import StageCosts, cut_bytes, tied_names
from autoshard.plan.stages import (
    Run,
    StageChoice,
    StageProblem,
    Tie,
    evaluate_stages,
    split_stages,
)
from autoshard.plan.weight_split import WeightWork, weight_work
from autoshard.report.units import nbytes
from autoshard.schedules import SCHEDULES, WeightSplit

WORTH_IT = 1e-3
"""A more complicated data-parallel mode must make a step faster by more than this share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedPlan:
    """The best split of one configuration.

    Attributes:
        stages: per stage the (segment index, menu entry) of its segments, in order.
        choices: what the stage program says of each stage.
        state: of each stage's parameters, at rest.
        transient_bytes: of parameters and gradients on their way, on every stage.
        tails: per stage the seconds of gradient reduction and of the optimizer, once per step.
        weight_s: per stage the part of backward that makes gradients of weights, where the schedule
            puts it off.
        split: what the schedule was fitted to.
        step_s: what plans are compared by.
        bound_s: no split of the configuration takes less, under this sharding.
    """

    program: Program
    configuration: Configuration
    data_parallel: str
    assignments: Mapping[str, Assignment]
    classes: Mapping[str, ClassCosts]
    stages: tuple[tuple[tuple[int, MenuEntry], ...], ...]
    choices: tuple[StageChoice, ...]
    state: tuple[StateBytes, ...]
    transient_bytes: int
    send_bytes: tuple[int, ...]
    tails: tuple[tuple[float, float], ...]
    weight_s: tuple[float, ...]
    split: WeightSplit
    step_s: float
    bound_s: float
    peak_bytes: int

    @property
    def predicted_s(self) -> float:
        """What a step takes when its schedule is simulated."""
        closed_form = SCHEDULES[self.configuration.schedule].closed_form
        return self.pipeline.step_s if closed_form else self.step_s

    @property
    def pipeline(self) -> PipelineSeconds:
        """What its schedule takes, simulated."""
        c = self.configuration
        return pipeline_seconds(
            Pipeline(
                schedule=c.schedule, num_ranks=c.mesh.pp, num_micro_batches=c.num_micro_batches,
                virtual_stages=c.virtual_stages, split=self.split,
            ),
            stage_seconds(self.choices, self.weight_s),
            [sum(tail) for tail in self.tails],
        )  # fmt: skip

    @property
    def recomputes(self) -> bool:
        """Whether any segment runs again in backward, which only lack of memory asks for."""
        return any(entry.mode != "none" for stage in self.stages for _, entry in stage)

    def class_of(self, index: int) -> ClassCosts:
        """Costs of the segment with this index."""
        return self.classes[self.program.segments[index].layer.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Infeasible:
    """Why a configuration has no plan.

    Attributes:
        missing_bytes: what the worst stage lacks; infinite if bytes are not the reason.
        exact: a device with so much more memory would do; else it may lack more than that.
    """

    configuration: Configuration
    missing_bytes: float
    stage: int
    reason: str
    exact: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Beaten:
    """That a configuration has no plan within a time limit.

    Attributes:
        unhindered: it would not even with all the memory that it wants.
    """

    configuration: Configuration
    limit_s: float
    unhindered: bool


def choose_stages(
    request: Request,
    configuration: Configuration,
    assignments: Mapping[str, Assignment],
    classes: Mapping[str, ClassCosts],
    costs: CostModel,
    *,
    exactly: bool = False,
    limit_s: float = float("inf"),
) -> StagedPlan | Infeasible | Beaten:
    """The fastest data-parallel mode and stage split that fits; modes are tried simplest first.

    Args:
        exactly: find out what is missing to the byte, which takes longer, where nothing fits.
        limit_s: slower plans are of no interest.
    """
    beaten: Beaten | None = None
    best: StagedPlan | None = None
    nearest: Infeasible | None = None
    for mode in configuration.data_parallel:
        prices = StageCosts(request, configuration, classes, costs, mode)
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
    """One configuration under one data-parallel mode.

    Attributes:
        groups: segments of each run, by index.
        cuts: bytes that pass each cut.
    """

    request: Request
    configuration: Configuration
    assignments: Mapping[str, Assignment]
    classes: Mapping[str, ClassCosts]
    prices: StageCosts
    tied: dict[str, list[int]] = field(init=False)
    cuts: dict[int, int] = field(init=False)
    groups: list[list[int]] = field(init=False)
    problem: StageProblem = field(init=False)

    def __post_init__(self) -> None:
        program = self.request.program
        indices = [i for i, s in enumerate(program.segments) if s.layer.kind != "shared"]
        self.tied = tied_names(program)
        self.cuts = cut_bytes(program, self.classes)
        kinds = groupby(indices, key=lambda i: (program.segments[i].layer.name, self.cuts[i]))
        self.groups = [list(group) for _, group in kinds]
        self.problem = self._problem()

    def least_s(self) -> float:
        """No split takes less, whatever memory it needs."""
        p, runs = self.configuration.mesh.pp, self.problem.runs
        work_s = sum(run.count * min(c.seconds for c in run.menu) for run in runs)
        step_s = sum(run.count * run.step_s for run in runs)
        return (self.configuration.paces * work_s + step_s) / p

    def beaten(self, limit_s: float, *, unhindered: bool) -> Beaten:
        return Beaten(
            configuration=self.configuration, limit_s=limit_s, unhindered=unhindered
        )  # fmt: skip

    def run(self, exactly: bool, limit_s: float) -> StagedPlan | Infeasible | Beaten:
        pinned = self.request.constraints.stages
        if not SCHEDULES[self.configuration.schedule].closed_form:
            return self._scheduled(pinned, limit_s)
        if pinned is not None:
            return self._pinned(pinned)
        lacking = self._lacking_at_least()
        if lacking > 0 and not exactly:
            return replace(self._infeasible(lacking, 0), exact=False)
        split = split_stages(self.problem, limit_s=limit_s)
        if split.beaten:
            return self.beaten(limit_s, unhindered=False)
        if split.stages:
            return self._staged(split.stages, split.step_s, split.bound_s)
        if not split.missing_bytes:
            return self._too_few()
        missing = max(split.missing_bytes)
        return self._infeasible(missing, split.missing_bytes.index(missing))

    def _lacking_at_least(self) -> float:
        """Bytes that every stage lacks even if all were equal; a quick test."""
        least = sum(
            run.count * (run.parameter_bytes + min(c.saved_bytes for c in run.menu))
            for run in self.problem.runs
        )
        least += sum(tie.parameter_bytes for tie in self.problem.ties)
        least /= self.problem.num_stages
        return least + self.problem.stage_bytes - self.problem.memory_bytes

    def _infeasible(self, missing_bytes: float, stage: int) -> Infeasible:
        return Infeasible(
            configuration=self.configuration, missing_bytes=missing_bytes, stage=stage,
            reason=f"stage {stage} lacks {nbytes(missing_bytes)}",
        )  # fmt: skip

    # -- the problem ------------------------------------------------------------------------------

    def _problem(self) -> StageProblem:
        shared = (c for c in self.request.program.classes if c.kind == "shared")
        return StageProblem(
            runs=tuple(map(self._run_of, self.groups)),
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
        layer = self._layer(group[0])
        return Run(
            count=len(group),
            menu=tuple(self.prices.choice(layer, entry) for entry in self._menu(layer)),
            parameter_bytes=float(
                self.prices.state(*self._own_types(group[0])).total + layer.buffer_bytes
            ),
            has_parameters=bool(layer.parameters),
            step_s=sum(self.prices.once_per_step(layer)),
            send_s=self.prices.send_s(self.cuts[group[-1]]),
        )

    def _layer(self, index: int) -> ClassCosts:
        return self.classes[self.request.program.segments[index].layer.name]

    def _menu(self, layer: ClassCosts) -> tuple[MenuEntry, ...]:
        """The recompute entries of a class that the pins allow."""
        wanted = self.request.constraints.recompute
        if wanted is None or len(layer.menu) == 1:
            return layer.menu
        return tuple(e for e in layer.menu if e.mode == wanted) or layer.menu[-1:]

    def _own_types(self, index: int) -> tuple[list[TensorType], list[TensorType]]:
        """Of the parameters that no other segment uses; experts that are spread are apart."""
        bindings, layer = self.request.program.segments[index].bindings, self._layer(index)
        own = {p: t for p, t in layer.parameters.items() if bindings[p] not in self.tied}
        spread = {p for p in own if self.prices.is_spread(layer, p)}
        return (
            [t for p, t in own.items() if p not in spread],
            [t for p, t in own.items() if p in spread],
        )

    def _tied_type(self, name: str) -> TensorType | None:
        """``None`` for what is not trained."""
        for index in self.tied[name]:
            for port, bound in self.request.program.segments[index].bindings.items():
                if bound == name and port in self._layer(index).parameters:
                    return self._layer(index).parameters[port]
        return None

    def _ties(self) -> Iterator[Tie]:
        for name, users in self.tied.items():
            kind = self._tied_type(name)
            if kind is not None:
                runs = tuple(i for i, group in enumerate(self.groups) if set(group) & set(users))
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
            send_bytes=(*(self.cuts[own[-1][0]] for own in stages[:-1]), 0),
            tails=tuple(map(self._tail, stages)), weight_s=(0.0,) * len(stages),
            split=WeightSplit(), step_s=step_s, bound_s=bound_s, peak_bytes=int(max(used)),
        )  # fmt: skip

    def _tail(self, stage: Sequence[tuple[int, MenuEntry]]) -> tuple[float, float]:
        pairs = [self.prices.once_per_step(self._layer(index)) for index, _ in stage]
        return sum(p[0] for p in pairs), sum(p[1] for p in pairs)

    def _scheduled(
        self, pinned: Sequence[int] | None, limit_s: float
    ) -> StagedPlan | Infeasible | Beaten:
        """Stages of a schedule that is simulated."""
        configuration = self.configuration
        problem = ScheduledProblem(
            stages=self.problem, name=configuration.schedule, num_ranks=configuration.mesh.pp,
            work=tuple(self._work(group[0]) for group in self.groups),
            virtual_stages=configuration.virtual_stages,
        )  # fmt: skip
        cuts = None if pinned is None else self._cuts_of(pinned)
        if problem.least_s(cuts) >= limit_s:
            return self.beaten(limit_s, unhindered=True)
        choices, lacking = problem.best(cuts)
        if not lacking:
            return self._too_few()
        if max(lacking) > 0:
            return self._infeasible(max(lacking), lacking.index(max(lacking)))
        weight_s = tuple(problem.weight_s(choice) for choice in choices)
        staged = replace(self._staged(choices, 0.0, 0.0), weight_s=weight_s, split=problem.split)
        step_s, bound_s = staged.pipeline.step_s, max(self.least_s(), problem.least_s(cuts))
        return replace(staged, step_s=step_s, bound_s=min(step_s, bound_s))

    def _work(self, index: int) -> WeightWork:
        return weight_work(self._layer(index).graph, self.prices.costs)

    def _too_few(self) -> Infeasible:
        return Infeasible(
            configuration=self.configuration, missing_bytes=float("inf"), stage=0,
            reason=f"{self.problem.num_stages} stages need as many parts with parameters",
        )  # fmt: skip

    def _segments(
        self, choices: Sequence[StageChoice]
    ) -> tuple[tuple[tuple[int, MenuEntry], ...], ...]:
        """The segments that counts by run and entry stand for."""
        taken = [0] * len(self.groups)
        stages = []
        for choice in choices:
            own: list[tuple[int, MenuEntry]] = []
            for (run, entry), number in sorted(choice.counts.items()):
                group = self.groups[run]
                menu = self._menu(self._layer(group[0]))
                own += [(i, menu[entry]) for i in group[taken[run] : taken[run] + number]]
                taken[run] += number
            stages.append(tuple(sorted(own, key=lambda pair: pair[0])))
        return tuple(stages)

    def _states_of(self, stages: Sequence[Sequence[tuple[int, MenuEntry]]]) -> Iterator[StateBytes]:
        """Of each stage; what a rank's stages share counts for the first of them."""
        seen: dict[int, set[str]] = {}
        for home, stage in zip(self.configuration.homes, stages, strict=True):
            indices = {index for index, _ in stage}
            own = {name for name, users in self.tied.items() if indices & set(users)}
            both = [self._own_types(index) for index in sorted(indices)]
            types = [t for own_types, _ in both for t in own_types]
            experts = [t for _, own_experts in both for t in own_experts]
            kinds = (self._tied_type(n) for n in sorted(own - seen.setdefault(home, set())))
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
                return self._infeasible(lacking, stage)
            counts.append(own)
        step_s, choices = evaluate_stages(self.problem, counts)
        unhindered = [
            Counter((run, 0) for run, _ in own.elements()) for own in map(Counter, counts)
        ]
        return self._staged(choices, step_s, evaluate_stages(self.problem, unhindered)[0])

    def _order(self, pinned: Sequence[int]) -> list[int]:
        """The run of every segment, for stages of these lengths."""
        order = [run for run, group in enumerate(self.groups) for _ in group]
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
        return [tuple(own[run] for run in range(len(self.groups))) for own in stages]

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
