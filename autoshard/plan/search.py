"""The outer search: mesh shape, micro-batch size, schedule and ZeRO mode around the programs.

For each configuration of :mod:`autoshard.plan.space` three programs are solved: tensor-split axes
for all layer classes jointly (:mod:`autoshard.plan.tensor_axis`, for several prices of memory), a
recompute menu per class (:mod:`autoshard.plan.recompute`), and the split into stages with a menu
entry for every layer (:mod:`autoshard.plan.stages`). These together are the declared space, of
which bound and gap of a plan speak.

Configurations are taken in the order of a lower bound on their step time, which is tightened only
for those that come to the front: from the whole program (:mod:`autoshard.plan.bounds`, with what
lack of memory costs), from the program at their micro-batch size, and from their fastest sharding.
The search ends when the next bound is no better than the best plan found: what was not solved
cannot win. Schedules that are simulated (several chunks per rank, split backwards) come after the
others, and their chunks are cut to equal lengths, which is part of the declared space. Each takes
long to solve, so only so many are; the gap of the plan counts the rest.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from autoshard.cluster import Cluster
from autoshard.cost_models.costs import AnalyticCosts, CostModel
from autoshard.errors import InfeasibleError, OptionError
from autoshard.ir import Program
from autoshard.options import Constraints
from autoshard.plan.alternatives import alternative, front, runners_up, time_first
from autoshard.plan.bounds import (
    WholeModel,
    ideal,
    seconds_of,
    whole_model,
)
from autoshard.plan.class_costs import ClassCosts, at_pace, axis_links, cost_classes
from autoshard.plan.context_axis import with_split_positions
from autoshard.plan.expert_axis import spread_experts
from autoshard.plan.infeasible import lacking_least, why_infeasible
from autoshard.plan.local_program import LocalProgram, coupling, localise_batch
from autoshard.plan.memo import Memo, RankClass, rank_classes
from autoshard.plan.mode_bounds import Floor, Floors, floors
from autoshard.plan.plan import Alternative, Candidate, Plan
from autoshard.plan.request import Request
from autoshard.plan.sharding_front import PRICES, Sharding, Shardings
from autoshard.plan.space import Configuration, configurations
from autoshard.plan.stage_choice import Beaten, Infeasible, StagedPlan, choose_stages
from autoshard.plan.tensor_axis import refuse_missing_rules, replicated, tensor_problem
from autoshard.plan.write import write_plan
from autoshard.report.units import nbytes
from autoshard.schedules import SCHEDULES
from autoshard.software import OWN, Software

T = TypeVar("T")
Progress = Callable[[str], None]
Solved = tuple[Alternative, StagedPlan]

WORTH_KNOWING = 1.05
"""Plans that are slower than the best so far by more than this factor are not worked out."""
NUM_PROMISING = 8
"""Configurations of simulated schedules that are solved first, on meshes where 1F1B does well."""
NUM_SIMULATED = 2
"""Others of them that are looked at; for the rest their bounds count into the gap."""
FEW_RUNNERS_UP = 3
"""Runner-up plans that are solved even if they are known to be slower."""
NUM_LEANER = 2
"""Configurations that are solved again in less memory for the front of time against memory."""
LEANER = (0.8, 0.6, 0.4, 0.2)
"""Shares of its peak memory that such a configuration may then use."""
NUM_CANDIDATES = 20
"""Configurations that did not win which a plan remembers."""


def find_plan(
    program: Program,
    *,
    cluster: Cluster,
    world_size: int,
    constraints: Constraints,
    optimizer: str = "adamw",
    precision: str | None = None,
    strict: bool = False,
    seed: int = 0,
    time_limit_s: float | None = None,
    costs: CostModel | str | None = None,
    standalone: int = 1,
    software: Software = OWN,
    memo: Memo | None = None,
    num_samples: int | None = None,
    progress: Progress = lambda text: None,
) -> Plan:
    """The best plan of the declared space.

    Args:
        time_limit_s: end the search then, as soon as there is a plan; its bound and gap tell what
            was left open.
        costs: ``None``: analytic ones of the cluster; ``"measured"``: see
            :mod:`autoshard.profile.planning`.
        standalone: how many batches like the program's, each on its own, make up a step; see
            :mod:`autoshard.plan.standalone`.
        software: what will run the plan, where that is not this project's runtime.
        memo: of this program and these pins, from an earlier search; it is added to.
        num_samples: per step, where that is not the program's own batch. Then the plan is a
            prediction: to run it, the model must be captured at that batch.

    Raises:
        OptionError: the pins leave nothing.
        UnsupportedOpError: ``strict`` and an op has no rule.
        InfeasibleError: nothing fits; says which stage lacks how many bytes in the configuration
            that comes closest, and what would help.
    """
    request = Request(
        program=program, cluster=cluster, world_size=world_size, constraints=constraints,
        optimizer=optimizer, precision=precision, strict=strict, seed=seed,
        time_limit_s=time_limit_s, standalone=standalone, software=software,
        num_samples=num_samples or program.batch_size,
    )  # fmt: skip
    if strict:
        refuse_missing_rules(program)
    facts = memo or Memo()

    def search(found: CostModel) -> Plan:
        return Search(request, found, progress, facts).run()

    if not isinstance(costs, str):
        return search(costs or AnalyticCosts(cluster))
    from autoshard.profile.planning import plan_measured

    return plan_measured(search, program, cluster, world_size, progress=progress)


class _Open:
    """The configurations that are not solved yet, by a lower bound on their step time.

    Args:
        levels: bounds, each tighter and dearer than the one before; infinite: nothing fits.
    """

    def __init__(
        self,
        space: Sequence[Configuration],
        levels: Sequence[Callable[[Configuration], float]],
    ) -> None:
        self._space = space
        self._levels = levels
        self.queue: list[tuple[float, int, int]] = [(0.0, 0, i) for i in range(len(space))]

    @property
    def least_s(self) -> float:
        """None of them takes less."""
        return self.queue[0][0]

    def pop(self) -> Configuration | None:
        """The most promising one, if its bound is as tight as it gets; else tighten that."""
        bound_s, level, index = heapq.heappop(self.queue)
        if level == len(self._levels):
            return self._space[index]
        tighter = self._levels[level](self._space[index])
        if tighter < float("inf"):
            heapq.heappush(self.queue, (max(bound_s, tighter), level + 1, index))
        return None


@dataclass(slots=True)
class Search:
    """The search and what it has computed so far.

    Attributes:
        seconds: spent, by phase.
        evaluated: how many configurations were solved in full.
    """

    request: Request
    costs: CostModel
    progress: Progress = lambda text: None
    memo: Memo = field(default_factory=Memo)
    seconds: dict[str, float] = field(default_factory=dict)
    evaluated: int = 0
    coupled: tuple[str, ...] = ()
    _best: StagedPlan | None = None
    _solved: list[StagedPlan] = field(default_factory=list)
    _rejected: dict[Configuration, Infeasible] = field(default_factory=dict)
    _least_s: float = float("inf")
    _candidates: list[Candidate] = field(default_factory=list)
    _refusals: list[OptionError] = field(default_factory=list)
    _open: _Open = field(default_factory=lambda: _Open((), ()))
    _whole: WholeModel | None = None
    _floors: dict[Configuration, Floors] = field(default_factory=dict)
    _local_s: dict[tuple[int, bool], float] = field(default_factory=dict)
    _shardings: dict[tuple[int, int], Shardings | None] = field(default_factory=dict)
    _classes: dict[tuple[int, int, str], dict[str, ClassCosts]] = field(default_factory=dict)
    _class: dict[tuple[int, int], dict[tuple[str, str], ClassCosts]] = field(default_factory=dict)

    def run(self) -> Plan:
        """The best plan; errors as :func:`find_plan`."""
        best = self.search()
        if best is None:
            if self._refusals and not self._rejected:
                raise self._refusals[0]
            nearest = lacking_least(self._rejected, self._lack_exactly)
            raise why_infeasible(self.request, nearest, self.is_feasible)
        compared_s = best.step_s
        if self.request.time_limit_s is None:
            self._solve_runners_up()
        solved = [(alternative(staged), staged) for staged in self._solved]
        leaner = self._timed("front", lambda: self._in_less_memory(solved))
        # What the search compares by is a little more than an uneven pipeline takes: of those that
        # it solved, the simulation has the last word.
        chosen, best = min((*solved, *leaner), key=lambda pair: time_first(pair[0]))
        local = self._exact(best.configuration)
        shared = {c.name for c in self.request.program.classes if c.kind == "shared"}
        # How shared ops lie on tp depends on how the batch is split, step by step.
        exact = {name: replicated(local.graphs[name]) for name in shared}
        best = replace(best, assignments={**best.assignments, **exact})
        return write_plan(
            self.request, best, local, self.costs, coupled=self.coupled, bound_s=self._least_s,
            compared_s=compared_s, candidates=self._others_than(best),
            runners_up=runners_up(chosen, [found for found, _ in solved]),
            front=front([found for found, _ in (*solved, *leaner)]), seconds=self.seconds,
        )  # fmt: skip

    def search(self, *, first: bool = False) -> StagedPlan | None:
        """The best plan of all configurations, or (``first``) any plan.

        Raises:
            OptionError: the pins leave no configuration.
        """
        request = self.request
        start = time.perf_counter()
        if self.memo.coupled is None:
            self.memo.coupled = self._timed("batch", lambda: coupling(request.program))
        self.coupled = self.memo.coupled
        space = configurations(
            request.program, request.world_size, request.constraints, request.cluster,
            coupled=bool(self.coupled), standalone=request.standalone,
            num_samples=request.num_samples,
        )  # fmt: skip
        deadline = start + (math.inf if request.time_limit_s is None else request.time_limit_s)
        closed = [c for c in space if SCHEDULES[c.schedule].closed_form]
        simulated = [c for c in space if not SCHEDULES[c.schedule].closed_form]
        levels: tuple[Callable[[Configuration], float], ...] = ()
        replicated = request.constraints.replicated  # bounds know one replica of each stage
        if len(space) > 1 and not replicated:  # else nothing to prune
            levels = (
                self._bound_from_whole, self._bound_from_ops,
                self._bound_from_shardings, self._bound_from_sharding, self._bound_from_stages,
            )  # fmt: skip
        self._open = _Open(closed or simulated, levels)
        if closed:
            self._search_best_first(self._open, first, deadline, most=len(closed))
        if first and self._best is not None:
            return self._best
        promising = self._promising(simulated)
        for configuration in promising:
            if time.perf_counter() < deadline:
                self._evaluate(configuration, 0.0, "among other schedules")
        rest = [c for c in simulated if c not in promising]
        if rest:
            left = _Open(rest, levels) if closed else self._open
            self._search_best_first(left, first, deadline, most=NUM_SIMULATED)
        return self._best

    def _search_best_first(self, left: _Open, first: bool, deadline: float, *, most: int) -> None:
        """Solve what may win, at most so many; what is then left lowers the bound of the plan."""
        total = len(left.queue)
        tries = 0
        while left.queue:
            bound_s = left.least_s
            if self._best is not None:
                late = time.perf_counter() > deadline
                if first or late or bound_s >= self._best.step_s:
                    self._least_s = min(self._least_s, bound_s, self._best.step_s)
                    return
            configuration = left.pop()
            if configuration is None:
                continue
            if self._best is not None and tries == most:
                self._least_s = min(self._least_s, bound_s)
                return
            tries += 1
            self._evaluate(configuration, bound_s, f"{len(left.queue)} of {total} left")

    def _promising(self, simulated: Sequence[Configuration]) -> list[Configuration]:
        """Of each other schedule where 1F1B does best, as if stages were equal.

        What a flush leaves of a bubble is that of 1F1B over the number of chunks.
        """
        solved = {
            (s.configuration.mesh, s.configuration.micro_batch_size): s.step_s for s in self._solved
        }
        estimates: dict[tuple[str, int], tuple[float, int, Configuration]] = {}
        for order, c in enumerate(simulated):
            if (alike_s := solved.get((c.mesh, c.micro_batch_size))) is not None:
                turns = (c.mesh.pp - 1) / c.virtual_stages if SCHEDULES[c.schedule].flushes else 0.0
                share = (c.num_micro_batches + turns) / (c.num_micro_batches + c.mesh.pp - 1)
                estimate = (alike_s * share, order, c)
                kind = (c.schedule, c.virtual_stages)
                estimates[kind] = min(estimates.get(kind, estimate), estimate)
        return [c for _, _, c in sorted(estimates.values())[:NUM_PROMISING]]

    def is_feasible(self, request: Request) -> bool:
        """Whether another request for the same program has any plan."""
        other = Search(request, self.costs)
        try:
            return other.search(first=True) is not None
        except (OptionError, InfeasibleError):
            return False

    def _timed(self, phase: str, function: Callable[[], T]) -> T:
        start = time.perf_counter()
        try:
            return function()
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    # -- bounds, each tighter and dearer than the one before --------------------------------------

    def _bound_from_whole(self, configuration: Configuration) -> float:
        mesh = configuration.mesh
        program = self.request.program
        parts = program.batch_size / configuration.micro_batch_size * mesh.cp * mesh.tp
        found = self._floors_of(configuration)
        if not found.modes:
            self._reject(self._lacking(configuration, found.missing_bytes))
        return self._least_s_of(configuration, self.whole.seconds / parts)

    def _floors_of(self, configuration: Configuration) -> Floors:
        if configuration not in self._floors:
            self._floors[configuration] = floors(
                self.whole, configuration, self.request, self.costs
            )
        return self._floors[configuration]

    def _least_s_of(self, configuration: Configuration, seconds: float) -> float:
        """From the seconds of a micro-batch over all stages, under the best mode for them."""
        modes = self._floors_of(configuration).modes
        pace = self._pace(configuration)
        return min((pace * floor.least_s(seconds) for floor in modes), default=math.inf)

    def _pace(self, configuration: Configuration) -> float:
        """Nothing takes less than this share of what it takes while all ranks compute."""
        return configuration.pace(self.request.cluster.device)

    def _lacking(self, configuration: Configuration, missing_bytes: float) -> Infeasible:
        return Infeasible(
            configuration=configuration, missing_bytes=missing_bytes, stage=0, exact=False,
            reason=f"every stage lacks at least {nbytes(missing_bytes)}",
        )  # fmt: skip

    @property
    def whole(self) -> WholeModel:
        """The facts that bounds are made of."""
        if self._whole is None:
            self._whole = self._timed(
                "bounds", lambda: whole_model(self.request.program, ideal(self.costs))
            )
        return self._whole

    def _bound_from_ops(self, configuration: Configuration) -> float:
        try:
            seconds = self._op_seconds(configuration, ideal(self.costs)) / configuration.mesh.tp
        except OptionError as refusal:  # an op that cannot be split over positions
            self._refusals.append(refusal)
            return float("inf")
        return self._least_s_of(configuration, seconds)

    def _bound_from_shardings(self, configuration: Configuration) -> float:
        """From the fastest sharding over however many micro-batches."""
        if configuration.mesh.tp == 1:
            return 0.0
        shardings = self._shardings_of(configuration)
        if shardings is None:
            return float("inf")
        seconds = self._timed("sharding", shardings.least_s)
        return self._least_s_of(configuration, seconds)

    def _bound_from_sharding(self, configuration: Configuration) -> float:
        if configuration.mesh.tp == 1:
            seconds = self._op_seconds(configuration, self.costs)
            return self._least_s_of(configuration, seconds)
        sharding = self._sharding(configuration, 0.0)
        return self._least_s_under(configuration, sharding) if sharding else float("inf")

    def _bound_from_stages(self, configuration: Configuration) -> float:
        """From what its stages may hold, in the seconds of the fastest sharding."""
        seconds, least = self._least_seconds(configuration), math.inf
        modes = self._floors_of(configuration).modes
        pace = self._pace(configuration)
        for floor in sorted(modes, key=lambda f: f.least_s(seconds)):
            above = pace * floor.least_s(seconds)
            if above >= least:
                break
            least = min(least, max(above, self._least_in_stages_s(floor, seconds)))
        if least == math.inf and seconds < math.inf:
            self._reject(self._lacking(configuration, 0.0))
        return least

    def _least_in_stages_s(self, floor: Floor, seconds: float) -> float:
        if floor.configuration.mesh.pp == 1:
            return 0.0
        memory = self.request.memory_bytes
        pace = self._pace(floor.configuration)
        return pace * self._timed("bounds", lambda: floor.least_in_stages_s(seconds, memory))

    def _least_seconds(self, configuration: Configuration) -> float:
        """Of a micro-batch under the fastest sharding, over all stages."""
        if configuration.mesh.tp == 1:
            return self._op_seconds(configuration, self.costs)
        shardings = self._shardings_of(configuration)
        return shardings.least_s() if shardings else float("inf")

    def _op_seconds(self, configuration: Configuration, costs: CostModel) -> float:
        """Of one micro-batch through the whole model, before the tensor axis splits it."""
        local = self._localised(configuration)
        key = (id(local), costs is self.costs)
        if key not in self._local_s:
            self._local_s[key] = sum(
                local.counts[name] * seconds_of(graph, costs)
                for name, graph in local.graphs.items()
            )
        return self._local_s[key]

    # -- one configuration ------------------------------------------------------------------------

    def _evaluate(self, configuration: Configuration, bound_s: float, left: str) -> None:
        """Solve a configuration: leaner shardings, too, where the fastest lacks memory."""
        best = self._best
        so_far = f"best {best.step_s:.3g} s" if best else "nothing fits so far"
        self.progress(f"{configuration} ({left}, {so_far})")
        self.evaluated += 1
        found: StagedPlan | None = None
        nearest: Infeasible | None = None
        beaten: Beaten | None = None
        tried: set[str] = set()
        pinned = self.request.constraints.recompute is not None
        for price in PRICES:
            if found is not None and (pinned or not found.recomputes):
                break  # memory was no hindrance
            if beaten is not None and beaten.unhindered:
                break
            if price:  # the highest price brackets the others: often nothing is left to solve
                self._sharding(configuration, PRICES[-1])
            sharding = self._sharding(configuration, price)
            if sharding is None or sharding.key in tried:
                continue
            tried.add(sharding.key)
            rivals = [p.step_s for p in (best, found) if p is not None]
            if configuration.workers:
                rivals = []  # bounds know one replica of each stage
            if rivals and self._least_s_under(configuration, sharding) >= min(rivals):
                continue
            limit_s = WORTH_KNOWING * min(rivals, default=float("inf"))
            outcome = self._staged(configuration, sharding, limit_s=limit_s)
            if isinstance(outcome, Beaten):
                beaten = outcome
                continue
            if isinstance(outcome, Infeasible):
                nearest = min(nearest or outcome, outcome, key=lambda o: o.missing_bytes)
                continue
            self._least_s = min(self._least_s, max(bound_s, outcome.bound_s))
            if found is None or outcome.step_s < found.step_s:
                found = outcome
        if found is not None:
            self._accept(found)
        elif beaten is not None:
            self._record(configuration, None, f"takes more than {beaten.limit_s:.4g} s")
        elif nearest is not None:
            self._reject(nearest)

    def _least_s_under(self, configuration: Configuration, sharding: Sharding) -> float:
        modes = self._floors_of(configuration).modes
        pace = self._pace(configuration)
        return min((pace * floor.spread_s(sharding.seconds) for floor in modes), default=math.inf)

    def _staged(
        self,
        configuration: Configuration,
        sharding: Sharding,
        *,
        exactly: bool = False,
        limit_s: float = float("inf"),
    ) -> StagedPlan | Infeasible | Beaten:
        classes = self._class_costs(configuration, sharding)
        found = () if configuration.workers or exactly else self._floors_of(configuration).modes
        modes = [floor.mode for floor in found]
        return self._timed(
            "stages",
            lambda: choose_stages(
                self.request, configuration, sharding.assignments, classes, self.costs,
                exactly=exactly, limit_s=limit_s, modes=modes,
            ),
        )  # fmt: skip

    def _lack_exactly(self, configuration: Configuration) -> Infeasible | None:
        """What a configuration that was rejected lacks under its leanest sharding."""
        shardings = (self._sharding(configuration, price) for price in PRICES)
        found = [
            self._staged(configuration, sharding, exactly=True)
            for sharding in {s.key: s for s in shardings if s is not None}.values()
        ]
        lacking = [o for o in found if isinstance(o, Infeasible)]
        return min(lacking, key=lambda o: o.missing_bytes, default=None)

    def _localised(self, configuration: Configuration) -> LocalProgram:
        """The program of one rank and micro-batch, by what it depends on for costs.

        Without coupling only the micro-batch size matters, so that is split off in one go.
        """
        mesh, program = configuration.mesh, self.request.program
        exact = (mesh.dp, configuration.parts, mesh.cp, mesh.tp, mesh.ep)
        if not self.coupled:
            micro_batches = program.batch_size // configuration.micro_batch_size
            exact = (1, micro_batches, mesh.cp, mesh.tp if mesh.cp > 1 else 1, mesh.ep)
        if exact not in self.memo.locals:
            self.memo.locals[exact] = self._split_batch(*exact)
        return self.memo.locals[exact]

    def _exact(self, configuration: Configuration) -> LocalProgram:
        """The program of one rank and micro-batch with dp and micro-batches as two axes."""
        mesh, request = configuration.mesh, self.request
        if request.num_samples != request.program.batch_size:
            return self._localised(configuration)
        exact = (mesh.dp, configuration.parts, mesh.cp, mesh.tp, mesh.ep)
        if exact not in self.memo.locals:
            self.memo.locals[exact] = self._split_batch(*exact)
        return self.memo.locals[exact]

    def _split_batch(
        self, dp: int, num_micro_batches: int, cp: int, tp: int, ep: int
    ) -> LocalProgram:
        program, cluster = self.request.program, self.request.cluster
        local = self._timed(
            "batch",
            lambda: localise_batch(program, dp, num_micro_batches, self.costs, cluster, cp * tp),
        )
        if ep > 1:
            local = spread_experts(local, ep)
        if cp == 1:
            return local
        return self._timed("sharding", lambda: with_split_positions(local, cp, tp, self.costs))

    def _sharding(self, configuration: Configuration, price: float) -> Sharding | None:
        """The best sharding at a price of memory; ``None`` if pins leave none."""
        local, tp = self._localised(configuration), configuration.mesh.tp
        if tp == 1:
            whole = {name: replicated(graph) for name, graph in local.graphs.items()}
            return Sharding(assignments=whole, seconds=0.0, key="")
        pace, mesh = configuration.paces, configuration.mesh
        pins = self.request.constraints
        pinned = tuple(sorted(pins.sharding.items()))
        size = configuration.micro_batch_size
        kept = (tp, mesh.cp, mesh.ep, size, price, pins.sequence_parallel, pinned)
        if self.memo.keeps_shardings and kept in self.memo.shardings:
            return self.memo.shardings[kept]
        shardings = self._shardings_of(configuration)
        if shardings is None:
            return None
        per_byte = price * self.whole.memory_price if price else 0.0
        found = self._timed("sharding", lambda: shardings.at(pace, per_byte))
        if self.memo.keeps_shardings:
            self.memo.shardings[kept] = found
        return found

    def _shardings_of(self, configuration: Configuration) -> Shardings | None:
        """All shardings of a configuration's program; ``None`` if pins leave none."""
        local, tp = self._localised(configuration), configuration.mesh.tp
        key = (id(local), tp)
        if key not in self._shardings:
            try:
                self._shardings[key] = self._timed(
                    "sharding",
                    lambda: Shardings(
                        tensor_problem(self.request, local, configuration.mesh, self.costs)
                    ),
                )
            except OptionError as refusal:
                self._refusals.append(refusal)
                self._shardings[key] = None
        return self._shardings[key]

    def _class_costs(
        self, configuration: Configuration, sharding: Sharding
    ) -> Mapping[str, ClassCosts]:
        local, mesh = self._localised(configuration), configuration.mesh
        key = (id(local), mesh.tp, sharding.key)
        if key not in self._classes:
            links = axis_links(self.request.cluster, mesh)
            self._classes[key] = self._timed(
                "costs",
                lambda: cost_classes(
                    self.request.program, self._ranks(local, sharding, mesh.tp),
                    sharding.assignments, links, self.costs, self.request.constraints,
                    self.request.software, self._class.setdefault((id(local), mesh.tp), {}),
                ),
            )  # fmt: skip
        pace, found = self._pace(configuration), self._classes[key]
        return found if pace == 1 else {name: at_pace(c, pace) for name, c in found.items()}

    def _ranks(self, local: LocalProgram, sharding: Sharding, tp: int) -> dict[str, RankClass]:
        kind = self.request.cluster.device.kind
        known = self.memo.ranks.setdefault((id(local), tp, kind), {})
        return rank_classes(
            self.request.program, local.graphs, sharding.assignments, tp, kind, known
        )

    # -- the record -------------------------------------------------------------------------------

    def _solve_runners_up(self) -> None:
        """Solve the most promising other meshes and schedules, if few were solved so far."""
        kinds = {alternative(staged).kind for staged in self._solved}
        tries = 0
        while self._open.queue and len(kinds) <= FEW_RUNNERS_UP and tries < 2 * FEW_RUNNERS_UP:
            configuration = self._open.pop()
            if configuration is None or configuration.kind in kinds:
                continue
            tries += 1
            for price in PRICES:
                sharding = self._sharding(configuration, price)
                found = self._staged(configuration, sharding) if sharding else None
                if isinstance(found, StagedPlan):
                    kinds.add(configuration.kind)
                    self._solved.append(found)
                    self._record(configuration, found, "")
                    break

    def _in_less_memory(self, solved: Sequence[Solved]) -> list[Solved]:
        """The fastest two of other meshes or closed-form schedules, with less memory to use."""
        by_kind: dict[tuple[object, ...], StagedPlan] = {}
        for other, staged in sorted(solved, key=lambda pair: time_first(pair[0])):
            if not SCHEDULES[other.schedule].closed_form:
                continue  # takes too long to solve again
            by_kind.setdefault(other.kind, staged)
        found = []
        for staged in list(by_kind.values())[:NUM_LEANER]:
            for share in LEANER:
                memory = int(share * staged.peak_bytes)
                pins = replace(self.request.constraints, memory_bytes=memory)
                outcome = choose_stages(
                    replace(self.request, constraints=pins), staged.configuration,
                    staged.assignments, staged.classes, self.costs,
                )  # fmt: skip
                if not isinstance(outcome, StagedPlan):
                    break
                found.append((alternative(outcome), outcome))
        return found

    def _accept(self, found: StagedPlan) -> None:
        self._solved.append(found)
        self._record(found.configuration, found, "")
        if self._best is None or found.step_s < self._best.step_s:
            self._best = found

    def _reject(self, found: Infeasible) -> None:
        self._record(found.configuration, None, found.reason)
        self._rejected[found.configuration] = found

    def _record(self, configuration: Configuration, found: StagedPlan | None, reason: str) -> None:
        self._candidates.append(
            Candidate(
                mesh=configuration.mesh, micro_batch_size=configuration.micro_batch_size,
                schedule=configuration.schedule,
                data_parallel=found.data_parallel
                if found
                else "/".join(configuration.data_parallel),
                step_s=found.step_s if found else None,
                peak_bytes=found.peak_bytes if found else None,
                reason=reason,
            )
        )  # fmt: skip

    def _others_than(self, best: StagedPlan) -> tuple[Candidate, ...]:
        others = []
        for candidate in self._candidates:
            if candidate.step_s is None:
                others.append(candidate)
            elif not _is(candidate, best.configuration):
                slower = candidate.step_s / best.step_s - 1
                others.append(replace(candidate, reason=f"{100 * slower:.1f} % slower"))
        return tuple(sorted(others, key=lambda c: c.step_s or float("inf"))[:NUM_CANDIDATES])


def _is(candidate: Candidate, configuration: Configuration) -> bool:
    return (candidate.mesh, candidate.micro_batch_size, candidate.schedule) == (
        configuration.mesh, configuration.micro_batch_size, configuration.schedule,
    )  # fmt: skip
