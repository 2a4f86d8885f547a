"""What cannot be captured is refused by name, with the user's line and the cure."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import zoo
import zoo_models
from torch import nn

from autoshard.capture import capture, check_against_eager
from autoshard.errors import CaptureError, OptionError


class Model(nn.Module):
    """A linear layer around a piece of the test's own code."""

    def __init__(self, body: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("state", torch.zeros(4))
        self.body = body

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self, self.linear(x)).sum()


X = torch.arange(8.0).reshape(2, 4)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * gradient


def _if_positive(self: Any, x: torch.Tensor) -> Any:
    if x.sum() > 0:
        return x
    return -x


def _item(self: Any, x: torch.Tensor) -> Any:
    return x * float(x.max().item())


def _numpy(self: Any, x: torch.Tensor) -> Any:
    return x + torch.from_numpy(x.detach().numpy())


def _masked(self: Any, x: torch.Tensor) -> Any:
    return x[x > 0]


def _custom(self: Any, x: torch.Tensor) -> Any:
    return Scaled.apply(x)


def _hook(self: Any, x: torch.Tensor) -> Any:
    x.register_hook(lambda g: 2 * g)
    return x


def _autocast(self: Any, x: torch.Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.linear(x)


def _writes_parameter(self: Any, x: torch.Tensor) -> Any:
    with torch.no_grad():
        self.linear.weight.mul_(0.5)
    return x


def _cond(self: Any, x: torch.Tensor) -> Any:
    return torch.cond(x.shape[0] > x.sum(), lambda y: y.sin(), lambda y: y.cos(), (x,))


HERE = r"test_capture_errors\.py"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (_if_positive, rf"{HERE}:\d+ in _if_positive.*values; use torch.where"),
        (_item, rf"{HERE}.*value"),
        (_numpy, rf"{HERE}.*leaves torch"),
        (_masked, rf"{HERE}.*depends on tensor values"),
        (_custom, rf"{HERE}:\d+ in _custom.*Scaled is a custom autograd.Function.*custom_op"),
        (_hook, rf"{HERE}:\d+ in _hook.*register_hook"),
        (_autocast, rf'{HERE}.*precision="bf16"'),
        (_writes_parameter, rf"{HERE}.*writes to the parameter linear.weight"),
        (_cond, rf"{HERE}.*cond"),
    ],
)
def test_code_that_no_pure_graph_can_hold(
    body: Callable[[Any, torch.Tensor], Any], message: str
) -> None:
    model = Model(body)
    weight = model.linear.weight
    with pytest.raises(CaptureError, match=message):
        capture(model, example_inputs=(X,))
    assert model.linear.weight is weight, "the model is as before, also after an error"


def test_hooks_are_refused() -> None:
    model = Model(lambda self, x: x)
    handle = model.linear.register_full_backward_hook(lambda *args: None)
    with pytest.raises(CaptureError, match="module linear has a backward hook"):
        capture(model, example_inputs=(X,))
    handle.remove()
    handle = model.linear.weight.register_hook(lambda g: g)
    with pytest.raises(CaptureError, match=r"parameter linear.weight has a gradient hook"):
        capture(model, example_inputs=(X,))
    handle.remove()
    capture(model, example_inputs=(X,))


def test_wrapped_models() -> None:
    model = Model(lambda self, x: x.tanh())
    plain = capture(model, example_inputs=(X,))
    compiled = capture(torch.compile(model), example_inputs=(X,))
    assert compiled.fingerprint == plain.fingerprint
    with pytest.raises(CaptureError, match=r"the model is a DataParallel.*model.module"):
        capture(nn.DataParallel(model), example_inputs=(X,))


def test_lazy_parameters() -> None:
    with pytest.raises(CaptureError, match=r"uninitialized.*run the model on one batch"):
        capture(nn.Sequential(nn.LazyLinear(3)), example_inputs=(X,))


def test_a_parameter_outside_the_model() -> None:
    stray = torch.ones(4, requires_grad=True)
    with pytest.raises(CaptureError, match=r"no parameter of the model.*nn.Parameter"):
        capture(Model(lambda self, x: x * stray), example_inputs=(X,))
    loss = nn.Linear(4, 1)
    with pytest.raises(CaptureError, match="loss_fn is a module with parameters"):
        capture(nn.Linear(4, 4), example_inputs=(X,), loss_fn=loss)


def test_a_tensor_attribute_that_forward_changes() -> None:
    model = Model(lambda self, x: x + self.count.add_(1))
    model.count = torch.zeros(4)
    with pytest.raises(CaptureError, match=r"count.*register_buffer"):
        capture(model, example_inputs=(X,))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_captured_right_and_noted(reentrant: bool) -> None:
    checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=reentrant)

    def body(self: Any, x: torch.Tensor) -> Any:
        return checkpoint(lambda y: self.linear(y).tanh(), x)

    model = Model(body)
    program = capture(model, example_inputs=(X,))
    (note,) = program.notes
    assert "activation checkpointing" in note and "test_capture_errors.py" in note
    check_against_eager(program, model, (X,))


def test_huggingface_checkpointing_and_cache() -> None:
    model, batch, _ = zoo.build("llama")
    plain = capture(model, example_inputs=batch)
    model.gradient_checkpointing_enable()
    program = capture(model, example_inputs=batch)
    assert program.fingerprint == plain.fingerprint
    assert "activation checkpointing" in program.notes[0]
    assert model.config.use_cache is True and model.is_gradient_checkpointing


# ------------------------------------------------------------------------------ inputs and loss


def test_a_model_that_does_not_know_its_inputs() -> None:
    message = r'autoshard.compile\(model, example_inputs=\{"idx": \.\.\., "targets": \.\.\.\}'
    with pytest.raises(CaptureError, match=message):
        capture(zoo_models.NanoGPT())


def test_no_loss() -> None:
    with pytest.raises(CaptureError, match=r"no loss.*loss_fn=lambda output, batch"):
        capture(nn.LSTM(4, 4), example_inputs=(X,))
    with pytest.raises(CaptureError, match=r"expected a scalar .* torch.float32 \[2, 4\]"):
        capture(nn.Linear(4, 4), example_inputs=(X,))
    with pytest.raises(CaptureError, match="does not depend on any trainable parameter"):
        capture(Model(lambda self, x: x.detach()), example_inputs=(X,))
    frozen = Model(lambda self, x: x).requires_grad_(False)
    with pytest.raises(CaptureError, match="does not depend on any trainable parameter"):
        capture(frozen, example_inputs=(X,))


def test_inputs_that_do_not_fit() -> None:
    linear = nn.Linear(4, 4)

    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        return output.sum()

    with pytest.raises(CaptureError, match=r"forward\(input\) takes no 'y'.*loss_fn"):
        capture(linear, example_inputs={"input": X, "y": X})
    with pytest.raises(CaptureError, match=r"needs 'input' but example_inputs has only 'x'"):
        capture(linear, example_inputs={"x": X}, loss_fn=loss)
    with pytest.raises(CaptureError, match="takes 1 to 1 inputs but example_inputs has 2"):
        capture(linear, example_inputs=(X, X))
    with pytest.raises(CaptureError, match=r"start with a tensor whose dim 0 is the batch"):
        capture(linear, example_inputs=(3,), loss_fn=loss)
    with pytest.raises(CaptureError, match="a dict, a tuple or a tensor but got int"):
        capture(linear, example_inputs=3, loss_fn=loss)
    with pytest.raises(OptionError, match="global_batch_size >= 1 but got 0"):
        capture(linear, example_inputs=X, loss_fn=loss, global_batch_size=0)


def test_a_tuple_whose_entries_could_go_either_way() -> None:
    class Optional(nn.Linear):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x)

    with pytest.raises(CaptureError, match=r"cannot tell which of the 2 entries.*give a dict"):
        capture(Optional(4, 4), example_inputs=(X, X), loss_fn=lambda o, b: F.mse_loss(o, b[1]))


def test_entries_of_the_batch_reach_the_loss_alone() -> None:
    linear = nn.Linear(4, 4)
    as_tuple = capture(linear, example_inputs=(X, X), loss_fn=lambda o, b: F.mse_loss(o, b[1]))
    assert [v.name for v in as_tuple.batch] == ["input", "target_1"]
    as_dict = capture(
        linear, example_inputs={"input": X, "goal": X, "weight": torch.tensor(2.0), "unused": X},
        loss_fn=lambda o, b: F.mse_loss(o, b["goal"]) * b["weight"],
    )  # fmt: skip
    found = [(v.name, v.type.per_sample) for v in as_dict.batch]
    assert found == [("input", True), ("goal", True), ("weight", False), ("unused", True)]


def test_huggingface_models_know_their_inputs() -> None:
    for name, entries in {
        "gpt2": {"input_ids": (8, 16), "labels": (8, 16)},
        "t5": {"input_ids": (8, 512), "labels": (8, 512)},
        "vit": {"pixel_values": (8, 3, 16, 16), "labels": (8,)},
        "whisper": {"input_features": (8, 8, 32), "labels": (8, 16)},
    }.items():
        program = capture(zoo.build(name)[0])
        assert {v.name: v.type.shape for v in program.batch} == entries
    program = capture(zoo.build("bert")[0], global_batch_size=3)
    assert program.batch_size == 3
