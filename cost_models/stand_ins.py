"""Ops that are not run as themselves when autograd is asked what it saves.

Ops of the runtime need other ranks, which planning has not. And [Note: kernels of another device]:
fake tensors are CPU tensors, whatever the plan's device, because a build of torch without CUDA
cannot differentiate fake CUDA tensors. The ops whose CUDA kernels save other things than their CPU
kernels are replaced by what CUDA saves: attention its operands, its result and one log-sum-exp per
row (FlashAttention-2 and the memory-efficient kernel alike), dropout one byte per element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoshard.cost_models.products import expert_rows
from autoshard.cost_models.work import CONVERSIONS
from autoshard.ir import Op, Value, resolve

StandIn = Callable[[Op, Mapping[str, Tensor]], tuple[Tensor, ...]]


class _Saving(torch.autograd.Function):
    """Makes outputs of given types; saves chosen operands, chosen outputs and extra tensors."""

    @staticmethod
    def forward(ctx: Any, op: Op, choice: _Choice, *tensors: Tensor) -> Any:
        outputs = tuple(choice.empty(v) for v in op.outputs)
        extras = [torch.empty(choice.extra_bytes, dtype=torch.uint8)] if choice.extra_bytes else []
        ctx.save_for_backward(
            *(tensors[i] for i in choice.operands), *(outputs[i] for i in choice.outputs), *extras
        )
        return outputs if len(outputs) > 1 else outputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("a stand-in for planning has no backward")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """Positions of the operands and outputs that an op saves, and bytes of what else it saves.

    ``heads_inside``: outputs ``[batch, heads, rows, size]`` lie in memory with heads after rows, as
    fused attention writes them, so that joining the heads again is a view.
    """

    operands: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    extra_bytes: int = 0
    heads_inside: bool = False

    def empty(self, value: Value) -> Tensor:
        shape, dtype = value.type.shape, value.type.dtype
        if not self.heads_inside or len(shape) != 4:
            return torch.empty(shape, dtype=dtype)
        batch, heads, rows, size = shape
        return torch.empty((batch, rows, heads, size), dtype=dtype).transpose(1, 2)


def _saving(op: Op, env: Mapping[str, Tensor], choice: _Choice) -> tuple[Tensor, ...]:
    tensors = [env[v.name] for v in op.operands]
    result = _Saving.apply(op, choice, *tensors)  # type: ignore[no-untyped-call]
    return result if isinstance(result, tuple) else (result,)


def _save_nothing(op: Op, env: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return _saving(op, env, _Choice())


def save_operands(op: Op, env: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """For ops that cannot run without values or ranks: all their operands are saved."""
    return _saving(op, env, _Choice(operands=tuple(range(len(op.operands)))))


def _identity(op: Op, env: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    x = env[op.operands[0].name]
    return (x.view_as(x),)


def _fused_attention(op: Op, env: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    q = op.operands[0].type
    rows = q.numel // max(1, q.shape[-1])
    choice = _Choice(
        operands=tuple(range(len(op.operands))), outputs=(0,), extra_bytes=4 * rows,
        heads_inside=True,
    )  # fmt: skip
    return _saving(op, env, choice)


def _experts(op: Op, env: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Operands, and per choice of a token: its copy, both products' results, and between them."""
    x, _, chosen, up, down = (v.type for v in op.operands)
    inside = x.shape[-1] + up.shape[1] + down.shape[2]
    extra = round(expert_rows(op)) * (inside * x.dtype.itemsize + 8)
    extra += chosen.numel * x.shape[-1] * x.dtype.itemsize
    choice = _Choice(operands=tuple(range(len(op.operands))), extra_bytes=extra)
    return _saving(op, env, choice)


def _masked_dropout(op: Op, env: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    p = op.args[1] if len(op.args) > 1 else 0.5
    train = op.args[2] if len(op.args) > 2 else True
    if not p or not train:
        return _identity(op, env)
    return (torch.native_dropout(env[op.operands[0].name], p, True)[0],)


def _cells(op: Op, env: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Cell by cell: cuDNN keeps the same gates in a reserve that no fake tensor has."""
    bound = op.map(lambda v: env[v.name])
    with torch.backends.mkldnn.flags(enabled=False):
        result = resolve(op.target)(*bound.args, **dict(bound.kwargs))
    return tuple(result)


_WORKSPACE_NUMBERS = 16
"""Per row, hidden unit, layer and direction in oneDNN's workspace; measured: 15.4 to 16.3."""


def _fused_lstm(op: Op, env: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """oneDNN's LSTM, which runs float32 on CPUs: a workspace per layer, and layers' results."""
    x, out, last = op.operands[0].type, op.outputs[0].type, op.outputs[1].type
    if x.dtype == torch.float64 or op.target != "aten.lstm.input":
        return _cells(op, env)
    layers = last.shape[0]  # times directions
    rows = x.numel // max(1, x.shape[-1])
    numbers = layers * rows * last.shape[-1] * _WORKSPACE_NUMBERS + (layers - 1) * out.numel
    return _saving(
        op, env, _Choice(operands=(0,), outputs=(0, 1, 2), extra_bytes=numbers * x.dtype.itemsize)
    )


def _split_embedding(op: Op, env: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The ids moved into the local range, and which of them are in it."""
    ids = next(v.type for v in op.operands if not v.type.dtype.is_floating_point)
    return _saving(op, env, _Choice(extra_bytes=ids.nbytes + ids.numel))


def _split_cross_entropy(op: Op, env: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The logits, and per row: local target, two flags, weight and normaliser."""
    logits, target = op.operands[0].type, op.operands[1].type
    number = max(4, logits.dtype.itemsize)
    per_row = target.dtype.itemsize + 2 + 2 * number
    return _saving(op, env, _Choice(operands=(0,), extra_bytes=per_row * target.numel))


def _split_batch_norm(op: Op, env: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The input, and the mean and deviation of every channel."""
    channels = op.operands[0].type.shape[1]
    return _saving(op, env, _Choice(operands=(0,), extra_bytes=8 * channels))


_ALIASING = {c.function for c in CONVERSIONS.values() if c.forward == "none"}
_MOVING = {c.function for c in CONVERSIONS.values()} - _ALIASING
_OF_RUNTIME: dict[str, StandIn] = {
    **dict.fromkeys(_ALIASING, _identity),
    **dict.fromkeys(_MOVING, _save_nothing),
    "vocab_parallel_embedding": _split_embedding,
    "vocab_parallel_cross_entropy": _split_cross_entropy,
    "batch_norm": _split_batch_norm,
    "grouped_attention": _fused_attention,
    "row_attention": _fused_attention,
    "sparse_experts": _experts,
}
_OF_CUDA: dict[str, StandIn] = {
    "scaled_dot_product_attention": _fused_attention,
    "dropout": _masked_dropout,
    "lstm": _cells,
}
_OF_CPU: dict[str, StandIn] = {"lstm": _fused_lstm}


def stand_in(op: Op, device_kind: str) -> StandIn | None:
    """What to run instead of an op to learn what it saves; ``None``: the op itself."""
    name = op.target.split(".")[1]
    if op.target.startswith("autoshard."):
        return _OF_RUNTIME.get(name)
    return (_OF_CUDA if device_kind == "cuda" else _OF_CPU).get(name)
