"""The outcome of the search as a plan."""

from __future__ import annotations

from collections.abc import Mapping

from autoshard.cost_models.costs import CostModel
from autoshard.ir import Op
from autoshard.options import ASYNCHRONOUS
from autoshard.placement.conversion import is_conversion
from autoshard.placement.registry import has_rule
from autoshard.plan.breakdown import Breakdowns
from autoshard.plan.local_program import LocalProgram
from autoshard.plan.plan import (
    BUCKET_BYTES,
    Alternative,
    Assignment,
    Candidate,
    Memory,
    Plan,
    Prediction,
    Recompute,
    ReplicatedOp,
    SegmentPlan,
    SolverReport,
    StagePlan,
)
from autoshard.plan.request import Request
from autoshard.plan.scheduled_stages import PipelineSeconds
from autoshard.plan.staged_plan import StagedPlan, replica_rules
from autoshard.versioned import most_stale

AS_THE_MODEL = "as the model"
"""The precision of a plan that keeps the model's own dtypes."""


def write_plan(
    request: Request,
    best: StagedPlan,
    local: LocalProgram,
    costs: CostModel,
    *,
    coupled: tuple[str, ...],
    candidates: tuple[Candidate, ...],
    runners_up: tuple[Alternative, ...],
    front: tuple[Alternative, ...],
    bound_s: float,
    compared_s: float,
    seconds: Mapping[str, float],
) -> Plan:
    """Everything that was decided and predicted.

    Args:
        local: the program on the best plan's own dp ranks and micro-batches.
        costs: that the search compared by.
        bound_s: nothing in the declared space takes less.
        compared_s: the least that the search found, in what it compares by.
    """
    program, configuration = request.program, best.configuration
    layers: dict[str, dict[str, Assignment]] = {}
    for layer in program.classes:
        axes = {"tp": best.assignments[layer.name]}
        if local.dp:
            axes["dp"] = local.dp[layer.name]
        if local.cp:
            axes["cp"] = local.cp[layer.name]
        if local.micro:
            axes["micro"] = local.micro[layer.name]
        layers[layer.name] = dict(sorted(axes.items()))
    parts = Breakdowns(request, best, costs)
    pipeline, gap = best.pipeline, max(0.0, 1 - bound_s / compared_s) if compared_s else 0.0
    return Plan(
        program=program.fingerprint, model=program.model_name, cluster=request.cluster,
        world_size=request.world_size, mesh=configuration.mesh,
        global_batch_size=request.num_samples * request.standalone,
        standalone=request.standalone, micro_batch_size=configuration.micro_batch_size,
        schedule=configuration.schedule, virtual_stages=configuration.virtual_stages,
        data_parallel=best.data_parallel,
        bucket_bytes=request.constraints.bucket_bytes or BUCKET_BYTES,
        vertical_sync=best.vertical_sync, staleness=_staleness(request, best),
        ssp_bound=request.constraints.staleness,
        precision=request.precision or AS_THE_MODEL, optimizer=request.optimizer,
        seed=request.seed, layers=layers, stages=tuple(_stages(request, best)),
        prediction=Prediction(
            step_s=pipeline.step_s, peak_bytes=best.peak_bytes, parts=_parts(best, pipeline),
            origin=_origin(best), ranks=parts.ranks(pipeline), layers=parts.layers(),
        ),
        solver=SolverReport(
            bound_s=bound_s, gap=gap, status="optimal" if gap <= 1e-3 else "feasible",
            seconds=dict(seconds), candidates=candidates,
        ),
        replicated=_replicated(request, best), coupled=coupled,
        notes=(
            *_stale_notes(request, best), *_cut_notes(request), *_recompute_notes(request, best),
            *program.notes,
        ),
        pins=request.constraints.pins, runners_up=runners_up, front=front,
    )  # fmt: skip


def _staleness(request: Request, best: StagedPlan) -> tuple[int | None, ...]:
    """Per stage, in updates; see :class:`autoshard.plan.plan.Plan`."""
    configuration, bound = best.configuration, request.constraints.staleness
    if best.data_parallel == "asp":
        return (None,)
    if best.data_parallel == "ssp":
        assert bound is not None, "ssp is pinned with its bound"
        return (most_stale(configuration.workers, bound),)
    if not request.constraints.stale:
        return ()
    return replica_rules(configuration, best.vertical_sync, best.ties).staleness


def _stale_notes(request: Request, best: StagedPlan) -> tuple[str, ...]:
    staleness = _staleness(request, best)
    if not staleness:
        return ()
    name = best.configuration.schedule if best.weight_versions != (1,) else best.data_parallel
    name = best.data_parallel if best.data_parallel in ASYNCHRONOUS else name
    if staleness == (None,):
        late = "by any number of updates"
    elif len(set(staleness)) == 1:
        late = f"by at most {staleness[0]} update(s)"
    else:
        late = f"by at most {', '.join(map(str, staleness))} updates in stages 0, 1, ..."
    return (
        f"stale training was allowed: under {name} the weights that a gradient changes are ahead "
        f"of those that it is of {late}, so results differ from those of one process",
        f"{name} makes an update per {_samples_per_update(request, best)} samples",
    )


def _samples_per_update(request: Request, best: StagedPlan) -> str:
    """``8``, or ``24, 8`` where stages differ."""
    configuration = best.configuration
    if best.data_parallel in ASYNCHRONOUS:
        return str(configuration.micro_batch_size)
    rules = replica_rules(configuration, best.vertical_sync)
    per = [rules.per_update(s) * configuration.micro_batch_size for s in range(rules.num_stages)]
    return str(per[0]) if len(set(per)) == 1 else ", ".join(map(str, per))


def _cut_notes(request: Request) -> tuple[str, ...]:
    if request.standalone == 1 or request.constraints.stale:
        return ()
    return (
        "micro-batches were allowed although samples interact in forward: a step is cut into "
        f"{request.standalone} batches of their own, so its result is the mean over theirs, not "
        f"that of one batch of {request.program.batch_size * request.standalone} samples",
    )


def _recompute_notes(request: Request, best: StagedPlan) -> tuple[str, ...]:
    """A pin that nothing can follow is said, not dropped."""
    wanted = request.constraints.recompute
    if wanted in (None, "none"):
        return ()
    modes = {entry.mode for stage in best.stages for _, entry in stage}
    if wanted in modes:
        return ()
    return (
        f"the pin recompute={wanted} has no effect: the model has no layers of its own that could "
        "be recomputed so",
    )


def _stages(request: Request, best: StagedPlan) -> list[StagePlan]:
    program = request.program
    stages = []
    first = [i for i, s in enumerate(program.segments) if s.layer.kind == "shared"]
    for k, (own, choice, state) in enumerate(
        zip(best.stages, best.choices, best.state, strict=True)
    ):
        segments = [
            SegmentPlan(
                index=i, path=program.segments[i].path, layer=program.segments[i].layer.name
            )
            for i in (first if k == 0 else ())
        ]
        for index, entry in own:
            segment = program.segments[index]
            segments.append(
                SegmentPlan(
                    index=index,
                    path=segment.path,
                    layer=segment.layer.name,
                    recompute=Recompute(mode=entry.mode, keep=entry.keep),
                )
            )
        classes = [best.classes[program.segments[i].layer.name] for i, _ in own]
        workspace = _workspace(best, k)
        buffers = sum(c.buffer_bytes for c in classes)
        versions = best.weight_versions[k] if best.weight_versions else 1
        known = state.total + (versions - 1) * state.parameters + buffers + workspace
        stages.append(
            StagePlan(
                segments=tuple(segments), forward_s=choice.forward_s, backward_s=choice.backward_s,
                communication_s=sum(c.communication_s for c in classes),
                send_bytes=best.send_bytes[k],
                replicas=(best.configuration.replicas or (1,) * (k + 1))[k],
                weight_versions=versions,
                memory=Memory(
                    parameters=versions * state.parameters + buffers, gradients=state.gradients,
                    optimizer=state.optimizer,
                    activations=max(0, int(choice.memory_bytes) - known),
                    workspace=workspace,
                ),
            )
        )  # fmt: skip
    return stages


def _workspace(best: StagedPlan, stage: int) -> int:
    """Of the stages of a rank the largest, once: with the first of them."""
    homes = best.configuration.homes
    own = [k for k, home in enumerate(homes) if home == homes[stage]]
    if own[0] != stage:
        return 0
    return best.transient_bytes + max(
        best.class_of(index).workspace_bytes + entry.peak_recompute_bytes
        for k in own
        for index, entry in best.stages[k]
    )


def _origin(best: StagedPlan) -> dict[str, float]:
    """Shares of the compute seconds of the plan's own ops."""
    classes = [best.class_of(index) for stage in best.stages for index, _ in stage]
    compute_s = sum(c.forward_s + c.backward_s - c.communication_s for c in classes)
    measured = sum(c.measured_s for c in classes) / compute_s if compute_s else 0.0
    return {"measured": measured, "analytic": 1.0 - measured}


def _parts(best: StagedPlan, pipeline: PipelineSeconds) -> dict[str, float]:
    """Where the step goes: on the rank that computes most, and what it waits for."""
    m, homes = best.configuration.turns(pipeline.slowest), best.configuration.homes
    stages = [k for k, home in enumerate(homes) if home == pipeline.slowest]
    own = [pair for k in stages for pair in best.stages[k]]
    recompute = m * sum(entry.extra_backward_s for _, entry in own)
    tensor = m * sum(best.class_of(index).communication_s for index, _ in own)
    reduction_s, optimizer_s = (sum(best.tails[k][i] for k in stages) for i in (0, 1))
    rest = pipeline.sends_s + reduction_s + optimizer_s
    return {
        "compute": max(0.0, pipeline.busy_s - tensor - recompute),
        "recompute": recompute,
        "collectives": tensor,
        "bubble": max(0.0, pipeline.step_s - pipeline.busy_s - rest),
        "sends": pipeline.sends_s,
        "gradient_reduction": reduction_s,
        "optimizer": optimizer_s,
    }


def _replicated(request: Request, best: StagedPlan) -> tuple[ReplicatedOp, ...]:
    """Ops that every rank of the tensor axis runs whole, where that costs at least 0.1 %."""
    mesh = best.configuration.mesh
    if mesh.tp == 1:
        return ()
    counts: dict[str, int] = {}
    for segment in request.program.segments:
        counts[segment.layer.name] = counts.get(segment.layer.name, 0) + 1
    total = sum(counts[name] * sum(layer.op_s.values()) for name, layer in best.classes.items())
    found = []
    for name, layer in best.classes.items():
        texts = best.assignments[name].ops
        for op in layer.graph.ops:
            text = texts.get(op.name)
            if text is None or "S(" in text or is_conversion(op):
                continue
            share = counts[name] * layer.op_s[op.name] / total if total else 0.0
            if share >= 1e-3 or not has_rule(op):
                found.append(_describe(op, share))
    return tuple(sorted(found, key=lambda r: -r.share_of_step)[:40])


def _describe(op: Op, share: float) -> ReplicatedOp:
    reason = (
        "splitting it would cost more than it saves"
        if has_rule(op)
        else "no sharding rule for this op"
    )
    return ReplicatedOp(
        op=op.name, target=op.target, module=op.module, source=op.source, share_of_step=share,
        reason=reason,
    )  # fmt: skip
