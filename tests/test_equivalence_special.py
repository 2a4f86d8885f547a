"""What is easily got wrong: dropout, frozen parameters, buffers, ignored targets, odd sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import equivalence as harness
import pytest
import special_models
import torch
from emitted import check, emitted_step
from equivalence import Source, Trained, difference, plan_of, program_of, reference
from random_models import build
from ranks import Pool

DOUBLE = torch.float64


def _train(
    ranks: Pool, source: Source, pins: dict[str, Any], *, steps: int = 2, seed: int = 0
) -> Trained:
    program = program_of(source, DOUBLE)
    plan = dataclasses.replace(plan_of(program, 4, pins), seed=seed)
    arguments = (source, DOUBLE, program, harness.encoded(plan), steps)
    trained = ranks.run(harness.distributed, *arguments, timeout_s=240)[0]
    assert trained is not None
    return trained


def _check(ranks: Pool, source: Source, pins: dict[str, Any]) -> Trained:
    trained = _train(ranks, source, pins)
    found = difference(trained, reference(source, DOUBLE, steps=2))
    assert found.worst <= 1e-9, found
    return trained


class TestDropout:
    """What a rank or a micro-batch draws is its own where samples are its own, and nowhere else."""

    @pytest.mark.parametrize(
        "pins", [{"dp": 4}, {"dp": 2, "micro_batch_size": 1}, {"tp": 4}, {"dp": 2, "tp": 2}]
    )
    def test_every_element_is_dropped_on_its_own(self, ranks: Pool, pins: dict[str, Any]) -> None:
        trained = _train(ranks, special_models.dropped, {"pp": 1, **pins}, steps=1)
        kept = trained.gradients[0]["weight"] * special_models.BATCH * special_models.COLUMNS / 2
        assert torch.equal(kept, kept.round())
        # Binomial(8, 1/2): mean 4 and variance 2; equal masks on 4 ranks would have variance 8.
        assert float(kept.mean()) == pytest.approx(4, abs=5 * (2 / len(kept)) ** 0.5)
        assert float(kept.var()) == pytest.approx(2, abs=0.35)
        quarters = kept.view(4, -1)
        assert all(not torch.equal(quarters[0], q) for q in quarters[1:])
        assert trained.losses[0] == pytest.approx(1, abs=0.05)

    def test_the_seed_decides(self, ranks: Pool) -> None:
        source, pins = special_models.language_model_with_dropout, {"dp": 2, "tp": 2}
        one, same, other = (_train(ranks, source, pins, seed=s) for s in (3, 3, 4))
        assert difference(one, same).worst == 0.0
        assert one.losses != other.losses

    def test_steps_draw_anew(self, ranks: Pool) -> None:
        trained = _train(ranks, special_models.dropped, {"dp": 4}, steps=2)
        first, second = (g["weight"] for g in trained.gradients)
        assert not torch.equal(first, second)

    def test_recomputation_draws_the_same(self, ranks: Pool) -> None:
        source, pins = special_models.language_model_with_dropout, {"dp": 2, "tp": 2}
        kept = _train(ranks, source, {**pins, "recompute": "none"})
        again = _train(ranks, source, {**pins, "recompute": "full"})
        assert difference(kept, again).worst <= 1e-9

    def test_the_mean_over_seeds_is_that_of_the_plain_model(self, ranks: Pool) -> None:
        source = special_models.language_model_with_dropout
        model, batch, _ = source(DOUBLE)
        plain = torch.tensor([float(model(**batch).loss) for _ in range(64)])
        trained = _train(ranks, source, {"pp": 2, "dp": 2, "micro_batch_size": 1}, steps=1)
        spread = float(plain.std()) + 1e-3
        assert abs(trained.losses[0] - float(plain.mean())) < 5 * spread


@pytest.mark.parametrize(
    "pins", [{"dp": 4, "data_parallel": "zero2"}, {"pp": 4}, {"pp": 2, "tp": 2}]
)
def test_frozen_parameters_stay(ranks: Pool, pins: dict[str, Any]) -> None:
    trained = _check(ranks, special_models.frozen, pins)
    before = special_models.frozen(DOUBLE)[0].state_dict()
    for name in ("wte.weight", "lm_head.weight", "h.1.attn.c_attn.weight", "h.2.mlp.0.bias"):
        assert torch.equal(trained.state[name], before[name])
        assert not any(name in g and g[name].any() for g in trained.gradients)


@pytest.mark.parametrize("pins", [{"dp": 4}, {"tp": 4}, {"dp": 2, "tp": 2}, {"pp": 2, "dp": 2}])
def test_buffers(ranks: Pool, pins: dict[str, Any]) -> None:
    trained = _check(ranks, special_models.buffered, pins)
    assert int(trained.state["norm.num_batches_tracked"]) == 2
    assert "shift" not in trained.state


@pytest.mark.parametrize(
    "pins",
    [{"dp": 4}, {"dp": 2, "pp": 2, "micro_batch_size": 1}, {"tp": 4}, {"dp": 2, "tp": 2}],
)
def test_means_over_targets_that_ranks_hold_unequally(ranks: Pool, pins: dict[str, Any]) -> None:
    _check(ranks, special_models.uncounted, pins)


@pytest.mark.parametrize(
    "pins",
    [
        {"dp": 4, "micro_batch_size": 1, "data_parallel": "ddp"},
        {"dp": 4, "micro_batch_size": 1, "data_parallel": "zero1"},
        {"pp": 2, "dp": 2, "micro_batch_size": 1},
        {"dp": 2, "tp": 2, "micro_batch_size": 1},
    ],
)
def test_gradients_that_share_memory_add_up(ranks: Pool, pins: dict[str, Any]) -> None:
    """Adding the next micro-batch's gradient to one must not change another."""
    _check(ranks, special_models.shared_gradients, pins)


def test_a_tied_weight_is_one_weight_on_two_stages(ranks: Pool) -> None:
    program = program_of("gpt2", DOUBLE, True)
    plan = plan_of(program, 4, {"pp": 4})
    users = {
        number
        for number, stage in enumerate(plan.stages)
        for segment in stage.segments
        if "transformer.wte.weight" in program.segments[segment.index].bindings.values()
    }
    assert users == {0, 3}
    trained = ranks.run(harness.distributed, "gpt2", DOUBLE, program, harness.encoded(plan), 2)[0]
    assert torch.equal(trained.state["lm_head.weight"], trained.state["transformer.wte.weight"])
    assert difference(trained, reference("gpt2", DOUBLE, lifted=True, steps=2)).worst <= 1e-9


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_a_vocabulary_that_does_not_divide(tp: int) -> None:
    """61 words over 2, 4 and 8 ranks, embedded and predicted in parts."""
    case = build("gpt2")
    plan = plan_of(case.program, tp, {"tp": tp, "sharding": {"transformer.wte.weight": "S(0)"}})
    states = [
        axes["tp"].parameters[name]
        for axes in plan.layers.values()
        for name in axes["tp"].parameters
        if name.endswith("wte.weight")
    ]
    assert states
    assert set(states) == {"S(0)"}
    check(case.expected, emitted_step(case.program, plan, case.model, case.batch), 1e-9)


def test_fewer_heads_of_keys_than_ranks() -> None:
    """Two heads of keys and values on four ranks: each query head finds its own."""
    case = build("llama")
    plan = plan_of(case.program, 4, {"tp": 4, "sharding": {"*self_attn.*_proj.weight": "S(0)"}})
    check(case.expected, emitted_step(case.program, plan, case.model, case.batch), 1e-9)
