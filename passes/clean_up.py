"""Drop what computes nothing new: equal ops, conversions there and back, idle copies, dead code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from autoshard.ir import Arg, Graph, Op, Value
from autoshard.passes.base import Stage, StageGraphs
from autoshard.passes.randomness import is_random

_INVERSE = {
    "autoshard.all_gather": "autoshard.split_varying",
    "autoshard.all_gather_replicated": "autoshard.split",
    "autoshard.split_varying": "autoshard.all_gather",
    "autoshard.split": "autoshard.all_gather_replicated",
}
"""Pairs whose composition is the identity both ways, forward and backward alike."""

_SAME_IF_CONTIGUOUS = frozenset({"aten.contiguous.default", "aten.clone.default"})
_FRESH_RESULTS = frozenset(
    {
        "aten.linear.default", "aten.addmm.default", "aten.mm.default", "aten.bmm.default",
        "aten.layer_norm.default", "aten.embedding.default", "aten.cat.default",
        "aten.contiguous.default", "aten.rms_norm.default", "aten.stack.default",
    }
)  # fmt: skip
"""Ops that always return a new contiguous tensor."""


@dataclass(frozen=True, slots=True)
class CleanUp:
    """Clean every layer and every stage's shared parts."""

    name: str = "clean_up"

    def accepts(self, graphs: StageGraphs) -> bool:
        return True

    def apply(self, graphs: StageGraphs) -> StageGraphs:
        layers = [replace(v, graph=clean(v.graph)) for v in graphs.layers.values()]

        def cleaned(stage: Stage) -> Stage:
            return replace(
                stage,
                prologue=clean(stage.prologue) if stage.prologue else None,
                shared=clean(stage.shared) if stage.shared else None,
            )

        return replace(graphs.with_layers(layers), stages=tuple(map(cleaned, graphs.stages)))


def clean(graph: Graph) -> Graph:
    """The same function of the same inputs and parameters in fewer ops."""
    for rewrite in (without_idle_copies, without_round_trips, without_equal_ops):
        graph = rewrite(graph)
    alive = graph.without_dead_ops()
    return replace(alive, parameters=graph.parameters)


def without_idle_copies(graph: Graph) -> Graph:
    """``contiguous`` of what is contiguous already: returns its operand."""
    producers = graph.producers()

    def original(op: Op) -> Value | None:
        if op.target not in _SAME_IF_CONTIGUOUS or op.target.startswith("aten.clone"):
            return None
        source = producers.get(op.operands[0].name)
        return op.operands[0] if source and source.target in _FRESH_RESULTS else None

    return _substituted(graph, original)


def without_round_trips(graph: Graph) -> Graph:
    """A gather right after the slice that it undoes, or the other way round."""
    producers = graph.producers()

    def original(op: Op) -> Value | None:
        source = producers.get(op.operands[0].name) if op.operands else None
        if source is None or _INVERSE.get(op.target) != source.target:
            return None
        if op.kwargs != source.kwargs or _dim_and_blocks(op) != _dim_and_blocks(source):
            return None
        before = source.operands[0]
        return before if before.type.shape == op.output.type.shape else None

    return _substituted(graph, original)


def _dim_and_blocks(op: Op) -> tuple[Arg, Arg]:
    blocks = op.args[-1] if isinstance(op.args[-1], tuple) else ()
    return op.args[1], blocks


def without_equal_ops(graph: Graph) -> Graph:
    """The second of two equal calls on equal operands.

    Ops that draw numbers or write to their operands are not equal to any other, and nothing that
    reads a tensor is equal to what read it before a write.
    """
    seen: dict[object, Op] = {}
    written = {v.name for op in graph.ops for v in op.mutates}
    renamed: dict[str, Value] = {}

    def known(value: Value) -> Value:
        return renamed.get(value.name, value)

    kept_outputs = {v.name for v in graph.outputs}
    ops = []
    for op in graph.ops:
        op = op.map(known)
        pure = not op.mutates and not is_random(op)
        pure = pure and not any(v.name in written for v in (*op.operands, *op.outputs))
        key = (op.target, _frozen(op.args), _frozen(op.kwargs))
        first = seen.get(key) if pure else None
        if first is None or any(v.name in kept_outputs for v in op.outputs):
            seen.setdefault(key, op)
            ops.append(op)
        else:
            renamed.update((v.name, w) for v, w in zip(op.outputs, first.outputs, strict=True))
    return replace(graph, ops=tuple(ops))


def _frozen(arg: Arg) -> object:
    """Equal only for equal calls: 1, 1.0 and True are different literals."""
    if isinstance(arg, Value):
        return ("value", arg.name)
    if isinstance(arg, tuple):
        return tuple(map(_frozen, arg))
    return (type(arg), arg)


def _substituted(graph: Graph, original: Callable[[Op], Value | None]) -> Graph:
    """Drop each op for which ``original`` gives a value, and use that value instead."""
    renamed: dict[str, Value] = {}
    kept_outputs = {v.name for v in graph.outputs}
    ops = []
    for op in graph.ops:
        op = op.map(lambda v: renamed.get(v.name, v))
        value = original(op) if op.output.name not in kept_outputs else None
        if value is None:
            ops.append(op)
        else:
            renamed[op.output.name] = renamed.get(value.name, value)
    return replace(graph, ops=tuple(ops))
