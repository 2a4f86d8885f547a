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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from autoshard.cluster import Cluster
from autoshard.cost_models.costs import AnalyticCosts, CostModel
from autoshard.errors import InfeasibleError, OptionError
from autoshard.ir import Program
from autoshard.options import Constraints
from autoshard.plan.alternatives import alternative, front, runners_up, time_first
from autoshard.plan.infeasible import lacking_least, why_infeasible
from autoshard.plan.memo import Memo
from autoshard.plan.phases import Phases
from autoshard.plan.plan import Alternative, Candidate, Plan
from autoshard.plan.rank_programs import RankPrograms
from autoshard.plan.request import Request
from autoshard.plan.search_bounds import SearchBounds
from autoshard.plan.sharding_front import PRICES, Sharding
from autoshard.plan.space import Configuration, configurations
from autoshard.plan.stage_choice import choose_stages
from autoshard.plan.staged_plan import Beaten, Infeasible, StagedPlan
from autoshard.plan.tensor_axis import refuse_missing_rules, replicated
from autoshard.plan.write import write_plan
from autoshard.schedules import SCHEDULES
from autoshard.software import OWN, Software

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
        phases: seconds spent, by phase.
        evaluated: how many configurations were solved in full.
    """

    request: Request
    costs: CostModel
    progress: Progress = lambda text: None
    memo: Memo = field(default_factory=Memo)
    phases: Phases = field(default_factory=Phases)
    evaluated: int = 0
    programs: RankPrograms = field(init=False)
    bounds: SearchBounds = field(init=False)
    _best: StagedPlan | None = None
    _solved: list[StagedPlan] = field(default_factory=list)
    _rejected: dict[Configuration, Infeasible] = field(default_factory=dict)
    _least_s: float = float("inf")
    _candidates: list[Candidate] = field(default_factory=list)
    _refusals: list[OptionError] = field(default_factory=list)
    _open: _Open = field(default_factory=lambda: _Open((), ()))

    def __post_init__(self) -> None:
        refuse = self._refusals.append
        self.programs = RankPrograms(self.request, self.costs, self.memo, self.phases, refuse)
        self.bounds = SearchBounds(
            self.request, self.costs, self.programs, self.phases, self._reject, refuse
        )

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
        leaner = self.phases.timed("front", lambda: self._in_less_memory(solved))
        # What the search compares by is a little more than an uneven pipeline takes: of those that
        # it solved, the simulation has the last word.
        chosen, best = min((*solved, *leaner), key=lambda pair: time_first(pair[0]))
        local = self.programs.exact(best.configuration)
        shared = {c.name for c in self.request.program.classes if c.kind == "shared"}
        # How shared ops lie on tp depends on how the batch is split, step by step.
        exact = {name: replicated(local.graphs[name]) for name in shared}
        best = replace(best, assignments={**best.assignments, **exact})
        return write_plan(
            self.request, best, local, self.costs, coupled=self.programs.coupled,
            bound_s=self._least_s, compared_s=compared_s, candidates=self._others_than(best),
            runners_up=runners_up(chosen, [found for found, _ in solved]),
            front=front([found for found, _ in (*solved, *leaner)]), seconds=self.phases.seconds,
        )  # fmt: skip

    def search(self, *, first: bool = False) -> StagedPlan | None:
        """The best plan of all configurations, or (``first``) any plan.

        Raises:
            OptionError: the pins leave no configuration.
        """
        request = self.request
        start = time.perf_counter()
        space = configurations(
            request.program, request.world_size, request.constraints, request.cluster,
            coupled=bool(self.programs.coupled), standalone=request.standalone,
            num_samples=request.num_samples,
        )  # fmt: skip
        deadline = start + (math.inf if request.time_limit_s is None else request.time_limit_s)
        closed = [c for c in space if SCHEDULES[c.schedule].closed_form]
        simulated = [c for c in space if not SCHEDULES[c.schedule].closed_form]
        levels: tuple[Callable[[Configuration], float], ...] = ()
        replicated = request.constraints.replicated  # bounds know one replica of each stage
        if len(space) > 1 and not replicated:  # else nothing to prune
            levels = self.bounds.levels
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
                self.programs.sharding(configuration, PRICES[-1])
            sharding = self.programs.sharding(configuration, price)
            if sharding is None or sharding.key in tried:
                continue
            tried.add(sharding.key)
            rivals = [p.step_s for p in (best, found) if p is not None]
            if configuration.workers:
                rivals = []  # bounds know one replica of each stage
            if rivals and self.bounds.least_s_under(configuration, sharding) >= min(rivals):
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

    def _staged(
        self,
        configuration: Configuration,
        sharding: Sharding,
        *,
        exactly: bool = False,
        limit_s: float = float("inf"),
    ) -> StagedPlan | Infeasible | Beaten:
        classes = self.programs.class_costs(configuration, sharding)
        found = (
            () if configuration.workers or exactly else self.bounds.floors_of(configuration).modes
        )
        modes = [floor.mode for floor in found]
        return self.phases.timed(
            "stages",
            lambda: choose_stages(
                self.request, configuration, sharding.assignments, classes, self.costs,
                exactly=exactly, limit_s=limit_s, modes=modes,
            ),
        )  # fmt: skip

    def _lack_exactly(self, configuration: Configuration) -> Infeasible | None:
        """What a configuration that was rejected lacks under its leanest sharding."""
        shardings = (self.programs.sharding(configuration, price) for price in PRICES)
        found = [
            self._staged(configuration, sharding, exactly=True)
            for sharding in {s.key: s for s in shardings if s is not None}.values()
        ]
        lacking = [o for o in found if isinstance(o, Infeasible)]
        return min(lacking, key=lambda o: o.missing_bytes, default=None)

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
                sharding = self.programs.sharding(configuration, price)
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
