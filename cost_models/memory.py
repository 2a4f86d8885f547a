"""What backward keeps: saved activations, asked of PyTorch rather than guessed.

A graph is run once on fake tensors (nothing is allocated) under saved-tensor hooks. Every storage
that autograd packs belongs to the first value that has it (views belong to their base), or, if no
value has it, to the op that made it: a mask, a log-sum-exp, statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from autoshard.cost_models.stand_ins import save_operands, stand_in
from autoshard.cost_models.work import CONVERSIONS, work_of
from autoshard.ir import Graph, Op, Value, resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedValue:
    """One value whose storage backward needs.

    Attributes:
        savers: the ops that save it, in order; it is free once all of them are recomputed.
        layer_input: it comes from outside the graph, so full recompute keeps it, too.
    """

    num_bytes: int
    savers: tuple[str, ...]
    layer_input: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedActivations:
    """What the backward of one graph needs, parameters and buffers aside.

    Attributes:
        values: by name of the owning value, each storage once.
        extra_bytes: op -> what it saves that is no value of the graph.
        needs: op -> those of its own operands and outputs whose storage it saves (names before
            views are traced to their base), so that a planner knows in which state it is saved.
        owners: value -> the value that its storage belongs to (itself, or the base of a view).
    """

    values: Mapping[str, SavedValue]
    extra_bytes: Mapping[str, int]
    needs: Mapping[str, tuple[str, ...]]
    owners: Mapping[str, str]

    @property
    def total_bytes(self) -> int:
        """Everything that is held between forward and backward without recompute."""
        return sum(v.num_bytes for v in self.values.values()) + sum(self.extra_bytes.values())

    @property
    def input_bytes(self) -> int:
        """The part that are layer inputs: held by the layer before, or by full recompute."""
        return sum(v.num_bytes for v in self.values.values() if v.layer_input)

    def local_bytes(self, whole: Graph, local: Graph) -> int:
        """What one rank saves when it runs ``local``, a rewrite of ``whole`` on smaller shapes.

        Every value scales with its number of elements, an op's extras with its largest tensor.
        Values that conversions add are not in here: ask :func:`saved_values` of ``local`` for an
        exact figure.
        """
        before, after = whole.values, local.values
        total = 0.0
        for name, saved in self.values.items():
            ratio = 1.0
            if name in after:
                ratio = after[name].type.numel / max(1, before[name].type.numel)
            total += saved.num_bytes * ratio
        ops = {op.name: op for op in local.ops}
        for op in whole.ops:
            if op.name in self.extra_bytes:
                ratio = _largest(ops[op.name]) / _largest(op) if op.name in ops else 1.0
                total += self.extra_bytes[op.name] * ratio
        return round(total)


def _largest(op: Op) -> int:
    return max((v.type.numel for v in (*op.operands, *op.outputs)), default=1) or 1


class _Storages:
    """Who owns which storage, and what was packed by whom."""

    def __init__(self) -> None:
        self.owner: dict[int, str] = {}
        self.packed: dict[int, tuple[int, list[str]]] = {}
        self.parts: dict[int, dict[tuple[str, int, int], None]] = {}
        self.alive: list[Tensor] = []  # a freed storage's address could be given out again
        self.op: Op | None = None

    def own(self, tensor: Tensor, name: str) -> str:
        """The owner of a tensor's storage: ``name`` unless somebody had it before."""
        self.alive.append(tensor)
        return self.owner.setdefault(_address(tensor), name)

    def pack(self, tensor: Tensor) -> Tensor:
        self.alive.append(tensor)
        storage = tensor.untyped_storage()
        address = storage._cdata
        _, savers = self.packed.setdefault(address, (storage.nbytes(), []))
        if self.op is not None:
            if self.op.name not in savers:
                savers.append(self.op.name)
            part = (self.op.name, int(tensor.storage_offset()), tensor.numel())
            self.parts.setdefault(address, {})[part] = None
        return tensor


_Place = tuple[int, int, int]
"""Storage, offset and number of elements: tells parts of one storage (q, k, v) from each other."""


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _place(tensor: Tensor) -> _Place:
    return _address(tensor), int(tensor.storage_offset()), tensor.numel()


def saved_values(graph: Graph, *, device_kind: str = "cpu") -> SavedActivations:
    """Run a graph once on fake tensors and see what autograd saves.

    Args:
        graph: global or localised; conversions and other ops of the runtime need no process group.
        device_kind: ``"cuda"`` or ``"cpu"``: whose kernels save, see
            :mod:`autoshard.cost_models.stand_ins`.
    """
    storages = _Storages()
    owners: dict[str, str] = {}
    held: dict[str, dict[_Place, str]] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        env: dict[str, Tensor] = {}
        for value in (*graph.inputs, *graph.parameters):
            tensor = _fake(value)
            env[value.name] = tensor
            owners[value.name] = storages.own(tensor, value.name)
        with torch.autograd.graph.saved_tensors_hooks(storages.pack, lambda t: t):
            for op in graph.ops:
                storages.op = op
                for value, result in zip(op.outputs, _run(op, env, device_kind), strict=True):
                    env[value.name] = result
                    owners[value.name] = storages.own(result, value.name)
                names = [v.name for v in (*op.operands, *op.outputs)]
                held[op.name] = {_place(env[n]): n for n in reversed(names)}
    return _collect(graph, storages, owners, held)


def _collect(
    graph: Graph,
    storages: _Storages,
    owners: dict[str, str],
    held: dict[str, dict[_Place, str]],
) -> SavedActivations:
    inputs = {v.name for v in graph.inputs}
    parameters = {v.name for v in graph.parameters}
    values: dict[str, SavedValue] = {}
    extra: dict[str, int] = {}
    needs: dict[str, list[str]] = {}
    for address, (num_bytes, savers) in storages.packed.items():
        owner = storages.owner.get(address)
        if owner in parameters:
            continue
        if owner is None:
            extra[savers[0]] = extra.get(savers[0], 0) + num_bytes
            continue
        values[owner] = SavedValue(
            num_bytes=num_bytes, savers=tuple(savers), layer_input=owner in inputs
        )
        for name, offset, numel in storages.parts[address]:
            needed = held[name].get((address, offset, numel), owner)
            if needed not in needs.setdefault(name, []):
                needs[name].append(needed)
    return SavedActivations(
        values=values, extra_bytes=extra, owners=owners,
        needs={name: tuple(found) for name, found in needs.items()},
    )  # fmt: skip


def regathered(graph: Graph, saved: SavedActivations) -> SavedActivations:
    """What is saved if operands that are gathered from parts are kept as those parts.

    Args:
        saved: of the graph, with everything that autograd packs.
    """
    inputs, parameters = ({v.name for v in vs} for vs in (graph.inputs, graph.parameters))
    values, part_of = dict(saved.values), dict[str, str]()
    for op in graph.ops:
        known = CONVERSIONS.get(op.target.split(".")[1])
        whole = op.outputs[0].name
        if known is None or known.forward != "all_gather" or whole not in values:
            continue
        part = part_of[whole] = saved.owners[op.operands[0].name]
        gone = values.pop(whole)
        if part in parameters:
            continue
        size = op.operands[0].type.nbytes
        before = values.get(part, SavedValue(num_bytes=size, savers=(), layer_input=part in inputs))
        savers = dict.fromkeys((*before.savers, *gone.savers))
        values[part] = replace(before, savers=tuple(savers))
    needs = {
        name: tuple(part_of.get(saved.owners.get(v, v), v) for v in own)
        for name, own in saved.needs.items()
    }
    return replace(saved, values=values, needs=needs)


def _fake(value: Value) -> Tensor:
    kind = value.type
    tensor = torch.empty(kind.shape, dtype=kind.dtype)
    return tensor.requires_grad_(kind.differentiable)


def _run(op: Op, env: Mapping[str, Tensor], device_kind: str) -> tuple[Tensor, ...]:
    if replacement := stand_in(op, device_kind):
        return replacement(op, env)
    bound = op.map(lambda v: env[v.name])
    try:
        result = resolve(op.target)(*bound.args, **dict(bound.kwargs))
    except (RuntimeError, NotImplementedError, LookupError):
        # Shapes that depend on values, or a runtime op that wants its process group.
        return save_operands(op, env)
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def workspace_bytes(graph: Graph, saved: SavedActivations) -> int:
    """Peak of what lives only for a moment: unsaved values in forward, gradients in backward.

    Gradients of parameters are not counted: they stay, see :mod:`autoshard.cost_models.state`.
    """
    return max(_forward_peak(graph, saved), _backward_peak(graph))


def _forward_peak(graph: Graph, saved: SavedActivations) -> int:
    """Values that nothing saves live from their op to their last use."""
    owners = saved.owners
    last = {owners[v.name]: i for i, op in enumerate(graph.ops) for v in op.operands}
    last.update((owners[v.name], len(graph.ops)) for v in graph.outputs)
    live = peak = 0
    ends: dict[int, int] = {}
    for index, op in enumerate(graph.ops):
        for value in op.outputs:
            if owners[value.name] == value.name and value.name not in saved.values:
                live += value.type.nbytes
                end = last.get(value.name, index)
                ends[end] = ends.get(end, 0) + value.type.nbytes
        peak = max(peak, live)
        live -= ends.get(index, 0)
    return peak


def _backward_peak(graph: Graph) -> int:
    """Gradients live from the last use of their value, in reverse, to the op that made it.

    Ops whose backward launches nothing (views, sums) hand their gradient's storage on.
    """
    parameters = {p.name for p in graph.parameters}
    storage: dict[str, int] = {}  # value -> the storage of its gradient
    num_bytes: dict[int, int] = {}
    holders: dict[int, int] = {}
    peak = 0

    def hold(value: Value, shared: int | None) -> None:
        if value.name in storage:  # a second use adds to the gradient that is there
            return
        key = len(num_bytes) if shared is None else shared
        num_bytes.setdefault(key, value.type.nbytes)
        holders[key] = holders.get(key, 0) + 1
        storage[value.name] = key

    for value in graph.outputs:
        if value.type.differentiable:
            hold(value, None)
    for op in reversed(graph.ops):
        gradients = [v for v in op.outputs if v.name in storage]
        if not gradients:
            continue
        handed_on = storage[gradients[0].name] if work_of(op).backward.kernels == 0 else None
        for v in op.operands:
            if v.type.differentiable and v.name not in parameters:
                hold(v, handed_on)
        peak = max(peak, sum(n for key, n in num_bytes.items() if holders[key]))
        for v in gradients:
            holders[storage.pop(v.name)] -= 1
    return peak
