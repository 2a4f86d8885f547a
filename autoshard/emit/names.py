"""Short variable names, as a person would choose them."""

from __future__ import annotations

import builtins
from collections.abc import Iterable

from autoshard.emit.text import identifier
from autoshard.ir import Op, Value
from autoshard.placement.conversion import FUNCTIONS, is_conversion

RESERVED = frozenset(dir(builtins)) | {
    "F", "torch", "Tensor", "self", "key", "batch", "layer", "number", "local", "keep", "recompute",
    "recomputing", "seeded", "count_targets", "batch_norm", *FUNCTIONS,
}  # fmt: skip

_BY_KIND = {
    "arange": "positions", "softmax": "weights", "cross_entropy_loss": "loss", "mse_loss": "loss",
    "vocab_parallel_cross_entropy": "loss", "count_targets": "count", "eq": "mask", "ne": "mask",
    "lt": "mask", "le": "mask", "gt": "mask", "ge": "mask", "logical_and": "mask", "mean": "mean",
    "logical_or": "mask", "logical_not": "mask", "bitwise_and": "mask", "bitwise_or": "mask",
    "tril": "mask", "cos": "cos", "sin": "sin", "neg": "negated", "pow": "square", "sum": "total",
    "cat": "joined", "rsqrt": "scale", "matmul": "product", "bmm": "product", "mm": "product",
    "topk": "top", "argmax": "best", "zeros": "zeros", "ones": "ones", "full": "filled",
    "rand": "noise", "batch_norm": "x", "layer_norm": "x", "rms_norm": "x", "group_norm": "x",
}  # fmt: skip

_NAMED_BY_MODULE = frozenset(
    {"linear", "addmm", "conv1d", "conv2d", "conv3d", "embedding", "vocab_parallel_embedding",
     "conv_transpose2d", "conv_transpose1d"}
)  # fmt: skip

TRANSPARENT = frozenset(
    {
        "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand", "contiguous",
        "flatten", "unflatten", "to", "_to_copy", "clone", "detach", "dropout", "slice", "select",
        "alias", "_unsafe_view", "relu", "gelu", "silu", "tanh", "sigmoid", "softmax", "clamp",
        "masked_fill", "neg", "t", "layer_norm", "batch_norm", "rms_norm", "group_norm", "pad",
        "sqrt", "rsqrt", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "repeat", "pow",
    }
)  # fmt: skip
"""Ops whose result is still "the same thing": it keeps the name, if the operand is not needed."""

_SHORT = {f"{n}_proj": n for n in ("q", "k", "v", "o", "gate", "up", "down", "out", "in")}
_SHORT |= {"query": "q", "key": "k", "value": "v", "in_proj": "projected", "out_proj": "projected"}

_BINARY = frozenset({"add", "sub", "mul", "div", "rsub"})


def kind(op: Op) -> str:
    """``view`` of ``aten.view.default``."""
    return op.target.split(".")[1]


def fresh_name(op: Op, index: int = 0) -> str:
    """What to call an output that has nothing to do with its operands."""
    name = kind(op)
    leaf = op.module.rsplit(".", 1)[-1]
    if len(op.outputs) > 1:
        attends = "attn" in op.module.lower() or "attention" in op.module.lower()
        if len(op.outputs) == 3 and name in {"split", "chunk", "unbind", "split_with_sizes"}:
            return "qkv"[index] if attends else f"part_{index}"
        return f"{_BY_KIND.get(name, 'part')}_{index}"
    if name == "add" and op.output.name.startswith("residual"):
        return "hidden"
    if name in _NAMED_BY_MODULE and leaf and not leaf.isdigit():
        return _SHORT.get(leaf, identifier(leaf))
    return _BY_KIND.get(name, "x")


def keeps_name(op: Op) -> tuple[Value, ...]:
    """Operands whose name the result may take, best first."""
    name = kind(op)
    if len(op.outputs) != 1 or not op.operands:
        return ()
    if is_conversion(op) or name in TRANSPARENT:
        return op.operands[:1]
    if name in _BINARY and not op.output.name.startswith("residual"):
        shape = op.output.type.shape
        fitting = [v for v in op.operands if v.type.shape == shape]
        return tuple(dict.fromkeys(fitting))
    return ()


class Names:
    """Names in use; a name is free again when its value is not needed any more."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)

    def take(self, wish: str) -> str:
        name, count = wish, 2
        if wish in RESERVED:
            name, wish = f"{wish}_", f"{wish}_"
        while name in self._taken:
            name, count = (
                f"{wish}_{count}" if not wish.endswith("_") else f"{wish}{count}",
                count + 1,
            )
        self._taken.add(name)
        return name

    def take_exactly(self, name: str) -> str:
        """A name that callers use, so that it cannot be another."""
        self._taken.add(name)
        return name

    def free(self, name: str) -> None:
        self._taken.discard(name)
