"""Asynchronous data parallelism against one process that makes the updates in the same order."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import asynchronous_runs as workers
import pytest
import stale_runs as runs
import torch
from ranks import Pool
from stale_runs import Setup, State
from torch import nn
from torch.optim import Optimizer

from autoshard.errors import LaunchError
from autoshard.runtime.asynchronous import Order, Worker
from autoshard.versioned import most_stale


@pytest.mark.parametrize(
    ("order", "bound", "optimizer"),
    [
        (workers.round_robin, None, runs.momentum),
        (workers.reversed_rounds, None, runs.adam),
        (workers.one_far_ahead, None, runs.momentum),
        (workers.one_far_ahead, workers.STEPS, runs.momentum),
        (workers.round_robin, 1, runs.adam),
    ],
)
def test_same_as_one_process_in_that_order(
    order: Order, bound: int | None, optimizer: Any, ranks: Pool
) -> None:
    pins = workers.pins_of(bound)
    given = runs.setup("chain", **pins)
    results = ranks.run(workers.trained, given, optimizer, order, bound)
    losses, state = workers.in_order(given, order, optimizer)
    for worker in range(workers.WORKERS):
        assert results[worker][0] == pytest.approx(losses[worker], abs=1e-12)
        assert [order(*made) for made in results[worker][2]] == list(
            range(workers.WORKERS * workers.STEPS)
        )
    for name, tensor in state.items():
        torch.testing.assert_close(results[0][1][name], tensor, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bound", [None, 1])
@pytest.mark.parametrize("model", ["gpt2", "t5", "llama", "unet", "resnet"])
def test_models_in_that_order(model: str, bound: int | None, ranks: Pool) -> None:
    """Batch norm sees each worker's own minibatch."""
    given = runs.setup(model, **workers.pins_of(bound))
    results = ranks.run(workers.trained, given, runs.adam, workers.rotating_rounds, bound)
    losses, state = workers.in_order(given, workers.rotating_rounds, runs.adam)
    for worker in range(workers.WORKERS):
        assert results[worker][0] == pytest.approx(losses[worker], abs=1e-9)
    for name, tensor in state.items():
        torch.testing.assert_close(results[0][1][name], tensor, rtol=0, atol=1e-9)


class SlowMomentum(torch.optim.SGD):
    """Gives other threads time to do harm between a gradient and its update."""

    def step(self, closure: Any = None) -> Any:
        time.sleep(0.02)
        return super().step(closure)


def slow_momentum(parameters: list[nn.Parameter]) -> Optimizer:
    return SlowMomentum(parameters, lr=0.05, momentum=0.9)


def test_a_worker_that_begins_a_step_leaves_the_updates_in_work_alone(ranks: Pool) -> None:
    given = runs.setup("chain", **workers.pins_of(None))
    results = ranks.run(workers.trained, given, slow_momentum, workers.rotating_rounds, None)
    losses, state = workers.in_order(given, workers.rotating_rounds, runs.momentum)
    for worker in range(workers.WORKERS):
        assert results[worker][0] == pytest.approx(losses[worker], abs=1e-12)
    for name, tensor in state.items():
        torch.testing.assert_close(results[0][1][name], tensor, rtol=0, atol=1e-12)


def slow_worker(given: Setup, bound: int | None) -> list[tuple[int, int]]:
    """Worker 3 takes its time; what server 0 has seen."""
    made = workers.engine(given, runs.momentum, None, bound)
    for batch in runs.batches("chain", workers.STEPS):
        if made._place.rank == 3:
            time.sleep(0.3)
        made.step(made.local_batch(batch))
    made.drain()
    order: list[tuple[int, int]] = made.engine.order_of_updates
    return order


@pytest.mark.parametrize("bound", [None, 0, 1])
def test_the_bound_holds(bound: int | None, ranks: Pool) -> None:
    pins = workers.pins_of(bound)
    for made in ranks.run(slow_worker, runs.setup("chain", **pins), bound):
        clocks, furthest, late = [0] * workers.WORKERS, 0, 0
        fetched, waiting = [0] * workers.WORKERS, set[int]()
        for done, (worker, clock) in enumerate(made):
            late = max(late, done - fetched[worker])
            clocks[worker] = clock + 1
            furthest = max(furthest, max(clocks) - min(clocks))
            waiting.add(worker)
            for one in [w for w in waiting if clocks[w] - min(clocks) <= (bound or 0)]:
                fetched[one] = done + 1
                waiting.remove(one)
        if bound is None:
            assert furthest > 1, made  # nobody waits for the slow one
        else:
            assert furthest <= bound + 1, made
            assert late <= most_stale(workers.WORKERS, bound), made


def lost_worker(given: Setup) -> tuple[str, float]:
    """Worker 3 does nothing; with a bound the others cannot go on for ever."""
    made = runs.parallel(given)
    made._place = Worker.create(0, timeout=timedelta(seconds=3))
    engine = made.engine
    start = time.monotonic()
    if made._place.rank == 3:
        engine._server.start()
        time.sleep(6)
        return "", 0.0
    try:
        made.step(made.local_batch(runs.batches("chain", 1)[0]))
    except LaunchError as error:
        return str(error), time.monotonic() - start
    return "", time.monotonic() - start


def test_a_worker_that_hangs_ends_the_others(ranks: Pool) -> None:
    results = ranks.run(lost_worker, runs.setup("chain", data_parallel="ssp", staleness=0))
    ranks.close()
    for message, seconds in results[:3]:
        assert "worker" in message or "another rank" in message, results
        assert seconds < 20


def saved(given: Setup, folder: Path) -> tuple[float, float, State, State]:
    made = workers.engine(given, runs.adam, workers.round_robin, None)
    batches = runs.batches("chain", workers.STEPS)
    for batch in batches[:2]:
        made.step(made.local_batch(batch))
    made.save(folder)
    again = runs.parallel(given, runs.adam)
    again.load(folder)
    one, other = (m.evaluate(m.local_batch(batches[2])) for m in (made, again))
    for index in ("exp_avg", "exp_avg_sq"):
        for slot, theirs in zip(made.engine.slots, again.engine.slots, strict=True):
            state = made.optimizer.state[slot.local][index]
            torch.testing.assert_close(state, again.optimizer.state[theirs.local][index])
    return one, other, made.full_state_dict(), again.full_state_dict()


def test_saves_weights_and_state_of_all_servers(tmp_path: Path, ranks: Pool) -> None:
    given = runs.setup("chain", data_parallel="asp")
    one, other, state, again = ranks.run(saved, given, tmp_path)[0]
    model: nn.Module = runs.build("chain")
    model.load_state_dict(state)
    parts = runs.micro_batches_of(runs.batches("chain", 3)[2], workers.WORKERS)
    expected = [model(**part).item() for part in parts]
    assert one == other == pytest.approx(sum(expected) / 4, abs=1e-12)
    for name, tensor in state.items():
        assert torch.equal(tensor, again[name])
