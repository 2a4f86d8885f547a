"""Programs of asynchronous workers whose updates come in a given order, and what they come to."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import stale_runs as runs
import torch
from stale_runs import Setup, State

from autoshard.runtime.asynchronous import AsynchronousEngine, Order, Worker

WORKERS = 4
STEPS = 4


def round_robin(worker: int, clock: int) -> int:
    return clock * WORKERS + worker


def reversed_rounds(worker: int, clock: int) -> int:
    return clock * WORKERS + WORKERS - 1 - worker


def one_far_ahead(worker: int, clock: int) -> int:
    """Worker 0 makes all of its updates before the others make any."""
    return clock if worker == 0 else STEPS + clock * (WORKERS - 1) + worker - 1


def rotating_rounds(worker: int, clock: int) -> int:
    """Workers in turn; each begins its next step while the servers still update for the others."""
    return clock * WORKERS + (worker + clock) % WORKERS


def pins_of(bound: int | None) -> dict[str, Any]:
    if bound is None:
        return {"data_parallel": "asp"}
    return {"data_parallel": "ssp", "staleness": bound}


def engine(given: Setup, optimizer: Any, order: Order | None, bound: int | None) -> Any:
    made = runs.parallel(given, optimizer)
    made._place = Worker.create(bound, timeout=timedelta(seconds=30))
    first = made.engine
    assert isinstance(first, AsynchronousEngine)
    made.__dict__["engine"] = AsynchronousEngine(
        first.module, worker=made._place, config=first.config, optimizer=optimizer, order=order
    )
    return made


def trained(
    given: Setup, optimizer: Any, order: Order | None, bound: int | None
) -> tuple[list[float], State, list[tuple[int, int]]]:
    made = engine(given, optimizer, order, bound)
    losses = [made.step(made.local_batch(b)) for b in runs.batches(given.model, STEPS)]
    state = made.full_state_dict()
    return losses, state, made.engine.order_of_updates


def in_order(given: Setup, order: Order, optimizer: Any) -> tuple[dict[int, list[float]], State]:
    """A worker's gradient is of the weights that its own update before has left."""
    loss_of = runs.Loss(given.model)
    model = loss_of.model
    stepped = optimizer(list(model.parameters()))
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    weights = {worker: start for worker in range(WORKERS)}
    batches = runs.batches(given.model, STEPS)
    losses: dict[int, list[float]] = {w: [] for w in range(WORKERS)}
    pairs = [(w, c) for w in range(WORKERS) for c in range(STEPS)]
    for worker, clock in sorted(pairs, key=lambda pair: order(*pair)):
        leaves = {n: t.clone().requires_grad_() for n, t in weights[worker].items()}
        part = list(runs.micro_batches_of(batches[clock], WORKERS))[worker]
        loss = loss_of.of(leaves, part)
        losses[worker].append(loss.item())
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        stepped.step()
        weights[worker] = {n: p.detach().clone() for n, p in model.named_parameters()}
    return losses, {n: p.detach() for n, p in model.named_parameters()}
