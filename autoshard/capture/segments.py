"""The flat graph cut into segments, and equal segments recognised as one layer class."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from autoshard import ir
from autoshard.capture.lower import Lowered
from autoshard.capture.modules import CallNode, call_tree, layers_of
from autoshard.capture.naming import Names, Origins, identifier, value_names
from autoshard.capture.spelling import is_random
from autoshard.capture.structure import Stretch, form_of, relative, stretch_of

_MATRICES_OF_A_PART = 4
"""Between layers, more weight matrices than this are cut into one part each."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """A planned segment: which ops, and what it is."""

    kind: str
    path: str
    name: str
    ops: tuple[ir.Op, ...]
    is_module: bool = False


def shared_ops(graph: ir.Graph) -> tuple[ir.Graph, int]:
    """The graph with its ops that depend on the batch alone in front, each once; their number."""
    same: dict[Hashable, ir.Op] = {}
    stands_for: dict[str, ir.Value] = {}
    fixed = {v.name for v in (*graph.inputs, *graph.parameters) if not v.type.parametric}
    front: list[ir.Op] = []
    rest: list[ir.Op] = []
    for old in graph.ops:
        op = old.map(lambda v: stands_for.get(v.name, v))
        alone = all(v.name in fixed for v in op.operands)
        if not alone or op.mutates or is_random(op.target):
            rest.append(op)
            continue
        key = repr((op.target, op.args, op.kwargs))
        if twin := same.get(key):
            stands_for.update((v.name, w) for v, w in zip(op.outputs, twin.outputs, strict=True))
            continue
        same[key] = op
        front.append(op)
        fixed.update(v.name for v in op.outputs)
    return replace(graph, ops=(*front, *rest)), len(front)


def segments_of(lowered: Lowered, model: nn.Module) -> tuple[tuple[ir.Segment, ...], str]:
    """Every op in one segment, in execution order; and the program's name of the loss."""
    graph, num_shared = shared_ops(lowered.graph)
    shared, rest = graph.ops[:num_shared], graph.ops[num_shared:]
    parameters = {p.name: p for p in graph.parameters}
    batch = {v.name for v in lowered.batch}
    common = {v.name for op in shared for v in op.outputs}

    def kind_of(name: str) -> str:
        return "batch" if name in batch else "shared" if name in common else "activation"

    modules = dict(model.named_modules(remove_duplicate=False))
    root = call_tree(rest, lowered.calls, modules, parameters)
    layers = layers_of(root, rest, parameters, kind_of)
    cuts = [_Cut("shared", "shared", "shared", shared)] if shared else []
    cuts += _cuts(rest, layers, parameters)
    leaves = _leaf_paths(graph.ops, modules)
    builder = _Builder(graph, kind_of, Origins(leaves, lowered.frames), _root_prefix(layers))
    return builder.build(cuts), builder.names_of[graph.outputs[0].name]


# ------------------------------------------------------------------------------------ cutting


def _cuts(
    ops: Sequence[ir.Op], layers: Sequence[CallNode], parameters: Mapping[str, ir.Value]
) -> list[_Cut]:
    cuts: list[_Cut] = []
    position = 0
    for layer in layers:
        start, stop = layer.ops[0], layer.ops[-1] + 1
        cuts += _parts(ops[position:start], parameters, bool(layers), first=position == 0)
        inside = tuple(ops[start:stop])
        below = all(
            v.name.startswith(layer.path + ".")
            for op in inside
            for v in op.operands
            if v.name in parameters
        )
        kind = "layer" if below else "part"
        cuts.append(_Cut(kind, layer.path, type(layer.module).__name__, inside, is_module=True))
        position = stop
    cuts += _parts(ops[position:], parameters, bool(layers), last=True)
    return cuts


def _parts(
    ops: Sequence[ir.Op],
    parameters: Mapping[str, ir.Value],
    has_layers: bool,
    *,
    first: bool = False,
    last: bool = False,
) -> list[_Cut]:
    if not ops:
        return []
    weighty = [
        i
        for i, op in enumerate(ops)
        if any(v.name in parameters and v.type.ndim >= 2 for v in op.operands)
    ]
    if has_layers and len(weighty) <= _MATRICES_OF_A_PART:
        embeds = any(op.target.startswith("aten.embedding") for op in ops)
        if first:
            return [_part("embeddings" if embeds else "stem", ops)]
        return [_part("head" if last else _module_name(ops, parameters), ops)]
    borders = [0, *weighty[1:], len(ops)]
    return [
        _part(_module_name(ops[a:b], parameters), ops[a:b]) for a, b in itertools.pairwise(borders)
    ]


def _part(name: str, ops: Sequence[ir.Op]) -> _Cut:
    return _Cut("part", name, name, tuple(ops))


def _module_name(ops: Sequence[ir.Op], parameters: Mapping[str, ir.Value]) -> str:
    """After the module whose weights are used, else after the first module."""
    weighty = [op for op in ops if any(v.name in parameters for v in op.operands)]
    return identifier((weighty or list(ops))[0].module or "between")


def _leaf_paths(ops: Sequence[ir.Op], modules: Mapping[str, nn.Module]) -> Collection[str]:
    used = {op.module for op in ops}
    inner = {parent for path in used for parent in _parents(path)}
    return {path for path in used - inner if path in modules}


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def _root_prefix(layers: Sequence[CallNode]) -> str:
    """The module that holds all layers, left out of program names (``transformer``, ``model``)."""
    if not layers:
        return ""
    common = layers[0].path.split(".")[:-2]
    for layer in layers:
        parts = layer.path.split(".")
        while common and parts[: len(common)] != common:
            common = common[:-1]
    return ".".join(common)


# ----------------------------------------------------------------------------------- building


class _Builder:
    """Makes the segments, and one class for all that have the same form."""

    def __init__(
        self,
        graph: ir.Graph,
        kind_of: Callable[[str], str],
        origins: Origins,
        prefix: str,
    ) -> None:
        self._graph = graph
        self._parameters = {p.name: p for p in graph.parameters}
        self._kind_of = kind_of
        self._origins = origins
        self._prefix = prefix
        self._classes: dict[Hashable, tuple[ir.LayerClass, list[str]]] = {}
        self._class_names = Names()
        self._part_names = Names()
        fixed = (v.name for v in (*graph.inputs, *graph.parameters))
        self._names = Names({n for name in fixed for n in (name, identifier(name))} | {"loss"})
        self._short_names: dict[str, str] = {}
        self.names_of = {v.name: v.name for v in (*graph.inputs, *graph.parameters)}

    def build(self, cuts: Sequence[_Cut]) -> tuple[ir.Segment, ...]:
        last_use: dict[str, int] = {self._graph.outputs[0].name: len(cuts)}
        for i, cut in enumerate(cuts):
            for op in cut.ops:
                for value in op.operands:
                    last_use[value.name] = max(i, last_use.get(value.name, 0))
        return tuple(self._segment(i, cut, last_use) for i, cut in enumerate(cuts))

    def _segment(self, index: int, cut: _Cut, last_use: Mapping[str, int]) -> ir.Segment:
        stretch = stretch_of(cut.ops, self._parameters, lambda name: last_use.get(name, 0) > index)
        base = cut.path if cut.is_module else ""
        form = (cut.kind, cut.name, form_of(stretch, base, self._kind_of))
        if form not in self._classes:
            self._classes[form] = self._new_class(cut, stretch, base)
        layer, order = self._classes[form]
        inside = [v.name for v in _values(stretch)]
        self._name_results(cut, stretch, dict(zip(inside, order, strict=True)), base)
        path = cut.path if cut.is_module else self._part_names.give(cut.path)
        interface = (*stretch.inputs, *stretch.parameters, *stretch.outputs)
        outer = dict(zip(inside, order, strict=True))
        bindings = {outer[v.name]: self.names_of[v.name] for v in interface}
        return ir.Segment(path=path, layer=layer, bindings=bindings)

    def _new_class(self, cut: _Cut, stretch: Stretch, base: str) -> tuple[ir.LayerClass, list[str]]:
        skip = base or self._prefix
        names = value_names(
            stretch, skip, self._origins, self._wanted(stretch), shared=cut.kind == "shared"
        )
        if not base:  # parts keep the full names of their parameters
            names.update((p.name, p.name) for p in stretch.parameters)
        graph = ir.Graph(stretch.inputs, stretch.parameters, stretch.ops, stretch.outputs)
        ops = tuple(
            replace(op, name=names[op.name], module=_below(op, base)) for op in graph.ops
        )  # an op is called like its only output
        renamed = replace(graph, ops=ops).renamed(names)
        name = self._class_names.give(cut.name)
        order = [names[v.name] for v in _values(stretch)]
        return ir.LayerClass(name=name, kind=cut.kind, graph=renamed), order

    def _wanted(self, stretch: Stretch) -> dict[str, str]:
        """What inputs are called inside: batch and shared values as outside, the activation x."""
        wanted: dict[str, str] = {}
        activations = [v for v in stretch.inputs if self._kind_of(v.name) == "activation"]
        for value in stretch.inputs:
            if activations and value is activations[0]:
                wanted[value.name] = "x"
            else:
                wanted[value.name] = self._short_names.get(value.name, value.name)
        loss = self._graph.outputs[0].name
        if any(v.name == loss for v in stretch.outputs):
            wanted[loss] = "loss"
        return wanted

    def _name_results(
        self, cut: _Cut, stretch: Stretch, inside: Mapping[str, str], base: str
    ) -> None:
        """Program names of the results: those of the class after the layer's own path."""
        loss = self._graph.outputs[0].name
        place = base.removeprefix(self._prefix + ".") if self._prefix else base
        for op in stretch.ops:
            for value in op.outputs:
                if value.name == loss:
                    self.names_of[loss] = "loss"
                    continue
                self._short_names[value.name] = inside[value.name]
                wanted = f"{place}_{inside[value.name]}" if base else inside[value.name]
                self.names_of[value.name] = self._names.give(identifier(wanted))


def _below(op: ir.Op, base: str) -> str:
    return relative(op.module, base) if base else op.module


def _values(stretch: Stretch) -> list[ir.Value]:
    made = [v for op in stretch.ops for v in op.outputs]
    return [*stretch.inputs, *stretch.parameters, *made]
