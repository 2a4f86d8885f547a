"""Where a plan says that its step goes, and what it says of single parameters and ops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_search import CLUSTER, plan_for, program_of

from autoshard.options import Constraints
from autoshard.plan.plan import Breakdown, Communication
from autoshard.plan.search import find_plan
from autoshard.report.compare import Comparison, as_text, parts


def found(rank: Breakdown, kind: str, axis: str) -> Communication:
    (one,) = (c for c in rank.communication if (c.kind, c.axis) == (kind, axis))
    return one


def weight_bytes() -> int:
    return sum(p.type.nbytes for p in program_of("gpt2").parameters.values() if p.trainable)


MIXES: list[dict[str, Any]] = [
    {"pp": 4}, {"dp": 4, "data_parallel": "ddp"}, {"tp": 2, "dp": 2, "data_parallel": "zero1"},
    {"dp": 4, "data_parallel": "zero3", "micro_batch_size": 1}, {"pp": 2, "tp": 2},
    {"pp": 2, "dp": 2, "recompute": "full", "micro_batch_size": 1},
    {"cp": 2, "dp": 2}, {"cp": 2, "pp": 2, "recompute": "full"},
    {"pp": 2, "dp": 2, "virtual_stages": 2}, {"pp": 2, "dp": 2, "schedule": "gpipe"},
]  # fmt: skip


@pytest.mark.parametrize("pins", MIXES, ids=str)
def test_the_parts_of_every_rank_add_up_to_the_step(pins: dict[str, Any]) -> None:
    plan = plan_for(**pins)
    assert len(plan.prediction.ranks) == plan.mesh.pp
    for rank in plan.prediction.ranks:
        assert sum(parts(rank).values()) == pytest.approx(plan.prediction.step_s, rel=1e-6)
        assert min(parts(rank).values()) >= 0
        assert {c.axis for c in rank.communication} <= {
            axis for axis in ("pp", "dp", "cp", "tp") if getattr(plan.mesh, axis) > 1
        } | ({"dp"} if plan.mesh.cp > 1 else set())  # gradients over both


def test_data_parallelism_moves_every_weight_once_or_more() -> None:
    """All-reduced once per step; or gathered forward and backward, scattered each micro-batch."""
    pins = {"pp": 1, "dp": 4, "tp": 1, "micro_batch_size": 1}
    (once,) = plan_for(**pins, data_parallel="ddp").prediction.ranks
    assert found(once, "all_reduce", "dp").num_bytes >= weight_bytes()
    plan = plan_for(**pins, data_parallel="zero3")
    (each,) = plan.prediction.ranks
    scattered, gathered = found(each, "reduce_scatter", "dp"), found(each, "all_gather", "dp")
    m = plan.num_micro_batches
    assert (
        scattered.num_bytes == gathered.num_bytes == m * found(once, "all_reduce", "dp").num_bytes
    )
    assert scattered.count == m * found(once, "all_reduce", "dp").count


def test_what_compute_hides_is_told_apart() -> None:
    """Beside a GPU's compute all but the end of it; beside a CPU's nothing."""
    pins = Constraints.of({"dp": 4, "data_parallel": "ddp"})
    by_kind = {}
    for kind in ("cuda", "cpu"):
        cluster = replace(CLUSTER, device=replace(CLUSTER.device, kind=kind))
        plan = find_plan(program_of("gpt2"), cluster=cluster, world_size=4, constraints=pins)
        (rank,) = plan.prediction.ranks
        by_kind[kind] = found(rank, "all_reduce", "dp")
        copied = found(rank, "copy", "dp")  # into buckets; nothing hides it
        assert copied.exposed_s == copied.seconds > 0
        assert rank.exposed_s + rank.hidden_s == pytest.approx(
            by_kind[kind].seconds + copied.seconds
        )
    assert by_kind["cpu"].exposed_s == pytest.approx(by_kind["cpu"].seconds)
    assert by_kind["cuda"].exposed_s < 0.9 * by_kind["cuda"].seconds
    assert by_kind["cuda"].seconds == pytest.approx(by_kind["cpu"].seconds)


def test_tensor_collectives_are_those_of_the_layers() -> None:
    plan = plan_for(world_size=2, tp=2)
    (rank,) = plan.prediction.ranks
    counts: dict[str, int] = {}
    for layer, report in plan.prediction.layers.items():
        number = sum(s.layer == layer for s in plan.stages[0].segments)
        for one in report.conversions:
            for motion in (one.forward, one.backward):
                counts[motion] = counts.get(motion, 0) + number
    m = plan.num_micro_batches
    for kind in ("all_gather", "reduce_scatter"):
        assert counts.get(kind, 0) > 0
        assert found(rank, kind, "tp").count == m * counts[kind]
    tensor_s = sum(c.seconds for c in rank.communication if c.axis == "tp")
    reduced_s = plan.prediction.parts["gradient_reduction"]
    assert tensor_s == pytest.approx(plan.prediction.parts["collectives"] + reduced_s)


def test_middle_ranks_send_both_ways() -> None:
    plan = plan_for(pp=4)
    first, second, third, last = (found(r, "send", "pp") for r in plan.prediction.ranks)
    assert second.count == third.count == 2 * first.count == 2 * last.count
    assert first.count == 2 * plan.num_micro_batches - plan.num_micro_batches
    assert first.num_bytes == plan.stages[0].send_bytes * plan.num_micro_batches


# -- explain --------------------------------------------------------------------------------------


def test_explain_says_what_an_op_costs_and_what_it_makes_others_do() -> None:
    plan = plan_for(world_size=2, tp=2, recompute="full")
    report = plan.prediction.layers["GPT2Block"]
    one = next(c for c in report.conversions if "all_gather" in (c.forward, c.backward))
    text = plan.explain(one.users[0])
    assert f"{one.value} passes from {one.source} to {one.target} on tp for" in text
    assert "all-gather" in text and "per micro-batch, forward and backward" in text
    assert "in each of 4 layers" in text
    kept = next(name for name, size in report.saved_bytes.items() if size and name in report.op_s)
    assert "per micro-batch for backward: made again" in plan.explain(kept)
    fast = plan_for(world_size=2, tp=2, recompute="none")
    kept = next(n for n, s in fast.prediction.layers["GPT2Block"].saved_bytes.items() if s)
    assert "per micro-batch for backward: kept" in fast.explain(kept)


def test_explain_says_the_bytes_of_a_parameter_as_it_is_split() -> None:
    plan = plan_for(world_size=2, tp=2, sharding={"*.mlp.c_fc.weight": "S(1)"})
    whole = program_of("gpt2").parameters["transformer.h.0.mlp.c_fc.weight"].type.nbytes
    assert plan.prediction.layers["GPT2Block"].parameter_bytes["mlp.c_fc.weight"] == whole // 2
    assert f"takes {whole // 2 / 1024:.2f} KiB on a rank" in plan.explain("mlp.c_fc.weight")
    assert "of it conversions" in plan.explain("GPT2Block")


# -- side by side ---------------------------------------------------------------------------------


def compared(**pins: Any) -> Comparison:
    return Comparison(chosen=plan_for(), other=plan_for(**pins), name="hand")


def test_the_difference_is_the_sum_of_its_parts() -> None:
    comparison = compared(pp=4, micro_batch_size=2)
    difference_s = comparison.other.prediction.step_s - comparison.chosen.prediction.step_s
    assert difference_s > 0
    assert sum(comparison.differences().values()) == pytest.approx(difference_s)
    first, second, *_ = comparison.reasons()
    assert first.startswith("hand takes ") and "longer per step" in first
    assert "bubble" in second  # of four stages and four micro-batches


def test_both_plans_are_shown_with_every_part() -> None:
    text = as_text(compared(pp=2, tp=2, recompute="full"))
    for words in ("side by side", "send on pp", "recompute", "peak memory", "rank of hand"):
        assert words in text.lower()
    assert max(map(len, text.splitlines())) <= 100


def test_a_plan_against_itself() -> None:
    chosen = plan_for()
    alike = Comparison(chosen=chosen, other=chosen, name="hand")
    assert list(alike.reasons()) == ["hand takes as long as the chosen plan"]
    assert alike.ratio == 1
