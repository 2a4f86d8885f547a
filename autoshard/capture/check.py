"""Train a captured program beside the model it was captured from.

This is the only way to notice what tracing cannot see: Python counters, ``random`` in forward,
state that changes from step to step.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from autoshard import ir
from autoshard.capture.batch import Batch, LossFn, layout_of
from autoshard.capture.export import loss_of
from autoshard.capture.guards import unwrap
from autoshard.capture.interpret import run_program, tensors_of
from autoshard.errors import CaptureError

_RATE = 0.01


def check_against_eager(
    program: ir.Program,
    model: nn.Module,
    example_inputs: Batch,
    loss_fn: LossFn | None = None,
    steps: int = 2,
    *,
    rtol: float | None = None,
) -> None:
    """Compare loss, every gradient and every buffer over some steps of gradient descent.

    Both sides start from the model's tensors and the same random seed; the model is not changed.

    Args:
        example_inputs: a real batch of ``program.batch_size`` samples.
        rtol: allowed difference relative to the largest entry of a tensor; ``None`` for what the
            narrowest floating-point type in the program can hold.

    Raises:
        CaptureError: they differ; names the first tensor that does and by how much.
    """
    model = unwrap(model)
    layout = layout_of(model, example_inputs, loss_fn, None)
    if layout.batch_size != program.batch_size:
        raise CaptureError(
            f"expected a batch of {program.batch_size} samples, for which the program was "
            f"captured, but got {layout.batch_size}"
        )
    eager = copy.deepcopy(model)
    eager.zero_grad()
    if not eager.training:
        eager.train()
    named = {p.name for p in program.parameters.values() if p.trainable}
    mirror = {
        name: tensor.detach().clone().requires_grad_(name in named)
        for name, tensor in tensors_of(program, model).items()
    }
    tolerance = rtol if rtol is not None else _tolerance(program)
    batch = layout.rebuild(list(layout.tensors(example_inputs).values()))
    args, kwargs = layout.arguments(batch)
    for step in range(steps):
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(step)
            expected = loss_of(eager(*args, **kwargs), batch, loss_fn)
            torch.manual_seed(step)
            found = run_program(program, mirror, layout.tensors(batch))
        _compare(f"loss in step {step}", expected, found, tolerance)
        _compare_gradients(program, eager, mirror, expected, found, step, tolerance)


def _tolerance(program: ir.Program) -> float:
    dtypes = {
        v.type.dtype
        for layer in program.classes
        for op in layer.graph.ops
        for v in op.outputs
        if v.type.dtype.is_floating_point
    }
    return max(float(torch.finfo(d).eps) for d in dtypes) * 100


def _compare_gradients(
    program: ir.Program,
    eager: nn.Module,
    mirror: dict[str, torch.Tensor],
    expected: torch.Tensor,
    found: torch.Tensor,
    step: int,
    tolerance: float,
) -> None:
    tensors = tensors_of(program, eager)
    names = [p.name for p in program.parameters.values() if p.trainable]
    torch.autograd.backward(expected)
    torch.autograd.backward(found)
    for name in names:
        a, b = (_taken_gradient(side[name]) for side in (tensors, mirror))
        _compare(f"gradient of {name} in step {step}", a, b, tolerance)
        with torch.no_grad():
            tensors[name].sub_(a, alpha=_RATE)
            mirror[name].sub_(b, alpha=_RATE)
    for info in program.parameters.values():
        if info.buffer and info.name in tensors:
            what = f"buffer {info.name} after step {step}"
            _compare(what, tensors[info.name], mirror[info.name], tolerance)


def _taken_gradient(parameter: torch.Tensor) -> torch.Tensor:
    gradient, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter) if gradient is None else gradient


def _compare(what: str, expected: torch.Tensor, found: torch.Tensor, tolerance: float) -> None:
    a, b = expected.detach().to(torch.float64), found.detach().to(torch.float64)
    scale = max(float(a.abs().max()), 1e-6) if a.numel() else 1.0
    difference = float((a - b).abs().max()) / scale if a.numel() else 0.0
    if not difference <= tolerance:  # also catches nan
        raise CaptureError(
            f"the captured program differs from the model: {what} is off by {difference:.2e} "
            f"(allowed {tolerance:.2e}); look for Python state, random or data-dependent code in "
            "forward that changes from step to step"
        )
