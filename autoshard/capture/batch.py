"""The user's example batch: which tensors it has, what they are called, where each of them goes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from autoshard.errors import CaptureError, OptionError

Batch = Any
"""A dict of keyword arguments, a tuple of positional ones, or one tensor."""
LossFn = Callable[[Any, Batch], torch.Tensor]

_HOW = (
    "write autoshard.compile(model, example_inputs={{...}}, ...) with one tensor per argument of {}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLayout:
    """A batch taken apart.

    Attributes:
        names: input name of every tensor of the batch, in order.
        shapes, dtypes: of the tensors, at ``batch_size`` samples.
        per_sample: whether dim 0 is the batch dim.
        leaves: the batch's leaves; tensors are replaced by ``None``.
        tensor_positions: where among the leaves the tensors are.
        to_model: keys (dict) or number of leading entries (tuple) that ``forward`` takes.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    per_sample: tuple[bool, ...]
    batch_size: int
    leaves: tuple[Any, ...]
    tensor_positions: tuple[int, ...]
    spec: pytree.TreeSpec
    to_model: frozenset[str] | int

    def rebuild(self, tensors: Sequence[torch.Tensor]) -> Batch:
        """The batch in the structure that the user gave, on other tensors."""
        leaves = list(self.leaves)
        for position, tensor in zip(self.tensor_positions, tensors, strict=True):
            leaves[position] = tensor
        return pytree.tree_unflatten(leaves, self.spec)

    def arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of ``forward``."""
        if isinstance(self.to_model, int):
            return tuple(batch[: self.to_model]), {}
        return (), {k: v for k, v in batch.items() if k in self.to_model}

    def tensors(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The tensors of a real batch of the same structure, by input name."""
        leaves = pytree.tree_leaves(_as_container(batch))
        found = [leaves[i] for i in self.tensor_positions]
        return dict(zip(self.names, found, strict=True))


def _as_container(batch: Batch) -> Batch:
    if isinstance(batch, torch.Tensor):
        return (batch,)
    if isinstance(batch, Mapping):
        return dict(batch)
    return tuple(batch) if isinstance(batch, list) else batch


def layout_of(
    model: nn.Module, example: Batch, loss_fn: LossFn | None, global_batch_size: int | None
) -> BatchLayout:
    """Take the example apart; per-sample tensors get ``global_batch_size`` rows.

    Raises:
        CaptureError: the example does not fit ``forward``, or has no per-sample tensor.
        OptionError: ``global_batch_size`` is not positive.
    """
    batch = _as_container(example)
    if not isinstance(batch, (dict, tuple)):
        raise CaptureError(
            f"expected example_inputs to be a dict, a tuple or a tensor but got "
            f"{type(example).__name__}; {_HOW.format(_parameters(model))}"
        )
    if global_batch_size is not None and global_batch_size < 1:
        raise OptionError(f"expected global_batch_size >= 1 but got {global_batch_size}")
    if isinstance(batch, dict):
        to_model: frozenset[str] | int = _accepted_keys(model, batch, loss_fn)
    else:
        to_model = _accepted_length(model, batch, loss_fn)
    leaves, spec = pytree.tree_flatten(batch)
    positions = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
    if not positions or leaves[positions[0]].ndim == 0:
        raise CaptureError(
            "expected example_inputs to start with a tensor whose dim 0 is the batch; "
            + _HOW.format(_parameters(model))
        )
    tensors = [leaves[i] for i in positions]
    example_size = tensors[0].shape[0]
    size = global_batch_size or example_size
    per_sample = tuple(t.ndim > 0 and t.shape[0] == example_size for t in tensors)
    return BatchLayout(
        names=_names(model, batch, spec, positions),
        shapes=tuple(
            (size, *t.shape[1:]) if split else tuple(t.shape)
            for t, split in zip(tensors, per_sample, strict=True)
        ),
        dtypes=tuple(t.dtype for t in tensors),
        per_sample=per_sample,
        batch_size=size,
        leaves=tuple(None if i in positions else leaf for i, leaf in enumerate(leaves)),
        tensor_positions=positions,
        spec=spec,
        to_model=to_model,
    )


def _forward_parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def _parameters(model: nn.Module) -> str:
    return f"forward({', '.join(_forward_parameters(model))})"


def no_example(model: nn.Module) -> CaptureError:
    """The error for a model that does not know its own inputs."""
    required = [
        p.name
        for p in _forward_parameters(model).values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    entries = ", ".join(f'"{name}": ...' for name in required or ["x"])
    return CaptureError(
        f"{type(model).__name__} does not say what its inputs look like; give one batch: "
        f"autoshard.compile(model, example_inputs={{{entries}}}, ...)"
    )


def _accepted_keys(
    model: nn.Module, batch: Mapping[str, Any], loss_fn: LossFn | None
) -> frozenset[str]:
    parameters = _forward_parameters(model)
    if loss_fn is None and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return frozenset(batch)
    named = {n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    if loss_fn is None and (unknown := [k for k in batch if k not in named]):
        raise CaptureError(
            f"{_parameters(model)} takes no {', '.join(map(repr, unknown))}; drop it from "
            "example_inputs, or give the loss_fn that uses it"
        )
    missing = [
        n for n, p in parameters.items() if n in named and p.default is p.empty and n not in batch
    ]
    if missing:
        raise CaptureError(
            f"{_parameters(model)} needs {', '.join(map(repr, missing))} but example_inputs has "
            f"only {', '.join(map(repr, batch))}; add the missing entries"
        )
    return frozenset(batch) & named


def _accepted_length(model: nn.Module, batch: tuple[Any, ...], loss_fn: LossFn | None) -> int:
    parameters = _forward_parameters(model).values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return len(batch)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    if len(batch) < required or (len(batch) > len(positional) and loss_fn is None):
        raise CaptureError(
            f"{_parameters(model)} takes {required} to {len(positional)} inputs but "
            f"example_inputs has {len(batch)}; entries after those of forward need a loss_fn"
        )
    if loss_fn is not None and required < len(batch) <= len(positional):
        raise CaptureError(
            f"cannot tell which of the {len(batch)} entries of example_inputs belong to "
            f"{_parameters(model)}, whose last arguments are optional, and which only to loss_fn; "
            "give a dict: entries whose key forward does not take go to loss_fn alone"
        )
    return min(len(batch), len(positional))


def _names(
    model: nn.Module, batch: Batch, spec: pytree.TreeSpec, positions: Sequence[int]
) -> tuple[str, ...]:
    """Keys of the dict, or forward's parameter names; nested entries get their key added."""
    forward = [n for n, p in _forward_parameters(model).items() if p.kind is not p.VAR_POSITIONAL]
    names = []
    paths = [path for path, _ in pytree.tree_flatten_with_path(batch)[0]]
    for position in positions:
        first, *rest = (getattr(key, "key", getattr(key, "idx", None)) for key in paths[position])
        if isinstance(first, int):
            first = forward[first] if first < len(forward) else f"target_{first}"
        names.append("_".join(str(part) for part in (first, *rest)))
    return tuple(names)
