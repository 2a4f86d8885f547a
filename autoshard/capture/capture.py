"""Capture: the steps from a model to a program, in order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from autoshard import ir
from autoshard.capture.batch import Batch, BatchLayout, LossFn, layout_of, no_example
from autoshard.capture.export import export
from autoshard.capture.guards import check_module, unwrap
from autoshard.capture.huggingface import example_batch
from autoshard.capture.losses import summed
from autoshard.capture.lower import annotated, lower
from autoshard.capture.segments import segments_of
from autoshard.capture.simplify import simplified
from autoshard.errors import CaptureError


def capture(
    model: nn.Module,
    *,
    example_inputs: Batch = None,
    loss_fn: LossFn | None = None,
    global_batch_size: int | None = None,
    model_name: str = "",
) -> ir.Program:
    """The model's forward pass and loss, in training mode, at the global batch size.

    Nothing is computed or allocated, and the model is left as it was: it may be real, fake or on
    the meta device.

    Args:
        example_inputs: one batch: a dict of keyword arguments of ``forward`` or a tuple of
            positional ones. Tensors whose dim 0 has the size of the first tensor's are per sample.
            ``None`` for Hugging Face models, which know their inputs.
        loss_fn: ``loss_fn(output, batch) -> scalar``; ``None`` if the model returns its loss.
            Entries of the batch that ``forward`` does not take go to ``loss_fn`` alone.
        global_batch_size: samples per optimizer step; ``None`` for the example's.

    Raises:
        CaptureError: the model cannot be captured as one exact graph; names the line and the cure.
    """
    model = unwrap(model)
    notes = check_module(model)
    layout = _layout(model, example_inputs, loss_fn, global_batch_size)
    parameters = parameters_of(model)
    canonical = {alias: p.name for p in parameters.values() for alias in p.aliases}
    # Trace the training step into the raw graph.
    exported = export(model, layout, loss_fn)
    # Lower it to pure ops with one spelling per meaning.
    lowered = lower(exported.program, layout, canonical, parameters)
    # Derive what depends on what, simplify, and make means of losses additive.
    lowered = replace(lowered, graph=annotated(lowered.graph))
    lowered = summed(simplified(lowered))
    _check_loss(lowered.graph)
    # Cut it into layers and recognise the equal ones.
    segments, loss = segments_of(lowered, model)
    infos = {**_as_used(parameters, lowered.graph), **_constant_infos(lowered.constants)}
    program = ir.Program(
        batch=lowered.batch,
        batch_size=layout.batch_size,
        segments=segments,
        loss=loss,
        parameters=infos,
        constants=lowered.constants,
        notes=(*notes, *exported.notes),
        model_name=model_name or type(model).__name__,
    )
    return replace(program, fingerprint=fingerprint(program))


def _layout(
    model: nn.Module, example: Batch, loss_fn: LossFn | None, global_batch_size: int | None
) -> BatchLayout:
    if example is None:
        example = example_batch(model, global_batch_size)
    if example is None:
        raise no_example(model)
    return layout_of(model, example, loss_fn, global_batch_size)


def parameters_of(model: nn.Module) -> dict[str, ir.ParameterInfo]:
    """Every parameter and buffer by canonical name, with all its aliases."""
    found: dict[int, ir.ParameterInfo] = {}
    persistent = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._buffers
        if name not in module._non_persistent_buffers_set
    }
    held: list[tuple[str, torch.Tensor]] = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in held:
        if known := found.get(id(tensor)):
            found[id(tensor)] = replace(known, aliases=(*known.aliases, name))
            continue
        is_parameter = isinstance(tensor, nn.Parameter)
        trainable = is_parameter and tensor.requires_grad
        type_ = ir.TensorType(
            tuple(tensor.shape), tensor.dtype, differentiable=trainable, parametric=is_parameter
        )
        found[id(tensor)] = ir.ParameterInfo(
            name=name, type=type_, aliases=(name,), trainable=trainable, buffer=not is_parameter,
            persistent=is_parameter or name in persistent,
        )  # fmt: skip
    return {info.name: info for info in found.values()}


def _as_used(
    parameters: Mapping[str, ir.ParameterInfo], graph: ir.Graph
) -> dict[str, ir.ParameterInfo]:
    """Buffers that the graph writes to are parametric: they change as training goes on."""
    used = {p.name: p.type for p in graph.parameters}
    return {n: replace(info, type=used.get(n, info.type)) for n, info in parameters.items()}


def _constant_infos(constants: Mapping[str, torch.Tensor]) -> dict[str, ir.ParameterInfo]:
    return {
        name: ir.ParameterInfo(
            name=name, type=ir.TensorType(tuple(t.shape), t.dtype), aliases=(name,),
            trainable=False, buffer=True, persistent=False,
        )
        for name, t in constants.items()
    }  # fmt: skip


def _check_loss(graph: ir.Graph) -> None:
    (loss,) = graph.outputs
    if not loss.type.differentiable:
        raise CaptureError(
            "the loss does not depend on any trainable parameter: expected requires_grad=True on "
            "some parameter, and a loss computed from the model's output without detach or no_grad"
        )


def fingerprint(program: ir.Program) -> str:
    """A sha256 over everything that decides what the program computes."""
    digest = hashlib.sha256()

    def add(*parts: object) -> None:
        digest.update(repr(parts).encode())

    add(program.batch, program.batch_size, program.loss)
    for layer in program.classes:
        graph = layer.graph
        add(layer.name, layer.kind, graph.inputs, graph.parameters, graph.outputs)
        for op in graph.ops:
            add(op.target, op.args, op.kwargs, op.outputs)
    for segment in program.segments:
        add(segment.path, segment.layer.name, sorted(segment.bindings.items()))
    for name in sorted(program.parameters):
        add(program.parameters[name])
    for name, tensor in sorted(program.constants.items()):
        add(name, tensor.tolist())
    return digest.hexdigest()
