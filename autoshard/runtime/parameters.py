"""Parameters at rest: declared by emitted layers, held as DTensors under their original names.

A layer's parameter is a ``DTensor`` on the ``tp`` axis of the mesh, split or replicated there (a
plain tensor where that axis has one rank, which spares every use the dispatch of a DTensor); FSDP2
may split its rows over ``dp`` as well. The DTensor of a blockwise split is one over the whole
tensor with its elements in another order: its local part is this rank's part of every block.
Buffers are plain tensors, this rank's part.

Nothing outside this file and :mod:`autoshard.runtime.boxes` knows how a parameter is cut.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from autoshard.errors import CheckpointError, InternalError
from autoshard.placement.state import local_size
from autoshard.runtime.boxes import Piece, Place, Split, pieces, tp_shape
from autoshard.runtime.collectives import all_gather_replicated, stack_over, sum_over
from autoshard.runtime.local_stages import Chunks
from autoshard.runtime.mesh import Mesh, current

__all__ = [
    "Container", "Layer", "Parameter", "Split", "attach", "declared", "load_parameters", "local",
    "local_part", "on_gradient", "pieces_of", "set_local_gradient", "sum_partial_gradients",
    "whole",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parameter:
    """What an emitted layer says of one parameter or buffer.

    Attributes:
        shape: of the whole tensor.
        buffer: a buffer; ``persistent`` if it belongs to the state dict.
        split: how it is split over ``tp``; ``None`` if every rank holds the whole.
        partial_gradient: axes on which each rank's gradient is an addend (state ``V``), to be
            summed once per step; see :func:`sum_partial_gradients`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    trainable: bool = True
    buffer: bool = False
    persistent: bool = True
    split: Split | None = None
    partial_gradient: tuple[str, ...] = ()


# -- the module tree ------------------------------------------------------------------------------


class Container(nn.Module):
    """A node of the tree of names; ``container[0]`` is the child that is called ``"0"``."""

    def __getitem__(self, name: int | str) -> Any:
        return getattr(self, str(name))


class Layer(Container):
    """Base of emitted layers: holds what ``PARAMETERS`` declares, empty, below nested containers.

    Created on the mesh of this thread and on the default device (``with torch.device("meta")``
    allocates nothing); :func:`load_parameters` fills it.
    """

    PARAMETERS: ClassVar[Mapping[str, Parameter]] = {}

    def __init__(self) -> None:
        super().__init__()
        for name, declaration in self.PARAMETERS.items():
            _register(self, name, _empty(declaration, current()), declaration)

    def __getattr__(self, name: str) -> Any:
        names = self.__dict__.get("_names")
        if names is not None and hasattr(names, name):
            return getattr(names, name)
        return super().__getattr__(name)


def _empty(declaration: Parameter, mesh: Mesh) -> Tensor:
    split, shape = declaration.split, declaration.shape
    place = Place(mesh.rank("tp"), mesh.size("tp"))
    if split and split.blocks and any(b % place.n for b in split.blocks):
        raise InternalError(f"blocks {split.blocks} do not divide over {place.n} ranks")
    tensor = torch.empty(tp_shape(shape, split, place), dtype=declaration.dtype)
    if declaration.buffer:
        return tensor
    if mesh.device_mesh is not None and mesh.size("tp") > 1:
        tensor = DTensor.from_local(
            tensor,
            mesh.device_mesh["tp"],
            (Shard(split.dim) if split else Replicate(),),
            run_check=False,
            shape=torch.Size(shape),
            stride=_contiguous_stride(shape),
        )
    return nn.Parameter(tensor, requires_grad=declaration.trainable)


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _container(root: nn.Module, path: tuple[str, ...]) -> nn.Module:
    """The module at ``path`` below ``root``, created where it is missing."""
    for name in path:
        if name not in root._modules:
            root.add_module(name, Container())
        root = cast(nn.Module, root._modules[name])
    return root


def _declarations(module: nn.Module) -> dict[str, Parameter]:
    # Kept beside the tensors by name, because FSDP2 replaces the tensors themselves.
    return cast(dict[str, Parameter], module.__dict__.setdefault("_declarations", {}))


def _register(root: nn.Module, name: str, tensor: Tensor, declaration: Parameter) -> None:
    *path, leaf = name.split(".")
    holder = _container(root, tuple(path))
    known = _declarations(holder).setdefault(leaf, declaration)
    if known != declaration:
        raise InternalError(f"parameter {name!r} is declared as {known} and as {declaration}")
    if leaf in holder._parameters or leaf in holder._buffers:
        return  # a tied parameter: the one that is there serves both
    if declaration.buffer:
        holder.register_buffer(leaf, tensor, persistent=declaration.persistent)
    else:
        holder.register_parameter(leaf, cast(nn.Parameter, tensor))


def attach(
    stage: nn.Module, layer: Layer, path: str, names: Mapping[str, str] | None = None
) -> None:
    """Give the parameters of ``layer`` their original names in ``stage``.

    Args:
        path: where the layer becomes a submodule, if its parameters are named relative to it.
        names: declared name -> qualified name, for a layer whose parameters are not all below one
            path. It does not become a submodule: its tensors do, under their own names, and the
            layer finds them there. Tensors of one qualified name are one tensor (tied weights).
    """
    if names is None:
        *above, name = path.split(".")
        parent = _container(stage, tuple(above))
        present = parent._modules.get(name)
        parent._modules[name] = layer
        for inner, declaration, tensor in declared(present) if present else ():
            _register(layer, inner, tensor, declaration)
        return
    for inner, declaration, tensor in tuple(declared(layer)):
        _register(stage, names[inner], tensor, declaration)
    for inner in {name.partition(".")[0] for name in layer.PARAMETERS}:
        for table in (layer._modules, layer._parameters, layer._buffers):
            table.pop(inner, None)
    layer.__dict__["_declarations"] = {}
    layer.__dict__["_names"] = _Names(stage, names)


class _Names:
    """Attribute access by a layer's own names to tensors that live elsewhere in the stage.

    Looked up each time, because FSDP2 replaces the tensors.
    """

    def __init__(self, root: nn.Module, names: Mapping[str, str]) -> None:
        self._root = root
        self._targets = {n: q.split(".") for n, q in names.items() if "." not in n}
        for child in {n.partition(".")[0] for n in names if "." in n}:
            below = {n.partition(".")[2]: q for n, q in names.items() if n.startswith(child + ".")}
            self.__dict__[child] = _Names(root, below)

    def __getattr__(self, name: str) -> Any:
        targets = self.__dict__.get("_targets", {})
        if name not in targets:
            raise AttributeError(name)
        return functools.reduce(getattr, targets[name], self._root)

    def __getitem__(self, name: int | str) -> Any:
        return getattr(self, str(name))


def declared(module: nn.Module) -> Iterator[tuple[str, Parameter, Tensor]]:
    """Every declared parameter and buffer below ``module``: name, declaration, tensor.

    What several stages of one rank hold comes once.

    Raises:
        InternalError: if two stages declare one name differently.
    """
    if isinstance(module, Chunks):
        known: dict[str, Parameter] = {}
        for stage in module.stages:
            for name, declaration, tensor in declared(stage):
                if known.get(name, declaration) != declaration:
                    raise InternalError(
                        f"stages of one rank declare {name!r} as {known[name]} and {declaration}"
                    )
                if name not in known:
                    known[name] = declaration
                    yield name, declaration, tensor
        return
    for prefix, holder in module.named_modules():
        for leaf, declaration in holder.__dict__.get("_declarations", {}).items():
            table = holder._buffers if declaration.buffer else holder._parameters
            yield f"{prefix}.{leaf}" if prefix else leaf, declaration, cast(Tensor, table[leaf])


# -- use ------------------------------------------------------------------------------------------


def local(parameter: Tensor, size: int | None = None) -> Tensor:
    """The local tensor of a parameter for use in forward; differentiable.

    The gradient is stored as it comes: an addend stays an addend. An uneven split is padded with
    zeros to ``ceil(size / n)`` along its dim.

    Args:
        size: of the whole split dim, if it is not the parameter's own.
    """
    if not isinstance(parameter, DTensor):
        _keep_gradient_apart(parameter)
        return parameter
    tensor = _leaf(parameter)
    (placement,) = parameter.placements
    if not isinstance(placement, Shard):
        return tensor
    dim = placement.dim
    wanted = local_size(size or parameter.shape[dim], parameter.device_mesh.size())
    missing = wanted - tensor.shape[dim]
    if missing <= 0:
        return tensor
    shape = (*tensor.shape[:dim], missing, *tensor.shape[dim + 1 :])
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


class _OwnMemory:
    """A hook that sees that no other gradient shares memory with its parameter's.

    Autograd makes the first gradient that arrives the parameter's ``grad`` without a copy, if no
    one else holds that tensor. It may still be a part of another's memory, as in
    ``cat(token, x) + positions``; adding to one, as the next micro-batch does, would then change
    the other. A stage runs the same ops every time: what a gradient is once, it is always.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.needed = True
        self._handle = parameter.register_hook(self)  # type: ignore[no-untyped-call]

    def __call__(self, gradient: Tensor) -> Tensor | None:
        if gradient.untyped_storage().nbytes() == gradient.nbytes:
            self.needed = False
            return None
        return gradient.clone(memory_format=torch.contiguous_format)

    def remove(self) -> None:
        self._handle.remove()


def _keep_gradient_apart(parameter: Tensor) -> None:
    kept = parameter.__dict__
    if "_own_memory" not in kept:
        kept["_own_memory"] = _OwnMemory(parameter) if parameter.requires_grad else None
    elif (hook := kept["_own_memory"]) is not None and not hook.needed:
        hook.remove()
        kept["_own_memory"] = None


def _leaf(parameter: DTensor) -> Tensor:
    """The local tensor as a leaf of autograd, whose gradient becomes the parameter's.

    ``to_local`` and its backward would take the dispatch of a DTensor, some 0.3 ms, at every use.
    """
    leaf: Tensor | None = parameter.__dict__.get("_leaf")
    if leaf is None:
        leaf = local_part(parameter).requires_grad_(parameter.requires_grad)
        if parameter.requires_grad:
            _keep_gradient_apart(leaf)
            # Weakly: a hook that leads back to its own tensor is a cycle that is never collected.
            held = weakref.ref(parameter)
            leaf.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda leaf: _hand_over(leaf, held())
            )
        parameter.__dict__["_leaf"] = leaf
    return leaf


@torch.no_grad()
def _hand_over(leaf: Tensor, parameter: DTensor | None) -> None:
    gradient, leaf.grad = leaf.grad, None
    if parameter is None or gradient is None:
        return
    if parameter.grad is None:
        set_local_gradient(parameter, gradient)
    else:
        local_part(parameter.grad).add_(gradient)
    for hook in parameter.__dict__.get("_on_gradient", ()):
        hook(parameter)


def on_gradient(parameter: Tensor, hook: Callable[[Tensor], None]) -> None:
    """Call ``hook(parameter)`` each time that a backward has added to its gradient."""
    if isinstance(parameter, DTensor):
        parameter.__dict__.setdefault("_on_gradient", []).append(hook)
    else:
        parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def set_local_gradient(parameter: Tensor, gradient: Tensor | None) -> None:
    """Give a parameter the gradient of the part that this rank holds."""
    if gradient is None or not isinstance(parameter, DTensor):
        parameter.grad = gradient
        return
    parameter.grad = DTensor.from_local(
        gradient, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a parameter, gradient or optimizer state; shares its storage."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _dp_place(tensor: Tensor, mesh: Mesh) -> Place:
    """How the rows of the local part are split over the ranks that share the parameter."""
    if isinstance(tensor, DTensor):
        axes = tensor.device_mesh.mesh_dim_names or ()
        for axis, placement in zip(axes, tensor.placements, strict=True):
            if axis == mesh.replicas and not placement.is_replicate():
                return Place(mesh.rank(axis), mesh.size(axis))
    return Place()


def pieces_of(tensor: Tensor, declaration: Parameter) -> tuple[Piece, ...]:
    """Where the elements of this rank's part of ``tensor`` lie in the whole tensor.

    Args:
        tensor: a parameter, or its gradient or optimizer state, before or after FSDP2.
    """
    mesh = current()
    place = Place(mesh.rank("tp"), mesh.size("tp"))
    return pieces(declaration.shape, declaration.split, place, _dp_place(tensor, mesh))


def whole(tensor: Tensor, declaration: Parameter) -> Tensor:
    """The whole tensor, on every rank; collective over ``dp`` and ``tp``; no gradient.

    Args:
        tensor: a parameter, or its gradient or optimizer state, before or after FSDP2. A scalar
            state of the optimizer is returned as it is.
    """
    mesh = current()
    part = local_part(tensor)
    if part.ndim == 0:
        return part
    dp, split = _dp_place(tensor, mesh), declaration.split
    if dp.n > 1:
        tp = Place(mesh.rank("tp"), mesh.size("tp"))
        rows = tp_shape(declaration.shape, split, tp)[0]
        part = _padded(part, 0, local_size(rows, dp.n))
        part = stack_over(part, mesh, mesh.replicas).flatten(0, 1).narrow(0, 0, rows)
    if split is None or mesh.size("tp") == 1:
        return part
    size = declaration.shape[split.dim]
    if not split.blocks:
        part = _padded(part, split.dim, local_size(size, mesh.size("tp")))
    return all_gather_replicated(part, split.dim, size, split.blocks, axis="tp")


def _padded(tensor: Tensor, dim: int, size: int) -> Tensor:
    shape = (*tensor.shape[:dim], size - tensor.shape[dim], *tensor.shape[dim + 1 :])
    return torch.cat([tensor, tensor.new_zeros(shape)], dim) if shape[dim] else tensor


@torch.no_grad()
def load_parameters(module: nn.Module, source: Mapping[str, Tensor]) -> None:
    """Copy this rank's parts of the whole tensors in ``source`` into ``module``.

    Works before and after FSDP2. Casts to the declared dtype.

    Raises:
        CheckpointError: if a tensor is missing or has another shape.
    """
    for name, declaration, tensor in declared(module):
        if name not in source:
            raise CheckpointError(f"expected a tensor for {name!r} but there is none")
        given = source[name]
        if tuple(given.shape) != declaration.shape:
            raise CheckpointError(
                f"expected shape {declaration.shape} for {name!r} but got {tuple(given.shape)}"
            )
        part = local_part(tensor)
        for piece in pieces_of(tensor, declaration):
            piece.local.of(part).copy_(piece.whole.of(given.detach()))


@torch.no_grad()
def sum_partial_gradients(module: nn.Module) -> None:
    """Sum every gradient that is an addend on an axis over that axis; once per step.

    One all-reduce per axis and dtype.
    """
    mesh = current()
    if all(mesh.size(axis) == 1 for axis in mesh.axes):
        return
    groups: dict[tuple[str, torch.dtype], list[Tensor]] = {}
    for _, declaration, tensor in declared(module):
        if tensor.grad is not None:
            part = local_part(tensor.grad)
            for axis in declaration.partial_gradient:
                if mesh.size(axis) > 1:
                    groups.setdefault((axis, part.dtype), []).append(part)
    for (axis, _), parts in groups.items():
        total = sum_over(torch.cat([p.reshape(-1) for p in parts]), mesh, axis)
        summed = torch.split(total, [p.numel() for p in parts])
        for part, addends in zip(parts, summed, strict=True):
            part.copy_(addends.view_as(part))
