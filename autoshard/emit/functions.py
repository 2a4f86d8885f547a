"""Printers of ops that are written as functions: ``F.<name>``, ``torch.<name>``, constructors."""

from __future__ import annotations

import torch

from autoshard.emit.printers import PRINTERS, Call, Printer, printer, receiver
from autoshard.emit.text import literal
from autoshard.ir import Arg, Value

_REDUCTIONS = {0: "none", 1: "mean", 2: "sum"}


def function(name: str, *positional: str, keywords: tuple[str, ...] = ()) -> Printer:
    """``name(positional..., keyword=...)``; optional positional tensors that are absent end it."""

    def write(call: Call) -> str:
        given = [call.bound[p] for p in positional]
        while given and given[-1] is None:
            given.pop()
        parts = ", ".join(map(call.text, given))
        return f"{name}({parts}{call.keywords(*keywords)})"

    return write


for _name in (
    "relu", "silu", "tanhshrink", "softsign", "hardswish", "hardsigmoid", "hardtanh", "mish",
    "selu", "relu6", "log_sigmoid", "softplus", "elu", "leaky_relu",
):  # fmt: skip
    _python = {"log_sigmoid": "logsigmoid"}.get(_name, _name)
    _options = {"softplus": ("beta", "threshold"), "elu": ("alpha",), "hardtanh": (),
                "leaky_relu": ("negative_slope",)}.get(_name, ())  # fmt: skip
    PRINTERS[_name] = function(f"F.{_python}", "self", keywords=_options)
del PRINTERS["hardtanh"]

PRINTERS |= {
    "gelu": function("F.gelu", "self", keywords=("approximate",)),
    "layer_norm": function("F.layer_norm", "input", "normalized_shape", "weight", "bias",
                           keywords=("eps",)),
    "linear": function("F.linear", "input", "weight", "bias"),
    "addmm": function("torch.addmm", "self", "mat1", "mat2", keywords=("beta", "alpha")),
    "baddbmm": function("torch.baddbmm", "self", "batch1", "batch2", keywords=("beta", "alpha")),
    "group_norm": function("F.group_norm", "input", "num_groups", "weight", "bias",
                           keywords=("eps",)),
    "rms_norm": function("F.rms_norm", "input", "normalized_shape", "weight", keywords=("eps",)),
    "softmax.int": function("F.softmax", "self", keywords=("dim", "dtype")),
    "log_softmax.int": function("F.log_softmax", "self", keywords=("dim", "dtype")),
    "cat": function("torch.cat", "tensors", keywords=("dim",)),
    "stack": function("torch.stack", "tensors", keywords=("dim",)),
    "where.self": function("torch.where", "condition", "self", "other"),
    "where.ScalarOther": function("torch.where", "condition", "self", "other"),
    "max.other": function("torch.maximum", "self", "other"),
    "min.other": function("torch.minimum", "self", "other"),
    "maximum": function("torch.maximum", "self", "other"),
    "minimum": function("torch.minimum", "self", "other"),
    "rsqrt": function("torch.rsqrt", "self"),
    "logical_and": function("torch.logical_and", "self", "other"),
    "logical_or": function("torch.logical_or", "self", "other"),
    "repeat_interleave.self_int": function("torch.repeat_interleave", "self", "repeats",
                                           keywords=("dim",)),
    "zeros_like": function("torch.zeros_like", "self", keywords=("dtype",)),
    "ones_like": function("torch.ones_like", "self", keywords=("dtype",)),
    "full_like": function("torch.full_like", "self", "fill_value", keywords=("dtype",)),
    "adaptive_avg_pool2d": function("F.adaptive_avg_pool2d", "self", "output_size"),
    "one_hot": function("F.one_hot", "self", "num_classes"),
}  # fmt: skip

_RARE_POOL_OPTIONS = {"ceil_mode": False, "count_include_pad": True, "divisor_override": None}


def _pool(name: str) -> Printer:
    """The short form says nothing of the rarer options."""

    def write(call: Call) -> str | None:
        rare = any(call.bound.get(k, plain) != plain for k, plain in _RARE_POOL_OPTIONS.items())
        if rare or set(call.bound.get("dilation", ())) - {1}:
            return None
        return (
            f"F.{name}({call['self']}, {call['kernel_size']}{call.keywords('stride', 'padding')})"
        )

    return write


PRINTERS |= {name: _pool(name) for name in ("max_pool2d", "avg_pool2d")}


@printer("embedding")
def _embedding(call: Call) -> str | None:
    if call.bound["scale_grad_by_freq"] or call.bound["sparse"]:
        return None
    index: Arg = call.bound["padding_idx"]
    padding = f", padding_idx={index}" if index >= 0 else ""
    return f"F.embedding({call['indices']}, {call['weight']}{padding})"


@printer("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
def _dropout(call: Call) -> str:
    name = call.op.target.split(".")[1]
    python = {"feature_dropout": "dropout2d", "feature_alpha_dropout": "feature_alpha_dropout"}
    if name == "feature_dropout" and call.op.operands[0].type.ndim != 4:
        python = {name: "dropout1d" if call.op.operands[0].type.ndim == 3 else "dropout3d"}
    return f"F.{python.get(name, name)}({call['input']}, {call['p']}, {call['train']})"


@printer("scaled_dot_product_attention")
def _attention(call: Call) -> str:
    rest = call.keywords("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    text = f"{call['query']}, {call['key']}, {call['value']}{rest}"
    return f"F.scaled_dot_product_attention({text})"


def _loss(name: str, *options: str) -> Printer:
    def write(call: Call) -> str:
        first = next(k for k in ("self", "input") if k in call.bound)
        reduction = _REDUCTIONS[call.bound["reduction"]]
        rest = call.keywords(*options)
        if reduction != "mean":
            rest += f', reduction="{reduction}"'
        return f"F.{name}({call[first]}, {call['target']}{rest})"

    return write


PRINTERS |= {
    "mse_loss": _loss("mse_loss"),
    "l1_loss": _loss("l1_loss"),
    "smooth_l1_loss": _loss("smooth_l1_loss", "beta"),
    "huber_loss": _loss("huber_loss", "delta"),
    "nll_loss_nd": _loss("nll_loss", "weight", "ignore_index"),
    "nll_loss": _loss("nll_loss", "weight", "ignore_index"),
    "cross_entropy_loss": _loss("cross_entropy", "weight", "ignore_index", "label_smoothing"),
    "binary_cross_entropy": _loss("binary_cross_entropy", "weight"),
    "binary_cross_entropy_with_logits": _loss(
        "binary_cross_entropy_with_logits", "weight", "pos_weight"
    ),
}


def _convolution(name: str) -> Printer:
    def write(call: Call) -> str:
        given = [call["input"], call["weight"]]
        given += [call["bias"]] if call.bound["bias"] is not None else []
        rest = ""
        for option, plain in (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)):
            value = call.bound[option]
            if isinstance(value, tuple) and len(set(value)) == 1:
                value = value[0]
            if value != plain:
                rest += f", {option}={call.text(value)}"
        return f"F.{name}({', '.join(given)}{rest})"

    return write


PRINTERS |= {
    f"{name}.{overload}": _convolution(name)
    for name in ("conv1d", "conv2d", "conv3d")
    for overload in ("default", "padding")
}


@printer("batch_norm")
def _batch_norm(call: Call) -> str:
    """Through the runtime's own function: recomputation must not update the statistics twice."""
    call.imports.add("batch_norm")
    names = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum")
    given = ", ".join(call[n] for n in names)
    return f"batch_norm({given}, {call['eps']}, axes=())"


@printer("pad")
def _pad(call: Call) -> str:
    mode, value = call.bound["mode"], call.bound["value"]
    rest = f", mode={literal(mode)}" if mode != "constant" else ""
    if value not in (None, 0, 0.0):
        whole = not call.op.output.type.dtype.is_floating_point
        rest += f", value={literal(int(value) if whole else value)}"
    return f"F.pad({call['self']}, {call['pad']}{rest})"


@printer("div.Tensor_mode", "div.Scalar_mode")
def _div_mode(call: Call) -> str:
    mode = call["rounding_mode"]
    return f"torch.div({call['self']}, {call['other']}, rounding_mode={mode})"


# -- constructors ---------------------------------------------------------------------------------


def _constructor(name: str, *positional: str) -> Printer:
    def write(call: Call) -> str:
        parts = [call[p] for p in positional]
        natural = torch.int64 if name == "arange" and _all_integers(call) else None
        dtype = call.op.output.type.dtype
        if dtype != natural:
            parts.append(f"dtype={literal(dtype)}")
        return f"torch.{name}({', '.join(parts)}, device={call.device})"

    return write


def _all_integers(call: Call) -> bool:
    return all(isinstance(call.bound.get(k, 0), int) for k in ("start", "end", "step"))


PRINTERS |= {
    "zeros": _constructor("zeros", "size"),
    "ones": _constructor("ones", "size"),
    "empty.memory_format": _constructor("empty", "size"),
    "full": _constructor("full", "size", "fill_value"),
    "arange.default": _constructor("arange", "end"),
    "arange.start": _constructor("arange", "start", "end"),
    "arange.start_step": _constructor("arange", "start", "end", "step"),
    "rand": _constructor("rand", "size"),
    "randn": _constructor("randn", "size"),
    "eye.default": _constructor("eye", "n"),
    "eye.m": _constructor("eye", "n", "m"),
    "scalar_tensor": _constructor("scalar_tensor", "s"),
}


@printer("copy_", "add_.Tensor", "mul_.Tensor", "fill_.Scalar", "zero_")
def _in_place(call: Call) -> str:
    name = call.op.target.split(".")[1]
    others = [a for a in call.op.args[1:] if isinstance(a, (Value, int, float))]
    return f"{receiver(call)}.{name}({', '.join(map(call.text, others))})"
