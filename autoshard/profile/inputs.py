"""Real tensors to run a graph on: the right shapes and dtypes, and indices that are in range."""

from __future__ import annotations

import torch
from torch import Tensor

from autoshard.ir import Graph, Op, Value

_DEFAULT_BOUND = 2
_TABLE_FIRST = ("index_select", "gather", "index", "take_along_dim", "scatter", "scatter_add")
_INDEX_PUT = ("index_put", "index_put_", "index_add", "index_copy")


def tensors_for(graph: Graph, device: torch.device) -> dict[str, Tensor]:
    """A tensor for every input and parameter, from a fixed seed; leaves that need gradients do."""
    bounds = index_bounds(graph)
    generator = torch.Generator(device=device).manual_seed(0)
    return {
        v.name: _tensor(v, bounds.get(v.name, _DEFAULT_BOUND), device, generator)
        for v in (*graph.inputs, *graph.parameters)
    }


def stand_in(value: Value, device: torch.device) -> Tensor:
    """A tensor of a value's type with the same number everywhere, that any use of it allows."""
    kind = value.type
    number = 0.5 if kind.dtype.is_floating_point or kind.dtype.is_complex else 0
    return torch.full(kind.shape, number, dtype=kind.dtype, device=device)


def _tensor(value: Value, bound: int, device: torch.device, generator: torch.Generator) -> Tensor:
    kind = value.type
    if kind.dtype.is_floating_point:
        made = torch.empty(kind.shape, dtype=kind.dtype, device=device)
        # Positive, so that variances, square roots and logarithms of it are numbers.
        return made.uniform_(0.1, 0.9, generator=generator).requires_grad_(kind.differentiable)
    if kind.dtype == torch.bool:
        return torch.ones(kind.shape, dtype=kind.dtype, device=device)
    if kind.dtype.is_complex:
        return torch.ones(kind.shape, dtype=kind.dtype, device=device)
    return torch.randint(
        0, max(1, bound), kind.shape, dtype=kind.dtype, device=device, generator=generator
    )


def index_bounds(graph: Graph) -> dict[str, int]:
    """Values of integer type -> one above the largest index that every use of them allows.

    A use through views and copies counts as a use.
    """
    bounds: dict[str, int] = {}
    for op in reversed(graph.ops):
        for position, value in enumerate(op.operands):
            if value.type.dtype.is_floating_point or value.type.dtype == torch.bool:
                continue
            found = _bound(op, position)
            if found is None:
                found = min((bounds[v.name] for v in op.outputs if v.name in bounds), default=None)
            if found is not None:
                bounds[value.name] = min(found, bounds.get(value.name, found))
    return bounds


def _bound(op: Op, position: int) -> int | None:
    """What the op itself allows its operand at ``position`` to hold."""
    name = op.target.split(".")[1]
    shapes = [v.type.shape for v in op.operands]
    if name == "embedding":
        return shapes[0][0] if position == 1 else None
    if name == "vocab_parallel_embedding":
        return shapes[1 - position][0]
    if name in ("cross_entropy_loss", "nll_loss", "vocab_parallel_cross_entropy"):
        return shapes[0][1 if len(shapes[0]) > 1 else 0] if position == 1 else None
    if name in (*_TABLE_FIRST, *_INDEX_PUT):
        if position == 0 or not shapes[0]:
            return None
        dim = op.args[1] if len(op.args) > 1 and isinstance(op.args[1], int) else None
        return shapes[0][dim] if dim is not None else min(shapes[0])
    if name == "one_hot":
        return op.outputs[0].type.shape[-1]
    return None
