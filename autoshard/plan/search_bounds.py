"""Lower bounds on the step time of configurations, each tighter and dearer than the one before."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from autoshard.cost_models.costs import CostModel
from autoshard.errors import OptionError
from autoshard.plan.bounds import ideal, seconds_of
from autoshard.plan.mode_bounds import Floor, Floors, floors
from autoshard.plan.phases import Phases
from autoshard.plan.rank_programs import RankPrograms
from autoshard.plan.request import Request
from autoshard.plan.sharding_front import Sharding
from autoshard.plan.space import Configuration
from autoshard.plan.staged_plan import Infeasible
from autoshard.report.units import nbytes


@dataclass(slots=True)
class SearchBounds:
    """Of all configurations of a request; infinite where nothing fits.

    Args:
        reject: told of configurations that lack memory.
        refuse: told of pins that leave a configuration nothing.
    """

    request: Request
    costs: CostModel
    programs: RankPrograms
    _phases: Phases
    _reject: Callable[[Infeasible], None]
    _refuse: Callable[[OptionError], None]
    _floors: dict[Configuration, Floors] = field(default_factory=dict)
    _local_s: dict[tuple[int, bool], float] = field(default_factory=dict)

    @property
    def levels(self) -> tuple[Callable[[Configuration], float], ...]:
        """All of them, in order."""
        return (
            self.from_whole, self.from_ops, self.from_shardings, self.from_sharding,
            self.from_stages,
        )  # fmt: skip

    def from_whole(self, configuration: Configuration) -> float:
        """From the whole program's seconds, and what lack of memory costs."""
        mesh = configuration.mesh
        program = self.request.program
        parts = program.batch_size / configuration.micro_batch_size * mesh.cp * mesh.tp
        found = self.floors_of(configuration)
        if not found.modes:
            self._reject(self._lacking(configuration, found.missing_bytes))
        return self._least_s_of(configuration, self.programs.whole.seconds / parts)

    def from_ops(self, configuration: Configuration) -> float:
        """From the program's ops at the configuration's micro-batch size."""
        try:
            seconds = self._op_seconds(configuration, ideal(self.costs)) / configuration.mesh.tp
        except OptionError as refusal:  # an op that cannot be split over positions
            self._refuse(refusal)
            return float("inf")
        return self._least_s_of(configuration, seconds)

    def from_shardings(self, configuration: Configuration) -> float:
        """From the fastest sharding over however many micro-batches."""
        if configuration.mesh.tp == 1:
            return 0.0
        shardings = self.programs.shardings_of(configuration)
        if shardings is None:
            return float("inf")
        seconds = self._phases.timed("sharding", shardings.least_s)
        return self._least_s_of(configuration, seconds)

    def from_sharding(self, configuration: Configuration) -> float:
        """From the fastest sharding over so many micro-batches as the configuration has."""
        if configuration.mesh.tp == 1:
            seconds = self._op_seconds(configuration, self.costs)
            return self._least_s_of(configuration, seconds)
        sharding = self.programs.sharding(configuration, 0.0)
        return self.least_s_under(configuration, sharding) if sharding else float("inf")

    def from_stages(self, configuration: Configuration) -> float:
        """From what its stages may hold, in the seconds of the fastest sharding."""
        seconds, least = self._least_seconds(configuration), math.inf
        modes = self.floors_of(configuration).modes
        pace = self._pace(configuration)
        for floor in sorted(modes, key=lambda f: f.least_s(seconds)):
            above = pace * floor.least_s(seconds)
            if above >= least:
                break
            least = min(least, max(above, self._least_in_stages_s(floor, seconds)))
        if least == math.inf and seconds < math.inf:
            self._reject(self._lacking(configuration, 0.0))
        return least

    def least_s_under(self, configuration: Configuration, sharding: Sharding) -> float:
        """No plan of the configuration with that sharding takes less."""
        modes = self.floors_of(configuration).modes
        pace = self._pace(configuration)
        return min((pace * floor.spread_s(sharding.seconds) for floor in modes), default=math.inf)

    def floors_of(self, configuration: Configuration) -> Floors:
        """What its bounds are made of, by mode of data parallelism."""
        if configuration not in self._floors:
            self._floors[configuration] = floors(
                self.programs.whole, configuration, self.request, self.costs
            )
        return self._floors[configuration]

    def _least_s_of(self, configuration: Configuration, seconds: float) -> float:
        """From the seconds of a micro-batch over all stages, under the best mode for them."""
        modes = self.floors_of(configuration).modes
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

    def _least_in_stages_s(self, floor: Floor, seconds: float) -> float:
        if floor.configuration.mesh.pp == 1:
            return 0.0
        memory = self.request.memory_bytes
        pace = self._pace(floor.configuration)
        return pace * self._phases.timed("bounds", lambda: floor.least_in_stages_s(seconds, memory))

    def _least_seconds(self, configuration: Configuration) -> float:
        """Of a micro-batch under the fastest sharding, over all stages."""
        if configuration.mesh.tp == 1:
            return self._op_seconds(configuration, self.costs)
        shardings = self.programs.shardings_of(configuration)
        return shardings.least_s() if shardings else float("inf")

    def _op_seconds(self, configuration: Configuration, costs: CostModel) -> float:
        """Of one micro-batch through the whole model, before the tensor axis splits it."""
        local = self.programs.localised(configuration)
        key = (id(local), costs is self.costs)
        if key not in self._local_s:
            self._local_s[key] = sum(
                local.counts[name] * seconds_of(graph, costs)
                for name, graph in local.graphs.items()
            )
        return self._local_s[key]
