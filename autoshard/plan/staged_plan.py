"""What a configuration comes to: stages of segments that fit, or what is in the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from autoshard.cost_models.state import StateBytes
from autoshard.ir import Program
from autoshard.plan.class_costs import ClassCosts
from autoshard.plan.plan import Assignment
from autoshard.plan.recompute import MenuEntry
from autoshard.plan.replicas import tied_pairs
from autoshard.plan.scheduled_stages import (
    Pipeline,
    PipelineSeconds,
    pipeline_seconds,
    stage_seconds,
)
from autoshard.plan.space import Configuration
from autoshard.plan.stages import StageChoice
from autoshard.report.units import nbytes
from autoshard.schedules import SCHEDULES, WeightSplit
from autoshard.versioned import Rules, StageTimes, step_seconds


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
        ends_together: see :class:`autoshard.software.Software`.
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
    ends_together: bool = True
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
                virtual_stages=c.virtual_stages, split=self.split, together=self.ends_together,
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


def infeasible(configuration: Configuration, missing_bytes: float, stage: int) -> Infeasible:
    """A stage lacks memory."""
    return Infeasible(
        configuration=configuration, missing_bytes=missing_bytes, stage=stage,
        reason=f"stage {stage} lacks {nbytes(missing_bytes)}",
    )  # fmt: skip
