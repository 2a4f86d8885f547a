"""From class costs to the stage program of one configuration, and back to stages of segments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal

from autoshard.cluster import Link, link
from autoshard.cost_models.costs import CostModel
from autoshard.cost_models.state import StateBytes
from autoshard.errors import OptionError
from autoshard.ir import Program, TensorType
from autoshard.options import ASYNCHRONOUS
from autoshard.plan.class_costs import ClassCosts
from autoshard.plan.plan import Assignment, Mesh
from autoshard.plan.recompute import MenuEntry
from autoshard.plan.replicas import ReplicaProblem, ReplicatedSplit, Segment, tied_pairs
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
from autoshard.versioned import Rules, StageTimes, holds, step_seconds

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
        weight_versions: per stage, that a rank holds at most; empty where there is one.
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
    vertical_sync: bool = False
    weight_versions: tuple[int, ...] = ()

    @property
    def predicted_s(self) -> float:
        """What a step takes when its schedule is simulated."""
        closed_form = SCHEDULES[self.configuration.schedule].closed_form
        return self.pipeline.step_s if closed_form else self.step_s

    @property
    def pipeline(self) -> PipelineSeconds:
        """What its schedule takes, simulated."""
        c = self.configuration
        if c.workers:
            return self._replicated_pipeline()
        return pipeline_seconds(
            Pipeline(
                schedule=c.schedule, num_ranks=c.mesh.pp, num_micro_batches=c.num_micro_batches,
                virtual_stages=c.virtual_stages, split=self.split,
            ),
            stage_seconds(self.choices, self.weight_s),
            [sum(tail) for tail in self.tails],
        )  # fmt: skip

    def _replicated_pipeline(self) -> PipelineSeconds:
        c = self.configuration
        busy_s = [
            c.turns(k) * (s.forward_s + s.backward_s) + sum(self.tails[k])
            for k, s in enumerate(self.choices)
        ]
        slowest = max(range(len(busy_s)), key=busy_s.__getitem__)
        if c.schedule == "none":  # workers of their own
            step_s = without_s = busy_s[slowest]
        else:
            rules = replica_rules(c, self.vertical_sync, self.ties)
            times = [
                StageTimes(
                    forward_s=s.forward_s, backward_s=s.backward_s, send_s=s.send_s,
                    update_s=sum(self.tails[k]) / rules.updates_per_step(k),
                )
                for k, s in enumerate(self.choices)
            ]  # fmt: skip
            step_s = step_seconds(rules, times)
            without_s = step_seconds(rules, [replace(t, send_s=0.0) for t in times])
        return PipelineSeconds(
            step_s=step_s, sends_s=max(0.0, step_s - without_s), slowest=slowest,
            busy_s=busy_s[slowest] - sum(self.tails[slowest]),
        )  # fmt: skip

    @property
    def ties(self) -> tuple[tuple[int, int], ...]:
        """Of stages that are replicated one by one: owners of weights, and others that use them."""

        def trained(index: int) -> set[str]:
            bindings = self.program.segments[index].bindings
            return {bindings[port] for port in self.class_of(index).parameters}

        return tied_pairs([set().union(*(trained(i) for i, _ in own)) for own in self.stages])

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


def replica_rules(
    configuration: Configuration, vertical_sync: bool, ties: tuple[tuple[int, int], ...] = ()
) -> Rules:
    """What the ranks of a configuration with replicated stages do."""
    return Rules(
        schedule=configuration.schedule, replicas=configuration.replicas,
        num_micro_batches=configuration.num_micro_batches, vertical_sync=vertical_sync,
        ties=ties,
    )  # fmt: skip


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
            return self._replicated(pinned)
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
        if problem.least_of(choices) >= limit_s:
            return self.beaten(limit_s, unhindered=False)
        weight_s = tuple(problem.weight_s(choice) for choice in choices)
        staged = replace(self._staged(choices, 0.0, 0.0), weight_s=weight_s, split=problem.split)
        step_s, bound_s = staged.pipeline.step_s, max(self.least_s(), problem.least_s(cuts))
        return replace(staged, step_s=step_s, bound_s=min(step_s, bound_s))

    # -- stages that are replicated one by one ----------------------------------------------------

    def _replicated(self, pinned: Sequence[int] | None) -> StagedPlan | Infeasible:
        """Cuts and replicas of every stage; see :mod:`autoshard.plan.replicas`."""
        configuration, constraints = self.configuration, self.request.constraints
        order = [index for group in self.groups for index in group]
        if pinned is not None and (sum(pinned) != len(order) or min(pinned) < 1):
            raise OptionError(
                f"constraint stages={tuple(pinned)} expects positive numbers that add up to "
                f"{len(order)} segments; a plan without this pin lists them"
            )
        workers = configuration.data_parallel[0] in ASYNCHRONOUS
        most = max(len(self._menu(self._layer(index))) for index in order)
        problem = ReplicaProblem(
            segments=[
                [self._replicated_segment(i, e, len(order)) for i in order] for e in range(most)
            ],
            update_s=lambda r: [sum(self._replicated_update(i, r)) for i in order],
            num_ranks=configuration.workers,
            schedule="pipedream" if workers else configuration.schedule,
            num_micro_batches=configuration.num_micro_batches,
            vertical_sync=constraints.vertical_sync, memory_bytes=float(self.request.memory_bytes),
            stage_bytes=self.problem.stage_bytes,
            replicas=(configuration.workers,) if workers else constraints.replicas,
            lengths=None if pinned is None else tuple(pinned), num_stages=constraints.pp,
            card_ranks=self._between.levels[-1].members if self._between.levels else 1,
        )  # fmt: skip
        split = problem.best()
        if not split.stages:
            return Infeasible(
                configuration=configuration, missing_bytes=float("inf"), stage=0,
                reason=split.reason,
            )  # fmt: skip
        if split.missing_bytes > 0:
            memory = [s.memory_bytes for s in split.stages]
            return self._infeasible(split.missing_bytes, memory.index(max(memory)))
        return self._staged_replicas(split, order)

    def _staged_replicas(self, split: ReplicatedSplit, order: Sequence[int]) -> StagedPlan:
        counts = tuple(s.replicas for s in split.stages)
        configuration = replace(
            self.configuration, replicas=counts, mesh=Mesh(pp=len(split.stages))
        )
        constraints = self.request.constraints
        stages, choices, tails = [], [], []
        for stage in split.stages:
            own = order[stage.first : stage.end]
            menus = [self._menu(self._layer(index)) for index in own]
            entries = [menu[min(stage.entry, len(menu) - 1)] for menu in menus]
            stages.append(tuple(zip(own, entries, strict=True)))
            updates = configuration.num_micro_batches // (
                stage.replicas
                if configuration.schedule in ("pipedream", "none")
                else configuration.num_micro_batches
            )
            optimizer_s = sum(self._replicated_update(i, stage.replicas)[1] for i in own)
            reduction_s = stage.times.update_s - optimizer_s  # and what ties move
            tails.append((updates * reduction_s, updates * optimizer_s))
            choices.append(
                StageChoice(
                    counts={}, forward_s=stage.times.forward_s, backward_s=stage.times.backward_s,
                    send_s=stage.times.send_s, step_s=sum(tails[-1]),
                    memory_bytes=stage.memory_bytes,
                )
            )  # fmt: skip
        versions: tuple[int, ...] = (1,)
        if configuration.schedule != "none":
            versions = holds(replica_rules(configuration, constraints.vertical_sync))[1]
        found = StagedPlan(
            program=self.request.program, configuration=configuration,
            data_parallel=configuration.data_parallel[0], assignments=self.assignments,
            classes=self.classes,
            stages=tuple(stages), choices=tuple(choices),
            state=tuple(
                self.prices_over(1).state(
                    [t for index, _ in stage for t in self._all_types(index)]
                )
                for stage in stages
            ),
            transient_bytes=0, send_bytes=(*(self.cuts[own[-1][0]] for own in stages[:-1]), 0),
            tails=tuple(tails), weight_s=(0.0,) * len(stages), split=WeightSplit(), step_s=0.0,
            bound_s=0.0, peak_bytes=int(max(c.memory_bytes for c in choices)),
            vertical_sync=constraints.vertical_sync, weight_versions=versions,
        )  # fmt: skip
        step_s = found.pipeline.step_s
        bound_s = min(step_s, configuration.num_micro_batches * split.bottleneck_s)
        return replace(found, step_s=step_s, bound_s=bound_s)

    def prices_over(self, replicas: int) -> StageCosts:
        """Prices of a stage on so many ranks."""
        c = self.configuration
        per_update = c.num_micro_batches // replicas
        if c.schedule in ("pipedream", "none"):
            per_update = 1
        alone = replace(c, mesh=Mesh(dp=replicas), num_micro_batches=per_update)
        return StageCosts(self.request, alone, self.classes, self.prices.costs, "ddp")

    def _replicated_segment(self, index: int, entry: int, count: int) -> Segment:
        layer, menu = self._layer(index), self._menu(self._layer(index))
        prices = self.prices_over(1)
        own = prices.choice(layer, menu[min(entry, len(menu) - 1)])
        kinds, tied = self._all_types(index), self._tied_of(index)
        again = {n: t for n, t in tied.items() if self.tied[n][0] != index and not self._whole}
        copies = float(sum(t.nbytes for t in again.values()))
        return Segment(
            forward_s=own.forward_s, backward_s=own.backward_s, saved_bytes=own.saved_bytes,
            workspace_bytes=float(layer.workspace_bytes),
            weight_bytes=float(sum(t.nbytes for t in kinds)) + copies,
            state_bytes=float(prices.state(kinds).total + layer.buffer_bytes) + 2 * copies,
            send_s=self._hop_s(self.cuts[index]),
            tied={name: self._hop_s(kind.nbytes) for name, kind in tied.items()},
            parts_ties=any(min(users) <= index < max(users) for users in self.tied.values()),
        )  # fmt: skip

    @property
    def _whole(self) -> bool:
        """Every rank has the whole model."""
        return self.configuration.data_parallel[0] in ASYNCHRONOUS

    def _tied_of(self, index: int) -> dict[str, TensorType]:
        """A segment's trained weights that others use too."""
        names = sorted(name for name, users in self.tied.items() if index in users)
        return {name: t for name in names if (t := self._tied_type(name)) is not None}

    @property
    def _between(self) -> Link:
        """To a replica of the next stage: as far as any two of the ranks are apart."""
        return link(self.request.cluster, self.configuration.workers)

    def _hop_s(self, num_bytes: int) -> float:
        """To a replica of the next stage, over a whole network card."""
        if not self._between.levels:
            return 0.0
        *inner, last = self._between.levels
        card = replace(last, bytes_per_s=last.bytes_per_s * last.members)
        whole = replace(self._between, levels=(*inner, card))
        return self.prices.costs.collective("send", num_bytes, whole)

    def _replicated_update(self, index: int, replicas: int) -> tuple[float, float]:
        """Seconds of a reduction over the replicas of a stage and of the optimizer.

        Workers that do not wait for each other send gradients and fetch weights: what a reduction
        moves, but beside nothing.
        """
        layer = self._layer(index)
        reduction_s, optimizer_s = self.prices_over(replicas).once_per_step(layer)
        if self.configuration.data_parallel[0] in ASYNCHRONOUS and layer.parameters:
            among = link(self.request.cluster, replicas)
            num_bytes = sum(t.nbytes for t in layer.parameters.values())
            reduction_s = self.prices.costs.collective("all_reduce", num_bytes, among)
        return reduction_s, optimizer_s

    def _all_types(self, index: int) -> list[TensorType]:
        """Of a segment's parameters; of tied ones in the first segment that uses them."""
        kinds, _ = self._own_types(index)
        first = (name for name, users in self.tied.items() if users[0] == index)
        return [*kinds, *(t for name in first if (t := self._tied_type(name)) is not None)]

    def _work(self, index: int) -> WeightWork:
        work = weight_work(self._layer(index).graph, self.prices.costs)
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
