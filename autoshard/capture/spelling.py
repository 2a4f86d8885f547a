"""One op for one meaning: what users spell in many ways becomes one form with explicit literals.

``view``, ``flatten``, ``unflatten`` and their kin become ``reshape`` to explicit sizes,
``zeros_like`` becomes ``zeros``; casts to the same dtype, whole slices and other calls that return
their operand disappear. No ``-1`` is left in a size list. Each function returns the value of the
call, or ``NotImplemented`` to have it written down as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from autoshard.capture.lower import Lowering

Spelling = Callable[["Lowering", fx.Node, tuple[Any, ...], dict[str, Any]], Any]
SPELLINGS: dict[str, Spelling] = {}


def _spells(*targets: str) -> Callable[[Spelling], Spelling]:
    def register(function: Spelling) -> Spelling:
        SPELLINGS.update(dict.fromkeys(targets, function))
        return function

    return register


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


RESHAPES = (
    "aten.view.default", "aten._unsafe_view.default", "aten.reshape.default",
    "aten.flatten.using_ints", "aten.unflatten.int", "aten.view_as.default",
    "aten.reshape_as.default", "aten.ravel.default",
)  # fmt: skip


@_spells(*RESHAPES)
def _reshape(low: Lowering, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args[0].type.shape == _shape(node):
        return args[0]
    return low.emit("aten.reshape.default", (args[0], _sizes(low, node)), {}, node.meta["val"])


def _sizes(low: Lowering, node: fx.Node) -> tuple[int, ...]:
    low._type(node.meta["val"])  # refuses sizes that depend on values
    return _shape(node)


@_spells("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default")
def _expand(low: Lowering, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args[0].type.shape == _shape(node):
        return args[0]
    return low.emit("aten.expand.default", (args[0], _sizes(low, node)), {}, node.meta["val"])


@_spells("aten.t.default", "aten.numpy_T.default", "aten.mT.default")
def _transpose(low: Lowering, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The transpose of a matrix (or of the last two dims)."""
    ndim = args[0].type.ndim
    if ndim < 2:
        return args[0]
    if ndim > 2 and "mT" not in str(node.target):
        order = tuple(reversed(range(ndim)))
        return low.emit("aten.permute.default", (args[0], order), {}, node.meta["val"])
    dims = (ndim - 2, ndim - 1)
    return low.emit("aten.transpose.int", (args[0], *dims), {}, node.meta["val"])


@_spells("aten.narrow.default")
def _narrow(low: Lowering, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, dim, start, length = args
    bounds = (dim % x.type.ndim, start, start + length)
    return low.emit("aten.slice.Tensor", (x, *bounds), {}, node.meta["val"])


@_spells("aten.slice.Tensor")
def _slice(low: Lowering, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``slice(x, dim, start, end, step)`` with both ends explicit and not negative."""
    x = args[0]
    if x.type.shape == _shape(node):
        return x
    defaults: tuple[Any, ...] = (0, None, None, 1)
    given = [*args[1:], *defaults[len(args) - 1 :]]
    dim, start, end, step = given
    dim %= x.type.ndim
    first, last, stride = slice(start, end, step).indices(x.type.shape[dim])
    bounds = (dim, first, last) if stride == 1 else (dim, first, last, stride)
    return low.emit("aten.slice.Tensor", (x, *bounds), {}, node.meta["val"])


@_spells(
    "aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten.to.other",
    "aten.type_as.default", "aten._to_copy.default",
)  # fmt: skip
def _cast(low: Lowering, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dtype = node.meta["val"].dtype
    if args[0].type.dtype == dtype:
        return args[0]
    return low.emit("aten.to.dtype", (args[0], dtype), {}, node.meta["val"])


@_spells("aten.contiguous.default")
def _contiguous(low: Lowering, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Memory format is not part of a value; only what reads strides needs the copy."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    only_reshaped = all(getattr(u.target, "_schema", None) is not None
                        and target_name(u.target) in RESHAPES
                        for u in node.users)  # fmt: skip
    if only_reshaped or source.meta["val"].is_contiguous():
        return args[0]
    return NotImplemented


@_spells("aten.alias.default", "aten.lift_fresh_copy.default", "aten.lift_fresh.default")
def _same(low: Lowering, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0]


@_spells("aten.clone.default")
def _clone(low: Lowering, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A copy matters only if the original may be written to later: if it is a buffer."""
    return NotImplemented if args[0].name in low.parameters else args[0]


@_spells("aten.detach.default")
def _detach(low: Lowering, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return NotImplemented if args[0].type.dtype.is_floating_point else args[0]


@_spells("aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default")
def _dropout(low: Lowering, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    _, p, training = args
    return NotImplemented if training and p > 0 else args[0]


@_spells("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor")
def _add(low: Lowering, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Integer positions plus an offset of zero."""
    x, y = args[:2]
    integer = not node.meta["val"].dtype.is_floating_point
    if integer and isinstance(y, int) and y == 0 and x.type.dtype == node.meta["val"].dtype:
        return x
    return NotImplemented


@_spells("aten.mul.Tensor", "aten.div.Tensor")
def _scale(low: Lowering, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A scale of one."""
    x, y = args[:2]
    number = isinstance(y, (int, float)) and not isinstance(y, bool)
    if number and y == 1 and not kwargs and x.type.dtype == node.meta["val"].dtype:
        return x
    return NotImplemented


_FACTORIES = {
    "aten.zeros_like.default": 0, "aten.ones_like.default": 1, "aten.new_zeros.default": 0,
    "aten.new_ones.default": 1, "aten.zeros.default": 0, "aten.ones.default": 1,
    "aten.empty_like.default": 0, "aten.new_empty.default": 0, "aten.empty.memory_format": 0,
}  # fmt: skip


@_spells(*_FACTORIES)
def _constant(low: Lowering, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Zeros and ones of an explicit shape and dtype; uninitialised memory is zeros."""
    value = node.meta["val"]
    number = _FACTORIES[f"aten.{node.target.__name__}"]  # type: ignore[union-attr]
    target = "aten.ones.default" if number else "aten.zeros.default"
    return low.emit(target, (_sizes(low, node),), {"dtype": value.dtype}, value)


@_spells("aten.full.default", "aten.full_like.default", "aten.new_full.default")
def _full(low: Lowering, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = node.meta["val"]
    number = args[2] if "new_full" in str(node.target) else args[1]
    sizes = _sizes(low, node)
    return low.emit("aten.full.default", (sizes, number), {"dtype": value.dtype}, value)


@_spells("aten.scalar_tensor.default")
def _scalar(low: Lowering, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = node.meta["val"]
    return low.emit("aten.full.default", ((), args[0]), {"dtype": value.dtype}, value)


@_spells(
    "aten.rand.default", "aten.rand_like.default", "aten.randn.default", "aten.randn_like.default"
)
def _random(low: Lowering, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = node.meta["val"]
    target = "aten.randn.default" if "randn" in str(node.target) else "aten.rand.default"
    return low.emit(target, (_sizes(low, node),), {"dtype": value.dtype}, value)


@_spells("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def _arange(low: Lowering, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = node.meta["val"]
    return low.emit(
        f"aten.{node.target.__name__}", args, {"dtype": value.dtype}, value  # type: ignore[union-attr]
    )  # fmt: skip


@_spells("aten.batch_norm.default")
def _batch_norm(low: Lowering, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Whether cuDNN is used is up to the device that trains, not the one that captures."""
    return low.emit("aten.batch_norm.default", (*args[:8], True), {}, node.meta["val"])


@_spells("aten.square.default")
def _square(low: Lowering, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return low.emit("aten.pow.Tensor_Scalar", (args[0], 2), {}, node.meta["val"])


def target_name(target: Any) -> str:
    """``aten.linear.default``, ``transformers.grouped_mm_fallback.default``."""
    namespace, _, _ = target._schema.name.partition("::")
    if namespace == "autoshard":  # functions of the runtime
        return f"{namespace}.{target._schema.name.partition('::')[2]}"
    return f"{namespace}.{target.__name__}"


def is_random(target: str) -> bool:
    """The op draws random numbers, by its tag in ATen."""
    if not target.startswith("aten."):
        return False
    packet, _, overload = target.removeprefix("aten.").partition(".")
    function = getattr(getattr(torch.ops.aten, packet), overload)
    return torch.Tag.nondeterministic_seeded in function.tags
