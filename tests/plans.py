"""Plans made by hand: what the planner would be asked for with everything pinned."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import replace

from autoshard.cluster import Cluster, Device, Tier
from autoshard.ir import Graph, Program
from autoshard.passes.apply_axis import apply_axis
from autoshard.placement.conversion import convertible
from autoshard.placement.hints import block_hints
from autoshard.placement.registry import strategies
from autoshard.placement.state import R, State, V
from autoshard.plan.batch_axis import split_batch
from autoshard.plan.plan import (
    Assignment,
    Memory,
    Mesh,
    Plan,
    Prediction,
    Recompute,
    SegmentPlan,
    SolverReport,
    StagePlan,
)

CLUSTER = Cluster(
    name="test",
    device=Device(
        name="test", memory_bytes=2**30, bytes_per_s=1e9, flops_per_s={"f32": 1e9},
        matmul_efficiency=1.0, memory_efficiency=1.0, launch_s=0.0, kind="cpu",
    ),
    tiers=(Tier(name="node", size=0, bytes_per_s=1e9, latency_s=1e-5),),
)  # fmt: skip

MEGATRON = {
    "*c_attn.*": -1, "*c_fc.*": -1, "*attn.c_proj.weight": 0, "*mlp.c_proj.weight": 0,
    "*q_proj.*": 0, "*k_proj.*": 0, "*v_proj.*": 0, "*gate_proj.*": 0, "*up_proj.*": 0,
    "*o_proj.weight": 1, "*down_proj.weight": 1,
}  # fmt: skip
"""Parameter pattern -> the dim that Megatron splits."""


def greedy(
    graph: Graph,
    n: int,
    split: Mapping[str, int] | None = None,
    inputs: Mapping[str, str] | None = None,
    output: str = "R",
) -> Assignment:
    """The strategy of each op that fits the states of its operands best, one op after the other.

    Args:
        split: parameter pattern -> dim along which it lies split at rest; others are ``R``.
        inputs: states in which inputs arrive; others are ``R``.
        output: state of every output that has a gradient.
    """
    hints = block_hints(graph)
    states = {v.name: State.parse((inputs or {}).get(v.name, "R")) for v in graph.inputs}
    rest = {v.name: _rest(v.name, v.type.shape, split or {}, hints, n) for v in graph.parameters}
    states |= rest
    chosen: dict[str, str] = {}
    for op in graph.ops:
        best = min(
            strategies(op, n, hints),
            key=lambda s: sum(
                _price(states[v.name], need, v.name in rest, v.type.differentiable)
                for v, need in zip(op.operands, s.inputs, strict=True)
            ),
        )
        chosen[op.name] = str(best)
        states |= {v.name: s for v, s in zip(op.outputs, best.outputs, strict=True)}
    return Assignment(
        ops=chosen,
        inputs={v.name: str(states[v.name]) for v in graph.inputs},
        parameters={k: str(s) for k, s in rest.items()},
        outputs={v.name: output if v.type.differentiable else "R" for v in graph.outputs},
    )


def _rest(name: str, shape: Sequence[int], split: Mapping[str, int], hints, n: int) -> State:
    for pattern, dim in split.items():
        if fnmatch.fnmatch(name, pattern):
            dim = dim % len(shape)
            blocks = [
                b for b in hints.get((name, dim), ()) if len(b) == 3 and not any(x % n for x in b)
            ]
            return State("S", dim, blocks[0] if blocks else ())
    return R


def _price(have: State, need: State, parameter: bool, differentiable: bool) -> float:
    if have == need or (not differentiable and have.is_whole and need.is_whole):
        return 0.0
    if parameter:
        return 100.0 if have.is_split or need.is_split else 1.0
    if not convertible(have, need) and not (convertible(have, V) and convertible(V, need)):
        return 1000.0
    if need.kind == "P":
        return 40.0
    return {"P": 30.0, "S": 50.0, "R": 20.0, "V": 25.0}[have.kind]


def make_plan(
    program: Program,
    *,
    pp: int = 1,
    dp: int = 1,
    tp: int = 1,
    micro_batches: int = 1,
    split: Mapping[str, int] | None = None,
    recompute: Recompute | None = None,
    tensor: Mapping[str, Assignment] | None = None,
) -> Plan:
    """A plan with the batch split over ``dp`` and micro-batches and parameters over ``tp``."""
    layers: dict[str, dict[str, Assignment]] = {c.name: {} for c in program.classes}
    graphs = {c.name: c.graph for c in program.classes}
    for axis, n in (("dp", dp), ("micro", micro_batches)):
        if n > 1:
            found = split_batch(program, graphs, n)
            assert not found.coupled, found.coupled
            for name, assignment in found.layers.items():
                layers[name][axis] = assignment
                graphs[name] = apply_axis(graphs[name], assignment, axis, n)
    if tp > 1:
        for name, graph in graphs.items():
            layers[name]["tp"] = (tensor or {}).get(name) or greedy(graph, tp, split)
    indices = [i for i, s in enumerate(program.segments) if s.layer.kind != "shared"]
    size = -(-len(indices) // pp)
    stages = [
        StagePlan(
            segments=tuple(
                SegmentPlan(
                    index=i, path=program.segments[i].path, layer=program.segments[i].layer.name,
                    recompute=(recompute if program.segments[i].layer.kind == "layer" else None)
                    or Recompute(),
                )
                for i in indices[k * size : (k + 1) * size]
            ),
            forward_s=0.0, backward_s=0.0, communication_s=0.0, send_bytes=0, memory=Memory(),
        )
        for k in range(pp)
    ]  # fmt: skip
    return Plan(
        program=program.fingerprint, model=program.model_name, cluster=CLUSTER,
        world_size=pp * dp * tp, mesh=Mesh(pp=pp, dp=dp, tp=tp),
        global_batch_size=program.batch_size,
        micro_batch_size=program.batch_size // dp // micro_batches,
        schedule="none" if pp == 1 else "1f1b", data_parallel="ddp", precision="f32",
        optimizer="adamw", seed=0, layers=layers, stages=tuple(stages),
        prediction=Prediction(step_s=0.0, peak_bytes=0, parts={}, origin={}),
        solver=SolverReport(bound_s=0.0, gap=0.0, status="pinned", seconds={}),
    )  # fmt: skip


def with_stages(plan: Plan, stages: Sequence[StagePlan]) -> Plan:
    return replace(plan, stages=tuple(stages))
