"""Gradients of inputs first and of weights later: together those of one backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoshard.runtime.split_backward import backward_of_inputs

Function = Callable[[nn.ParameterDict, Tensor, Tensor], tuple[Tensor, ...]]


class Join(torch.autograd.Function):
    """A node of several inputs and outputs that is written in Python."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def a_chain(w: nn.ParameterDict, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (torch.tanh(torch.tanh(x @ w["a"]) @ w["b"]) + y,)


def a_weight_used_twice(w: nn.ParameterDict, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    normed = functional.layer_norm(x @ w["a"], (4,), w["n"])
    return (functional.layer_norm(torch.tanh(normed @ w["a"]), (4,), w["n"]) * y,)


def a_weight_that_meets_no_input(w: nn.ParameterDict, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """As an embedding does that enters in a later stage; torch's own split loses it."""
    return x @ w["a"], y, w["b"].exp(), w["n"] * 2


def a_bias_for_all_layers(w: nn.ParameterDict, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    bias = w["b"].exp()
    for _ in range(3):
        x, bias = Join.apply(x, bias)
        x = torch.tanh(x @ w["a"] + bias)
    return x, bias, y * bias.sum()


def inputs_pass_through(w: nn.ParameterDict, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return x, y, x * 2, w["a"] @ x, x.detach(), torch.arange(3)


def nothing_reaches_one_input(w: nn.ParameterDict, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (x @ w["a"],)


def run(function: Function, split: bool) -> dict[str, Tensor | None]:
    """Two micro-batches; the second adds to the gradients of the first."""
    torch.manual_seed(1)
    weights = nn.ParameterDict({n: torch.randn(4, 4).double() for n in ("a", "b", "unused")})
    weights["n"] = nn.Parameter(torch.randn(4).double())
    found: dict[str, Tensor | None] = {}
    for m in range(2):
        x, y = (torch.randn(4, 4).double().requires_grad_() for _ in range(2))
        outputs = function(weights, x, y)
        given = [torch.randn_like(o) if o.requires_grad else None for o in outputs]
        if split:
            gradients, late = backward_of_inputs(outputs, given, (x, y))
            before = {n: None if w.grad is None else w.grad.clone() for n, w in weights.items()}
            del outputs
            assert all(_same(w.grad, before[n]) for n, w in weights.items())
            late.run()
            found |= {f"x{m}": gradients[0], f"y{m}": gradients[1]}
        else:
            pairs = [(o, g) for o, g in zip(outputs, given, strict=True) if g is not None]
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
            found |= {f"x{m}": x.grad, f"y{m}": y.grad}
    return {**found, **{n: w.grad for n, w in weights.items()}}


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other is None or (one is not None and other is not None and one.equal(other))


@pytest.mark.parametrize(
    "function",
    [
        a_chain, a_weight_used_twice, a_weight_that_meets_no_input, a_bias_for_all_layers,
        inputs_pass_through, nothing_reaches_one_input,
    ],
)  # fmt: skip
def test_equals_one_backward(function: Function) -> None:
    found, expected = run(function, True), run(function, False)
    for name, gradient in expected.items():
        mine = found[name]
        if gradient is None:
            assert mine is None or not mine.any(), name
        else:
            assert mine is not None, name
            torch.testing.assert_close(mine, gradient, rtol=0, atol=1e-12)


def test_hooks_of_weights_run_in_the_second_part() -> None:
    weight, seen = nn.Parameter(torch.ones(2, 2)), []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    x = torch.ones(2, 2, requires_grad=True)
    _, late = backward_of_inputs([x @ weight], [torch.ones(2, 2)], [x])
    assert not seen
    late.run()
    assert len(seen) == 1 and weight.grad is not None


def test_the_first_stage_has_no_inputs() -> None:
    weight = nn.Parameter(torch.ones(2))
    gradients, late = backward_of_inputs([weight * 3], [torch.ones(2)], [])
    late.run()
    assert gradients == () and weight.grad is not None and weight.grad.tolist() == [3, 3]
