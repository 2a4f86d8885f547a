"""Separate what runs once per step from what runs for every micro-batch.

On the axis of micro-batches a conversion moves nothing: ``split`` says that a whole value is cut
into micro-batches, a gather of a graph input says that it is wanted uncut. Here both disappear:
values arrive as they are wanted. Everything in the shared segment that depends on the whole local
batch moves into the stage's prologue.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from autoshard.errors import InternalError
from autoshard.ir import Graph, Op, Value
from autoshard.passes.base import SEQUENTIAL, Call, Layer, Stage, StageGraphs, whole
from autoshard.placement.conversion import is_conversion
from autoshard.placement.state import State


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """Give every stage its prologue and its per-micro-batch part of the shared segment."""

    name: str = "micro_batches"

    def accepts(self, graphs: StageGraphs) -> bool:
        return bool(graphs.stages)

    def apply(self, graphs: StageGraphs) -> StageGraphs:
        sequential = SEQUENTIAL in graphs.axes
        free = _parameter_free(graphs)
        layers: dict[str, Layer] = {}
        arrivals: dict[str, dict[str, _Arrival]] = {}
        for layer in graphs.layers.values():
            states = graphs.plan.layers[layer.name][SEQUENTIAL].inputs if sequential else {}
            uncut = {v.name for v in layer.graph.inputs if _is_uncut(v, states)}
            graph, arrivals[layer.name] = _without_markers(layer.graph, uncut, layer.name)
            layers[layer.name] = replace(layer, graph=graph)
        graphs = graphs.with_layers(layers.values())
        stages = []
        for stage in graphs.stages:
            calls = tuple(_rebound(call, arrivals[call.layer], free) for call in stage.calls)
            stages.append(_with_shared(graphs, replace(stage, calls=calls), arrivals))
        return replace(graphs, stages=tuple(stages))


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A graph input after markers are gone: which original input it is, and whether uncut."""

    source: str
    uncut: bool


def _is_uncut(value: Value, states: Mapping[str, str]) -> bool:
    if not value.type.per_sample or value.name not in states:
        return False
    return not State.parse(states[value.name]).is_split


def _parameter_free(graphs: StageGraphs) -> set[str]:
    names = {v.name for v in graphs.program.batch}
    return names | set(graphs.shared.outputs if graphs.shared else ())


def _marker(op: Op) -> bool:
    moves = is_conversion(op) and op.keywords.get("axis") == SEQUENTIAL
    return moves and op.target in {"autoshard.split", "autoshard.all_gather_replicated"}


def _without_markers(
    graph: Graph, uncut: set[str], where: str
) -> tuple[Graph, dict[str, _Arrival]]:
    """The graph with inputs that arrive as they are wanted, cut or uncut.

    ``split`` of a value that is computed, not an input, stays: the caller knows what to do.
    """
    arriving = {v.name: v for v in graph.inputs}
    used = {v.name for op in graph.ops if not _marker(op) for v in op.operands}
    used |= {v.name for v in graph.outputs}
    inputs = [v for v in graph.inputs if v.name in used]
    found = {v.name: _Arrival(v.name, v.name in uncut) for v in inputs}
    ops = []
    for op in graph.ops:
        if not _marker(op) or op.operands[0].name not in arriving:
            ops.append(op)
            continue
        dims = [a for a in op.args[1:] if isinstance(a, (int, tuple))]
        if dims[0] != 0 or isinstance(dims[-1], tuple):
            raise InternalError(f"micro_batches: {where}: op {op.name} does not cut dim 0: {op}")
        inputs.append(op.output)
        found[op.output.name] = _Arrival(op.operands[0].name, op.target != "autoshard.split")
    unused = [v for v in graph.inputs if v.name not in {a.source for a in found.values()}]
    found.update((v.name, _Arrival(v.name, v.name in uncut)) for v in unused)
    return replace(graph, inputs=(*inputs, *unused), ops=tuple(ops)), found


def _rebound(call: Call, arrivals: Mapping[str, _Arrival], free: set[str]) -> Call:
    """The call with bindings for the inputs as they arrive now."""
    bindings = dict(call.bindings)
    for name, arrival in arrivals.items():
        value = call.bindings[arrival.source]
        if arrival.uncut and value not in free:
            raise InternalError(
                f"micro_batches: {call.path} needs all of %{value}, which has a gradient"
            )
        bindings[name] = whole(value) if arrival.uncut else value
    return replace(call, bindings=bindings)


def _with_shared(
    graphs: StageGraphs, stage: Stage, arrivals: Mapping[str, Mapping[str, _Arrival]]
) -> Stage:
    """The stage with its two parts of the shared segment, and what is cut in between."""
    layers = graphs.layers
    needed = {c.bindings[v.name]: v for c in stage.calls for v in layers[c.layer].graph.inputs}
    batch = {name: v for v in graphs.program.batch for name in (v.name, whole(v.name))}
    ops: tuple[Op, ...] = ()
    held: tuple[Value, ...] = ()
    made: dict[str, Value] = {}
    if graphs.shared is not None:
        layer = layers[graphs.shared.layer.name]
        graph = _in_program_names(layer.graph, graphs.shared.bindings, arrivals[layer.name])
        ops, held = _with_whole_names(graph), graph.parameters
        made = {v.name: v for v in graph.inputs} | {v.name: v for op in ops for v in op.outputs}
        needed |= {v.name: v for v in graph.outputs if v.name == graphs.program.loss}
    each = _closure(ops, held, [made[n] for n in sorted(needed) if n in made and n == _plain(n)])
    entering = {v.name: v for v in each.inputs} | needed
    cut = [n for n in sorted(entering) if n not in batch and n not in made and whole(n) in made]
    uncut = [n for n in sorted(entering) if n != _plain(n)]
    wanted = dict.fromkeys((*uncut, *map(whole, cut)))
    once = _closure(ops, held, [made[n] if n in made else entering[n] for n in wanted])
    return replace(
        stage,
        shared=each if each.outputs else None,
        prologue=once if once.outputs else None,
        cut=tuple(cut),
    )


def _plain(name: str) -> str:
    return name.removesuffix("@whole")


def _in_program_names(
    graph: Graph, bindings: Mapping[str, str], arrivals: Mapping[str, _Arrival]
) -> Graph:
    """The shared class under the names by which its segment's values are known elsewhere."""
    names = {n: f"shared_{n}" for n in graph.values}
    names |= {v.name: bindings[v.name] for v in (*graph.parameters, *graph.outputs)}
    for name, arrival in arrivals.items():
        value = bindings[arrival.source]
        names[name] = whole(value) if arrival.uncut else value
    return graph.renamed(names)


def _with_whole_names(graph: Graph) -> tuple[Op, ...]:
    """The ops, with what depends on the whole local batch under the names of whole values.

    The markers are gone: what ``split`` gives is known by the plain name of what it cuts.
    """
    names = {v.name: v.name for v in (*graph.inputs, *graph.parameters)}
    # What is cut is whole, even if it depends on no sample (rows of zeros).
    cut = {op.operands[0].name for op in graph.ops if _marker(op)}
    ops = []
    for op in graph.ops:
        operands = [names[v.name] for v in op.operands]
        if _marker(op):
            names[op.output.name] = _plain(operands[0])
            continue
        depends = any(name != _plain(name) for name in operands)
        for v in op.outputs:
            # A constant may be cut by one op and whole for another: what follows from it whole is
            # one value for all micro-batches.
            uncut = (depends and v.type.per_sample) or v.name in cut
            names[v.name] = whole(v.name) if uncut else v.name

        def known(v: Value) -> Value:
            return replace(v, name=names[v.name])

        ops.append(replace(op.map(known), outputs=tuple(map(known, op.outputs))))
    return tuple(ops)


def _closure(ops: Iterable[Op], held: tuple[Value, ...], outputs: Iterable[Value]) -> Graph:
    """The ops that ``outputs`` need; what they take is among ``held`` tensors or an input."""
    graph = Graph((), held, tuple(ops), tuple(outputs)).without_dead_ops()
    made = {v.name for op in graph.ops for v in op.outputs} | {v.name for v in graph.parameters}
    taken = {v.name: v for op in graph.ops for v in op.operands} | {
        v.name: v for v in graph.outputs
    }
    return replace(graph, inputs=tuple(v for n, v in taken.items() if n not in made))
