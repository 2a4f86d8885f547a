"""Tracing equal layers once: what makes the time of a capture independent of depth.

The model's own forward runs under the tracer as always. When it calls a layer, and a layer that is
equal in everything its forward can depend on was traced before (the *template*), the call is
written down as one opaque op with the template's results; after the export that op is replaced by
a copy of the template's nodes. Control flow outside the layers, skips and ties are traced as they
are. Two calls are equal if all of these are (:meth:`Repeats._call_of`):

* the modules: types, parameters (shape, dtype, gradient, ties), and every other attribute. Integers
  that differ between siblings are watched (:mod:`autoshard.capture.watched`): a layer whose forward
  looked at its index is no template;
* the arguments: their nesting, the metadata of tensors and which of them share memory, all else by
  value;
* gradient and autocast modes.

A layer is traced in full if anything of it is not understood: hooks, buffers, attributes or
arguments of unknown kind. A traced layer is no template if it wrote in place, used a tensor that it
was not given, changed its attributes or arguments, drew a random number in Python, or returned
anything but tensors and constants (:meth:`Repeats._trace`). If, after the export, a value made
inside a template turns out to be used elsewhere, or anything does not fit, the model is exported
again in full. What no comparison can see is state outside the layer and its arguments that changes
from call to call: a counter in a global variable.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as pytree

from autoshard.capture.watched import Watched

_MARK = "/capture/repeats.py"
_LIBRARY = "autoshard_capture"
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size, complex)
_INTERNAL = {
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_backward_pre_hooks",
    "_backward_hooks", "_is_full_backward_hook", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
}  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class NotRepeatable(Exception):
    """The exported graph cannot be completed from templates."""


class _Unsuited(Exception):
    """Something of a call is not understood: it is traced in full."""


@dataclass(frozen=True, slots=True)
class _Call:
    """All that the outcome of a call depends on (``form``), and the tensors that flow in."""

    form: Hashable
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class _Result:
    """What a call returned: ``leaves`` are operands, new tensors (both by number) or constants."""

    spec: pytree.TreeSpec
    leaves: tuple[tuple[str, Any], ...]
    tensors: tuple[Tensor, ...]


_number = itertools.count()
_results: dict[int, tuple[Tensor, ...]] = {}
"""Templates of the captures that are under way: number -> the tensors that they make."""


@functools.cache
def _ops() -> tuple[Any, Any, Any]:
    """The ops that stand for the begin and end of a template, and for a repeated call."""

    def nothing(tensors: Sequence[Tensor], number: int) -> None:
        return None

    def repeat(tensors: Sequence[Tensor], number: int) -> list[Tensor]:
        return [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
            for t in _results[number]
        ]

    def no_backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("a repeated layer is only traced")

    made = []
    for name, body, schema in (
        ("begin", nothing, "(Tensor[] tensors, int number) -> ()"),
        ("end", nothing, "(Tensor[] tensors, int number) -> ()"),
        ("repeat", repeat, "(Tensor[] tensors, int number) -> Tensor[]"),
    ):
        op = torch.library.custom_op(f"{_LIBRARY}::{name}", body, mutates_args=(), schema=schema)
        op.register_fake(body)
        fx.node.has_side_effect(op._opoverload)
        if name == "repeat":
            op.register_autograd(no_backward)
        made.append(op._opoverload)
    return made[0], made[1], made[2]


@dataclass(slots=True)
class Repeats:
    """The templates of one export, and the calls that repeat them."""

    _templates: list[tuple[Hashable, int, _Result]] = field(default_factory=list)
    _repeated: set[int] = field(default_factory=set)
    _numbers: list[int] = field(default_factory=list)
    _busy: bool = False

    @property
    def used(self) -> bool:
        """Whether any layer was traced under watch."""
        return bool(self._numbers)

    # -------------------------------------------------------------------------------- tracing

    @contextlib.contextmanager
    def tracing(self, model: nn.Module) -> Iterator[None]:
        """While active, calls of repeated layers of ``model`` go through :meth:`_forward`."""
        modules = [m for _, m in model.named_modules(remove_duplicate=False)]
        # Modules with two names are seen by the tracer through proxies, which a wrapper would hide.
        rows = _rows(model) if len({id(m) for m in modules}) == len(modules) else []
        with contextlib.ExitStack() as stack:
            for siblings in rows:
                _watch(siblings, stack)
                for layer in siblings:
                    _set(stack, layer, "forward", self._wrapper(layer, layer.forward))
            try:
                yield
            finally:
                for number in self._numbers:
                    _results.pop(number, None)

    def _wrapper(self, layer: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(layer, original, args, kwargs)

        return forward

    def _forward(
        self,
        layer: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self._busy or get_proxy_mode() is None:
            return original(*args, **kwargs)
        if id(layer) in self._repeated:
            raise NotRepeatable("a layer is called again, of which one call was repeated")
        call = self._call_of(layer, args, kwargs)
        if call is None:
            return original(*args, **kwargs)
        for form, number, result in self._templates:
            if form == call.form:
                self._repeated.add(id(layer))
                return self._repeat(number, result, call)
        self._busy = True
        try:
            return self._trace(layer, original, args, kwargs, call)
        finally:
            self._busy = False

    def _repeat(self, number: int, result: _Result, call: _Call) -> Any:
        made = _ops()[2](list(call.tensors), number)
        values = {"operand": call.tensors, "made": made}
        leaves = [values[kind][x] if kind in values else x for kind, x in result.leaves]
        return pytree.tree_unflatten(leaves, result.spec)

    def _trace(
        self,
        layer: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call: _Call,
    ) -> Any:
        """Run the layer's forward, and keep it as a template if it is fit for that."""
        begin, end, _ = _ops()
        number = next(_number)
        self._numbers.append(number)
        watched = _watched_in(layer)
        for each in watched:
            each.used = False
        begin(list(call.tensors), number)
        drawn = random.getstate()
        output = original(*args, **kwargs)
        if any(each.used for each in watched) or random.getstate() != drawn:
            return output
        result, after = _result_of(output, call), self._call_of(layer, args, kwargs)
        if result is None or after is None or after.form != call.form:
            return output
        end(list(result.tensors), number)
        mode = get_proxy_mode()
        assert mode is not None, "tracing is under way"
        if _interior(mode.tracer.graph, number) is not None:
            _results[number] = result.tensors
            self._templates.append((call.form, number, result))
        return output

    # ----------------------------------------------------------------------------- comparing

    def _call_of(self, layer: nn.Module, args: Any, kwargs: Any) -> _Call | None:
        """What a call depends on; ``None`` if that is not known."""
        modes = (torch.get_default_dtype(), torch.is_inference_mode_enabled())
        autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        if autocast or not torch.is_grad_enabled():
            return None
        seen = _Tensors()
        leaves, spec = pytree.tree_flatten((args, kwargs))
        # The tracer would look at every attribute of a tensor that is asked for.
        with contextlib.suppress(_Unsuited), torch._C.DisableTorchFunction():
            modules = tuple(
                (path, self._module(path, module, seen))
                for path, module in layer.named_modules(remove_duplicate=False)
            )
            arguments = tuple(
                seen.add(leaf) if isinstance(leaf, Tensor) else _frozen(leaf, strict=True)
                for leaf in leaves
            )
            return _Call((modules, spec, arguments, modes), tuple(seen.tensors))
        return None

    @staticmethod
    def _module(path: str, module: nn.Module, seen: _Tensors) -> Hashable:
        known = module.__dict__
        if any(known.get(name) for name in _HOOKS):
            raise _Unsuited
        if any(buffer is not None for buffer in module._buffers.values()):
            raise _Unsuited
        parameters = tuple(
            (name, None if p is None else seen.add(p)) for name, p in module._parameters.items()
        )
        others = tuple(
            (name, _frozen(value))
            for name, value in known.items()
            if name not in _INTERNAL and not (name == "forward" and not path)
        )
        return (type(module), parameters, others)


class _Tensors:
    """The tensors of a call, each once, with what a forward can see of them."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}
        self._storages: dict[int, int] = {}

    def add(self, tensor: Tensor) -> Hashable:
        if getattr(tensor, "constant", None) is not None or tensor.layout != torch.strided:
            raise _Unsuited  # its values are known, and forward may ask for them
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        storage = self._storages.setdefault(tensor.untyped_storage()._cdata, len(self._storages))
        return (
            "tensor", self._numbers[id(tensor)], storage, tensor.storage_offset(), type(tensor),
            tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad,
            tensor.is_leaf,
        )  # fmt: skip


def _frozen(value: Any, *, strict: bool = False) -> Hashable:
    """A value that is equal for equal contents; objects of other kinds by identity.

    Args:
        strict: the latter are not allowed: what they hold may change between two calls.
    """
    kind = type(value)
    if kind is Watched:
        return "watched"
    if isinstance(value, _PLAIN):
        return (kind, repr(value) if isinstance(value, (float, complex)) else value)
    if kind in (tuple, list):
        return (kind, *(_frozen(v, strict=strict) for v in value))
    if kind in (set, frozenset):
        return (kind, frozenset(_frozen(v, strict=strict) for v in value))
    if isinstance(value, dict):
        return (kind, *((_frozen(k), _frozen(v, strict=strict)) for k, v in value.items()))
    if isinstance(value, (Tensor, nn.Module)):
        raise _Unsuited
    if strict and not isinstance(value, type):
        raise _Unsuited
    return (kind, id(value))


def _result_of(output: Any, call: _Call) -> _Result | None:
    """What a call returned; ``None`` if a repeated call could not return the like."""
    leaves, spec = pytree.tree_flatten(output)
    operands = {id(t): i for i, t in enumerate(call.tensors)}
    gradient = any(t.requires_grad for t in call.tensors)
    made: dict[int, Tensor] = {}
    described: list[tuple[str, Any]] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            if not isinstance(leaf, _PLAIN):
                return None
            described.append(("constant", leaf))
        elif id(leaf) in operands:
            described.append(("operand", operands[id(leaf)]))
        else:
            if leaf.requires_grad != (gradient and leaf.dtype.is_floating_point):
                return None
            made.setdefault(id(leaf), leaf)
            described.append(("made", list(made).index(id(leaf))))
    return _Result(spec, tuple(described), tuple(made.values())) if made else None


# ------------------------------------------------------------------------------- which layers


_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def _rows(model: nn.Module) -> list[list[nn.Module]]:
    """Siblings of one composite class in a container; where rows lie in rows, the inner ones."""
    found: list[list[nn.Module]] = []
    by_class: dict[type, list[nn.Module]] = {}
    for child in dict.fromkeys(model.children()):
        inner = _rows(child)
        found += inner
        composite = next(child.children(), None) is not None
        if not inner and composite and not isinstance(child, _CONTAINERS):
            by_class.setdefault(type(child), []).append(child)
    if isinstance(model, _CONTAINERS):
        found += [row for row in by_class.values() if len(row) > 1]
    return found


def _watch(siblings: Sequence[nn.Module], stack: contextlib.ExitStack) -> None:
    """Put a watched number for every integer that differs between siblings."""
    values: dict[tuple[str, str], set[int]] = {}
    places: dict[tuple[str, str], list[tuple[nn.Module, int]]] = {}
    for layer in siblings:
        for path, module in layer.named_modules():
            for name, value in module.__dict__.items():
                if type(value) is int:
                    values.setdefault((path, name), set()).add(value)
                    places.setdefault((path, name), []).append((module, value))
    for place, found in values.items():
        if len(found) > 1:
            for module, value in places[place]:
                _set(stack, module, place[1], Watched(value))


def _watched_in(layer: nn.Module) -> list[Watched]:
    return [v for m in layer.modules() for v in m.__dict__.values() if type(v) is Watched]


def _set(stack: contextlib.ExitStack, module: nn.Module, name: str, value: object) -> None:
    """Set an attribute of the instance for the time of ``stack``."""
    held = module.__dict__
    if name in held:
        stack.callback(held.__setitem__, name, held[name])
    else:
        stack.callback(held.pop, name, None)
    held[name] = value


# ---------------------------------------------------------------------------------- expanding


@dataclass(frozen=True, slots=True)
class _Interior:
    """A template in the graph: its markers, and the nodes between them."""

    begin: fx.Node
    nodes: tuple[fx.Node, ...]
    end: fx.Node


def _interior(graph: fx.Graph, number: int) -> _Interior | None:
    """The template, if its nodes are pure and use only what they were given; else ``None``."""
    begin, end, _ = _ops()
    nodes: list[fx.Node] = []
    last: fx.Node | None = None
    for node in reversed(graph.nodes):
        if last is None:
            if node.target is end and node.args[1] == number:
                last = node
            continue
        if node.target is begin and node.args[1] == number:
            break
        nodes.append(node)
    else:
        return None
    nodes.reverse()
    known = {*nodes, *_operands(node)}
    for inner in nodes:
        pure = isinstance(inner.target, torch._ops.OpOverload) and not (
            inner.target._schema.is_mutable
        )
        item = getattr(inner.target, "__name__", "") == "getitem"
        if inner.op != "call_function" or not (pure or item):
            return None
        if not known.issuperset(inner.all_input_nodes):
            return None
    if not known.issuperset(_operands(last)):
        return None
    return _Interior(node, tuple(nodes), last)


def _operands(node: fx.Node) -> list[fx.Node]:
    return list(node.args[0])  # type: ignore[arg-type]


def expand(graph: fx.Graph) -> None:
    """Replace every repeated call by a copy of its template, and take the markers out.

    Raises:
        NotRepeatable: a template does not hold what it seemed to.
    """
    begin, end, repeat = _ops()
    repeats = [n for n in graph.nodes if n.target is repeat]
    templates: dict[int, _Interior] = {}
    for node in repeats:
        number = node.args[1]
        assert isinstance(number, int), "as it was traced"
        if number not in templates:
            found = _interior(graph, number)
            if found is None or _leaks(found):
                raise NotRepeatable("a template's values are used outside it")
            templates[number] = found
        _copy(graph, templates[number], node)
    for node in [n for n in graph.nodes if n.target in (begin, end)]:
        graph.erase_node(node)


def _leaks(template: _Interior) -> bool:
    """Whether a value that is no result is used after the template."""
    inside = {*template.nodes, template.end}
    results = set(_operands(template.end))
    return any(n not in results and not inside.issuperset(n.users) for n in template.nodes)


def _copy(graph: fx.Graph, template: _Interior, call: fx.Node) -> None:
    """Put a copy of the template's nodes where ``call`` is, on its operands."""
    env = dict(zip(_operands(template.begin), _operands(call), strict=True))
    place = _Place(template.begin, call)
    with graph.inserting_before(call):
        for node in template.nodes:
            env[node] = graph.node_copy(node, lambda n: env[n])
            env[node].meta = place.moved(node.meta)
    results = [env[n] for n in _operands(template.end)]
    for item in list(call.users):
        if getattr(item.target, "__name__", "") != "getitem":
            raise NotRepeatable("the results of a repeated layer are used as a list")
        item.replace_all_uses_with(results[item.args[1]])  # type: ignore[index]
        graph.erase_node(item)
    graph.erase_node(call)


class _Place:
    """From the place of a template to that of a call: module paths and stack traces."""

    def __init__(self, begin: fx.Node, call: fx.Node) -> None:
        self._depth = len(begin.meta["nn_module_stack"])
        self._stack: Mapping[str, Any] = call.meta["nn_module_stack"]
        self._old = list(begin.meta["nn_module_stack"].values())[-1][0]
        self._new = list(self._stack.values())[-1][0]
        trace = call.meta.get("stack_trace") or ""
        self._outer = trace[: max(0, _mark(trace))]

    def moved(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        found = copy.copy(dict(meta))
        below = list(meta["nn_module_stack"].items())[self._depth :]
        found["nn_module_stack"] = {
            **self._stack,
            **{
                key.replace(self._old, self._new, 1): (self._new + path[len(self._old) :], kind)
                for key, (path, kind) in below
            },
        }
        trace = meta.get("stack_trace") or ""
        if self._outer and (at := _mark(trace)) >= 0:
            found["stack_trace"] = self._outer + trace[at:]
        return found


def _mark(trace: str) -> int:
    """Where the first frame of this file begins in a stack trace; -1 if none does."""
    at = trace.find(_MARK)
    return trace.rfind("File ", 0, at) if at >= 0 else -1
