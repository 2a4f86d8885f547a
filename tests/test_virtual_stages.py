"""Plans with several chunks per pipeline rank, or a split backward: pins, memory, price."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_search import CLUSTER
from transformers import GPT2Config, GPT2LMHeadModel

from autoshard.capture import capture
from autoshard.cost_models.pipeline import StageSeconds, simulate
from autoshard.errors import InfeasibleError, OptionError, PlanFileError
from autoshard.ir import Program
from autoshard.options import Constraints
from autoshard.plan.plan import Plan
from autoshard.plan.scheduled_stages import Pipeline, pipeline_seconds
from autoshard.plan.search import find_plan
from autoshard.schedules import by_name


@functools.cache
def program() -> Program:
    """Eight equal layers, and a head tied to the embedding."""
    config = GPT2Config(n_layer=8, n_embd=32, n_head=2, vocab_size=64, n_positions=16)
    tokens = torch.zeros(8, 16, dtype=torch.long)
    return capture(GPT2LMHeadModel(config), example_inputs={"input_ids": tokens, "labels": tokens})


@functools.cache
def plan_of(pins: tuple[tuple[str, Any], ...]) -> Plan:
    return find_plan(
        program(), cluster=CLUSTER, world_size=2,
        constraints=Constraints(**dict(pins)),
    )  # fmt: skip


def plan_for(**pins: Any) -> Plan:
    return plan_of(tuple({"pp": 2, "micro_batch_size": 1, **pins}.items()))


def rank_bytes(plan: Plan) -> list[int]:
    used = [0] * plan.mesh.pp
    for home, stage in zip(plan.homes, plan.stages, strict=True):
        used[home] += stage.memory.total
    return used


@pytest.mark.parametrize(
    "pins",
    [
        {"virtual_stages": 2}, {"schedule": "looped-bfs", "virtual_stages": 2},
        {"schedule": "zb-h1"}, {"schedule": "zb-2p"}, {"schedule": "zb-v"},
    ],
    ids=str,
)  # fmt: skip
def test_pins_are_followed_and_parts_add_up(pins: dict[str, Any]) -> None:
    plan = plan_for(**pins)
    assert plan.schedule == pins.get("schedule", "interleaved-1f1b")
    assert plan.virtual_stages == (2 if pins.get("schedule") == "zb-v" else
                                   pins.get("virtual_stages", 1))  # fmt: skip
    assert len(plan.stages) == 2 * plan.virtual_stages
    indices = [s.index for stage in plan.stages for s in stage.segments]
    assert indices == sorted(indices)
    assert sum(plan.prediction.parts.values()) == pytest.approx(plan.prediction.step_s)
    assert max(rank_bytes(plan)) == pytest.approx(plan.prediction.peak_bytes, abs=8)
    assert plan.solver.bound_s <= plan.prediction.step_s


def test_chunks_shorten_the_bubble_and_hold_more() -> None:
    one, two = plan_for(schedule="1f1b"), plan_for(virtual_stages=2)
    assert two.prediction.parts["bubble"] < 0.8 * one.prediction.parts["bubble"]
    assert max(rank_bytes(two)) > max(rank_bytes(one))


def test_the_search_chooses_chunks() -> None:
    assert plan_for().schedule == "interleaved-1f1b"


def test_stages_of_chunks_are_pinned_in_the_order_of_the_model() -> None:
    total = sum(s.layer.kind != "shared" for s in program().segments)
    sizes = (1, 1, total - 3, 1)
    plan = plan_for(virtual_stages=2, stages=sizes)
    kinds = {c.name for c in program().classes if c.kind == "shared"}
    assert (
        tuple(sum(s.layer not in kinds for s in stage.segments) for stage in plan.stages) == sizes
    )
    assert plan.homes == (0, 1, 0, 1)


def test_each_rank_recomputes_what_it_must() -> None:
    """The first rank holds most in flight."""
    free = plan_for(virtual_stages=2)
    limit = max(rank_bytes(free)) - 1
    tight = plan_for(virtual_stages=2, memory_bytes=limit)
    assert max(rank_bytes(tight)) <= limit
    modes = [{s.recompute.mode for s in stage.segments} for stage in tight.stages]
    assert modes[0] | modes[2] != {"none"}
    assert modes[1] | modes[3] == {"none"}
    with pytest.raises(InfeasibleError, match="lacks"):
        plan_for(virtual_stages=2, memory_bytes=min(rank_bytes(free)) // 8)


def test_a_tied_weight_that_a_rank_has_twice_is_held_once() -> None:
    """In V shape the first rank has the embedding and the head."""
    looped, folded = plan_for(virtual_stages=2), plan_for(schedule="zb-v")
    weights = [sum(s.memory.parameters for s in plan.stages) for plan in (looped, folded)]
    embedding = program().parameters["transformer.wte.weight"].type.nbytes
    assert weights[0] - weights[1] == embedding


@pytest.mark.parametrize(
    ("pins", "words"),
    [
        ({"schedule": "1f1b", "virtual_stages": 2}, "at most 1 but got 2"),
        ({"schedule": "interleaved-1f1b"}, "at least 2 but got 1"),
        ({"pp": 1, "virtual_stages": 2}, "pp is pinned to 1"),
        ({"pp": 2, "virtual_stages": 2, "stages": (3, 3)}, "2 entries but pp is 2 with 2 virtual"),
        ({"virtual_stages": 0}, "virtual_stages expects a positive integer"),
    ],
)
def test_pins_that_contradict_each_other(pins: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Constraints(**pins)


def test_more_chunks_than_parts_with_parameters() -> None:
    with pytest.raises(OptionError, match="pp times virtual_stages may be at most"):
        plan_for(virtual_stages=50)


def test_a_plan_file_whose_stages_and_chunks_disagree(tmp_path: Path) -> None:
    path = plan_for(virtual_stages=2).save(tmp_path / "plan.json")
    assert Plan.load(path) == plan_for(virtual_stages=2)
    text = path.read_text()
    path.write_text(text.replace('\n "virtual_stages": 2', '\n "virtual_stages": 3'))
    with pytest.raises(PlanFileError, match="4 stages but pp is 2 x 3 virtual stages"):
        Plan.load(path)


@pytest.mark.parametrize(("name", "v"), [("1f1b", 1), ("gpipe", 1), ("interleaved-1f1b", 3)])
@pytest.mark.parametrize("m", [31, 64])
def test_many_micro_batches_are_priced_from_few(name: str, v: int, m: int) -> None:
    """Against the whole schedule, with uneven stages and transfers."""
    stages = [
        StageSeconds(forward_s=1 + 0.1 * (s % 3), backward_s=2 - 0.2 * (s % 2), send_s=0.05)
        for s in range(3 * v)
    ]
    pipeline = Pipeline(schedule=name, num_ranks=3, num_micro_batches=m, virtual_stages=v)
    found = pipeline_seconds(pipeline, stages, [0.5] * (3 * v))
    whole = simulate(by_name(name, 3, m, v), stages)
    assert found.step_s == pytest.approx(max(whole.end_s) + 0.5 * v, rel=1e-3)


def test_a_step_that_all_end_together_has_the_bubble_of_a_flush() -> None:
    """Zero-bubble ranks go on at their own time only where nothing makes them wait."""
    stages = [StageSeconds(forward_s=1, backward_s=2, weight_s=1)] * 4
    alone = Pipeline(schedule="zb-2p", num_ranks=4, num_micro_batches=12, together=False)
    together = replace(alone, together=True)
    tails = [0.0] * 4
    assert pipeline_seconds(alone, stages, tails).step_s == pytest.approx(12 * 3)
    assert pipeline_seconds(together, stages, tails).step_s == pytest.approx(12 * 3 + 3)
