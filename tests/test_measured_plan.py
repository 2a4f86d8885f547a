"""Planning with costs measured on this machine: how, when again, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

import autoshard
from autoshard.cluster import core_share, find, num_cores
from autoshard.cost_models.compute import op_cost
from autoshard.cost_models.costs import AnalyticCosts, MeasuredCosts, op_key
from autoshard.errors import OptionError
from autoshard.ir import Graph
from autoshard.plan.plan import Plan
from autoshard.profile import profiler
from autoshard.profile.in_order import OpTimes
from autoshard.profile.timing import Timing

MODEL, BATCH, LOSS = zoo.build("gpt2", torch.float32)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOSHARD_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def plan(costs: Any = "measured", **more: Any) -> Plan:
    options = {"cluster": "cpu", "world_size": 2, "loss_fn": LOSS, **more}
    return autoshard.compile(MODEL, example_inputs=BATCH, costs=costs, **options).plan


def slower(factor: float) -> Any:
    """What measures every op as taking so many times what it is computed to take."""

    def made(seconds: float) -> Timing:
        return Timing(median_s=seconds, mean_s=seconds, best_s=seconds, spread=0.0, repeats=3)

    def measure(graphs: Sequence[Graph]) -> dict[str, OpTimes]:
        ops = (op for graph in graphs for op in graph.ops)
        costs = {op_key(op): op_cost(op, find("cpu").device) for op in ops}
        return {
            key: OpTimes(
                forward=made(factor * cost.forward_s), backward=made(factor * cost.backward_s)
            )
            for key, cost in costs.items()
        }

    return measure


def test_every_op_of_the_plan_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "_engine_s", lambda device: 1e-6)  # anew each time
    first = plan()
    assert first.prediction.origin["measured"] > 0.9
    assert plan(None).prediction.origin["measured"] == 0

    def never(*args: object, **options: object) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(profiler, "measure_in_order", never)
    again = plan()
    assert again.prediction.step_s == pytest.approx(first.prediction.step_s, rel=1e-6)
    assert again.prediction.origin["measured"] > 0.9


def test_predictions_follow_the_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """In proportion, and as many times slower as processes share a core."""
    pins = {"dp": 2, "tp": 1, "micro_batch_size": 2, "recompute": "none"}
    monkeypatch.setattr(profiler, "measure_in_order", slower(100.0))
    monkeypatch.setattr(profiler, "companions", lambda number, steps: nullcontext())
    monkeypatch.setattr(profiler, "_engine_s", lambda device: 0.0)
    computed = plan(None, constraints=pins).prediction.parts["compute"]
    measured = plan(constraints=pins).prediction.parts["compute"]
    assert 80 * computed < measured <= 100.001 * computed  # adding gradients is not measured

    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(4 * num_cores()))
    assert core_share(4 * num_cores()) == 0.25
    assert plan(constraints=pins).prediction.parts["compute"] == pytest.approx(
        4 * measured, rel=0.05
    )


def test_what_is_not_measured_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow measurements do not drive the search to ops of which it has none."""
    monkeypatch.setattr(profiler, "measure_in_order", slower(100.0))
    monkeypatch.setattr(profiler, "companions", lambda number, steps: nullcontext())
    monkeypatch.setattr(profiler, "_engine_s", lambda device: 0.0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    found = plan(world_size=4)
    best = plan(MeasuredCosts(find("cpu"), {}, {"": 100.0}), world_size=4)
    assert found.mesh == best.mesh
    assert found.prediction.step_s == pytest.approx(best.prediction.step_s, rel=1e-6)


def test_a_cost_model_brings_its_cluster() -> None:
    fast = AnalyticCosts(find("h100"))
    assert plan(fast, cluster=None).cluster == find("h100")
    with pytest.raises(OptionError, match="costs are for cluster 'h100' but cluster is 'cpu'"):
        plan(fast)


@pytest.mark.parametrize(
    ("costs", "cluster", "words"),
    [
        ("guessed", "cpu", "costs expects None .* 'measured' or a CostModel but got 'guessed'"),
        (3, "cpu", "or a CostModel but got 3"),
        (
            "measured",
            "h100",
            "of kind cpu, but the cluster 'h100' .* kind cuda: .*\"this-machine\"",
        ),
    ],
)
def test_other_costs_are_refused(costs: Any, cluster: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        plan(costs, cluster=cluster)
