"""The step of a plan on the clock, as the cost model predicts it.

The schedule is simulated with each stage's seconds (:mod:`autoshard.cost_models.pipeline`). Then
every rank reduces its gradients, for as long as that is predicted to add to the step, and steps its
optimizer. Collectives inside layers are part of forward and backward, as in the plan.
"""

from __future__ import annotations

from collections.abc import Iterator

from autoshard.cluster import link
from autoshard.cost_models.collective import collective_s
from autoshard.cost_models.pipeline import Simulation, StageSeconds, simulate
from autoshard.errors import PlanFileError
from autoshard.plan.plan import Plan
from autoshard.schedule import Action, Schedule
from autoshard.schedules import by_name
from autoshard.timeline import Span, Timeline

WEIGHT_SHARE = 0.5
"""Part of a backward that makes gradients of weights, where a schedule runs it apart: for products
of matrices both parts are equal (Qi et al. 2023, section 2). A plan does not keep its own figure.
"""


def predicted_timeline(plan: Plan) -> Timeline:
    """What every pipeline rank is predicted to do in a step.

    Raises:
        PlanFileError: the plan does not say where its step goes.
    """
    if len(plan.prediction.ranks) != plan.mesh.pp:
        raise PlanFileError(
            f"expected a plan that says where the step of its {plan.mesh.pp} pipeline rank(s) goes "
            f"but it does for {len(plan.prediction.ranks)}: plan it again"
        )
    schedule = by_name(plan.schedule, plan.mesh.pp, plan.num_micro_batches, plan.virtual_stages)
    stages = _stage_seconds(plan, schedule)
    simulation = simulate(schedule, stages)
    spans = [
        Span(
            lane=schedule.homes[action.stage], kind=action.kind, start_s=start, end_s=end,
            stage=action.stage, micro_batch=action.micro_batch,
        )
        for action, start, end in simulation.timeline
    ]  # fmt: skip
    spans += _sends(schedule, stages, simulation)
    spans += _ends(plan, simulation)
    return Timeline(
        name="predicted",
        lanes=tuple(f"pipeline rank {rank}" for rank in range(plan.mesh.pp)),
        spans=tuple(sorted(spans, key=lambda s: (s.lane, s.start_s))),
    )


def _stage_seconds(plan: Plan, schedule: Schedule) -> list[StageSeconds]:
    to_next = link(plan.cluster, plan.mesh.pp, plan.mesh.replicas * plan.mesh.tp)
    return [
        StageSeconds(
            forward_s=stage.forward_s, backward_s=stage.backward_s,
            send_s=collective_s("send", stage.send_bytes, to_next) if stage.send_bytes else 0.0,
            weight_s=WEIGHT_SHARE * stage.backward_s if schedule.splits else 0.0,
        )
        for stage in plan.stages
    ]  # fmt: skip


def _sends(
    schedule: Schedule, stages: list[StageSeconds], simulation: Simulation
) -> Iterator[Span]:
    """Activations to the next stage, and gradients back, which take as long."""
    homes = schedule.homes
    for action, _, end in simulation.timeline:
        target = _receiver(action)
        if target is None or not 0 <= target < len(homes):
            continue
        lasts_s = stages[min(action.stage, target)].send_s
        if homes[target] != homes[action.stage] and lasts_s:
            yield Span(
                lane=homes[action.stage], kind="send", start_s=end, end_s=end + lasts_s,
                stage=action.stage, micro_batch=action.micro_batch,
            )  # fmt: skip


def _receiver(action: Action) -> int | None:
    """The stage that waits for what an action makes, if it is there."""
    if action.kind == "W":
        return None
    return action.stage + (1 if action.kind == "F" else -1)


def _ends(plan: Plan, simulation: Simulation) -> Iterator[Span]:
    """Gradient reduction and optimizer of every rank."""
    for rank, (own, end_s) in enumerate(
        zip(plan.prediction.ranks, simulation.end_s, strict=True)
    ):  # fmt: skip
        # What ZeRO gathers in every layer is exposed, too, but lies inside forward and backward.
        left_s = max(0.0, plan.prediction.step_s - end_s - own.optimizer_s)
        exposed_s = sum(c.exposed_s for c in own.communication if c.axis in ("dp", "ep"))
        reduced_s = end_s + min(exposed_s, left_s)
        if reduced_s > end_s:
            yield Span(lane=rank, kind="reduce", start_s=end_s, end_s=reduced_s)
        if own.optimizer_s:
            yield Span(lane=rank, kind="step", start_s=reduced_s, end_s=reduced_s + own.optimizer_s)
