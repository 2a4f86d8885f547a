"""Every model of the zoo and every mix of axes once: the numbers of the plain model.

``make equivalence`` runs the whole matrix; see tests/equivalence.py for what is compared.
"""

from __future__ import annotations

import equivalence as harness
import pytest
import torch
import zoo
from equivalence import CONFIGURATIONS, difference, plan_of, program_of, reference
from ranks import Pool

from autoshard.errors import OptionError
from autoshard.plan.plan import Plan

STEPS = 2
"""The second step's gradients are those of the parameters that the first has updated."""

RUNS = [
    ("gpt2", "dp=2 tp=2"),
    ("gpt2", "pp=4"),  # tied embeddings on two stages
    ("gpt2", "zero3"),
    ("llama", "tp=4"),  # more ranks than heads of keys and values
    ("llama", "pp=2 tp=2"),
    ("qwen3", "zero2"),
    ("gemma3", "auto"),
    ("mixtral", "dp=2 tp=2"),
    ("bert", "full recompute"),
    ("t5", "pp=4"),
    ("t5", "dp=2 tp=2"),
    ("whisper", "dp=2 pp=2"),
    ("vit", "gpipe"),
    ("vit", "zero1"),
    ("resnet", "dp=4"),
    ("convnext", "tp=4"),
    ("nanogpt", "selective recompute"),
    ("encoder", "pp=2 tp=2"),
    ("vgg", "auto"),
    ("vgg_bn", "tp=4"),
    ("vgg_bn", "zero2"),
    ("unet", "pp=4"),
    ("unet", "dp=2 tp=2"),
    ("lstm", "dp=2 pp=2"),
    ("lstm", "tp=4"),
    ("dlrm", "auto"),
    ("dlrm", "pp=2 tp=2"),
    ("mlp", "zero3"),
    ("two_tower", "dp=4"),
    ("two_tower", "dp=2 tp=2"),
]


def test_every_model_and_configuration_is_run() -> None:
    assert {m for m, _ in RUNS} == set(zoo.names())
    assert {c for _, c in RUNS} == set(CONFIGURATIONS)


@pytest.mark.parametrize(("model", "configuration"), RUNS)
def test_trains_to_the_numbers_of_the_plain_model(
    ranks: Pool, model: str, configuration: str
) -> None:
    dtype = torch.float64
    lifted = harness.casts(program_of(model, dtype))
    program = program_of(model, dtype, lifted)
    plan = plan_of(program, 4, CONFIGURATIONS[configuration])
    _check_pins(plan, CONFIGURATIONS[configuration])
    arguments = (model, dtype, program, harness.encoded(plan), STEPS)
    trained = ranks.run(harness.distributed, *arguments, timeout_s=240)[0]
    found = difference(trained, reference(model, dtype, lifted=lifted, steps=STEPS))
    assert found.worst <= 1e-8, found


def _check_pins(plan: Plan, pins: dict[str, object]) -> None:
    """The plan is what the configuration says, and splits what it is to split."""
    for axis in ("pp", "dp", "tp"):
        assert getattr(plan.mesh, axis) == pins.get(axis, getattr(plan.mesh, axis))
    if plan.mesh.tp > 1:
        states = [s for axes in plan.layers.values() for s in axes["tp"].parameters.values()]
        assert any(s != "R" for s in states)  # split, or used by activations that are
    if "recompute" in pins:
        modes = {s.recompute.mode for stage in plan.stages for s in stage.segments}
        assert pins["recompute"] in modes


@pytest.mark.parametrize(
    ("model", "configuration"), [("llama", "dp=2 tp=2"), ("resnet", "dp=4"), ("gpt2", "pp=2 tp=2")]
)
def test_single_precision(ranks: Pool, model: str, configuration: str) -> None:
    program = program_of(model, torch.float32)
    plan = plan_of(program, 4, CONFIGURATIONS[configuration])
    arguments = (model, torch.float32, program, harness.encoded(plan), STEPS)
    trained = ranks.run(harness.distributed, *arguments, timeout_s=240)[0]
    found = difference(trained, reference(model, torch.float32, steps=STEPS), rounded=True)
    assert found.loss <= 1e-5, found
    assert found.gradient <= 1e-5, found


def test_a_model_that_casts_differs_by_no_more_than_its_own_rounding(ranks: Pool) -> None:
    """Qwen3's norms compute in float32; with these casts lifted nothing is left (above)."""
    program = program_of("qwen3", torch.float64)
    plan = plan_of(program, 4, CONFIGURATIONS["tp=4"])
    arguments = ("qwen3", torch.float64, program, harness.encoded(plan), 1)
    trained = ranks.run(harness.distributed, *arguments, timeout_s=240)[0]
    plain = reference("qwen3", torch.float64, steps=1)
    lifted = reference("qwen3", torch.float64, lifted=True, steps=1)
    assert difference(lifted, plain).gradient > 1e-8
    assert difference(trained, plain, rounded=True).gradient <= 1e-6


class TestTheHarness:
    """Differences are seen."""

    def test_a_wrong_gradient(self) -> None:
        one, other = (reference("mlp", torch.float64, steps=1) for _ in range(2))
        assert difference(one, other).worst == 0.0
        one.gradients[0]["out.bias"] *= 1 + 1e-6
        assert difference(one, other).where == {"gradient": "out.bias"}
        assert difference(one, other).worst > 1e-8

    def test_a_missing_tensor(self) -> None:
        one, other = (reference("mlp", torch.float64, steps=1) for _ in range(2))
        del one.gradients[0]["out.bias"]
        del one.state["inp.weight"]
        found = difference(one, other)
        assert found.gradient == found.state == float("inf")

    def test_casts_are_lifted(self) -> None:
        assert harness.casts(program_of("qwen3", torch.float64))
        assert not harness.casts(program_of("qwen3", torch.float64, True))


class TestSamplesThatInteract:
    @pytest.mark.parametrize(
        ("model", "line"), [("two_tower", "matmul"), ("vgg_bn", "batch_norm"), ("mixtral", "")]
    )
    def test_the_batch_is_split_over_ranks_but_not_in_time(self, model: str, line: str) -> None:
        program = program_of(model, torch.float64)
        plan = plan_of(program, 4, {"dp": 4})
        assert plan.num_micro_batches == 1
        assert plan.coupled
        assert line in plan.coupled[0]

    def test_micro_batches_are_refused_with_the_reason(self) -> None:
        program = program_of("two_tower", torch.float64)
        with pytest.raises(OptionError, match="samples interact in forward"):
            plan_of(program, 4, {"pp": 4, "micro_batch_size": 2})

    @pytest.mark.parametrize("model", ["gpt2", "vit", "encoder", "dlrm", "lstm", "t5", "whisper"])
    def test_samples_that_do_not(self, model: str) -> None:
        program = program_of(model, torch.float64)
        plan = plan_of(program, 4, {"pp": 2, "dp": 2, "micro_batch_size": 1})
        assert plan.num_micro_batches == 4
        assert not plan.coupled
