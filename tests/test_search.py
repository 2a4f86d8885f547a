"""The outer search: pins, memory, bounds, and what it says when nothing fits."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import zoo

from autoshard.capture import capture
from autoshard.cluster import Cluster, Device, Tier
from autoshard.cost_models.costs import AnalyticCosts
from autoshard.errors import InfeasibleError, OptionError
from autoshard.ir import Program
from autoshard.options import Constraints
from autoshard.placement.strategy import leaves_a_rank_empty
from autoshard.plan.bounds import ideal, recompute_bound, whole_model
from autoshard.plan.plan import Plan
from autoshard.plan.request import Request
from autoshard.plan.search import find_plan
from autoshard.plan.space import configurations

CLUSTER = Cluster(
    name="test",
    device=Device(
        name="test device", memory_bytes=2**34, bytes_per_s=1e10, matmul_efficiency=1.0,
        flops_per_s={"f32": 1e10, "f64": 1e10}, memory_efficiency=1.0, launch_s=1e-6,
        num_units=12,
    ),
    tiers=(
        Tier(name="node", size=2, bytes_per_s=1e10, latency_s=1e-6),
        Tier(name="network", size=0, bytes_per_s=1e9, latency_s=1e-5),
    ),
)  # fmt: skip
"""Two devices per node; products of few tiles do not fill a device."""


@cache
def program_of(name: str) -> Program:
    model, batch, loss_fn = zoo.build(name, torch.float32)
    return capture(model, example_inputs=batch, loss_fn=loss_fn, model_name=name)


def plan_for(world_size: int = 4, model: str = "gpt2", **pins: Any) -> Plan:
    return find_plan(
        program_of(model), cluster=CLUSTER, world_size=world_size, constraints=Constraints.of(pins)
    )


def compared_by(plan: Plan) -> float:
    """The seconds that the search compares: of a pipeline the closed form, not the simulation."""
    return plan.solver.bound_s / (1 - plan.solver.gap)


def modes(plan: Plan) -> set[str]:
    return {s.recompute.mode for stage in plan.stages for s in stage.segments}


def _loss_of(plan: Plan) -> str:
    """How the plan has the loss of GPT-2 computed on the tensor axis."""
    return next(
        layer["tp"].ops[op.name]
        for c in program_of("gpt2").classes
        for name, layer in plan.layers.items()
        for op in c.graph.ops
        if name == c.name and "cross_entropy" in op.target
    )


def sizes(plan: Plan) -> list[int]:
    """Segments per stage; the one of shared values is not counted."""
    layers = {c.name for c in program_of("gpt2").classes if c.kind != "shared"}
    return [sum(s.layer in layers for s in stage.segments) for stage in plan.stages]


# ------------------------------------------------------------------------------- pins


@pytest.mark.parametrize(
    "pins",
    [
        {"pp": 4}, {"dp": 4}, {"tp": 4}, {"pp": 2, "tp": 2}, {"dp": 2, "micro_batch_size": 1},
        {"pp": 2, "schedule": "gpipe"}, {"dp": 4, "data_parallel": "zero3"},
    ],
    ids=str,
)  # fmt: skip
def test_pins_are_honoured(pins: dict[str, Any]) -> None:
    plan = plan_for(**pins)
    for name, value in pins.items():
        where = plan.mesh if name in ("pp", "dp", "tp") else plan
        assert getattr(where, name) == value, f"{name} of {plan.mesh}, {plan.schedule}"
    assert plan.mesh.world_size == 4
    assert plan.pins == pins


def test_pinned_recompute_is_honoured() -> None:
    plan = plan_for(recompute="full")
    layers = [
        s for stage in plan.stages for s in stage.segments if s.path.startswith("transformer.h.")
    ]
    assert {s.recompute.mode for s in layers} == {"full"}


def test_a_recompute_pin_that_nothing_can_follow_is_said() -> None:
    plan = plan_for(model="dlrm", recompute="full")
    assert modes(plan) == {"none"}
    assert any("recompute=full has no effect" in note for note in plan.notes)


def test_pinned_stages_are_honoured() -> None:
    free = plan_for(pp=2)
    total = sum(sizes(free))
    plan = plan_for(pp=2, stages=(2, total - 2))
    assert sizes(plan) == [2, total - 2]
    assert plan.prediction.step_s >= free.prediction.step_s * 0.99


def test_pinned_stages_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(OptionError, match="add up to"):
        plan_for(pp=2, stages=(1, 1))


def test_pinned_sharding_of_a_parameter_is_honoured() -> None:
    plan = plan_for(tp=4, sharding={"*.mlp.c_proj.weight": "S(0)"})
    block = next(
        layer for layer in plan.layers.values() if "mlp.c_proj.weight" in layer["tp"].parameters
    )
    assert block["tp"].parameters["mlp.c_proj.weight"] == "S(0)"


def test_an_op_that_is_pinned_whole_works_on_whole_operands() -> None:
    vocabulary = {"transformer.wte.weight": "S(0)"}
    free = plan_for(tp=4, sharding=vocabulary)
    assert _loss_of(free) == "S(1), R -> R [vocab_parallel]"
    whole = plan_for(tp=4, sharding={**vocabulary, "cross_entropy": "R"})
    assert _loss_of(whole) == "R, R -> R"
    assert whole.prediction.step_s > free.prediction.step_s


def test_a_sharding_pin_of_nothing_is_refused() -> None:
    with pytest.raises(OptionError, match="none of that name"):
        plan_for(tp=4, sharding={"no.such.weight": "S(0)"})


def test_a_sharding_pin_that_an_op_cannot_have_is_refused() -> None:
    with pytest.raises(OptionError, match="its output can be"):
        plan_for(tp=4, sharding={"ln_1": "S(2)"})


# ------------------------------------------------------------------------------- optimum


def test_bounds_never_prune_the_optimum() -> None:
    """Every configuration solved alone: none is better than the plan, none beats its own bound."""
    program = program_of("gpt2")
    request = Request(
        program=program,
        cluster=CLUSTER,
        world_size=4,
        constraints=Constraints(memory_bytes=900_000),
    )
    plan = plan_for(memory_bytes=900_000)
    whole = whole_model(program, ideal(AnalyticCosts(CLUSTER)))
    best, fitting = float("inf"), 0
    for c in configurations(program, 4, request.constraints, CLUSTER, coupled=False):
        bound = recompute_bound(whole, c, request)
        parts = c.num_micro_batches * c.mesh.dp * c.mesh.tp
        paces = (c.num_micro_batches + c.mesh.pp - 1) / c.mesh.pp
        try:
            alone = plan_for(
                pp=c.mesh.pp, dp=c.mesh.dp, tp=c.mesh.tp, micro_batch_size=c.micro_batch_size,
                memory_bytes=900_000,
            )  # fmt: skip
        except InfeasibleError:
            continue
        fitting += 1
        assert compared_by(alone) >= (whole.seconds / parts + bound.seconds) * paces, str(c)
        assert alone.prediction.step_s == pytest.approx(compared_by(alone), rel=0.02)
        best = min(best, compared_by(alone))
    assert fitting > 5, "memory leaves several configurations to compare"
    assert compared_by(plan) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("model", ["llama", "t5", "unet"])
def test_no_split_beats_the_ideal_device(model: str) -> None:
    """The bound's premise, on the ops of other models: 1 / tp of the seconds is not undercut."""
    program = program_of(model)
    whole = whole_model(program, ideal(AnalyticCosts(CLUSTER)))
    for tp in (2, 4):
        plan = find_plan(
            program, cluster=CLUSTER, world_size=tp,
            constraints=Constraints(tp=tp, micro_batch_size=8 if model != "unet" else None),
        )  # fmt: skip
        assert plan.prediction.step_s >= whole.seconds / tp


def test_the_same_request_gives_the_same_plan() -> None:
    one, other = plan_for(), plan_for()
    clean = replace(one.solver, seconds={})
    assert replace(one, solver=clean) == replace(other, solver=replace(other.solver, seconds={}))


def test_a_search_that_ran_out_of_time_says_what_is_open() -> None:
    plan = find_plan(
        program_of("gpt2"), cluster=CLUSTER, world_size=4, constraints=Constraints(),
        time_limit_s=0.0,
    )  # fmt: skip
    best = plan_for()
    assert plan.solver.bound_s <= best.prediction.step_s
    assert plan.solver.gap == pytest.approx(1 - plan.solver.bound_s / plan.prediction.step_s)


def test_progress_names_configurations() -> None:
    said: list[str] = []
    find_plan(
        program_of("gpt2"), cluster=CLUSTER, world_size=2, constraints=Constraints(),
        progress=said.append,
    )  # fmt: skip
    assert said
    assert re.match(r"pp=\d+ dp=\d+ tp=\d+ micro-batch \d+ \w+ \(", said[0])


# ------------------------------------------------------------------------------- memory


def test_stages_are_uneven_where_the_model_is() -> None:
    """Six segments on four stages: no other division, pinned, is faster."""
    free = plan_for(pp=4, micro_batch_size=1)
    assert sum(sizes(free)) == 6
    for cuts in itertools.combinations(range(1, 6), 3):
        stages = tuple(b - a for a, b in itertools.pairwise((0, *cuts, 6)))
        pinned = plan_for(pp=4, micro_batch_size=1, stages=stages)
        assert sizes(pinned) == list(stages)
        assert free.prediction.step_s <= pinned.prediction.step_s * (1 + 1e-4), stages
    indices = [s.index for stage in free.stages for s in stage.segments]
    assert indices == sorted(indices)


def test_recompute_is_chosen_only_when_memory_is_tight() -> None:
    pins = {"pp": 1, "dp": 4, "tp": 1, "micro_batch_size": 2, "data_parallel": "ddp"}
    ample = plan_for(**pins)
    assert modes(ample) == {"none"}
    tight = plan_for(**pins, memory_bytes=int(0.9 * ample.prediction.peak_bytes))
    assert modes(tight) - {"none"}
    assert tight.prediction.peak_bytes <= 0.9 * ample.prediction.peak_bytes
    assert tight.prediction.step_s > ample.prediction.step_s


def test_zero_is_chosen_when_memory_is_tight() -> None:
    pins = {"pp": 1, "dp": 4, "tp": 1, "micro_batch_size": 1, "recompute": "none"}
    ample = plan_for(**pins, data_parallel="ddp")
    tight = plan_for(**pins, memory_bytes=int(0.7 * ample.prediction.peak_bytes))
    assert tight.data_parallel in ("zero1", "zero2", "zero3")
    assert tight.prediction.peak_bytes <= 0.7 * ample.prediction.peak_bytes


def test_bytes_of_a_stage_add_up() -> None:
    for pins in ({"dp": 4, "data_parallel": "zero2"}, {"pp": 2, "tp": 2, "recompute": "full"}):
        plan = plan_for(**pins)
        ranks = [0] * plan.mesh.pp
        for home, stage in zip(plan.homes, plan.stages, strict=True):
            ranks[home] += stage.memory.total
        assert max(ranks) == pytest.approx(plan.prediction.peak_bytes, rel=1e-6)


def test_too_little_memory_suggests_a_world_size_that_works() -> None:
    alone = plan_for(world_size=1, micro_batch_size=1, recompute="full")
    memory = int(0.6 * alone.prediction.peak_bytes)
    small = replace(CLUSTER, device=replace(CLUSTER.device, memory_bytes=memory))
    with pytest.raises(InfeasibleError) as caught:
        find_plan(program_of("gpt2"), cluster=small, world_size=1, constraints=Constraints())
    text = str(caught.value)
    missing = re.search(r"lacks [\d.]+ KiB \((\d+) bytes\) on stage 0", text)
    assert missing is not None, text
    assert 0 < int(missing[1]) < alone.prediction.peak_bytes
    enough = memory + int(missing[1]) + 1  # exactly: with a hundredth less nothing fits
    assert plan_for(1, memory_bytes=enough).prediction.peak_bytes <= enough
    with pytest.raises(InfeasibleError):
        plan_for(1, memory_bytes=enough - int(missing[1]) // 100)
    suggested = re.search(r"It fits with world_size=(\d+)", text)
    assert suggested is not None, text
    plan = find_plan(
        program_of("gpt2"), cluster=small, world_size=int(suggested[1]), constraints=Constraints()
    )
    assert plan.prediction.peak_bytes <= memory


def test_too_little_memory_suggests_a_pin_to_remove() -> None:
    pins: dict[str, Any] = {"pp": 1, "dp": 4, "tp": 1, "data_parallel": "ddp"}
    peak = plan_for(**pins, recompute="full", micro_batch_size=1).prediction.peak_bytes
    with pytest.raises(InfeasibleError, match="fits without the pin data_parallel=ddp"):
        plan_for(**pins, memory_bytes=int(0.8 * peak))
    del pins["data_parallel"]
    assert plan_for(**pins, memory_bytes=int(0.8 * peak)).data_parallel != "ddp"


def test_impossible_memory_says_so() -> None:
    small = replace(CLUSTER, device=replace(CLUSTER.device, memory_bytes=1000))
    with pytest.raises(InfeasibleError, match="No world size up to"):
        find_plan(program_of("gpt2"), cluster=small, world_size=2, constraints=Constraints())


# ------------------------------------------------------------------------------- coupled samples


def test_coupled_samples_get_one_micro_batch() -> None:
    plan = plan_for(model="vgg_bn", dp=2)
    assert plan.coupled
    assert plan.num_micro_batches == 1


def test_allowing_coupled_micro_batches_alone_changes_nothing() -> None:
    # How many there are is for the user to say, since it changes the result.
    assert plan_for(model="vgg_bn", dp=2, allow_coupled_micro_batches=True).num_micro_batches == 1


# ------------------------------------------------------------------------------- splits


def test_no_rank_is_left_without_a_part() -> None:
    assert not leaves_a_rank_empty(7, 4)  # 2, 2, 2, 1
    assert leaves_a_rank_empty(5, 4)  # 2, 2, 1, 0
    assert leaves_a_rank_empty(3, 4)
    assert not leaves_a_rank_empty(50257, 8)
