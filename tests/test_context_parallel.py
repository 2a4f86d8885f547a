"""Context parallelism: how positions are split, what it costs, and that it trains."""

from __future__ import annotations

from typing import Any

import equivalence as harness
import pytest
import torch
from equivalence import difference, plan_of, program_of, reference
from ranks import Pool

from autoshard.errors import OptionError
from autoshard.options import Constraints, validate_world_size
from autoshard.plan import rank_programs, space
from autoshard.plan.context_axis import positions
from autoshard.plan.plan import Plan

STEPS = 2

RUNS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"cp": 4, "dp": 1, "pp": 1}),
    ("gpt2", {"cp": 2, "pp": 2, "dp": 1}),  # tied embeddings on two stages
    ("llama", {"cp": 2, "tp": 2}),
    ("llama", {"cp": 2, "dp": 2, "data_parallel": "zero3"}),
    ("nanogpt", {"cp": 2, "dp": 2, "data_parallel": "ddp", "micro_batch_size": 1}),
    ("encoder", {"cp": 2, "dp": 2, "data_parallel": "zero1"}),
]


@pytest.mark.parametrize(("model", "pins"), RUNS, ids=str)
def test_trains_to_the_numbers_of_the_plain_model(
    ranks: Pool, model: str, pins: dict[str, Any]
) -> None:
    dtype = torch.float64
    lifted = harness.casts(program_of(model, dtype))
    program = program_of(model, dtype, lifted)
    plan = plan_of(program, 4, pins)
    assert plan.mesh.cp == pins["cp"]
    assert split_positions(plan)
    arguments = (model, dtype, program, harness.encoded(plan), STEPS)
    trained = ranks.run(harness.distributed, *arguments, timeout_s=240)[0]
    found = difference(trained, reference(model, dtype, lifted=lifted, steps=STEPS))
    assert found.worst <= 1e-8, found


def split_positions(plan: Plan) -> bool:
    """Some op takes its activations split over positions, and no parameter is split."""
    layers = [axes["cp"] for axes in plan.layers.values()]
    whole = {s for layer in layers for s in layer.parameters.values()} <= {"R", "V"}
    return whole and any("S(1)" in text for layer in layers for text in layer.ops.values())


def test_queries_stay_and_keys_are_gathered() -> None:
    """What Llama 3 does by hand comes out of the program."""
    plan = plan_of(program_of("llama", torch.float64), 4, {"cp": 4, "dp": 1})
    texts = [t for axes in plan.layers.values() for t in axes["cp"].ops.values()]
    assert any(t.endswith("[causal_rows]") or t.startswith("S(1), S(1), S(1)") for t in texts)


def test_state_is_spread_over_data_and_context_ranks() -> None:
    program = program_of("llama", torch.float64)
    four = plan_of(program, 4, {"dp": 4, "data_parallel": "zero3"})
    both = plan_of(program, 4, {"dp": 2, "cp": 2, "data_parallel": "zero3"})
    assert both.mesh.replicas == four.mesh.replicas == 4
    assert both.stages[0].memory.optimizer == four.stages[0].memory.optimizer


def test_short_sequences_are_left_to_pins() -> None:
    assert plan_of(program_of("llama", torch.float64), 4, {}).mesh.cp == 1


def test_long_sequences_are_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("llama", torch.float64)
    monkeypatch.setattr(space, "LONG", positions(program))
    plan = plan_of(program, 4, {"dp": 1, "pp": 1})
    assert plan.mesh.cp * plan.mesh.tp == 4
    searched = {plan.mesh.cp, *(other.mesh.cp for other in plan.solver.candidates)}
    assert searched == {1, 2, 4}
    pinned = min(
        plan_of(program, 4, {"dp": 1, "pp": 1, "cp": cp}).prediction.step_s for cp in (1, 2, 4)
    )
    assert plan.prediction.step_s == pytest.approx(pinned)


def test_where_positions_cannot_be_split_the_search_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(*_: object) -> None:
        raise OptionError("positions cannot be split")

    program = program_of("llama", torch.float64)
    monkeypatch.setattr(space, "LONG", positions(program))
    monkeypatch.setattr(rank_programs, "with_split_positions", refuses)
    assert plan_of(program, 4, {}).mesh.cp == 1


def test_a_model_without_positions() -> None:
    with pytest.raises(OptionError, match="nothing of the form \\[samples, positions, features\\]"):
        plan_of(program_of("mlp", torch.float64), 4, {"cp": 2})


def test_pins_that_the_world_cannot_hold() -> None:
    with pytest.raises(OptionError, match="cp=3 x tp=2 holds 6 ranks"):
        validate_world_size(8, Constraints(cp=3, tp=2))
