"""Pointwise ops with broadcasting: every dim that is not broadcast may be split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from autoshard.ir import Op
from autoshard.placement.named import (
    LETTERS,
    arguments,
    broadcast_letters,
    named_signature,
    operand_names,
)
from autoshard.placement.registry import rule
from autoshard.placement.strategy import Signature


def pointwise(op: Op, linear: Iterable[Sequence[str]] = (), padded: bool = False) -> Signature:
    """The signature of an op that maps each element on its own.

    Args:
        op: the call; all tensors in it are broadcast to its output.
        linear: groups of parameter names in which the op is jointly linear. A group counts only
            if all of it are tensors in this call: ``x + 1`` is affine, not linear.
        padded: the last dim need not divide, because the derivative is finite everywhere: what
            stands in the padding is ignored later, so its gradient is and stays zero.
    """
    names = operand_names(op)
    shapes = [v.type.shape for v in op.operands]
    inputs, output, fixed = broadcast_letters(shapes, op.output.type.shape)
    groups = [tuple(names.index(n) for n in group) for group in linear if set(group) <= set(names)]
    return Signature(
        inputs,
        tuple(output for _ in op.outputs),
        fixed,
        tuple(groups),
        frozenset(output[-1:] if padded else ""),
    )


@rule("aten.add.Tensor", "aten.sub.Tensor", "aten.rsub.Tensor")
def add(op: Op) -> Signature:
    return pointwise(op, linear=[("self", "other")], padded=True)


@rule("aten.add.Scalar", "aten.sub.Scalar", "aten.rsub.Scalar")
def add_number(op: Op) -> Signature:
    return pointwise(op, padded=True)


@rule("aten.mul.Tensor", "aten.mul.Scalar")
def multiply(op: Op) -> Signature:
    return pointwise(op, linear=[("self",), ("other",)], padded=True)


@rule("aten.div.Tensor", "aten.div.Scalar")
def divide(op: Op) -> Signature:
    """Linear in the dividend; padding could divide by zero, unless the divisor is a number."""
    return pointwise(op, linear=[("self",)], padded=len(op.operands) == 1)


@rule("aten.neg.default", "aten.negative.default", "aten.positive.default")
def negate(op: Op) -> Signature:
    return pointwise(op, linear=[("self",)], padded=True)


@rule(
    "aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten.to.other",
    "aten._to_copy.default", "aten.type_as.default",
)  # fmt: skip
def cast(op: Op) -> Signature:
    """Linear between floating types; of ``other`` only the dtype is read, so it is held whole."""
    letters = LETTERS[: op.output.type.ndim]
    return named_signature(op, {"self": letters}, letters, linear=[("self",)], padded=letters[-1:])


@rule("aten.lerp.Scalar", "aten.lerp.Tensor")
def interpolate(op: Op) -> Signature:
    return pointwise(op, linear=[("self", "end")])


@rule("aten.addcmul.default")
def add_product(op: Op) -> Signature:
    return pointwise(op, linear=[("self", "tensor1"), ("self", "tensor2")])


@rule("aten.addcdiv.default")
def add_quotient(op: Op) -> Signature:
    return pointwise(op, linear=[("self", "tensor1")])


_SMOOTH_FUNCTIONS = (
    "tanh", "sigmoid", "silu", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "softplus",
    "mish", "hardswish", "hardsigmoid", "hardtanh", "hardshrink", "softshrink", "log_sigmoid",
    "gelu", "sin", "cos", "erf", "atan", "threshold", "sign", "floor", "ceil",
    "round", "trunc",
)  # fmt: skip
"""Functions with a finite value and derivative wherever they are evaluated."""

_FUNCTIONS = (
    "abs", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal",
    "square", "tan", "asin", "acos", "sinh", "cosh", "asinh", "acosh", "atanh", "erfc", "erfinv",
    "sinc", "frac", "isnan", "isinf", "isfinite", "logical_not", "bitwise_not", "signbit", "sgn",
    "nan_to_num", "deg2rad", "rad2deg", "lgamma", "digamma", "clamp", "clamp_min", "clamp_max",
    "logit",
)  # fmt: skip


@rule(*(f"aten.{name}.default" for name in _SMOOTH_FUNCTIONS))
def smooth_function(op: Op) -> Signature:
    return pointwise(op, padded=True)


@rule(
    *(f"aten.{name}.default" for name in _FUNCTIONS),
    *(f"aten.{name}.Tensor" for name in ("clamp", "clamp_min", "clamp_max")),
    "aten.round.decimals",
)
def function(op: Op) -> Signature:
    return pointwise(op)


@rule(
    "aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor", "aten.pow.Scalar",
    "aten.div.Tensor_mode", "aten.div.Scalar_mode", "aten.floor_divide.default",
    "aten.floor_divide.Scalar", "aten.remainder.Tensor", "aten.remainder.Scalar",
    "aten.remainder.Scalar_Tensor", "aten.fmod.Tensor", "aten.fmod.Scalar",
    "aten.maximum.default", "aten.minimum.default", "aten.max.other", "aten.min.other",
    "aten.fmax.default", "aten.fmin.default", "aten.atan2.default", "aten.hypot.default",
    "aten.logaddexp.default", "aten.xlogy.Tensor",
)  # fmt: skip
def of_two(op: Op) -> Signature:
    return pointwise(op)


_COMPARISONS = (
    "eq", "ne", "lt", "le", "gt", "ge", "bitwise_and", "bitwise_or", "bitwise_xor",
    "__and__", "__or__", "__xor__", "__lshift__", "__rshift__",
)  # fmt: skip


@rule(
    *(f"aten.{name}.{kind}" for name in _COMPARISONS for kind in ("Tensor", "Scalar")),
    *(f"aten.logical_{name}.default" for name in ("and", "or", "xor")),
    "aten.isclose.default",
)
def truth(op: Op) -> Signature:
    return pointwise(op)


@rule("aten.glu.default")
def gated(op: Op) -> Signature:
    """``a * sigmoid(b)`` with a and b the halves of one dim, which stays whole."""
    ndim = op.output.type.ndim
    dim = arguments(op)["dim"] % ndim
    letters = LETTERS[:ndim]
    halved = letters[:dim] + "Z" + letters[dim + 1 :]
    return Signature((letters,), (halved,), frozenset((letters[dim], "Z")))


@rule("aten.prelu.default")
def learned_slope(op: Op) -> Signature:
    """One slope for all, or one for each element of dim 1."""
    letters = LETTERS[: op.output.type.ndim]
    if op.operands[1].type.numel > 1:
        return named_signature(op, {"self": letters, "weight": letters[1]}, letters)
    return named_signature(op, {"self": letters}, letters)


@rule(
    *(f"aten.{name}_.{kind}" for name in ("add", "sub", "mul", "div", "fill")
      for kind in ("Tensor", "Scalar")),
    "aten.copy_.default", "aten.lerp_.Scalar", "aten.lerp_.Tensor", "aten.zero_.default",
    "aten.clamp_.default",
)  # fmt: skip
def in_place(op: Op) -> None:
    """What capture leaves in place updates a small buffer (a counter): the same on every rank."""
    return None
