"""What one rank runs under each configuration, and what that costs.

Much of it is the same for many configurations: a micro-batch of one size is cut from the program
once, its shardings are solved once for every number of tensor ranks, and its layers are priced once
for every sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from autoshard.cost_models.costs import CostModel
from autoshard.errors import OptionError
from autoshard.plan.bounds import WholeModel, ideal, whole_model
from autoshard.plan.class_costs import ClassCosts, at_pace, axis_links, cost_classes
from autoshard.plan.context_axis import with_split_positions
from autoshard.plan.expert_axis import spread_experts
from autoshard.plan.local_program import LocalProgram, coupling, localise_batch
from autoshard.plan.memo import Memo, RankClass, rank_classes
from autoshard.plan.phases import Phases
from autoshard.plan.request import Request
from autoshard.plan.sharding_front import Sharding, Shardings
from autoshard.plan.space import Configuration
from autoshard.plan.tensor_axis import replicated, tensor_problem


@dataclass(slots=True)
class RankPrograms:
    """Of all configurations of a request.

    Args:
        refuse: told of the pins that leave a configuration without a sharding.
    """

    request: Request
    costs: CostModel
    memo: Memo
    _phases: Phases
    _refuse: Callable[[OptionError], None]
    _whole: WholeModel | None = None
    _shardings: dict[tuple[int, int], Shardings | None] = field(default_factory=dict)
    _classes: dict[tuple[int, int, str], dict[str, ClassCosts]] = field(default_factory=dict)
    _class: dict[tuple[int, int], dict[tuple[str, str], ClassCosts]] = field(default_factory=dict)

    @property
    def coupled(self) -> tuple[str, ...]:
        """Ops in which the samples of a batch interact."""
        if self.memo.coupled is None:
            program = self.request.program
            self.memo.coupled = self._phases.timed("batch", lambda: coupling(program))
        return self.memo.coupled

    @property
    def whole(self) -> WholeModel:
        """The facts that bounds are made of."""
        if self._whole is None:
            self._whole = self._phases.timed(
                "bounds", lambda: whole_model(self.request.program, ideal(self.costs))
            )
        return self._whole

    def localised(self, configuration: Configuration) -> LocalProgram:
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

    def exact(self, configuration: Configuration) -> LocalProgram:
        """The program of one rank and micro-batch with dp and micro-batches as two axes."""
        mesh, request = configuration.mesh, self.request
        if request.num_samples != request.program.batch_size:
            return self.localised(configuration)
        exact = (mesh.dp, configuration.parts, mesh.cp, mesh.tp, mesh.ep)
        if exact not in self.memo.locals:
            self.memo.locals[exact] = self._split_batch(*exact)
        return self.memo.locals[exact]

    def _split_batch(
        self, dp: int, num_micro_batches: int, cp: int, tp: int, ep: int
    ) -> LocalProgram:
        program, cluster = self.request.program, self.request.cluster
        local = self._phases.timed(
            "batch",
            lambda: localise_batch(program, dp, num_micro_batches, self.costs, cluster, cp * tp),
        )
        if ep > 1:
            local = spread_experts(local, ep)
        if cp == 1:
            return local
        return self._phases.timed(
            "sharding", lambda: with_split_positions(local, cp, tp, self.costs)
        )

    def sharding(self, configuration: Configuration, price: float) -> Sharding | None:
        """The best sharding at a price of memory; ``None`` if pins leave none."""
        local, tp = self.localised(configuration), configuration.mesh.tp
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
        shardings = self.shardings_of(configuration)
        if shardings is None:
            return None
        per_byte = price * self.whole.memory_price if price else 0.0
        found = self._phases.timed("sharding", lambda: shardings.at(pace, per_byte))
        if self.memo.keeps_shardings:
            self.memo.shardings[kept] = found
        return found

    def shardings_of(self, configuration: Configuration) -> Shardings | None:
        """All shardings of a configuration's program; ``None`` if pins leave none."""
        local, tp = self.localised(configuration), configuration.mesh.tp
        key = (id(local), tp)
        if key not in self._shardings:
            try:
                self._shardings[key] = self._phases.timed(
                    "sharding",
                    lambda: Shardings(
                        tensor_problem(self.request, local, configuration.mesh, self.costs)
                    ),
                )
            except OptionError as refusal:
                self._refuse(refusal)
                self._shardings[key] = None
        return self._shardings[key]

    def class_costs(
        self, configuration: Configuration, sharding: Sharding
    ) -> Mapping[str, ClassCosts]:
        """What each layer class costs under a sharding, by name."""
        local, mesh = self.localised(configuration), configuration.mesh
        key = (id(local), mesh.tp, sharding.key)
        if key not in self._classes:
            links = axis_links(self.request.cluster, mesh)
            self._classes[key] = self._phases.timed(
                "costs",
                lambda: cost_classes(
                    self.request.program, self._ranks(local, sharding, mesh.tp),
                    sharding.assignments, links, self.costs, self.request.constraints,
                    self.request.software, self._class.setdefault((id(local), mesh.tp), {}),
                ),
            )  # fmt: skip
        pace, found = configuration.pace(self.request.cluster.device), self._classes[key]
        return found if pace == 1 else {name: at_pace(c, pace) for name, c in found.items()}

    def _ranks(self, local: LocalProgram, sharding: Sharding, tp: int) -> dict[str, RankClass]:
        kind = self.request.cluster.device.kind
        known = self.memo.ranks.setdefault((id(local), tp, kind), {})
        return rank_classes(
            self.request.program, local.graphs, sharding.assignments, tp, kind, known
        )
