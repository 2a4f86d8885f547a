"""A small plan with everything that a report can show."""

from __future__ import annotations

from autoshard.cluster import Cluster, Device, Tier
from autoshard.plan.plan import (
    Alternative,
    Assignment,
    Breakdown,
    Candidate,
    Communication,
    ConversionReport,
    LayerReport,
    Memory,
    Mesh,
    Plan,
    Prediction,
    Recompute,
    ReplicatedOp,
    SegmentPlan,
    SolverReport,
    StagePlan,
)

CLUSTER = Cluster(
    name="two nodes",
    device=Device(
        name="test device", memory_bytes=16 * 2**30, bytes_per_s=1e12, flops_per_s={"f32": 1e13},
        matmul_efficiency=0.5, memory_efficiency=0.8, launch_s=5e-6,
    ),
    tiers=(
        Tier(name="node", size=4, bytes_per_s=1e11, latency_s=1e-6),
        Tier(name="network", size=0, bytes_per_s=1e10, latency_s=1e-5),
    ),
)  # fmt: skip

NUM_OPS = 6


def _layers() -> dict[str, dict[str, Assignment]]:
    """On the tensor axis: an embedding, a block split as Megatron does, and a head."""
    ops = {f"op_{i}": "S(2), S(2) -> S(2)" for i in range(NUM_OPS)}
    block = Assignment(
        ops={"attn_qkv": "V, S(0;64,64,64) -> S(2;64,64,64)", **ops},
        inputs={"x": "S(1)"},
        parameters={
            "ln.weight": "V", "attn.qkv.weight": "S(0;64,64,64)", "attn.out.weight": "S(1)",
            "mlp.up.weight": "S(0)", "mlp.down.weight": "S(1)",
        },
        outputs={"x_out": "S(1)"},
    )  # fmt: skip
    embeddings = Assignment(
        ops={"embedding": "R, S(0) -> P"}, inputs={"ids": "R"},
        parameters={"embed.weight": "S(0)"}, outputs={"x": "S(1)"},
    )  # fmt: skip
    head = Assignment(
        ops={"linear": "V, R -> V"}, inputs={"x": "S(1)"}, parameters={"embed.weight": "R"},
        outputs={"loss": "R"},
    )  # fmt: skip
    shared = Assignment(ops={"arange": "-> R"}, inputs={}, parameters={}, outputs={"mask": "R"})
    found = {"shared": shared, "embeddings": embeddings, "Block": block, "head": head}
    return {name: {"tp": assignment} for name, assignment in found.items()}


def _stages() -> tuple[StagePlan, ...]:
    full = Recompute(mode="full")
    first = (
        SegmentPlan(index=0, path="shared", layer="shared"),
        SegmentPlan(index=1, path="embeddings", layer="embeddings"),
        SegmentPlan(index=2, path="model.blocks.0", layer="Block", recompute=full),
        SegmentPlan(index=3, path="model.blocks.1", layer="Block", recompute=full),
    )
    last = (
        SegmentPlan(index=4, path="model.blocks.2", layer="Block"),
        SegmentPlan(index=5, path="model.blocks.3", layer="Block"),
        SegmentPlan(index=6, path="head", layer="head"),
    )
    times = {"forward_s": 1.25e-3, "backward_s": 3.5e-3, "communication_s": 0.4e-3}
    memory = Memory(
        parameters=3 * 2**30, gradients=3 * 2**30, optimizer=3 * 2**30, activations=2**30,
        workspace=2**28,
    )  # fmt: skip
    less = Memory(parameters=2**30, gradients=2**30, optimizer=2**30, activations=2**29)
    return (
        StagePlan(segments=first, **times, send_bytes=2**20, memory=memory),  # type: ignore[arg-type]
        StagePlan(segments=last, **times, send_bytes=0, memory=less),  # type: ignore[arg-type]
    )


def _replicated() -> tuple[ReplicatedOp, ...]:
    """Seven kinds of op, the first of them in three modules."""
    norms = [
        ReplicatedOp(
            op=f"norm_{i}", target="aten.layer_norm.default", module=f"blocks.{i}.ln",
            source="m.py:3", share_of_step=0.01,
            reason="splitting it would cost more than it saves",
        )
        for i in range(3)
    ]  # fmt: skip
    others = [
        ReplicatedOp(
            op=f"odd_{i}", target=f"aten.odd_{i}.default", module="", source=f"src/m.py:{i}",
            share_of_step=0.002 * (i + 1), reason="no sharding rule for this op",
        )
        for i in range(6)
    ]  # fmt: skip
    return (*norms, *others)


def _rank(compute_s: float, bubble_s: float) -> Breakdown:
    """Communication that adds 1.8 ms to a step of 20 ms."""
    return Breakdown(
        compute_s=compute_s, recompute_s=0.0, optimizer_s=1e-12, bubble_s=bubble_s,
        communication=(
            Communication(
                kind="all_gather", axis="tp", count=64, num_bytes=2**30, seconds=1.6e-3,
                exposed_s=1.6e-3,
            ),
            Communication(
                kind="all_reduce", axis="dp", count=6, num_bytes=3 * 2**30, seconds=9.0e-4,
                exposed_s=1.97e-4,
            ),
            Communication(
                kind="send", axis="pp", count=4, num_bytes=2**22, seconds=2.1e-6, exposed_s=2.1e-6,
            ),
        ),
    )  # fmt: skip


def _block_report() -> LayerReport:
    return LayerReport(
        op_s={"attn_qkv": 1e-4, "op_0": 2e-5}, saved_bytes={"attn_qkv": 2**20},
        parameter_bytes={"attn.qkv.weight": 2**19},
        conversions=(
            ConversionReport(
                value="x", users=("attn_qkv",), axis="tp", source="S(1)", target="V",
                forward="all_gather", backward="reduce_scatter", num_bytes=2**21, seconds=5e-5,
            ),
        ),
    )  # fmt: skip


def _solver() -> SolverReport:
    other = Candidate(
        mesh=Mesh(pp=1, dp=4, tp=2), micro_batch_size=2, schedule="none", data_parallel="zero1",
        step_s=0.0215, peak_bytes=2**33, reason="7.5 % slower",
    )  # fmt: skip
    refused = Candidate(
        mesh=Mesh(pp=1, dp=8, tp=1), micro_batch_size=2, schedule="none", data_parallel="ddp",
        step_s=None, peak_bytes=None, reason="stage 0 lacks 3.20 GiB",
    )  # fmt: skip
    return SolverReport(
        bound_s=0.019, gap=0.05, status="feasible", seconds={"capture": 1.5, "sharding": 0.75},
        candidates=(other, refused),
    )  # fmt: skip


def _front() -> tuple[Alternative, ...]:
    """The plan itself, and a mesh that is slower and leaner."""
    return (
        Alternative(
            mesh=Mesh(pp=2, dp=2, tp=2), schedule="1f1b", virtual_stages=1, micro_batch_size=2,
            data_parallel="zero1", recompute={"full": 2, "none": 4}, step_s=0.02,
            peak_bytes=int(10.25 * 2**30),
        ),
        Alternative(
            mesh=Mesh(pp=1, dp=4, tp=2), schedule="none", virtual_stages=1, micro_batch_size=2,
            data_parallel="zero1", recompute={"none": 6}, step_s=0.0215, peak_bytes=2**33,
        ),
    )  # fmt: skip


def small_plan() -> Plan:
    """Two stages x two data ranks x two tensor ranks."""
    return Plan(
        program="0123456789abcdef" * 4, model="TinyModel", cluster=CLUSTER, world_size=8,
        mesh=Mesh(pp=2, dp=2, tp=2), global_batch_size=16, micro_batch_size=2, schedule="1f1b",
        data_parallel="zero1", precision="bf16", optimizer="adamw", seed=0, layers=_layers(),
        stages=_stages(),
        prediction=Prediction(
            step_s=0.02, peak_bytes=int(10.25 * 2**30),
            parts={"compute": 0.0152, "recompute": 0.0, "collectives": 0.0016, "bubble": 0.003,
                   "sends": 0.0000021, "gradient_reduction": 0.000197, "optimizer": 1e-12},
            origin={"measured": 0.75, "analytic": 0.25, "assumed": 0.0},
            ranks=(_rank(0.0152, 0.003), _rank(0.0142, 0.004)),
            layers={"Block": _block_report()},
        ),
        solver=_solver(), replicated=_replicated(), coupled=("batch_norm in bn1",),
        runners_up=_front()[1:], front=_front(), pins={"pp": 2},
        notes=("attention 'flash' is captured as 'sdpa'",),
    )  # fmt: skip
