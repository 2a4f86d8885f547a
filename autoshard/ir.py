"""The program representation: immutable graphs of ATen ops on typed values.

A :class:`Graph` is a straight line of :class:`Op`. An op's arguments hold :class:`Value` objects
(name and type) where tensors go, so an op can be read, costed and rewritten without its graph.
Everything is frozen: a pass builds a new graph. Mutation exists only in the ops that PyTorch
itself leaves in place in training graphs (batch-norm statistics); :attr:`Op.mutates` lists them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

_DTYPE_NAMES = {
    torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorType:
    """Shape, dtype, and what the value depends on.

    Attributes:
        differentiable: a gradient flows through this value to a trainable parameter.
        per_sample: it depends on the batch (values that do not are the same for every sample).
        parametric: it depends on a parameter or mutated buffer, so it changes as training goes on
            (ids of routed experts are parametric and not differentiable).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiable: bool = False
    per_sample: bool = False
    parametric: bool = False

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def with_shape(self, shape: Iterable[int]) -> TensorType:
        return replace(self, shape=tuple(shape))

    def __str__(self) -> str:
        name = _DTYPE_NAMES.get(self.dtype, str(self.dtype).removeprefix("torch."))
        return f"{name}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Value:
    """A named tensor. Parameters and buffers are values whose name is their qualified name."""

    name: str
    type: TensorType

    def __str__(self) -> str:
        return f"%{self.name}: {self.type}"


Arg = Any
"""A :class:`Value`, a number, string, dtype, ``None``, or a tuple of these."""


def map_values(function: Callable[[Value], Arg], arg: Arg) -> Arg:
    """``arg`` with every :class:`Value` in it, at any depth of tuples, replaced."""
    if isinstance(arg, Value):
        return function(arg)
    if isinstance(arg, (tuple, list)):
        return tuple(map_values(function, item) for item in arg)
    return arg


def values_in(arg: Arg) -> Iterator[Value]:
    if isinstance(arg, Value):
        yield arg
    elif isinstance(arg, (tuple, list)):
        for item in arg:
            yield from values_in(item)


@dataclass(frozen=True, slots=True)
class Op:
    """One call: ``outputs = target(*args, **kwargs)``.

    Attributes:
        name: unique in its graph.
        target: ``"aten.<op>.<overload>"`` or ``"autoshard.<function>"`` (a function of
            :mod:`autoshard.runtime.ops`); see :func:`resolve`.
        outputs: one value, or one per element if the target returns a tuple.
        module: qualified name of the user's module that made the call.
        source: the user's ``file:line``.
    """

    name: str
    target: str
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...]
    outputs: tuple[Value, ...]
    module: str = ""
    source: str = ""

    @property
    def operands(self) -> tuple[Value, ...]:
        """Every tensor argument, in order, repeats included."""
        return (*values_in(self.args), *values_in(tuple(v for _, v in self.kwargs)))

    @property
    def keywords(self) -> dict[str, Arg]:
        return dict(self.kwargs)

    @property
    def output(self) -> Value:
        return self.outputs[0]

    @property
    def mutates(self) -> tuple[Value, ...]:
        """The operands that the call writes to, by the op's schema (batch norm: its statistics)."""
        if self.target.startswith("aten.batch_norm.") or self.target == "autoshard.batch_norm":
            training = self.keywords.get("training", self.args[5] if len(self.args) > 5 else False)
            return tuple(v for v in self.args[3:5] if isinstance(v, Value)) if training else ()
        name = self.target.split(".")[1]
        if name.endswith("_") and not name.startswith("_") and self.args:
            return tuple(values_in(self.args[0]))
        return ()

    def map(self, function: Callable[[Value], Arg]) -> Op:
        """The same call on other operands (outputs untouched)."""
        return replace(
            self,
            args=map_values(function, self.args),
            kwargs=tuple((k, map_values(function, v)) for k, v in self.kwargs),
        )

    def __str__(self) -> str:
        outs = ", ".join(map(str, self.outputs))
        parts = [_show(a) for a in self.args] + [f"{k}={_show(v)}" for k, v in self.kwargs]
        return f"{outs} = {self.target}({', '.join(parts)})"


def _show(arg: Arg) -> str:
    if isinstance(arg, Value):
        return f"%{arg.name}"
    if isinstance(arg, tuple):
        return f"[{', '.join(_show(a) for a in arg)}]"
    return str(arg) if isinstance(arg, torch.dtype) else repr(arg)


@dataclass(frozen=True, slots=True)
class Graph:
    """Straight-line program.

    Attributes:
        inputs: batch tensors and activations from elsewhere.
        parameters: parameters and buffers that the ops use, each once.
        outputs: values handed on; each is an input, a parameter or an op's output.
    """

    inputs: tuple[Value, ...]
    parameters: tuple[Value, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Value, ...]

    @property
    def values(self) -> dict[str, Value]:
        """Every value by name."""
        found = {v.name: v for v in (*self.inputs, *self.parameters)}
        for op in self.ops:
            found.update((v.name, v) for v in op.outputs)
        return found

    def uses(self) -> dict[str, list[Op]]:
        """For each value name the ops that take it, in order."""
        users: dict[str, list[Op]] = {}
        for op in self.ops:
            for name in dict.fromkeys(v.name for v in op.operands):
                users.setdefault(name, []).append(op)
        return users

    def producers(self) -> dict[str, Op]:
        return {v.name: op for op in self.ops for v in op.outputs}

    def without_dead_ops(self) -> Graph:
        """Drop ops whose results nobody uses and that mutate nothing, then unused parameters."""
        live = {v.name for v in self.outputs}
        kept: list[Op] = []
        for op in reversed(self.ops):
            if op.mutates or any(v.name in live for v in op.outputs):
                kept.append(op)
                live.update(v.name for v in op.operands)
        params = tuple(p for p in self.parameters if p.name in live)
        return replace(self, ops=tuple(reversed(kept)), parameters=params)

    def renamed(self, names: Mapping[str, str]) -> Graph:
        """The same graph with values renamed; ops keep their names, by which plans know them."""

        def value(v: Value) -> Value:
            return replace(v, name=names.get(v.name, v.name))

        ops = tuple(
            replace(op.map(value), outputs=tuple(map(value, op.outputs))) for op in self.ops
        )
        return Graph(
            tuple(map(value, self.inputs)), tuple(map(value, self.parameters)), ops,
            tuple(map(value, self.outputs)),
        )  # fmt: skip

    def __str__(self) -> str:
        lines = [f"inputs: {', '.join(map(str, self.inputs))}"]
        lines += [f"parameter {p}" for p in self.parameters]
        lines += [f"  {op}" for op in self.ops]
        return "\n".join([*lines, f"outputs: {', '.join(f'%{v.name}' for v in self.outputs)}"])


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """A parameter or buffer of the user's model.

    Attributes:
        name: its canonical qualified name (the first of its aliases).
        aliases: every name under which ``state_dict`` or the module tree holds this same tensor,
            the canonical one included; more than one means tied weights.
        persistent: part of ``state_dict`` (false for non-persistent buffers and lifted constants).
    """

    name: str
    type: TensorType
    aliases: tuple[str, ...]
    trainable: bool
    buffer: bool
    persistent: bool = True


@dataclass(frozen=True, slots=True)
class LayerClass:
    """One distinct layer: a graph with canonical names, shared by all equal layers.

    Values are named relative to the layer (parameters without the layer's module path).
    ``kind`` is ``"layer"`` for a module whose parameters all live below one path,
    ``"part"`` for the ops between layers (embeddings, head, loss, chunks of a model without
    layers), ``"shared"`` for the parameter-free ops on the batch (positions, rotary tables, masks)
    that every stage recomputes.
    """

    name: str
    kind: str
    graph: Graph


@dataclass(frozen=True, slots=True)
class Segment:
    """One occurrence of a layer class in the program.

    Attributes:
        path: module path of the layer (``"transformer.h.3"``), or a descriptive name for parts.
        bindings: class value name -> program value name, for inputs, parameters and outputs.
    """

    path: str
    layer: LayerClass
    bindings: Mapping[str, str]

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(self.bindings[v.name] for v in self.layer.graph.inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(self.bindings[v.name] for v in self.layer.graph.outputs)

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.bindings[v.name] for v in self.layer.graph.parameters)


@dataclass(frozen=True, slots=True)
class Program:
    """A captured training model: its forward pass with the loss, at the global batch size.

    Attributes:
        batch: the batch tensors, by input name (``labels``, ``input_ids``, ...); a type's
            ``per_sample`` says that dim 0 is the batch dim.
        batch_size: samples in the global batch; the size of dim 0 of every per-sample input.
        segments: every op of the program exactly once, in execution order; segment 0 is the
            ``"shared"`` one if there is one.
        loss: name of the scalar loss value.
        parameters: all parameters and buffers of the model by canonical name, used or not.
        constants: tensors lifted out of the model's code, by name (also in ``parameters``).
        notes: what capture decided that a user should know.
        fingerprint: a hash of everything above but the notes: equal for equal programs.
    """

    batch: tuple[Value, ...]
    batch_size: int
    segments: tuple[Segment, ...]
    loss: str
    parameters: Mapping[str, ParameterInfo]
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    fingerprint: str = ""
    model_name: str = ""

    @property
    def classes(self) -> tuple[LayerClass, ...]:
        """The distinct layers, in order of first appearance."""
        return tuple({s.layer.name: s.layer for s in self.segments}.values())


def resolve(target: str) -> Callable[..., Any]:
    """The function that a target names.

    Raises:
        AttributeError: if neither ATen nor :mod:`autoshard.runtime.ops` has it.
    """
    namespace, _, path = target.partition(".")
    if namespace == "autoshard":
        from autoshard.runtime import ops

        return getattr(ops, path)  # type: ignore[no-any-return]
    function = operator.attrgetter(path)(getattr(torch.ops, namespace))
    return function  # type: ignore[no-any-return]
