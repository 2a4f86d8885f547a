"""What users get wrong, through the public call: the error says what, and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoshard
from autoshard.errors import (
    AutoshardError,
    CaptureError,
    InfeasibleError,
    LaunchError,
    OptionError,
    PlanFileError,
    UnsupportedOpError,
)


class Net(nn.Module):
    """Three equal layers and a head; 16 features, 4 classes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x)  # type: ignore[no-any-return]


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(output, batch["y"])


def example(samples: int = 8, width: int = 16) -> dict[str, Tensor]:
    return {"x": torch.randn(samples, width), "y": torch.arange(samples) % 4}


def compiled(model: nn.Module | None = None, **options: Any) -> autoshard.Parallel:
    """``autoshard.compile`` of what is right, but for ``options``."""
    right: dict[str, Any] = {
        "world_size": 2,
        "example_inputs": example(),
        "loss_fn": loss_fn,
        "cluster": "cpu",
    }
    return autoshard.compile(model or Net(), **{**right, **options})


def refused(kind: type[AutoshardError], words: str, **options: Any) -> str:
    with pytest.raises(kind, match=words) as caught:
        compiled(**options)
    return str(caught.value)


# -- world size and batch -------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [0, -4, 2.0, True, "2"])
def test_world_size_is_a_positive_integer(world_size: Any) -> None:
    refused(OptionError, "world_size expects the number of devices", world_size=world_size)


def test_world_size_that_nothing_divides() -> None:
    """11 ranks with the tensor axis pinned away: 8 samples and 4 parts take at most 8 or 4."""
    words = r"no mesh pp x dp x cp x tp of 11 ranks fits: dp must divide the global batch of 8, pp"
    refused(OptionError, words, world_size=11, constraints={"tp": 1})


def test_global_batch_that_does_not_fit_the_mesh() -> None:
    refused(OptionError, "dp must divide the global batch of 3", global_batch_size=3,
            constraints={"dp": 2})  # fmt: skip


@pytest.mark.parametrize("size", [0, -1, "8", 1.5])
def test_global_batch_size_is_a_positive_integer(size: Any) -> None:
    refused(OptionError, "global_batch_size expects a positive number", global_batch_size=size)


# -- example inputs and loss ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, r'Net does not say what its inputs look like.*example_inputs=\{"x": ...\}'),
        ({"z": torch.zeros(8, 16)}, r"forward\(x\) needs 'x' but example_inputs has only 'z'"),
        ("abc", "expected example_inputs to be a dict, a tuple or a tensor but got str"),
        ({"x": 3.0}, "expected example_inputs to start with a tensor"),
        ({"x": torch.zeros(8, 15), "y": torch.zeros(8).long()}, r"test_bad_input\.py:\d+"),
    ],
)
def test_example_inputs_that_do_not_fit(
    given: Any, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    refused(CaptureError, words, example_inputs=given)
    assert capfd.readouterr() == ("", "")  # torch logs what its shape functions raise


def test_no_loss() -> None:
    words = "expected a scalar floating-point loss.*pass loss_fn=.*or let forward return the scalar"
    refused(CaptureError, words, loss_fn=None, example_inputs={"x": torch.zeros(8, 16)})


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (
            lambda output, batch: output.sum(1),
            r"expected a scalar floating-point loss but loss_fn returned .*return one number",
        ),
        (lambda output, batch: output.argmax(), "expected a scalar floating-point loss"),
        (lambda output, batch: output.detach().sum(), "does not depend on any trainable parameter"),
        (lambda output, batch: loss_fn(output, {}), r"test_bad_input\.py:\d+ in loss_fn"),
    ],
)
def test_a_loss_that_is_none(loss: Callable[..., Tensor], words: str) -> None:
    refused(CaptureError, words, loss_fn=loss)


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cluster": "h1000"}, "did you mean 'h100'"),
        ({"cluster": Path("none.json")}, "expected a readable cluster file"),
        ({"optimizer": "adamx"}, "expected optimizer to be one of adamw, .* but got 'adamx'"),
        ({"precision": "fp8"}, "precision expects None .* or one of bf16"),
        ({"model": "gpt2"}, r"expected a model \(torch.nn.Module\) but got str"),
        ({"time_limit_s": -1}, "time_limit_s expects a positive number"),
        ({"seed": "zero"}, "seed expects an integer"),
        ({"constraints": {"sharding": {"head.wieght": "S(0)"}}}, "did you mean head.weight"),
        ({"constraints": {"sharding": {"head.weight": "S(9)"}}}, r"has shape \[4, 16\]"),
        ({"constraints": {"stages": (1, 9)}}, "2 positive numbers that add up to 4 segments"),
    ],
)
def test_unknown_names_and_values(options: dict[str, Any], words: str) -> None:
    refused(OptionError, words, **options)


# -- pins that contradict each other, or the model ------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "constraints", "words"),
    [
        (2, {"tp": 3}, "does not divide world_size=2"),
        (8, {"pp": 2, "dp": 2, "tp": 1}, "holds 4 ranks but world_size is 8"),
        (2, {"micro_batch_size": 8, "dp": 2}, "micro_batch_size must divide the samples"),
        (16, {"pp": 16}, r"pp may be at most 4 .*the pins are: pp=16"),
        (2, {"schedule": "none", "pp": 2}, "schedule 'none' means one stage"),
        (2, {"stages": (1, 3), "pp": 1}, "stages has 2 entries but pp is 1"),
    ],
)
def test_contradicting_pins(world_size: int, constraints: dict[str, Any], words: str) -> None:
    refused(OptionError, words, world_size=world_size, constraints=constraints)


class Coupled(Net):
    """Samples interact in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(self.layers[0](x)))


def test_micro_batches_of_coupled_samples_are_refused() -> None:
    words = "would cut the batch although samples interact in forward"
    pins = {"dp": 2, "micro_batch_size": 2}
    refused(OptionError, words, model=Coupled(), constraints=pins)
    allowed = compiled(Coupled(), constraints={**pins, "allow_coupled_micro_batches": True})
    assert allowed.plan.num_micro_batches == 2
    assert "micro-batches were allowed" in " ".join(str(allowed.plan).split())


# -- memory ---------------------------------------------------------------------------------------


def test_too_little_memory_says_what_would_fit_and_that_is_true() -> None:
    pins = {"memory_bytes": 9000, "pp": 1, "dp": 2, "data_parallel": "ddp"}
    message = refused(InfeasibleError, r"lacks .* \(\d+ bytes\) on stage 0", constraints=pins)
    (missing,) = re.findall(r"\((\d+) bytes\)", message)
    (name,) = re.findall(r"It fits without the pin (\w+)=", message)
    compiled(constraints={k: v for k, v in pins.items() if k != name})
    # About as many bytes more as it says are what is missing.
    compiled(constraints={**pins, "memory_bytes": 9000 + int(1.2 * int(missing))})
    with pytest.raises(InfeasibleError):
        compiled(constraints={**pins, "memory_bytes": 9000 + int(0.8 * int(missing))})


def test_too_few_devices_names_a_number_that_is_enough() -> None:
    tight = replace(autoshard.cluster.find("cpu"))
    tight = replace(tight, device=replace(tight.device, memory_bytes=7000))
    message = refused(InfeasibleError, "lacks", cluster=tight, world_size=1)
    (enough,) = re.findall(r"world_size=(\d+)", message)
    compiled(cluster=tight, world_size=int(enough))
    with pytest.raises(InfeasibleError):
        compiled(cluster=tight, world_size=int(enough) // 2)


# -- unsupported ops ------------------------------------------------------------------------------


class Odd(Net):
    """Uses an op that has no sharding rule."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.special.bessel_j0(x) + x)


def test_strict_names_ops_without_a_rule() -> None:
    words = r"strict=True, but 1 op\(s\) have no sharding rule: aten.special_bessel_j0"
    refused(UnsupportedOpError, words, model=Odd(), strict=True)


# -- plan files -----------------------------------------------------------------------------------


def test_a_plan_is_only_for_its_program_batch_and_world(tmp_path: Path) -> None:
    path = compiled().plan.save(tmp_path / "plan.json")
    assert compiled(plan=path).plan == autoshard.Plan.load(path)
    for options, words in (
        ({"model": Net(32), "example_inputs": example(8, 32)}, "have changed, so plan again"),
        ({"global_batch_size": 16}, "a global batch of 8 samples but got 16"),
        ({"world_size": 4}, "the plan is for 2 devices but world_size is 4"),
    ):
        refused(PlanFileError, words, **options, plan=path)  # type: ignore[arg-type]


# -- running --------------------------------------------------------------------------------------


def test_step_outside_torchrun_prints_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--fast"])
    parallel = compiled(world_size=4)
    with pytest.raises(LaunchError, match=r"torchrun --nproc-per-node 4 train\.py --fast"):
        parallel.step(example())
    assert parallel.plan.world_size == 4  # everything but running still works
    assert parallel.emitted.files


def test_step_with_another_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2",
                        "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    parallel = compiled(world_size=4)
    with pytest.raises(LaunchError, match="expected 4 processes but got 2"):
        parallel.step(example())


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (example(6), "8 samples but got 6 samples"),
        ({"x": torch.zeros(8, 16)}, "keys x, y but got x; add y"),
        ({**example(), "z": torch.zeros(8)}, "remove z"),
        ({**example(), "x": torch.zeros(8, 15)}, r"shape \(8, 16\) but got \(8, 15\)"),
        ({**example(), "x": torch.zeros(8, 16).double()}, "dtype torch.float32 but got"),
        ({**example(), "y": [1, 2]}, "to be a tensor but got list"),
    ],
)
def test_a_batch_that_is_not_what_was_compiled(batch: Any, words: str) -> None:
    from autoshard.runtime import data

    values = captured_batch()
    with pytest.raises(OptionError, match=words):
        data.local_batch(batch, values, rank=0, size=1)


def captured_batch() -> Any:
    return compiled(world_size=1).program.batch


def test_training_from_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = Net()
    parallel = compiled(model, world_size=1)
    try:
        with pytest.raises(OptionError, match="is on the meta device: pass a model with real"):
            parallel.step(example())
    finally:
        from autoshard.runtime import launch

        launch.shut_down()
