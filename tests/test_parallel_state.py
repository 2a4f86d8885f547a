"""Whole state and gradients, as the original model has them; what all ranks must be given alike."""

from __future__ import annotations

from typing import Any

import parallel_runs as runs
import pytest
import torch
from parallel_runs import Setup, State
from ranks import Pool, RankError

from autoshard.parallel import Parallel


def state_and_gradients(
    given: Setup, steps: int
) -> tuple[list[float], State, State, list[set[str]]]:
    made = runs.parallel(given)
    before = {n: t.clone() for n, t in made.model.state_dict().items()}
    losses = runs.train(made, given, range(steps))
    runs.assert_equal(made.model.state_dict(), before)  # the user's model is left alone
    state, gradients = made.full_state_dict(), made.full_grads()
    ties: dict[int, set[str]] = {}
    for name, tensor in state.items():
        ties.setdefault(id(tensor), set()).add(name)
    return losses, state, gradients, [names for names in ties.values() if len(names) > 1]


PINS: list[dict[str, Any]] = [
    {"pp": 2, "tp": 2},
    {"dp": 4, "data_parallel": "zero3"},
    {"tp": 4},
    {"dp": 2, "pp": 2, "data_parallel": "zero1", "micro_batch_size": 2},
]


@pytest.mark.parametrize("pins", PINS, ids=str)
def test_state_loads_into_the_original_model(pins: dict[str, Any], ranks: Pool) -> None:
    given = runs.setup("odd", **pins)
    results = ranks.run(state_and_gradients, given, 2, world=given.world)
    losses, state, gradients, ties = results[0]
    assert all(other[0] == losses and other[1:] == ({}, {}, []) for other in results[1:])

    expected = runs.plain("odd", 2)
    assert losses == pytest.approx(expected.losses, rel=1e-10)
    runs.assert_close(state, expected.state, 1e-9)
    assert {"positions", "unused_cache"}.isdisjoint(state) and {"scale", "unused"} <= set(state)
    assert ties == [{"embed.weight", "head.weight"}, {"spare.weight", "spare_too.weight"}]

    assert set(gradients) == set(expected.gradients[-1])
    assert "head.weight" not in gradients and "frozen.weight" not in gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected.gradients[-1][name], rtol=1e-9, atol=1e-12)

    model, batch, _ = runs.build("odd")
    model.load_state_dict(state, strict=True)
    trained, _, _ = runs.build("odd")
    trained.load_state_dict(expected.state, strict=True)
    assert model(**batch).item() == pytest.approx(trained(**batch).item(), rel=1e-9)


def changed_later(given: Setup) -> bool:
    made = runs.parallel(given)
    runs.train(made, given, range(1))
    state = made.full_state_dict()
    before = {n: t.clone() for n, t in state.items()}
    runs.train(made, given, range(1, 2))
    runs.assert_equal(state, before)
    return True


def test_whole_state_is_a_copy(ranks: Pool) -> None:
    given = runs.setup("mlp")
    assert ranks.run(changed_later, given, world=1) == [True]


# -- what cannot train ----------------------------------------------------------------------------


def step_from_meta(given: Setup) -> None:
    model, _, _ = runs.build(given.model, given.dtype)
    made = Parallel(model.to("meta"), given.program, given.plan, optimizer="adamw")
    runs.train(made, given, range(1))


def test_a_model_on_meta_cannot_train(ranks: Pool) -> None:
    given = runs.setup("mlp", tp=2, dp=2)
    expected = r"OptionError: .*inp.weight is on the meta device: pass a model with real parameters"
    with pytest.raises(RankError, match=expected):
        ranks.run(step_from_meta, given)


def step_from_different_models(given: Setup) -> str:
    made = runs.parallel(given)
    with torch.no_grad():
        made.model.blocks[1][3].weight[5, 7] += 1e-6 * (made_rank() == 2)
    try:
        runs.train(made, given, range(1))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def made_rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def test_ranks_must_start_from_one_model(ranks: Pool) -> None:
    """One element of one parameter on one rank, far below what a loss shows."""
    for found in ranks.run(step_from_different_models, runs.setup("mlp", pp=2, dp=2)):
        assert found.startswith("OptionError: expected the same model on every rank")
        assert "'blocks.1.3.weight' on rank 2 differs" in found and "torch.manual_seed" in found
