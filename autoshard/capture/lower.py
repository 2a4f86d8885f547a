"""From the exported FX graph to one flat :class:`autoshard.ir.Graph`.

The FX graph is run symbolically: every node is given the value it stands for, and ops are written
down on the way. Regions (``no_grad``) are entered and inlined, writes in place become pure ops
(:mod:`autoshard.capture.mutation`), and spellings of one thing become one op
(:mod:`autoshard.capture.spelling`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from autoshard import ir
from autoshard.capture.batch import BatchLayout
from autoshard.capture.export import PREFIX
from autoshard.capture.mutation import Views, is_write
from autoshard.capture.source import Frames, frames_of, source_of
from autoshard.capture.spelling import SPELLINGS, target_name
from autoshard.errors import CaptureError

Call = tuple[str, int]
"""A call of a module: its qualified name and how often it had been called before."""

_DROPPED = {
    "aten._assert_tensor_metadata.default", "aten._assert_scalar.default",
    "aten._assert_async.msg", "aten._assert_async.default", "aten.sym_size.int",
    "aten.sym_constrain_range_for_size.default", "aten.sym_constrain_range.default",
}  # fmt: skip
_CONTEXT_KEYWORDS = ("device", "pin_memory", "layout", "memory_format", "non_blocking")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """The flat program.

    Attributes:
        graph: all ops; outputs are the loss alone.
        calls: op name -> the module calls it was made in, outermost first.
        frames: op name -> the user's statements it was made in, outermost first.
        constants: tensors lifted from the model's code, by value name.
    """

    graph: ir.Graph
    calls: Mapping[str, tuple[Call, ...]]
    frames: Mapping[str, Frames]
    constants: Mapping[str, torch.Tensor]
    batch: tuple[ir.Value, ...]


def lower(
    program: torch.export.ExportedProgram,
    layout: BatchLayout,
    canonical: Mapping[str, str],
    parameters: Mapping[str, ir.ParameterInfo],
) -> Lowered:
    """Lower the exported program.

    Args:
        canonical: qualified name of every parameter and buffer -> its canonical name.

    Raises:
        CaptureError: the graph holds something that no pure graph can.
    """
    lowering = Lowering(program.graph_module)
    batch = lowering.bind_inputs(program, layout, canonical, parameters)
    (output,) = lowering.run(program.graph_module)
    graph = ir.Graph(
        inputs=batch,
        parameters=tuple(lowering.parameters.values()),
        ops=tuple(lowering.ops),
        outputs=(output,),
    ).without_dead_ops()
    return Lowered(
        graph=graph, calls=lowering.calls, frames=lowering.frames, constants=lowering.constants,
        batch=batch,
    )  # fmt: skip


class Lowering:
    """The state of one symbolic run: values of nodes, and the ops written so far."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.ops: list[ir.Op] = []
        self.calls: dict[str, tuple[Call, ...]] = {}
        self.frames: dict[str, Frames] = {}
        self.parameters: dict[str, ir.Value] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.env: dict[fx.Node, Any] = {}
        self.views = Views(self)
        self.node: fx.Node
        self._names: dict[str, int] = {}

    # -------------------------------------------------------------------------------- inputs

    def bind_inputs(
        self,
        program: torch.export.ExportedProgram,
        layout: BatchLayout,
        canonical: Mapping[str, str],
        parameters: Mapping[str, ir.ParameterInfo],
    ) -> tuple[ir.Value, ...]:
        """Give every placeholder its value; the batch's are returned."""
        placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
        batch: list[ir.Value] = []
        for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                i = len(batch)
                type_ = ir.TensorType(
                    layout.shapes[i], layout.dtypes[i], per_sample=layout.per_sample[i]
                )
                batch.append(ir.Value(layout.names[i], type_))
                self._names[layout.names[i]] = 0
                self.env[node] = batch[i]
            elif spec.target is not None and spec.target.startswith(PREFIX) and (
                name := canonical.get(spec.target.removeprefix(PREFIX))
            ):  # fmt: skip
                value = ir.Value(name, parameters[name].type)
                self.env[node] = self.parameters[name] = value
                self.views.protect(node, value)
            else:
                self.env[node] = self._constant(node, spec.target or node.name, program)
        return tuple(batch)

    def _constant(self, node: fx.Node, target: str, program: torch.export.ExportedProgram) -> Any:
        tensor = program.constants.get(target, program.state_dict.get(target))
        if not isinstance(tensor, torch.Tensor):
            raise CaptureError(f"expected a tensor behind {target} but got {type(tensor).__name__}")
        if tensor.requires_grad:
            raise CaptureError(
                f"forward uses a tensor of shape {list(tensor.shape)} that requires a gradient but "
                "is no parameter of the model; register it with nn.Parameter"
            )
        name = target.removeprefix(PREFIX)
        value = ir.Value(name, ir.TensorType(tuple(tensor.shape), tensor.dtype))
        if tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor):
            raise CaptureError(
                f"constant {name} of shape {value.type} has no data (it is on the meta device); "
                "make it a buffer with register_buffer, or build the model on a real device"
            )
        if not tensor.ndim:
            self.node = node
            literal = tensor.item()
            return self.emit("aten.full.default", ((), literal), {"dtype": tensor.dtype}, tensor)
        self.constants[name] = tensor.detach().clone()
        self.parameters[name] = value
        self.views.protect(node, value)
        return value

    # ------------------------------------------------------------------------------- running

    def run(self, module: fx.GraphModule) -> tuple[Any, ...]:
        """The values of the graph's outputs; its placeholders must have theirs."""
        for node in module.graph.nodes:
            self.node = node
            if node.op == "call_function":
                self.env[node] = self._call(module, node)
            elif node.op == "output":
                result = self.read(node.args[0])
                return result if isinstance(result, tuple) else (result,)
            elif node.op not in ("placeholder", "get_attr"):
                raise self.error(f"unexpected {node.op} node")
        raise self.error("the graph has no output")

    def _call(self, module: fx.GraphModule, node: fx.Node) -> Any:
        target = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._region(module, node, str(target))
        if not isinstance(target, torch._ops.OpOverload):
            if getattr(target, "__name__", "") == "getitem":
                return self._item(node)
            raise self.error(f"Python function {target} in the graph")
        name = target_name(target)
        if name in _DROPPED:
            return None
        if name in ("aten.item.default", "aten._local_scalar_dense.default"):
            if not node.users:
                return None
            raise self.error(
                "a tensor's value is read in forward (.item() or int(tensor)); keep it a tensor"
            )
        if is_write(target):
            return self.views.write(node)
        self.views.record(node)
        return self.replay(node)

    def replay(self, node: fx.Node) -> Any:
        """Write down the call of ``node`` on the values that its operands have now."""
        name = target_name(node.target)
        args = self.read(node.args)
        kwargs = {k: self.read(v) for k, v in node.kwargs.items()}
        if spelling := SPELLINGS.get(name):
            result = spelling(self, node, args, kwargs)
            if result is not NotImplemented:
                return result
        return self.emit(name, args, kwargs, node.meta["val"])

    def _item(self, node: fx.Node) -> Any:
        self.views.record(node)
        value, index = self.read(node.args)
        return value[index] if isinstance(value, tuple) else value

    def _region(self, module: fx.GraphModule, node: fx.Node, kind: str) -> Any:
        """Inline a region of another gradient or autocast mode."""
        if kind == "wrap_with_set_grad_enabled":
            enabled, body, *operands = node.args
            detach = not enabled
        elif kind == "wrap_with_autocast":
            _, _, enabled, _, body, *operands = node.args
            detach = False
            if enabled:
                inside = getattr(module, body.target).graph.nodes  # type: ignore[union-attr, arg-type]
                self.node = next((n for n in inside if n.meta.get("stack_trace")), node)
                raise self.error(
                    "torch.autocast in forward: its casts are not part of the graph; remove it and "
                    'choose the precision with autoshard.compile(precision="bf16")'
                )
        else:
            raise self.error(
                f"the higher-order operator {kind} cannot be captured; write the region as plain "
                "torch code"
            )
        inner = getattr(module, body.target)  # type: ignore[union-attr, arg-type]
        holes = [n for n in inner.graph.nodes if n.op == "placeholder"]
        for hole, operand in zip(holes, operands, strict=True):
            self.node = node
            self.views.record_alias(hole, operand)  # type: ignore[arg-type]
            value = self.read(operand)
            cut = detach and isinstance(value, ir.Value) and value.type.dtype.is_floating_point
            self.env[hole] = (
                self.emit("aten.detach.default", (value,), {}, hole.meta["val"]) if cut else value
            )
        result = self.run(inner)
        self.node = node
        return result

    def read(self, arg: Any) -> Any:
        """An FX argument with nodes replaced by their values, lists by tuples."""
        if isinstance(arg, fx.Node):
            return self.env[arg]
        if isinstance(arg, (tuple, list)):
            return tuple(self.read(item) for item in arg)
        if isinstance(arg, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise self.error("a size depends on tensor values; give that dim a fixed size")
        return arg

    # ------------------------------------------------------------------------------- writing

    def emit(self, target: str, args: Sequence[Any], kwargs: Mapping[str, Any], fake: Any) -> Any:
        """Append an op whose results are typed like ``fake``: a value, or a tuple of them."""
        single = not isinstance(fake, (tuple, list))
        fakes = [fake] if single else list(fake)
        base = target.split(".")[1].strip("_")
        name = self._fresh(base)
        outputs = tuple(
            ir.Value(name if single else self._fresh(f"{name}_{i}"), self._type(f))
            for i, f in enumerate(fakes)
        )
        kept = tuple((k, v) for k, v in kwargs.items() if k not in _CONTEXT_KEYWORDS)
        calls = module_calls(self.node)
        op = ir.Op(
            name=name,
            target=target,
            args=tuple(args),
            kwargs=kept,
            outputs=outputs,
            module=calls[-1][0] if calls else "",
            source=source_of(self.node.meta.get("stack_trace")),
        )
        self.ops.append(op)
        self.calls[name] = calls
        self.frames[name] = frames_of(self.node.meta.get("stack_trace"))
        return outputs[0] if single else outputs

    def _fresh(self, base: str) -> str:
        count = self._names.get(base)
        self._names[base] = 0 if count is None else count + 1
        if count is None:
            return base
        return self._fresh(f"{base}_{count + 1}")

    def _type(self, fake: Any) -> ir.TensorType:
        if not isinstance(fake, (torch.Tensor, ir.TensorType)):
            raise self.error(f"an op returns {type(fake).__name__}, expected a tensor")
        if any(isinstance(size, torch.SymInt) for size in fake.shape):
            raise self.error(
                f"a tensor of shape {tuple(fake.shape)} has a size that depends on tensor values "
                "(nonzero, boolean indexing, unique); use torch.where or a fixed capacity"
            )
        return ir.TensorType(tuple(int(s) for s in fake.shape), fake.dtype)

    def error(self, text: str) -> CaptureError:
        """An error at the user's line that made the current node."""
        where = source_of(self.node.meta.get("stack_trace")) if hasattr(self, "node") else ""
        return CaptureError(f"cannot capture {where or 'the model'}: {text}")


def module_calls(node: fx.Node) -> tuple[Call, ...]:
    """The module calls around a node below the user's model, outermost (the model) first."""
    found = []
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        if path + "." == PREFIX or path.startswith(PREFIX):
            _, _, count = str(key).partition("@")
            found.append((path[len(PREFIX) :], int(count) if count.isdigit() else 0))
    return tuple(found)


# Ops whose results hold no value of their operands.
_NO_GRADIENT = {"aten.detach.default", "aten.bernoulli.p", "aten.rand_like.default"}


def annotated(graph: ir.Graph, mutated: Iterable[str] = ()) -> ir.Graph:
    """The graph with every value's ``differentiable``, ``per_sample`` and ``parametric`` derived.

    Args:
        mutated: names of buffers that training changes, apart from those the graph itself writes.
    """
    changed = {*mutated, *(v.name for op in graph.ops for v in op.mutates)}
    known: dict[str, ir.Value] = {v.name: v for v in graph.inputs}
    for p in graph.parameters:
        parametric = p.type.parametric or p.name in changed
        known[p.name] = replace(p, type=replace(p.type, parametric=parametric))
    ops = []
    for op in graph.ops:
        op = op.map(lambda v: known[v.name])
        operands = [v.type for v in op.operands]
        gradient = op.target not in _NO_GRADIENT and any(t.differentiable for t in operands)
        per_sample = any(t.per_sample for t in operands)
        parametric = any(t.parametric for t in operands)
        outputs = tuple(
            replace(
                v,
                type=replace(
                    v.type,
                    differentiable=gradient
                    and (v.type.dtype.is_floating_point or v.type.dtype.is_complex),
                    per_sample=per_sample,
                    parametric=parametric,
                ),
            )
            for v in op.outputs
        )
        known.update((v.name, v) for v in outputs)
        ops.append(replace(op, outputs=outputs))
    return ir.Graph(
        inputs=graph.inputs,
        parameters=tuple(known[p.name] for p in graph.parameters),
        ops=tuple(ops),
        outputs=tuple(known[v.name] for v in graph.outputs),
    )
