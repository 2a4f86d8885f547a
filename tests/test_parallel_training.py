"""What steers training: optimizer, scheduler, clipping, evaluation, data, dropout."""

from __future__ import annotations

from typing import Any

import parallel_runs as runs
import pytest
import torch
from equivalence import loss_of
from parallel_runs import Setup, State
from ranks import Pool
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from autoshard.errors import OptionError
from autoshard.runtime import random as randomness

DP_TP = {"dp": 2, "tp": 2, "data_parallel": "zero2"}
PP_DP = {"pp": 2, "dp": 2, "micro_batch_size": 2}


# -- optimizer, scheduler, clipping ---------------------------------------------------------------


def tuned(parameters: list[torch.nn.Parameter]) -> Optimizer:
    """Norms' weights and biases do not decay, as in many recipes."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=3e-3, betas=(0.8, 0.95), weight_decay=0.1)


def halving(optimizer: Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.5**step)


def tuned_training(given: Setup, clip_norm: float) -> tuple[list[float], State, State, float]:
    made = runs.parallel(given, optimizer=tuned)
    made.set_scheduler(halving)
    made.clip_norm = clip_norm
    losses = runs.train(made, given, range(3))
    return losses, made.full_grads(), made.full_state_dict(), made.optimizer.param_groups[1]["lr"]


@pytest.mark.parametrize("pins", [DP_TP, PP_DP], ids=str)
@pytest.mark.parametrize("clip_norm", [0.05, 1e6])
def test_clipping_and_schedule(pins: dict[str, Any], clip_norm: float, ranks: Pool) -> None:
    """As ``clip_grad_norm_`` and the scheduler do to the plain model; tied weights count once."""
    given = runs.setup("odd", **pins)
    expected = runs.plain(
        "odd", 3, optimizer=tuned, scheduler=halving, clip_norm=clip_norm
    )  # fmt: skip
    results = ranks.run(tuned_training, given, clip_norm)
    losses, gradients, state, _ = results[0]
    assert losses == pytest.approx(expected.losses, rel=1e-10)
    runs.assert_close(state, expected.state, 1e-9)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected.gradients[-1][name], rtol=1e-8, atol=1e-12)
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    assert norm == pytest.approx(0.05, rel=1e-4) if clip_norm == 0.05 else norm > 0.1
    assert [other[0] for other in results] == [losses] * 4
    assert [other[3] for other in results] == [pytest.approx(3e-3 / 8)] * 4


def test_options_are_checked() -> None:
    given = runs.setup("mlp")
    made = runs.parallel(given)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(OptionError, match="clip_norm expects a positive number"):
            made.clip_norm = bad


def bad_optimizers(given: Setup) -> dict[str, str]:
    found: dict[str, str] = {}
    own = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    for name, choice in {
        "unknown": "adamm",
        "none": lambda _: None,
        "other": lambda _: own,
    }.items():
        try:
            runs.train(runs.parallel(given, optimizer=choice), given, range(1))
        except OptionError as error:
            found[name] = str(error)
    return found


def test_bad_optimizers(ranks: Pool) -> None:
    (found,) = ranks.run(bad_optimizers, runs.setup("mlp"), world=1)
    assert "adamw" in found["unknown"] and "'adamm'" in found["unknown"]
    assert "return the optimizer" in found["none"]
    assert "use the argument of the callable" in found["other"]


# -- evaluation -----------------------------------------------------------------------------------


def with_evaluation(given: Setup, evaluate: bool) -> tuple[list[float], list[float], State]:
    made = runs.parallel(given)
    losses, evaluations = [], []
    for batch in runs.data(given, range(2)):
        local = made.local_batch(batch)
        if evaluate:
            evaluations.append(made.evaluate(local))
        losses.append(made.step(local))
        if evaluate:
            made.evaluate(local)
    return losses, evaluations, made.full_state_dict()


@pytest.mark.parametrize(
    ("name", "pins"),
    [
        ("dropping-gpt2", DP_TP),
        ("dropping-gpt2", PP_DP),
        ("vgg_bn", {"pp": 2, "dp": 2}),  # the statistics of all ranks in training only
    ],
)
def test_evaluation(name: str, pins: dict[str, Any], ranks: Pool) -> None:
    """Equals the plain model's in ``eval`` mode, and training does not notice."""
    given = runs.setup(name, **pins)
    results = ranks.run(with_evaluation, given, True)
    losses, evaluations, state = results[0]
    assert [other[:2] for other in results] == [(losses, evaluations)] * 4

    model, _, loss_fn = runs.build(name)
    model.eval()
    first = next(runs.data(given, range(1)))
    expected = loss_of(model, first, loss_fn).item()
    assert evaluations[0] == pytest.approx(expected, rel=1e-6)
    assert abs(losses[0] - expected) > 1e-5  # the mode matters

    without = ranks.run(with_evaluation, given, False)[0]
    assert without[0] == losses
    runs.assert_equal(without[2], state)


# -- data -----------------------------------------------------------------------------------------


class Numbers(Dataset[dict[str, Tensor]]):
    """Sample ``i`` says in its first two ids that it is ``i``."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.arange(16) + index
        ids[0] = index
        return {"ids": ids, "labels": ids}


def loaded(given: Setup) -> tuple[int, list[list[int]], list[float]]:
    made = runs.parallel(given)
    sampler = made.sampler(Numbers())
    loader = DataLoader(Numbers(), batch_size=sampler.local_batch_size, sampler=sampler)
    seen, losses = [], []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for batch in loader:
            seen.append(batch["ids"][:, 0].tolist())
            losses.append(made.step(batch))
    return made.mesh.rank("dp"), seen, losses


@pytest.mark.parametrize("pins", [DP_TP, PP_DP], ids=str)
def test_ranks_load_disjoint_samples(pins: dict[str, Any], ranks: Pool) -> None:
    """Together the data-parallel ranks take each global batch once; it trains as on one process."""
    given = runs.setup("odd", **pins)
    results = ranks.run(loaded, given)
    of_rank: dict[int, list[list[int]]] = {}
    for rank, seen, losses in results:
        assert of_rank.setdefault(rank, seen) == seen and losses == results[0][2]
    assert set(of_rank) == {0, 1}
    steps = [a + b for a, b in zip(of_rank[0], of_rank[1], strict=True)]
    assert len(steps) == 2 * 3 and all(len(set(step)) == 8 for step in steps)
    for epoch in (steps[:3], steps[3:]):
        assert len({i for step in epoch for i in step}) == 24
    assert steps[:3] != steps[3:]

    model, _, _ = runs.build("odd")
    samples = [Numbers()[i] for i in steps[0]]
    first = model(*(torch.stack([s[k] for s in samples]) for k in ("ids", "labels")))
    assert results[0][2][0] == pytest.approx(first.item(), rel=1e-10)


def wrong_batches(given: Setup) -> dict[str, str]:
    made = runs.parallel(given)
    batch = next(runs.data(given, range(1)))
    wrong = {
        "short": lambda: made.local_batch({k: v[:7] for k, v in batch.items()}),
        "local": lambda: made.local_batch(made.local_batch(batch)),
        "global": lambda: made.step(batch),
        "evaluated": lambda: made.evaluate(batch),
        "length": lambda: made.local_batch({**batch, "ids": batch["ids"][:, :-1]}),
        "missing": lambda: made.local_batch({"ids": batch["ids"]}),
        "dtype": lambda: made.step({k: v.int() for k, v in made.local_batch(batch).items()}),
        "small data": lambda: made.sampler(range(7)),
    }
    found: dict[str, str] = {}
    for name, call in wrong.items():
        try:
            call()
        except OptionError as error:
            found[name] = str(error)
    losses = runs.train(made, given, range(1))  # none of it has done any harm
    return {**found, "loss": str(losses[0])}


def test_batches_of_the_wrong_size(ranks: Pool) -> None:
    results = ranks.run(wrong_batches, runs.setup("odd", **DP_TP))
    found = results[0]
    assert all(other == found for other in results)
    assert "expected batch['ids'] to have 8 samples but got 7" in found["short"]
    assert "have 8 samples but got 4" in found["local"]
    assert "have 4 samples but got 8 samples" in found["global"]
    assert "local_batch" in found["global"] and found["evaluated"] == found["global"]
    assert "of shape (8, 16) but got (8, 15)" in found["length"]
    assert "add labels" in found["missing"]
    assert "torch.int32" in found["dtype"]
    assert "at least one global batch (8 samples) but got 7" in found["small data"]
    assert float(found["loss"]) == pytest.approx(runs.plain("odd", 1).losses[0], rel=1e-10)


# -- dropout --------------------------------------------------------------------------------------


def dropped(given: Setup) -> tuple[list[float], State]:
    made = runs.parallel(given)
    torch.manual_seed(torch.initial_seed() + torch.distributed.get_rank())  # must not matter
    losses = runs.train(made, given, range(2))
    return losses, made.full_state_dict()


@pytest.mark.parametrize("pins", [{**DP_TP, "micro_batch_size": 2}, PP_DP], ids=str)
def test_dropout_is_a_function_of_the_seed(pins: dict[str, Any], ranks: Pool) -> None:
    given = runs.recomputed(runs.setup("dropping-gpt2", **pins), "none")
    first = ranks.run(dropped, given)
    losses, state = first[0]
    assert [other[0] for other in first] == [losses] * 4
    for again in (given, runs.recomputed(given, "full")):
        other_losses, other_state = ranks.run(dropped, again)[0]
        assert other_losses == losses
        runs.assert_equal(other_state, state)
    seeded, _ = ranks.run(dropped, given.edited(seed=1))[0]
    assert seeded[0] != losses[0]
    plain, _, _ = runs.build("dropping-gpt2")
    without = loss_of(plain.eval(), next(runs.data(given, range(1))), None).item()
    for loss in (losses[0], seeded[0]):  # another loss than without dropout, but not by much
        assert 1e-4 < abs(loss - without) < 0.5


def masks(given: Setup) -> tuple[tuple[int, int], list[tuple[tuple[str, ...], bytes]], list[float]]:
    """What each random op of one step drops: its axes, and where."""
    drawn: list[tuple[tuple[str, ...], bytes]] = []
    original, drop = randomness.seeded, torch.nn.functional.dropout
    made = runs.parallel(given)
    functions = made.module.forward.__globals__  # of the emitted module
    axes_now: list[tuple[str, ...]] = [()]

    def watched(key: Tensor, number: int, axes: tuple[str, ...] = ()) -> Any:
        axes_now[0] = tuple(axes)
        return original(key, number, axes)

    def dropout(x: Tensor, p: float, training: bool) -> Tensor:
        out = drop(torch.ones_like(x), p, training)
        assert (
            set(out.unique().tolist()) == {0.0, 1 / (1 - p)}
            and 0.1 < (out == 0).double().mean() < 0.3
        )
        drawn.append((axes_now[0], (out == 0).numpy().tobytes()))
        return x * out

    functions["seeded"] = watched
    torch.nn.functional.dropout = dropout
    try:
        losses = runs.train(made, given, range(1))
        mesh = made.mesh
        return (mesh.rank("dp"), mesh.rank("tp")), drawn, losses
    finally:
        functions["seeded"], torch.nn.functional.dropout = original, drop


def test_ranks_draw_alike_only_where_they_hold_the_same(ranks: Pool) -> None:
    """Data-parallel ranks have other masks; tensor-parallel ones just where the value is split."""
    pins = {"dp": 2, "tp": 2, "micro_batch_size": 2, "sharding": {"attn_resid_dropout": "R"}}
    given = runs.setup("dropping-gpt2", **pins)
    found = {place: drawn for place, drawn, _ in ranks.run(masks, given)}
    count = len(found[0, 0])
    assert count == 2 * 9  # two micro-batches; two masks per block and one on the embeddings
    assert len({mask for _, mask in found[0, 0]}) == count
    for (axes, mask), (_, over_tp), (_, over_dp) in zip(
        found[0, 0], found[0, 1], found[1, 0], strict=True
    ):
        assert "dp" in axes and mask != over_dp
        assert (mask == over_tp) is ("tp" not in axes), axes
    assert {("tp" in axes) for axes, _ in found[0, 0]} == {False, True}
