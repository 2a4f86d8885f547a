"""Run graphs and programs on plain tensors: the meaning of the representation, op by op.

This is the reference that every rewrite is tested against. It is not how training runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from autoshard import ir
from autoshard.errors import InternalError

Tensors = Mapping[str, torch.Tensor]


def run_graph(
    graph: ir.Graph, env: Tensors, device: torch.device | None = None
) -> tuple[torch.Tensor, ...]:
    """The graph's outputs on the tensors of ``env``, which holds every input and parameter by name.

    Differentiable with plain autograd. Ops that mutate a buffer write to the tensor in ``env``.

    Args:
        device: where ops create tensors; by default that of the tensors in ``env``.

    Raises:
        InternalError: if ``env`` lacks a value, or an op returns another number of tensors than
            the graph says.
    """
    values: dict[str, torch.Tensor] = {}
    for value in (*graph.inputs, *graph.parameters):
        if value.name not in env:
            raise InternalError(f"run_graph: expected a tensor for {value} but got none")
        values[value.name] = env[value.name]
    device = device or next((tensor.device for tensor in values.values()), None)
    for op in graph.ops:
        _run_op(op, values, device)
    return tuple(values[v.name] for v in graph.outputs)


def run_program(program: ir.Program, tensors: Tensors, batch: Tensors) -> torch.Tensor:
    """The loss of a whole program, segment by segment.

    Args:
        tensors: parameters and buffers by canonical name (see :func:`tensors_of`).
        batch: batch tensors by input name.
    """
    values = {**tensors, **batch}
    device = next(tensor.device for tensor in values.values())
    values.update((name, tensor.to(device)) for name, tensor in program.constants.items())
    for segment in program.segments:
        graph = segment.layer.graph
        env = {v.name: values[segment.bindings[v.name]] for v in (*graph.inputs, *graph.parameters)}
        values.update(zip(segment.outputs, run_graph(graph, env, device), strict=True))
    return values[program.loss]


def tensors_of(program: ir.Program, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's own parameters and buffers under the program's canonical names."""
    held: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    held.update(model.named_buffers(remove_duplicate=False))
    return {name: held[name] for name in program.parameters if name in held}


def execute(program: ir.Program, model: torch.nn.Module | Tensors, batch: Tensors) -> torch.Tensor:
    """The loss of a program on a model's own tensors (or on tensors by canonical name)."""
    tensors = tensors_of(program, model) if isinstance(model, torch.nn.Module) else model
    return run_program(program, tensors, batch)


def bind(
    op: ir.Op, values: Tensors, device: torch.device | None = None
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call of the op on these operands, all of them looked up; it returns one tensor per output.

    Args:
        device: where an op without operands makes its result.
    """
    bound = op.map(lambda v: values[v.name])
    function, keywords = ir.resolve(op.target), dict(bound.kwargs)
    if not op.operands and _takes_device(function):
        keywords["device"] = device

    def call() -> tuple[torch.Tensor, ...]:
        result = function(*bound.args, **keywords)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    return call


def _run_op(op: ir.Op, values: dict[str, torch.Tensor], device: torch.device | None) -> None:
    try:
        results = bind(op, values, device)()
    except (RuntimeError, TypeError, IndexError) as error:
        error.add_note(f"while running {op} (module {op.module or '<root>'}, {op.source})")
        raise
    if len(results) != len(op.outputs):
        raise InternalError(f"expected {len(op.outputs)} results but got {len(results)}: {op}")
    values.update((v.name, r) for v, r in zip(op.outputs, results, strict=True))


def _takes_device(function: Callable[..., Any]) -> bool:
    schema = getattr(function, "_schema", None)
    return schema is not None and any(a.name == "device" for a in schema.arguments)
