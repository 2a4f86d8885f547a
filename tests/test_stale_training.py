"""Pipelines without a flush, and uneven replicas, against one process with every weight version."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import stale_runs as runs
import torch
from ranks import Pool
from stale_runs import Setup, State
from torch.optim.lr_scheduler import LambdaLR

from autoshard.errors import OptionError
from autoshard.runtime.replica_wire import Place

STEPS = 5
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "stashing": ({"schedule": "pipedream"}, runs.stashing),
    "stashing, two minibatches a step": (
        {"schedule": "pipedream", "micro_batch_size": 6, "replicas": (1, 1, 1, 1)},
        runs.stashing,
    ),
    "vertical sync": ({"schedule": "pipedream", "vertical_sync": True}, runs.vertical),
    "two versions": (
        {"schedule": "pipedream-2bw", "micro_batch_size": 3, "replicas": (1, 1, 1, 1)},
        runs.double_buffered,
    ),
    "3-1": ({"schedule": "pipedream", "replicas": (3, 1)}, runs.stashing),
    "1-3": ({"schedule": "pipedream", "replicas": (1, 3)}, runs.stashing),
    "2-1-1, vertical sync": (
        {"schedule": "pipedream", "replicas": (2, 1, 1), "vertical_sync": True},
        runs.vertical,
    ),
    "1-2-1, vertical sync": (
        {"schedule": "pipedream", "replicas": (1, 2, 1), "vertical_sync": True},
        runs.vertical,
    ),
    "3-1, two versions": (
        {"schedule": "pipedream-2bw", "replicas": (3, 1), "micro_batch_size": 2},
        runs.double_buffered,
    ),
    "3-1, flushed": ({"replicas": (3, 1), "micro_batch_size": 2}, runs.newest),
    "1-2-1, gpipe": (
        {"schedule": "gpipe", "replicas": (1, 2, 1), "micro_batch_size": 3},
        runs.newest,
    ),
}


def assert_close(found: State, expected: State, error: float = 1e-12) -> None:
    assert set(found) == set(expected)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=error)


@pytest.mark.parametrize(
    ("case", "optimizer"),
    [*((case, runs.momentum) for case in CASES), ("stashing", runs.adam), ("3-1", runs.adam)],
)
def test_same_as_one_process_with_all_versions(case: str, optimizer: Any, ranks: Pool) -> None:
    pins, rule = CASES[case]
    given = runs.setup("chain", **pins)
    results = ranks.run(runs.trained, given, STEPS, optimizer)
    expected = runs.reference(given, rule, optimizer)
    losses = [expected.step(b, given.plan.num_micro_batches) for b in runs.batches("chain", STEPS)]
    found, left, state = results[0]
    assert_close(state, expected.state, 1e-11)
    assert all(
        (other[0] == found or math.isnan(found[0])) and other[1] == left for other in results
    )
    delay = given.plan.rules.delay
    assert all(math.isnan(loss) for loss in found[:delay])
    assert [*found[delay:], *left] == pytest.approx(losses, abs=1e-12)


def test_stale_weights_are_not_fresh_ones(ranks: Pool) -> None:
    """That the references differ: the test above would see a wrong version."""
    given = runs.setup("chain", schedule="pipedream")
    states = []
    for rule in (runs.stashing, runs.vertical, lambda replicas: runs.newest(1)):
        expected = runs.reference(given, rule, runs.momentum)
        for batch in runs.batches("chain", STEPS):
            expected.step(batch, 1)
        states.append(expected.state)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert max(float((states[one][n] - states[other][n]).abs().max()) for n in states[0]) > 1e-4


def tuned(given: Setup) -> tuple[list[float], State, float, float]:
    made = runs.parallel(given)
    made.set_scheduler(lambda optimizer: LambdaLR(optimizer, lambda step: 0.5**step))
    made.clip_norm = 0.3
    batches = runs.batches(given.model, 4)
    losses = [made.step(made.local_batch(b)) for b in batches[:3]]
    gradients = made.full_grads()
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    return losses, made.full_state_dict(), made.evaluate(made.local_batch(batches[3])), norm


def test_vgg_split_3_1_is_exact_with_a_flush(ranks: Pool) -> None:
    """Clipping, scheduler and evaluation as in the plain model."""
    given = runs.setup("vgg", replicas=(3, 1), micro_batch_size=2)
    losses, state, evaluated, norm = ranks.run(tuned, given)[0]
    model = runs.build("vgg")
    optimizer = runs.momentum(list(model.parameters()))
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    batches, expected = runs.batches("vgg", 4), []
    for batch in batches[:3]:
        optimizer.zero_grad()
        loss = model(**batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        scheduler.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-12)
    assert_close(state, dict(model.state_dict()), 1e-11)
    assert evaluated == pytest.approx(model(**batches[3]).item(), abs=1e-11)
    clipped = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert norm == pytest.approx(float(clipped), abs=1e-9)


def test_vgg_split_3_1_without_a_flush(ranks: Pool) -> None:
    given = runs.setup("vgg", schedule="pipedream", replicas=(3, 1))
    found, left, state = ranks.run(runs.trained, given, 3, runs.momentum)[0]
    expected = runs.reference(given, runs.stashing, runs.momentum)
    losses = [expected.step(b, 3) for b in runs.batches("vgg", 3)]
    assert_close(state, expected.state, 1e-11)
    assert [*found[1:], *left] == pytest.approx(losses, abs=1e-12)


# -- running empty --------------------------------------------------------------------------------


def interrupted(given: Setup, folder: Path, resume: Setup) -> tuple[list[float], State]:
    """Two steps, a save, two more; then again from the checkpoint, maybe under another plan."""
    batches = runs.batches(given.model, 4)
    made = runs.parallel(given)
    losses = [made.step(made.local_batch(b)) for b in batches[:2]]
    made.save(folder)
    losses += [made.step(made.local_batch(b)) for b in batches[2:]]
    losses += made.drain()
    after = made.full_state_dict()
    again = runs.parallel(resume)
    again.load(folder)
    assert again.steps_done == 2
    for batch in batches[2:]:
        again.step(again.local_batch(batch))
    again.drain()
    return losses, after, again.full_state_dict()


@pytest.mark.parametrize(
    "pins",
    [
        {"schedule": "pipedream", "replicas": (3, 1)},
        {"schedule": "pipedream-2bw", "micro_batch_size": 3, "replicas": (1, 1, 1, 1)},
    ],
    ids=str,
)
def test_a_pipeline_runs_empty_to_save(pins: dict[str, Any], tmp_path: Path, ranks: Pool) -> None:
    given = runs.setup("chain", **pins)
    losses, after, again = ranks.run(interrupted, given, tmp_path, given)[0]
    rule = runs.stashing if pins["schedule"] == "pipedream" else runs.double_buffered
    expected = runs.reference(given, rule, runs.momentum)
    m, wanted = given.plan.num_micro_batches, []
    for index, batch in enumerate(runs.batches("chain", 4)):
        if index == 2:
            expected.begin()
        wanted.append(expected.step(batch, m))
    assert_close(after, expected.state, 1e-11)
    assert_close(again, expected.state, 1e-11)
    assert losses[given.plan.rules.delay :] == pytest.approx(wanted, abs=1e-12)


# -- what goes wrong ------------------------------------------------------------------------------


def silent_rank(given: Setup) -> tuple[str, float]:
    """Rank 1 stops taking part after the first step."""
    made = runs.parallel(given)
    made._place = Place.create(made.plan.rules, timeout=timedelta(seconds=3))
    batches = runs.batches(given.model, 2)
    made.step(made.local_batch(batches[0]))
    start = time.monotonic()
    if made._place.rank == 1:
        return "", 0.0
    try:
        made.step(made.local_batch(batches[1]))
        made.drain()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "", time.monotonic() - start


def test_a_rank_that_hangs_ends_the_others(ranks: Pool) -> None:
    given = runs.setup("chain", replicas=(3, 1), micro_batch_size=2)
    results = ranks.run(silent_rank, given)
    ranks.close()  # connections of that world are broken
    for rank in (0, 2, 3):
        message, seconds = results[rank]
        assert message and seconds < 20, results


def other_batches(given: Setup) -> str:
    import torch.distributed as dist

    made = runs.parallel(given)
    own = torch.full((runs.BATCH_SIZE, 8), float(dist.get_rank()), dtype=torch.float64)
    try:
        for _ in range(2):  # so that a rank that has noticed nothing does not leave first
            made.step({**runs.batches("chain", 1)[0], "x": own})
    except Exception as error:
        return str(error)
    return ""


def test_ranks_must_be_given_the_same_batch(ranks: Pool) -> None:
    given = runs.setup("chain", replicas=(3, 1), micro_batch_size=2)
    messages = ranks.run(other_batches, given)
    ranks.close()
    assert all(messages[:3]) and any("the same global batch on all ranks" in m for m in messages)


def clipped(given: Setup) -> str:
    made = runs.parallel(given)
    made.clip_norm = 1.0
    try:
        made.step(made.local_batch(runs.batches("chain", 1)[0]))
    except OptionError as error:
        return str(error)
    return ""


def test_clipping_needs_a_flush(ranks: Pool) -> None:
    given = runs.setup("chain", schedule="pipedream")
    assert all("step at different times" in message for message in ranks.run(clipped, given))
