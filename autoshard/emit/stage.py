"""The file of a stage, as source."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from autoshard.emit.body import Body, Context, sequence
from autoshard.emit.layer import (
    ParameterUse,
    Written,
    argument_wish,
    declarations,
    parameter_imports,
    parameter_uses,
    shared_producers,
    write_layer,
)
from autoshard.emit.text import WIDTH, class_name, identifier, lines, literal
from autoshard.ir import Graph, Value
from autoshard.passes.base import Call, Stage, StageGraphs, whole
from autoshard.placement.state import R


@dataclass
class StageWriter:
    """Writes one stage. Equal stages come out as equal text: layers are not named in it, but stand
    where ``@@document <class>@@`` does.

    Attributes:
        classes: (layer class, kept ops) -> its source, for the layers of this stage.
        left: how often each value between calls is still needed.
    """

    graphs: StageGraphs
    stage: Stage
    classes: dict[tuple[str, tuple[str, ...]], Written] = field(default_factory=dict)
    parameters: dict[str, ParameterUse] = field(default_factory=dict)
    imports: set[str] = field(default_factory=lambda: {"BaseStage"})
    left: dict[str, int] = field(default_factory=dict)
    argument_names: dict[int, tuple[str, ...]] = field(default_factory=dict)
    prologue_names: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = [c for c in self.stage.calls if self._is_layer(c)]
        self.producers = dict(shared_producers(self.graphs))
        for part in (self.stage.prologue, self.stage.shared):
            for op in part.ops if part else ():
                self.producers |= {v.name.removesuffix("@whole"): op for v in op.outputs}
        self.types = self._types()
        for call in self.layers:
            self._class_of(call)
        self._collect_parameters()
        for name in self._needed():
            self.left[name] = self.left.get(name, 0) + 1

    def source(self) -> str:
        """The whole file but for the names of layers."""
        forward, constants = self._forward()  # chooses the names that the rest uses
        methods = [self._method(c) for c in self.stage.calls if not self._is_layer(c)]
        body = [constants, declarations(self.parameters), self._prologue(), forward, *methods]
        for written in self.classes.values():
            self.imports |= written.imports
        text: list[str] = []
        for written in self.classes.values():
            text += ["", "", written.source]
        text += ["", "", "class Stage(BaseStage):", "@@document Stage@@", ""]
        for part in body:
            text += [*part, ""] if part and part[-1] else part
        code = "\n".join(text).rstrip() + "\n"
        return "\n".join(["@@header@@", "", *self._import_lines(code)]) + "\n" + code

    def _import_lines(self, code: str) -> list[str]:
        used = {"import torch": "torch.", "import torch.nn.functional as F": "F."}
        text = [line for line, mark in used.items() if re.search(rf"\b{re.escape(mark)}", code)]
        text += ["from torch import Tensor", ""]
        for module, exported in _HOMES.items():
            names = {n for n in self.imports if n in exported}
            if module == "ops":
                names = self.imports - _ELSEWHERE
            if names:
                listed = ", ".join(sorted(names, key=_import_order))
                text += _import(f"autoshard.runtime.{module}", listed)
        return text

    # -- what is in the stage ---------------------------------------------------------------------

    def _is_layer(self, call: Call) -> bool:
        return self.graphs.layers[call.layer].kind == "layer"

    def _class_of(self, call: Call) -> Written:
        key = (call.layer, call.recompute.keep)
        if key not in self.classes:
            name = class_name(call.layer)
            if any(w.name == name for w in self.classes.values()):
                name += str(len(self.classes) + 1)
            layer = self.graphs.layers[call.layer]
            self.classes[key] = write_layer(self.graphs, layer, call, name, call.recompute.keep)
        return self.classes[key]

    def _types(self) -> dict[str, Value]:
        """Local types of the values between calls, by program name."""
        found: dict[str, Value] = {}
        for part in (self.stage.prologue, self.stage.shared):
            for v in (*part.inputs, *part.outputs) if part else ():
                found.setdefault(v.name, v)
        for call in self.stage.calls:
            graph = self.graphs.layers[call.layer].graph
            for v in (*graph.inputs, *graph.outputs):
                found.setdefault(call.bindings[v.name], replace(v, name=call.bindings[v.name]))
        passing = {n for n in (*self.stage.receives, *self.stage.sends) if n not in found}
        for segment in self.graphs.program.segments if passing else ():
            for v in self.graphs.layers[segment.layer.name].graph.outputs:
                if segment.bindings[v.name] in passing:
                    name = segment.bindings[v.name]
                    found[name] = replace(v, name=name)
        return found

    def _needed(self) -> Iterable[str]:
        for call in self.stage.calls:
            for v in self.graphs.layers[call.layer].graph.inputs:
                yield call.bindings[v.name]
        yield from self.stage.sends

    def _collect_parameters(self) -> None:
        for call in self.stage.calls:
            if not self._is_layer(call):
                uses = parameter_uses(self.graphs, call)
                self.parameters.update((use.info.name, use) for use in uses.values())
        known = self.graphs.program.parameters
        for part in (self.stage.prologue, self.stage.shared):
            for v in part.parameters if part else ():
                self.parameters[v.name] = ParameterUse(info=known[v.name], state=R)
        self.imports |= parameter_imports(self.parameters.values())

    def _context(self, device: str, call: Call | None = None) -> Context:
        return Context(
            device=device,
            num_micro_batches=self.graphs.plan.num_micro_batches,
            random_axes=self.graphs.layers[call.layer].random_axes if call else {},
            keep=frozenset(call.recompute.keep) if call else frozenset(),
        )

    # -- methods ----------------------------------------------------------------------------------

    def _prologue(self) -> list[str]:
        graph = self.stage.prologue
        if graph is None:
            return []
        body = Body(self._context(""))
        for v in graph.inputs:
            source = f'batch["{v.name.removesuffix("@whole")}"]'
            body.names[v.name] = body.variables.take(identifier(v.name.removesuffix("@whole")))
            body.text += lines(f"{body.names[v.name]} = {source}", 8)
        anything = "next(iter(batch.values()))"
        first = body.names[graph.inputs[0].name] if graph.inputs else anything
        body.context = self._context(f"{first}.device")
        body.parameters(graph.parameters, self._buffers())
        body.write(graph)
        self.imports |= body.imports
        items = [f'"{self.prologue_names[v.name]}": {body.names[v.name]}' for v in graph.outputs]
        returned = lines(f"return {{{', '.join(items)}}}", 8)
        head = "def prologue(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:"
        return [f"    {head}", *body.text, *returned]

    def _buffers(self) -> set[str]:
        return {name for name, use in self.parameters.items() if use.info.buffer}

    def _forward(self) -> tuple[list[str], list[str]]:
        """``forward``, and the constants that describe its arguments."""
        stage = self.stage
        body = Body(self._context(""))
        inputs = [body.argument(self.types[n], self._wish(n)) for n in stage.receives]
        batch, prologue = self._arguments()
        for name in batch:
            body.names[name] = body.variables.take_exactly(name)
        for name in prologue:
            body.argument(self.types[name], self._wish(name))
        named = [body.names[n] for n in (*batch, *prologue)]
        self.prologue_names = {(whole(n) if n in stage.cut else n): body.names[n] for n in prologue}
        body.context = self._context(f"{[*inputs, *named, 'key'][0]}.device")
        if stage.shared:
            body.parameters(stage.shared.parameters, self._buffers())
            later = tuple(self.types[n] for n in self.left if n in body.names)
            body.write(replace(stage.shared, outputs=(*stage.shared.outputs, *later)))
        self.imports |= body.imports
        statements = [self._call(call, body) for call in stage.calls]
        results = [body.names[n] for n in stage.sends]
        head = ["self", *(f"{n}: Tensor" for n in inputs), "*", "key: Tensor"]
        head += [f"{n}: Tensor" for n in named]
        returned = (
            "Tensor" if len(results) == 1 else f"tuple[{', '.join(['Tensor'] * len(results))}]"
        )
        text = [
            *lines(f"def forward({', '.join(head)}) -> {returned}:", 4),
            *body.text,
            *_in_loops(statements),
            *lines(f"return {', '.join(results)}", 8),
        ]
        constants = [
            f"INPUTS = {literal(tuple(inputs))}",
            f"OUTPUTS = {literal(tuple(results))}",
            f"BATCH = {literal(batch)}",
            f"PROLOGUE = {literal(tuple(body.names[n] for n in prologue))}",
        ]
        if stage.cut:
            constants.append(f"CUT = {literal(tuple(body.names[n] for n in stage.cut))}")
        constants.append(f"LAYERS = {_repeated([self._class_of(c).name for c in self.layers])}")
        return text, [line for c in constants for line in lines(c, 4)]

    def _arguments(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Program names of batch values and of results of the prologue that ``forward`` takes."""
        stage = self.stage
        wanted = dict.fromkeys(v.name for v in stage.shared.inputs) if stage.shared else {}
        wanted |= dict.fromkeys(self.left)
        names = {v.name for v in self.graphs.program.batch}
        batch = tuple(v.name for v in self.graphs.program.batch if v.name in wanted)
        uncut = {v.name for v in stage.prologue.outputs} if stage.prologue else set()
        prologue = [n for n in wanted if n in uncut or n in stage.cut]
        return tuple(n for n in batch if n in names), tuple(prologue)

    def _wish(self, name: str) -> str:
        plain = name.removesuffix("@whole")
        if any(v.name == plain for v in self.graphs.program.batch):
            # The engine passes batch tensors by their own names.
            return plain if name == plain else f"whole_{identifier(plain)}"
        return argument_wish(self.types[name], self.producers, plain)

    def _call(self, call: Call, body: Body) -> _Statement:
        graph = self.graphs.layers[call.layer].graph
        names = [call.bindings[v.name] for v in graph.inputs]
        arguments = [body.names[n] for n in names]
        self.argument_names[call.index] = tuple(arguments)
        for name in names:
            self.left[name] -= 1
            if not self.left[name]:
                body.variables.free(body.names[name])
        targets = [self._target(call.bindings[v.name], names, body) for v in graph.outputs]
        if self._is_layer(call):
            position = next(i for i, c in enumerate(self.layers) if c is call)
            written = self._class_of(call)
            function, number = "layer", "number"
            takes_key = written.uses_key
        else:
            position, function, number = -1, f"self.{method_name(call)}", str(call.index)
            takes_key = self._method_takes_key(call)
        if takes_key:
            arguments.append(f"key=key + {number}")
        if call.recompute.mode != "none":
            self.imports.add("recompute")
            kept = ["keep=True"] if call.recompute.keep else []
            inner = ", ".join([function, *arguments, *kept])
            text = f"{', '.join(targets)} = recompute({inner})"
        else:
            text = f"{', '.join(targets)} = {function}({', '.join(arguments)})"
        return _Statement(text, position, takes_key, call.layer)

    def _target(self, name: str, operands: Sequence[str], body: Body) -> str:
        if not self.left.get(name):
            return "_"
        wish = self._wish(name)
        for operand in operands:
            same = self.types[operand].type.shape == self.types[name].type.shape
            if same and not self.left[operand] and self.types[operand].type.differentiable:
                wish = body.names[operand]
        body.names[name] = body.variables.take(wish)
        return body.names[name]

    def _method_takes_key(self, call: Call) -> bool:
        return bool(self.graphs.layers[call.layer].random_axes)

    def _method(self, call: Call) -> list[str]:
        """A part of the model that is no layer, with its parameters under their full names."""
        layer = self.graphs.layers[call.layer]
        names = {v.name: call.bindings[v.name] for v in layer.graph.parameters}
        graph: Graph = layer.graph.renamed(names)
        body = Body(self._context("", call))
        wishes = self.argument_names[call.index]
        arguments = [body.argument(v, w) for v, w in zip(graph.inputs, wishes, strict=True)]
        body.parameters(graph.parameters, self._buffers())
        first = arguments[0] if arguments else body.names[graph.parameters[0].name]
        body.context = self._context(f"{first}.device", call)
        body.write(graph)
        self.imports |= body.imports
        head = ["self", *(f"{a}: Tensor" for a in arguments)]
        head += ["*", "key: Tensor"] if self._method_takes_key(call) else []
        results = [body.names[v.name] for v in graph.outputs]
        returned = (
            "Tensor" if len(results) == 1 else f"tuple[{', '.join(['Tensor'] * len(results))}]"
        )
        return [
            *lines(f"def {method_name(call)}({', '.join(head)}) -> {returned}:", 4),
            *body.text,
            *lines(f"return {', '.join(results)}", 8),
        ]


@dataclass(frozen=True, slots=True)
class _Statement:
    """A call in ``forward``; ``position`` among the stage's layers, -1 for a method."""

    text: str
    position: int
    takes_key: bool
    layer: str


def method_name(call: Call) -> str:
    return f"run_{identifier(call.path)}"


def _in_loops(statements: Sequence[_Statement]) -> list[str]:
    """Runs of equal statements as loops over the layers."""
    text: list[str] = []
    i = 0
    while i < len(statements):
        first = statements[i]
        end = i + 1
        if first.position >= 0:
            while end < len(statements) and statements[end].text == first.text:
                end += 1
            stop = first.position + end - i
            number = "number" if first.takes_key else "_"
            which = f"self._calls[{first.position}:{stop}]"
            text.append(f"        for layer, {number} in {which}:")
            text += lines(first.text, 12)
        else:
            text += lines(first.text, 8)
        i = end
    return text


def _repeated(names: Sequence[str]) -> str:
    """``(A,) * 3 + (B,)``."""
    runs: list[tuple[str, int]] = []
    for name in names:
        if runs and runs[-1][0] == name:
            runs[-1] = (name, runs[-1][1] + 1)
        else:
            runs.append((name, 1))
    if not runs:
        return "()"
    if all(count == 1 for _, count in runs):
        return sequence([name for name, _ in runs])
    return " + ".join(f"({n},)" if count == 1 else f"({n},) * {count}" for n, count in runs)


_HOMES = {
    "ops": frozenset[str](),
    "parameters": frozenset({"Layer", "Parameter", "Split", "local"}),
    "stage": frozenset({"BaseStage"}),
}
_ELSEWHERE = frozenset().union(*_HOMES.values())


def _import(module: str, names: str) -> list[str]:
    line = f"from {module} import {names}"
    if len(line) <= WIDTH:
        return [line]
    return [f"from {module} import (", *(f"    {n}," for n in names.split(", ")), ")"]


def _import_order(name: str) -> tuple[bool, str]:
    return (name[0].islower(), name)
