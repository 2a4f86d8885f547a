"""How each op is written: one expression per ATen op, as a person would write it.

A printer gets the op's arguments by name as source text and returns an expression, or ``None`` if
the call has something that its short form cannot say. :func:`expression` then falls back to
``torch.ops.aten.<op>.<overload>(...)``, which can say everything.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from autoshard.emit.text import literal
from autoshard.ir import Arg, Op, Value, resolve
from autoshard.passes.base import SEQUENTIAL
from autoshard.placement.conversion import is_conversion
from autoshard.placement.named import arguments, with_arguments


class Source(str):
    """Text to be written as it is, where an argument would be."""


@dataclass(frozen=True, slots=True)
class Call:
    """An op on its way to text.

    Attributes:
        names: value name -> source text of the value.
        device: source text of the device to create tensors on.
        num_micro_batches: what ``share`` on the axis of micro-batches divides by.
        imports: names of :mod:`autoshard.runtime` that the text uses; printers add to it.
    """

    op: Op
    names: Mapping[str, str]
    device: str
    num_micro_batches: int
    imports: set[str]
    bound: Mapping[str, Arg] = field(default_factory=dict)

    def text(self, arg: Arg) -> str:
        if isinstance(arg, Value):
            return self.names[arg.name]
        if isinstance(arg, Source):
            return str(arg)
        if isinstance(arg, (tuple, list)):
            inner = ", ".join(map(self.text, arg))
            return f"({inner},)" if len(arg) == 1 else f"({inner})"
        return literal(arg)

    def __getitem__(self, name: str) -> str:
        return self.text(self.bound[name])

    def keywords(self, *names: str, **defaults: Arg) -> str:
        """``, name=value`` for each argument that is not at its default."""
        parts = []
        for name in names:
            default = defaults.get(name, _default(self.op.target, name))
            value = self.bound[name]
            if value is not None and not _equal(value, default):
                parts.append(f", {name}={self.text(value)}")
        return "".join(parts)


Printer = Callable[[Call], str | None]
PRINTERS: dict[str, Printer] = {}


def expression(call: Call) -> str:
    """Source text of a call."""
    op = by_mode(call.op)
    call = replace(call, op=op)
    if op.target.startswith("autoshard."):
        return _runtime(call)
    call = replace(call, bound=arguments(op))
    name = op.target.split(".")[1]
    printer = PRINTERS.get(".".join(op.target.split(".")[1:])) or PRINTERS.get(name)
    return (printer(call) if printer else None) or fallback(call)


_TRAINING = Source("self.training")


def by_mode(op: Op) -> Op:
    """An op that was captured in training mode, told to go by the module's mode.

    Flags (of batch norm, dropout, recurrent layers) become ``self.training``; attention drops
    nothing in evaluation.
    """
    given = arguments(op)
    changed: dict[str, Arg] = {}
    for name, value in given.items():
        if name in {"train", "training"} and value is True:
            changed[name] = _TRAINING
        elif name == "dropout_p" and value:
            changed[name] = Source(f"{value} if {_TRAINING} else 0.0")
        elif name == "use_input_stats" and value and given["running_mean"] is not None:
            changed[name] = _TRAINING
    return with_arguments(op, **changed) if changed else op


def fallback(call: Call) -> str:
    op = call.op
    parts = [call.text(a) for a in op.args]
    has_device = "device" in call.bound
    for name, value in op.kwargs:
        if name not in {"device", "pin_memory", "layout"} and value is not None:
            parts.append(f"{name}={call.text(value)}")
    if has_device and not op.operands:
        parts.append(f"device={call.device}")
    return f"torch.ops.{op.target}({', '.join(parts)})"


_PRECEDENCE: dict[type[ast.AST], int] = {
    ast.Compare: 1, ast.BitOr: 2, ast.BitXor: 3, ast.BitAnd: 4, ast.Add: 6, ast.Sub: 6,
    ast.Mult: 7, ast.Div: 7, ast.FloorDiv: 7, ast.Mod: 7, ast.MatMult: 7, ast.UnaryOp: 8,
}  # fmt: skip
_ATOM = 9


def precedence(text: str) -> int:
    """How tightly an expression holds together; ``_ATOM`` for names, calls and subscripts."""
    node = ast.parse(text, mode="eval").body
    if isinstance(node, ast.BinOp):
        return _PRECEDENCE[type(node.op)]
    if isinstance(node, (ast.IfExp, ast.Tuple)):
        return 0
    return _PRECEDENCE.get(type(node), _ATOM)


def within(text: str, least: int) -> str:
    """``text`` in parentheses, unless it holds together at least as tightly as ``least``."""
    return text if text.isidentifier() or precedence(text) >= least else f"({text})"


def _runtime(call: Call) -> str:
    """A function of autoshard.runtime.ops: conversions and special ops."""
    op = call.op
    function = op.target.split(".")[1]
    if is_conversion(op) and op.keywords.get("axis") == SEQUENTIAL:
        return f"{within(call.text(op.args[0]), 7)} / {call.num_micro_batches}"
    given = list(op.args)
    defaults = [default for _, default in _signature(op.target)]
    while (
        given and not isinstance(given[-1], Value) and _equal(given[-1], defaults[len(given) - 1])
    ):
        given.pop()
    parts = [call.text(a) for a in given]
    parts += [f"{name}={call.text(value)}" for name, value in op.kwargs]
    if is_conversion(op):
        parts = [*_named_conversion_arguments(call, function)]
    call.imports.add(function)
    return f"{function}({', '.join(parts)})"


def _named_conversion_arguments(call: Call, function: str) -> list[str]:
    named = {
        "all_to_all": ("source_dim", "target_dim", "size", "source_blocks", "target_blocks"),
        "all_gather": ("dim", "size", "blocks"),
        "all_gather_replicated": ("dim", "size", "blocks"),
        "pad": ("dim", "size", "blocks"),
    }.get(function, ("dim", "blocks"))
    first, *rest = call.op.args
    parts = [call.text(first), *(f"{n}={call.text(a)}" for n, a in zip(named, rest, strict=False))]
    return [*parts, *(f"{name}={call.text(value)}" for name, value in call.op.kwargs)]


@functools.cache
def _signature(target: str) -> tuple[tuple[str, Arg], ...]:
    """Name and default of each parameter of a runtime function."""
    found = inspect.signature(resolve(target)).parameters.values()
    return tuple((p.name, p.default) for p in found)


def _default(target: str, name: str) -> Arg:
    schema = resolve(target)._schema  # type: ignore[attr-defined]
    return next((a.default_value for a in schema.arguments if a.name == name), None)


def _equal(a: Any, b: Any) -> bool:
    a, b = (tuple(x) if isinstance(x, list) else x for x in (a, b))
    return type(a) is type(b) and bool(a == b)


def printer(*names: str) -> Callable[[Printer], Printer]:
    """Register a printer by op name, or by name and overload where overloads differ."""

    def register(function: Printer) -> Printer:
        PRINTERS.update(dict.fromkeys(names, function))
        return function

    return register


# -- operators ------------------------------------------------------------------------------------


def _operator(symbol: str) -> Printer:
    strength = precedence(f"a {symbol} b")

    def write(call: Call) -> str | None:
        if call.bound.get("alpha", 1) != 1:
            return None
        first, second = (call.text(a) for a in call.op.args[:2])
        return f"{within(first, strength)} {symbol} {within(second, strength + 1)}"

    return write


for _name, _symbol in {
    "add": "+", "sub": "-", "mul": "*", "div.Tensor": "/", "div.Scalar": "/", "eq": "==",
    "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "bitwise_and": "&",
    "bitwise_or": "|", "bitwise_xor": "^", "__and__": "&", "__or__": "|", "matmul": "@", "mm": "@",
    "bmm": "@", "floor_divide": "//", "remainder": "%",
}.items():  # fmt: skip
    PRINTERS[_name] = _operator(_symbol)


@printer("rsub.Scalar", "rsub.Tensor")
def _rsub(call: Call) -> str | None:
    if call.bound.get("alpha", 1) != 1:
        return None
    return f"{within(call['other'], 6)} - {within(call['self'], 7)}"


@printer("neg")
def _neg(call: Call) -> str:
    return f"-{within(call['self'], 8)}"


@printer("bitwise_not")
def _not(call: Call) -> str:
    return f"~{within(call['self'], 8)}"


# -- methods --------------------------------------------------------------------------------------


def method(name: str, *positional: str, keywords: tuple[str, ...] = ()) -> Printer:
    """``self.name(positional..., keyword=...)``."""

    def write(call: Call) -> str:
        parts = ", ".join(_one(call, p) for p in positional)
        rest = call.keywords(*keywords)
        return f"{receiver(call)}.{name}({parts}{rest if parts else rest.removeprefix(', ')})"

    return write


def _one(call: Call, name: str) -> str:
    """An argument; one dim is written without a tuple."""
    value = call.bound[name]
    single = name in {"dim", "dims", "shifts"} and isinstance(value, tuple) and len(value) == 1
    return call.text(value[0] if single else value)


def receiver(call: Call) -> str:
    return within(call["self"], _ATOM)


for _name in (
    "abs", "cos", "sin", "exp", "log", "sqrt", "rsqrt", "tanh", "sigmoid", "reciprocal", "erf",
    "square", "contiguous", "detach", "logical_not", "isnan", "isfinite", "isinf", "t", "sign",
    "expm1", "log1p", "floor", "ceil", "round", "mH", "mT",
):  # fmt: skip
    PRINTERS[_name] = method(_name)
PRINTERS |= {
    "unsqueeze": method("unsqueeze", "dim"),
    "squeeze.default": method("squeeze"),
    "squeeze.dim": method("squeeze", "dim"),
    "squeeze.dims": method("squeeze", "dim"),
    "flatten.using_ints": method("flatten", "start_dim", "end_dim"),
    "unflatten.int": method("unflatten", "dim", "sizes"),
    "pow.Tensor_Scalar": method("pow", "exponent"),
    "pow.Tensor_Tensor": method("pow", "exponent"),
    "sum.default": method("sum", keywords=("dtype",)),
    "mean.default": method("mean", keywords=("dtype",)),
    "sum.dim_IntList": method("sum", "dim", keywords=("keepdim", "dtype")),
    "mean.dim": method("mean", "dim", keywords=("keepdim", "dtype")),
    "amax": method("amax", "dim", keywords=("keepdim",)),
    "amin": method("amin", "dim", keywords=("keepdim",)),
    "argmax": method("argmax", "dim", keywords=("keepdim",)),
    "max.default": method("max"),
    "min.default": method("min"),
    "any.default": method("any"),
    "all.default": method("all"),
    "cumsum": method("cumsum", "dim", keywords=("dtype",)),
    "split.Tensor": method("split", "split_size", keywords=("dim",)),
    "split.sizes": method("split", "split_size", keywords=("dim",)),
    "split_with_sizes": method("split", "split_sizes", keywords=("dim",)),
    "chunk": method("chunk", "chunks", keywords=("dim",)),
    "unbind.int": method("unbind", "dim"),
    "masked_fill.Scalar": method("masked_fill", "mask", "value"),
    "masked_fill.Tensor": method("masked_fill", "mask", "value"),
    "tril": method("tril", "diagonal"),
    "triu": method("triu", "diagonal"),
    "gather": method("gather", "dim", "index"),
    "index_select": method("index_select", "dim", "index"),
    "clamp.default": method("clamp", "min", "max"),
    "clamp_min.default": method("clamp_min", "min"),
    "topk": method("topk", "k", keywords=("dim", "largest", "sorted")),
    "roll": method("roll", "shifts", "dims"),
    "flip": method("flip", "dims"),
    "narrow": method("narrow", "dim", "start", "length"),
    "to.dtype": method("to", "dtype"),
    "type_as": method("type_as", "other"),
    "new_zeros": method("new_zeros", "size", keywords=("dtype",)),
    "new_ones": method("new_ones", "size", keywords=("dtype",)),
    "new_full": method("new_full", "size", "fill_value", keywords=("dtype",)),
}


@printer("transpose.int")
def _transpose(call: Call) -> str:
    """A weight on its side is ``.T``."""
    text = receiver(call)
    matrix = call.op.operands[0].type.ndim == 2
    if matrix and text.startswith("local("):
        return f"{text}.T"
    return f"{text}.transpose({call['dim0']}, {call['dim1']})"


@printer("view.default", "reshape", "_unsafe_view", "expand", "repeat", "permute")
def _sizes(call: Call) -> str:
    name = call.op.target.split(".")[1].replace("_unsafe_view", "view")
    sizes = call.op.args[1]
    # A 0-dim view keeps its tuple: view() with nothing is an error.
    inner = ", ".join(map(str, sizes)) if sizes else "()"
    return f"{receiver(call)}.{name}({inner})"


@printer("_to_copy", "to.device", "to.dtype_layout", "to.prim_Device")
def _cast(call: Call) -> str | None:
    dtype = call.bound.get("dtype")
    return f"{receiver(call)}.to({literal(dtype)})" if dtype is not None else None


@printer("slice.Tensor")
def _slice(call: Call) -> str | None:
    value = call.op.operands[0]
    dim = call.bound["dim"] % max(value.type.ndim, 1)
    start, end, step = (call.bound[k] for k in ("start", "end", "step"))
    size = value.type.shape[dim]
    low = "" if start in (None, 0) else str(start)
    high = "" if end is None or end >= size else str(end)
    text = f"{low}:{high}" + (f":{step}" if step != 1 else "")
    return _subscript(receiver(call), dim, value.type.ndim, text)


@printer("select.int")
def _select(call: Call) -> str:
    value = call.op.operands[0]
    dim = call.bound["dim"] % value.type.ndim
    return _subscript(receiver(call), dim, value.type.ndim, call["index"])


def _subscript(receiver: str, dim: int, ndim: int, text: str) -> str:
    if dim > 2 and dim == ndim - 1:
        return f"{receiver}[..., {text}]"
    return f"{receiver}[{':, ' * dim}{text}]"


@printer("index.Tensor")
def _index(call: Call) -> str:
    indices = [":" if i is None else call.text(i) for i in call.bound["indices"]]
    return f"{receiver(call)}[{', '.join(indices)}]"


@printer("clone")
def _clone(call: Call) -> str:
    kept = call.bound.get("memory_format") in (None, torch.preserve_format)
    inner = "" if kept else f"memory_format={call['memory_format']}"
    return f"{receiver(call)}.clone({inner})"
