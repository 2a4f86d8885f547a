"""Train a captured program beside its model where that costs next to nothing.

Some things can be captured wrongly without any sign: Python counters, ``random`` in forward, state
that changes from step to step. Two real steps show them. Models that are too large for it, or have
no real parameters, are planned unchecked; :func:`autoshard.capture.check_against_eager` checks them
when asked.
"""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from autoshard import ir
from autoshard.capture.batch import Batch, LossFn, layout_of
from autoshard.capture.capture import capture
from autoshard.capture.check import check_against_eager
from autoshard.capture.guards import unwrap
from autoshard.cluster import find
from autoshard.cost_models.compute import op_cost

MAX_FLOPS = 2e10
"""Forward flops of one example batch that are worth a check: about a second on a laptop."""
MAX_BYTES = 2**29
"""Bytes of parameters and buffers, of which the check makes two copies."""


def self_check(
    program: ir.Program, model: nn.Module, example_inputs: Batch, loss_fn: LossFn | None
) -> str:
    """Check where it is cheap; returns why it was not done, or nothing.

    Raises:
        CaptureError: the program computes something else than the model.
    """
    model = unwrap(model)
    if example_inputs is None:
        return "not checked against the model: no real example batch was given"
    layout = layout_of(model, example_inputs, loss_fn, None)
    tensors = [*model.parameters(), *model.buffers(), *layout.tensors(example_inputs).values()]
    if any(t.is_meta or isinstance(t, FakeTensor) for t in tensors):
        return "not checked against the model: it has no real parameters or inputs"
    share = layout.batch_size / program.batch_size
    if _flops(program) * share > MAX_FLOPS or sum(t.nbytes for t in tensors) > MAX_BYTES:
        return "not checked against the model: two steps of it would take long on this machine"
    if layout.batch_size != program.batch_size:
        program = capture(model, example_inputs=example_inputs, loss_fn=loss_fn)
    with torch.random.fork_rng():
        check_against_eager(program, model, example_inputs, loss_fn)
    return ""


def _flops(program: ir.Program) -> float:
    device = find("cpu").device
    flops = {
        layer.name: sum(op_cost(op, device).forward_flops for op in layer.graph.ops)
        for layer in program.classes
    }
    return sum(flops[segment.layer.name] for segment in program.segments)
