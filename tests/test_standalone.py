"""Micro-batches of samples that interact: batches of their own, if the user allows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from equivalence import FAST_LINKS, distributed, encoded, loss_of

from autoshard.api import make_plan
from autoshard.errors import OptionError

PINS = {"pp": 1, "tp": 2, "dp": 2, "micro_batch_size": 2, "allow_coupled_micro_batches": True}


def planned(**pins: Any) -> Any:
    model, batch, loss_fn = zoo.build("vgg_bn")
    return make_plan(
        model, world_size=4, example_inputs=batch, loss_fn=loss_fn, cluster=FAST_LINKS,
        constraints={**PINS, **pins},
    )  # fmt: skip


def test_the_plan_says_that_the_result_is_another_one() -> None:
    plan = planned().plan
    assert (plan.num_micro_batches, plan.standalone, plan.global_batch_size) == (2, 2, 8)
    assert plan.coupled
    assert any("batches of their own" in note for note in plan.notes)


def test_their_number_is_not_left_to_the_planner() -> None:
    with pytest.raises(OptionError, match="pin micro_batch_size, too"):
        planned(micro_batch_size=None)


def test_training_averages_batches_of_their_own(ranks: Any) -> None:
    """Equal to gradient accumulation in a plain loop, batch-norm statistics included."""
    made = planned()
    results = ranks.run(distributed, "vgg_bn", torch.float64, made.program, encoded(made.plan))
    model, batch, loss_fn = zoo.build("vgg_bn")
    optimizer = torch.optim.AdamW(model.parameters())
    from equivalence import batches

    losses = []
    for data in batches(batch):
        optimizer.zero_grad()
        total = 0.0
        for rows in ([0, 1, 4, 5], [2, 3, 6, 7]):  # the two ranks' first halves, then their second
            loss = loss_of(model, tuple(t[rows] for t in data), loss_fn) / 2
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    assert results[0].losses == pytest.approx(losses, abs=1e-10)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(results[0].state[name], tensor, rtol=1e-8, atol=1e-8)
