"""Stages that are replicated one by one: from class costs to the replica program, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from autoshard.cluster import Link, link
from autoshard.errors import OptionError
from autoshard.ir import TensorType
from autoshard.options import ASYNCHRONOUS
from autoshard.plan.plan import Assignment, Mesh
from autoshard.plan.priced_segments import PricedSegments
from autoshard.plan.replicas import ReplicaProblem, ReplicatedSplit, Segment
from autoshard.plan.request import Request
from autoshard.plan.space import Configuration
from autoshard.plan.stage_costs import StageCosts
from autoshard.plan.staged_plan import Infeasible, StagedPlan, infeasible, replica_rules
from autoshard.plan.stages import StageChoice
from autoshard.schedules import WeightSplit
from autoshard.versioned import holds


@dataclass(slots=True)
class ReplicatedChoice:
    """One configuration.

    Attributes:
        stage_bytes: what every stage holds besides its segments.
    """

    request: Request
    configuration: Configuration
    assignments: Mapping[str, Assignment]
    parts: PricedSegments
    stage_bytes: float

    def run(self, pinned: Sequence[int] | None) -> StagedPlan | Infeasible:
        """Cuts and replicas of every stage; see :mod:`autoshard.plan.replicas`."""
        configuration, constraints = self.configuration, self.request.constraints
        order = [index for group in self.parts.groups for index in group]
        if pinned is not None and (sum(pinned) != len(order) or min(pinned) < 1):
            raise OptionError(
                f"constraint stages={tuple(pinned)} expects positive numbers that add up to "
                f"{len(order)} segments; a plan without this pin lists them"
            )
        workers = configuration.data_parallel[0] in ASYNCHRONOUS
        most = max(len(self.parts.menu(self.parts.layer(index))) for index in order)
        problem = ReplicaProblem(
            segments=[
                [self._segment(i, e, len(order)) for i in order] for e in range(most)
            ],
            update_s=lambda r: [sum(self._update(i, r)) for i in order],
            num_ranks=configuration.workers,
            schedule="pipedream" if workers else configuration.schedule,
            num_micro_batches=configuration.num_micro_batches,
            vertical_sync=constraints.vertical_sync, memory_bytes=float(self.request.memory_bytes),
            stage_bytes=self.stage_bytes,
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
            return infeasible(configuration, split.missing_bytes, memory.index(max(memory)))
        return self._staged(split, order)

    def _staged(self, split: ReplicatedSplit, order: Sequence[int]) -> StagedPlan:
        counts = tuple(s.replicas for s in split.stages)
        configuration = replace(
            self.configuration, replicas=counts, mesh=Mesh(pp=len(split.stages))
        )
        constraints = self.request.constraints
        stages, choices, tails = [], [], []
        for stage in split.stages:
            own = order[stage.first : stage.end]
            menus = [self.parts.menu(self.parts.layer(index)) for index in own]
            entries = [menu[min(stage.entry, len(menu) - 1)] for menu in menus]
            stages.append(tuple(zip(own, entries, strict=True)))
            updates = configuration.num_micro_batches // (
                stage.replicas
                if configuration.schedule in ("pipedream", "none")
                else configuration.num_micro_batches
            )
            optimizer_s = sum(self._update(i, stage.replicas)[1] for i in own)
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
            classes=self.parts.classes,
            stages=tuple(stages), choices=tuple(choices),
            state=tuple(
                self._prices_over(1).state(
                    [t for index, _ in stage for t in self.parts.all_types(index)]
                )
                for stage in stages
            ),
            transient_bytes=0,
            send_bytes=(*(self.parts.cuts[own[-1][0]] for own in stages[:-1]), 0),
            tails=tuple(tails), weight_s=(0.0,) * len(stages), split=WeightSplit(), step_s=0.0,
            bound_s=0.0, peak_bytes=int(max(c.memory_bytes for c in choices)),
            vertical_sync=constraints.vertical_sync, weight_versions=versions,
        )  # fmt: skip
        step_s = found.pipeline.step_s
        bound_s = min(step_s, configuration.num_micro_batches * split.bottleneck_s)
        return replace(found, step_s=step_s, bound_s=bound_s)

    def _prices_over(self, replicas: int) -> StageCosts:
        """Prices of a stage on so many ranks."""
        c = self.configuration
        per_update = c.num_micro_batches // replicas
        if c.schedule in ("pipedream", "none"):
            per_update = 1
        alone = replace(c, mesh=Mesh(dp=replicas), num_micro_batches=per_update)
        return StageCosts(self.request, alone, self.parts.classes, self.parts.prices.costs, "ddp")

    def _segment(self, index: int, entry: int, count: int) -> Segment:
        layer, menu = self.parts.layer(index), self.parts.menu(self.parts.layer(index))
        prices = self._prices_over(1)
        own = prices.choice(layer, menu[min(entry, len(menu) - 1)])
        kinds, tied = self.parts.all_types(index), self._tied_of(index)
        again = {
            n: t for n, t in tied.items() if self.parts.tied[n][0] != index and not self._whole
        }
        # Of weights that another stage owns: the weight, its gradient, and the newest received.
        copies = float(sum(t.nbytes for t in again.values()))
        return Segment(
            forward_s=own.forward_s, backward_s=own.backward_s, saved_bytes=own.saved_bytes,
            workspace_bytes=float(layer.workspace_bytes),
            weight_bytes=float(sum(t.nbytes for t in kinds)) + copies,
            state_bytes=float(prices.state(kinds).total + layer.buffer_bytes) + 3 * copies,
            send_s=self._hop_s(self.parts.cuts[index]),
            tied={name: self._hop_s(kind.nbytes) for name, kind in tied.items()},
            parts_ties=any(min(users) <= index < max(users) for users in self.parts.tied.values()),
        )  # fmt: skip

    @property
    def _whole(self) -> bool:
        """Every rank has the whole model."""
        return self.configuration.data_parallel[0] in ASYNCHRONOUS

    def _tied_of(self, index: int) -> dict[str, TensorType]:
        """A segment's trained weights that others use too."""
        names = sorted(name for name, users in self.parts.tied.items() if index in users)
        return {name: t for name in names if (t := self.parts.tied_type(name)) is not None}

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
        return self.parts.prices.costs.collective("send", num_bytes, whole)

    def _update(self, index: int, replicas: int) -> tuple[float, float]:
        """Seconds of a reduction over the replicas of a stage and of the optimizer.

        Workers that do not wait for each other send gradients and fetch weights: what a reduction
        moves, but beside nothing.
        """
        layer = self.parts.layer(index)
        reduction_s, optimizer_s = self._prices_over(replicas).once_per_step(layer)
        if self.configuration.data_parallel[0] in ASYNCHRONOUS and layer.parameters:
            among = link(self.request.cluster, replicas)
            num_bytes = sum(t.nbytes for t in layer.parameters.values())
            reduction_s = self.parts.prices.costs.collective("all_reduce", num_bytes, among)
        return reduction_s, optimizer_s
