"""Writes in place, made pure.

A write through a view (``shifted[:, 1:] = ids[:, :-1]``) becomes a new value of the view, scattered
back into a new value of its base; every other view of that base is then read anew. Only writes to
the model's own buffers stay writes, because they must outlive the step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from autoshard import ir
from autoshard.capture.spelling import target_name

if TYPE_CHECKING:
    from autoshard.capture.lower import Lowering


def is_write(target: torch._ops.OpOverload) -> bool:
    """By its schema the op writes to an operand."""
    return target._schema.is_mutable


def _is_view(target: Any) -> bool:
    returns = target._schema.returns
    return bool(returns) and returns[0].alias_info is not None


class Views:
    """Which node is a view of which, so that a write reaches everything that shares the memory."""

    def __init__(self, lowering: Lowering) -> None:
        self._low = lowering
        self._parent: dict[fx.Node, fx.Node] = {}
        self._children: dict[fx.Node, list[fx.Node]] = {}
        self._alias: set[fx.Node] = set()
        self._protected: dict[fx.Node, ir.Value] = {}

    def protect(self, node: fx.Node, value: ir.Value) -> None:
        """``node`` is a parameter, buffer or constant."""
        self._protected[node] = value

    def record(self, node: fx.Node) -> None:
        """Note that ``node`` is a view, if it is one."""
        if isinstance(node.target, torch._ops.OpOverload):
            if not _is_view(node.target) or _copies(node):
                return
        elif not _item_is_view(node):
            return
        base = node.args[0]
        if isinstance(base, fx.Node):
            self._link(node, base)

    def record_alias(self, node: fx.Node, base: fx.Node) -> None:
        """``node`` is another name of ``base`` (an input of an inlined region)."""
        self._alias.add(node)
        if isinstance(base, fx.Node):
            self._link(node, base)

    def _link(self, node: fx.Node, base: fx.Node) -> None:
        self._parent[node] = base
        self._children.setdefault(base, []).append(node)

    def write(self, node: fx.Node) -> Any:
        """Make the in-place call ``node`` pure; its value is the new value of its target."""
        low = self._low
        target = node.args[0]
        if not isinstance(target, fx.Node):
            raise low.error(f"cannot follow the write of {node.target}")
        root = target
        while root in self._parent:
            root = self._parent[root]
        if root in self._protected:
            value = self._write_buffer(node, target, root)
        else:
            value = self._pure(node, low.read(node.args), dict(node.kwargs))
            self._assign(target, value)
        self._link(node, target)
        self._alias.add(node)
        return low.env[target]

    def _write_buffer(self, node: fx.Node, target: fx.Node, root: fx.Node) -> ir.Value:
        low = self._low
        buffer = self._protected[root]
        if buffer.type.differentiable:
            raise low.error(
                f"forward writes to the parameter {buffer.name}; do that in the training loop"
            )
        if buffer.name in low.constants:
            raise low.error(
                f"forward writes to the tensor attribute {buffer.name}, which would be lost; "
                "register it with register_buffer"
            )
        if self._is_name_of(target, root):
            name = target_name(node.target)
            kwargs = {k: low.read(v) for k, v in node.kwargs.items()}
            args = (buffer, *low.read(node.args[1:]))
            low.emit(name, args, kwargs, root.meta["val"])
        else:
            value = self._pure(node, low.read(node.args), dict(node.kwargs))
            whole = self._scatter_up(target, value, root)
            low.emit("aten.copy_.default", (buffer, whole), {}, root.meta["val"])
        low.env[root] = buffer
        self._refresh(root, keep=None)
        return buffer

    def _is_name_of(self, node: fx.Node, root: fx.Node) -> bool:
        while node is not root:
            if node not in self._alias:
                return False
            node = self._parent[node]
        return True

    # ------------------------------------------------------------------------- assignments

    def _assign(self, node: fx.Node, value: Any) -> None:
        """``node`` has a new value: so have its base and all other views of that."""
        self._low.env[node] = value
        self._refresh(node, keep=None)
        child = node
        while child in self._parent:
            base = self._parent[child]
            self._low.env[base] = self._scatter(base, child, self._low.env[child])
            self._refresh(base, keep=child)
            child = base

    def _scatter_up(self, node: fx.Node, value: Any, root: fx.Node) -> Any:
        while node is not root:
            base = self._parent[node]
            value = self._scatter(base, node, value)
            node = base
        return value

    def _refresh(self, base: fx.Node, keep: fx.Node | None) -> None:
        low = self._low
        current = low.node
        for view in self._children.get(base, ()):
            if view is keep or view not in low.env:
                continue
            if view in self._alias:
                low.env[view] = low.env[base]
            elif isinstance(view.target, torch._ops.OpOverload):
                low.node = view
                low.env[view] = low.replay(view)
            else:
                low.env[view] = low.env[base][view.args[1]]
            self._refresh(view, keep=None)
        low.node = current

    def _scatter(self, base: fx.Node, view: fx.Node, value: Any) -> Any:
        """The value of ``base`` after its view ``view`` got ``value``."""
        low, fake = self._low, base.meta["val"]
        old = low.env[base]
        if view in self._alias:
            return value
        if not isinstance(view.target, torch._ops.OpOverload):
            return tuple(value if i == view.args[1] else v for i, v in enumerate(old))
        name = target_name(view.target)
        rest = low.read(view.args[1:])
        if name in _IDENTITIES:
            return value
        if name in _RESHAPES:
            return low.emit("aten.reshape.default", (value, tuple(fake.shape)), {}, fake)
        if name == "aten.slice.Tensor":
            return low.emit("aten.slice_scatter.default", (old, value, *rest), {}, fake)
        if name == "aten.narrow.default":
            dim, start, length = rest
            place = (dim, start, start + length)
            return low.emit("aten.slice_scatter.default", (old, value, *place), {}, fake)
        if name == "aten.select.int":
            return low.emit("aten.select_scatter.default", (old, value, *rest), {}, fake)
        if name in ("aten.transpose.int", "aten.t.default", "aten.numpy_T.default"):
            dims = rest if rest else tuple(range(len(fake.shape)))
            return low.emit("aten.transpose.int", (value, *dims), {}, fake) if dims[1:] else value
        if name == "aten.permute.default":
            order = [d % len(rest[0]) for d in rest[0]]
            inverse = tuple(order.index(d) for d in range(len(order)))
            return low.emit(name, (value, inverse), {}, fake)
        if name in _JOINS:
            dim = rest[-1] if len(rest) > 1 else 0
            return low.emit(_JOINS[name], (value, dim), {}, fake)
        raise low.error(f"a write in place through {name}; write it out of place")

    # ----------------------------------------------------------------------------- pure ops

    def _pure(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        low, fake = self._low, node.meta["val"]
        kwargs = {k: low.read(v) for k, v in kwargs.items()}
        name = target_name(node.target)
        if name == "aten.copy_.default":
            return self._cast(args[1], fake)
        if name in ("aten.fill_.Scalar", "aten.zero_.default"):
            number = args[1] if len(args) > 1 else 0
            return low.emit(
                "aten.full.default", (tuple(fake.shape), number), {"dtype": fake.dtype}, fake
            )
        if name == "aten.fill_.Tensor":
            return self._cast(args[1], fake)
        if name == "aten.bernoulli_.float":
            p = args[1] if len(args) > 1 else kwargs.pop("p", 0.5)
            return low.emit("aten.bernoulli.p", (args[0], p), kwargs, fake)
        base, _, overload = name.removeprefix("aten.").partition(".")
        if not name.startswith("aten.") or not base.endswith("_"):
            raise low.error(f"{name} writes in place and has no pure form; write it out of place")
        packet = getattr(torch.ops.aten, base[:-1], None)
        if packet is None or overload not in packet.overloads():
            raise low.error(f"{name} writes in place and has no pure form; write it out of place")
        pure = low.emit(f"aten.{base[:-1]}.{overload}", args, kwargs, fake)
        return pure

    def _cast(self, value: ir.Value, fake: torch.Tensor) -> ir.Value:
        """``value`` with the shape and dtype of ``fake``."""
        low = self._low
        if value.type.dtype != fake.dtype:
            like = value.type.with_shape(value.type.shape)
            value = low.emit(
                "aten.to.dtype", (value, fake.dtype), {},
                ir.TensorType(like.shape, fake.dtype),
            )  # fmt: skip
        if value.type.shape != tuple(fake.shape):
            value = low.emit("aten.expand.default", (value, tuple(fake.shape)), {}, fake)
        return value


_IDENTITIES = {"aten.detach.default", "aten.alias.default", "aten.contiguous.default",
               "aten.to.dtype", "aten.to.dtype_layout", "aten.to.device"}  # fmt: skip
_RESHAPES = {
    "aten.view.default", "aten.reshape.default", "aten._unsafe_view.default",
    "aten.unsqueeze.default", "aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims",
    "aten.flatten.using_ints", "aten.unflatten.int", "aten.view_as.default",
}  # fmt: skip
_JOINS = {
    "aten.split.Tensor": "aten.cat.default",
    "aten.split_with_sizes.default": "aten.cat.default",
    "aten.chunk.default": "aten.cat.default",
    "aten.unbind.int": "aten.stack.default",
}


def _copies(node: fx.Node) -> bool:
    """The op is a view by its schema but makes a copy here (a cast, a strided reshape)."""
    name = target_name(node.target)
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return True
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if name.startswith(("aten.to.", "aten.type_as")):
        return before.dtype != after.dtype
    if name == "aten.contiguous.default":
        return not before.is_contiguous()
    if name in ("aten.reshape.default", "aten.flatten.using_ints"):
        try:
            before.view(tuple(after.shape))
        except (RuntimeError, ValueError):
            return True
    return False


def _item_is_view(node: fx.Node) -> bool:
    source = node.args[0]
    return (
        isinstance(source, fx.Node)
        and isinstance(source.target, torch._ops.OpOverload)
        and target_name(source.target) in _JOINS
    )
