"""Older weights and uneven replicas on models of the zoo, each schedule against its semantics.

Weights that are tied between stages (GPT-2, T5), values that skip stages (T5, U-Net) and batch norm
(U-Net, ResNet), whose minibatches run whole: pipelines that cut one refuse it.
"""

from __future__ import annotations

import math

import pytest
import stale_runs as runs
import torch
from ranks import Pool

from autoshard.errors import OptionError

STEPS = 3
PAIRS = [
    *(("gpt2", case) for case in runs.CASES if case != "2bw"),
    *(
        ("t5", case)
        for case in ("pipedream", "pipedream, 2-1-1", "vertical sync", "2bw", "2-1-1, flushed")
    ),
    *(("llama", case) for case in ("pipedream", "2bw, 1-2-1")),
    *(("unet", case) for case in ("pipedream", "pipedream, 2-2")),
    ("resnet", "pipedream"),
]


@pytest.mark.parametrize(("model", "case"), PAIRS)
def test_same_as_one_process_with_all_versions(model: str, case: str, ranks: Pool) -> None:
    pins, rule = runs.CASES[case]
    given = runs.setup(model, **pins)
    results = ranks.run(runs.trained, given, STEPS, runs.adam)
    expected = runs.reference(given, rule, runs.adam)
    batches = runs.batches(model, STEPS)
    losses = [expected.step(batch, given.plan.num_micro_batches) for batch in batches]
    found, left, state = results[0]
    known = [loss for loss in (*found, *left) if not math.isnan(loss)]
    assert known == pytest.approx(losses, abs=1e-9)
    # Running statistics of a replica are of its own minibatches.
    together = max(given.plan.replicas) == 1
    wanted = expected.state if together else dict(expected.model.named_parameters())
    for name in wanted:
        if name in state:
            torch.testing.assert_close(state[name], expected.state[name], rtol=0, atol=1e-9)
    assert {n for m in expected.masters for n in m} <= set(state)


def evaluated(given: runs.Setup) -> tuple[float, runs.State]:
    made = runs.parallel(given, runs.adam)
    batches = runs.batches(given.model, 3)
    for batch in batches[:2]:
        made.step(made.local_batch(batch))
    loss = made.evaluate(made.local_batch(batches[2]))
    return loss, {n: b.clone() for n, b in made.engine.module.named_buffers()}


def test_replicas_evaluate_with_the_statistics_of_the_first(ranks: Pool) -> None:
    given = runs.setup("unet", **runs.CASES["pipedream, 2-2"][0])
    results = ranks.run(evaluated, given)
    assert len({loss for loss, _ in results}) == 1
    for one, other in (results[:2], results[2:]):
        assert all(torch.equal(one[1][name], tensor) for name, tensor in other[1].items())


def test_batches_that_interact_are_not_cut() -> None:
    with pytest.raises(OptionError, match="samples interact in forward"):
        runs.setup("resnet", schedule="pipedream-2bw", micro_batch_size=2, replicas=(1, 1, 1, 1))
