"""``precision="bf16"``: the program with autocast's casts written into it."""

from __future__ import annotations

from typing import Any

import parallel_runs as runs
import pytest
import torch
from equivalence import loss_of
from parallel_runs import Setup, State
from ranks import Pool

STEPS = 3
DP_TP = {"dp": 2, "tp": 2}
PP = {"pp": 2, "micro_batch_size": 4}


def trained(given: Setup) -> tuple[list[float], State, State, set[str]]:
    made = runs.parallel(given)
    losses, first = [], {}
    for step, batch in enumerate(runs.data(given, range(STEPS))):
        losses.append(made.step(made.local_batch(batch)))
        if step == 0:  # on every rank, though only the first one gets them
            first = made.full_grads()
    dtypes = {str(p.dtype) for p in made.module.parameters()}
    dtypes |= {str(t.dtype) for s in made.optimizer.state.values() for t in s.values() if t.ndim}
    return losses, first, made.full_state_dict(), dtypes


def autocast(name: str) -> tuple[list[float], State, State]:
    """The plain model as a user would train it in bfloat16 on one process."""
    model, _, loss_fn = runs.build(name, torch.float32)
    given = runs.setup(name, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    losses, first = [], {}
    for batch in runs.data(given, range(STEPS)):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch, loss_fn)
        loss.backward()
        first = first or {n: p.grad.clone() for n, p in model.named_parameters()}
        losses.append(loss.item())
        optimizer.step()
    return losses, first, model.state_dict()


def distance(found: State, expected: State) -> float:
    """Relative, in the Euclidean norm over all tensors."""
    assert set(found) == set(expected)
    off = [(found[n].double() - expected[n].double()).norm() for n in expected]
    size = [tensor.double().norm() for tensor in expected.values()]
    return float(torch.stack(off).norm() / torch.stack(size).norm())


@pytest.mark.parametrize("pins", [DP_TP, PP], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_trains_like_autocast(name: str, pins: dict[str, Any], ranks: Pool) -> None:
    given = runs.setup(name, torch.float32, "bf16", **pins)
    losses, gradients, state, dtypes = ranks.run(trained, given, world=given.world)[0]
    expected, expected_gradients, expected_state = autocast(name)
    full = runs.plain(name, STEPS, dtype=torch.float32)

    assert losses == pytest.approx(expected, rel=1e-2)
    # As near to float32 as autocast is, and no nearer: the products really are in bfloat16.
    off, usual = (distance(g, full.gradients[0]) for g in (gradients, expected_gradients))
    assert 0.5 * usual < off < 2 * usual, (off, usual)
    assert dtypes == {"torch.float32"}
    assert {str(t.dtype) for t in state.values()} == {"torch.float32"}
    start = runs.build(name, torch.float32)[0].state_dict()
    change, expected_change = (
        {n: end[n] - t for n, t in start.items()} for end in (state, expected_state)
    )
    assert distance(change, expected_change) < 0.1  # AdamW's first steps amplify rounding


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_splits_that_keep_the_order_of_sums_change_nothing(name: str, ranks: Pool) -> None:
    """Pipelining alone computes the same numbers; splitting the batch, the same up to the order
    in which gradients are added, which is done in float32."""
    one = ranks.run(trained, runs.setup(name, torch.float32, "bf16"), world=1)[0]
    pins = {"pp": 4, "micro_batch_size": 8}  # the whole batch: nothing is added in another order
    stages = ranks.run(trained, runs.setup(name, torch.float32, "bf16", **pins), world=4)[0]
    assert stages[0] == one[0]
    runs.assert_equal(stages[2], one[2])
    split = ranks.run(trained, runs.setup(name, torch.float32, "bf16", dp=2), world=2)[0]
    assert split[0][0] == pytest.approx(one[0][0], rel=1e-6)
    assert split[0] == pytest.approx(one[0], rel=1e-4)
    assert distance(split[1], one[1]) < 5e-3


def test_products_are_cast_and_statistics_are_not() -> None:
    program = runs.captured("gpt2", torch.float32, "bf16")
    found: dict[str, set[torch.dtype]] = {}
    for segment in program.segments:
        for op in segment.layer.graph.ops:
            kind = op.target.split(".")[1]
            found.setdefault(kind, set()).update(v.type.dtype for v in op.outputs)
    for kind in ("linear", "scaled_dot_product_attention"):
        assert found[kind] == {torch.bfloat16}, kind
    for kind in ("layer_norm", "cross_entropy_loss", "embedding"):
        assert found[kind] == {torch.float32}, kind
    assert {v.type.dtype for s in program.segments for v in s.layer.graph.parameters} == {
        torch.float32
    }
