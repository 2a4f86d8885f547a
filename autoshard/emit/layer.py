"""The class of a layer, as source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from autoshard.emit.body import Body, Context
from autoshard.emit.names import TRANSPARENT, Names, fresh_name, kind
from autoshard.emit.text import docstring, identifier, lines, literal
from autoshard.ir import Op, ParameterInfo, Value
from autoshard.passes.base import Call, Layer, StageGraphs, axis_sizes
from autoshard.placement.conversion import is_conversion
from autoshard.placement.state import State


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Source of a class, with what its file must import and how it is called.

    Attributes:
        uses_key: ``forward`` takes ``key``.
    """

    name: str
    source: str
    imports: frozenset[str]
    uses_key: bool
    document: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterUse:
    """A parameter of a layer or stage, with how it lies on ``tp`` at rest."""

    info: ParameterInfo
    state: State

    @property
    def partial(self) -> bool:
        """Gradients on the ranks of ``tp`` are addends."""
        return self.state.kind == "V"


def parameter_uses(graphs: StageGraphs, call: Call) -> dict[str, ParameterUse]:
    """Class parameter name -> its declaration and state, for one call of the class."""
    program = graphs.program
    states: Mapping[str, str] = {}
    if "tp" in graphs.axes:
        states = graphs.plan.layers[call.layer]["tp"].parameters
    return {
        v.name: ParameterUse(
            info=program.parameters[call.bindings[v.name]],
            state=State.parse(states.get(v.name, "R")),
        )
        for v in graphs.layers[call.layer].graph.parameters
    }


def declaration(use: ParameterUse) -> str:
    """``Parameter((768,), split=Split(0))``."""
    info = use.info
    parts = [literal(info.type.shape)]
    if info.type.dtype != torch.float32:
        parts.append(f"dtype={literal(info.type.dtype)}")
    if not info.trainable and not info.buffer:
        parts.append("trainable=False")
    if info.buffer:
        parts.append("trainable=False")
        parts.append("buffer=True")
    if not info.persistent:
        parts.append("persistent=False")
    if use.state.is_split:
        blocks = f", blocks={literal(use.state.blocks)}" if use.state.blocks else ""
        parts.append(f"split=Split({use.state.dim}{blocks})")
    if use.partial and info.trainable and not info.buffer:
        parts.append('partial_gradient=("tp",)')
    return f"Parameter({', '.join(parts)})"


def declarations(uses: Mapping[str, ParameterUse]) -> list[str]:
    """The ``PARAMETERS`` of a class."""
    if not uses:
        return []
    text = ["    PARAMETERS = {"]
    for name, use in uses.items():
        text += lines(f"{literal(name)}: {declaration(use)},", 8)
    return [*text, "    }", ""]


def parameter_imports(uses: Iterable[ParameterUse]) -> set[str]:
    found = list(uses)
    names = {"Parameter"} if found else set()
    return names | ({"Split"} if any(u.state.is_split for u in found) else set())


def argument_wish(value: Value, producers: Mapping[str, Op], name: str) -> str:
    """What to call an argument: ``hidden`` if it is an activation, else after its origin."""
    if value.type.differentiable:
        return "hidden" if value.type.shape else "loss"
    op = producers.get(name)
    while op is not None and (kind(op) in TRANSPARENT or is_conversion(op)):
        if fresh_name(op) != "x":
            break
        source = op.operands[0].name.removesuffix("@whole") if op.operands else ""
        name, op = source or name, producers.get(source)
    if op is None:
        return identifier(name)
    named = fresh_name(op)
    return named if named != "x" else identifier(kind(op))


def write_layer(
    graphs: StageGraphs, layer: Layer, call: Call, name: str, keep: Sequence[str]
) -> Written:
    """One class for every layer that equals ``call``'s; the docstring is filled in later."""
    uses = parameter_uses(graphs, call)
    context = Context(
        device="key.device",
        num_micro_batches=graphs.plan.num_micro_batches,
        random_axes=layer.random_axes,
        keep=frozenset(keep),
        root=call.path,
    )
    body = Body(context, variables=Names())
    producers = shared_producers(graphs)
    arguments = [
        body.argument(v, argument_wish(v, producers, call.bindings[v.name]))
        for v in layer.graph.inputs
    ]
    body.parameters(layer.graph.parameters, {n for n, use in uses.items() if use.info.buffer})
    body.write(layer.graph)
    results = ", ".join(body.names[v.name] for v in layer.graph.outputs)
    uses_key = any("key" in line.replace("self.", "") for line in body.text if _mentions_key(line))
    signature = ["self", *(f"{a}: Tensor" for a in arguments)]
    signature += ["*", "key: Tensor"] if uses_key else []
    returned = (
        "Tensor"
        if len(layer.graph.outputs) == 1
        else f"tuple[{', '.join('Tensor' for _ in layer.graph.outputs)}]"
    )
    text = [
        f"class {name}(Layer):",
        f"@@document {name}@@",
        "",
        *declarations(uses),
        *lines(f"def forward({', '.join(signature)}) -> {returned}:", 4),
        *body.text,
        *lines(f"return {results}", 8),
    ]
    return Written(
        name=name,
        source="\n".join(text),
        imports=frozenset(body.imports | parameter_imports(uses.values()) | {"Layer"}),
        uses_key=uses_key,
        document=describe(graphs, layer, dict(zip(arguments, layer.graph.inputs, strict=True))),
    )


def _mentions_key(line: str) -> bool:
    return "seeded(key" in line or "key.device" in line


def shared_producers(graphs: StageGraphs) -> dict[str, Op]:
    """Program value name -> the op of the shared segment that makes it."""
    if graphs.shared is None:
        return {}
    bindings = graphs.shared.bindings
    made = graphs.shared.layer.graph.producers()
    return {n: op for n, op in made.items()} | {
        bindings[n]: op for n, op in made.items() if n in bindings
    }


def describe(graphs: StageGraphs, layer: Layer, arguments: Mapping[str, Value]) -> str:
    """Local shapes of arguments and results, and their states on axes of more than one rank."""
    axes = [a for a in graphs.axes if a in graphs.plan.layers[layer.name] and a in ("cp", "tp")]
    rows = []
    for name, value in arguments.items():
        rows.append((name, value, [graphs.plan.layers[layer.name][a].inputs for a in axes]))
    for value in layer.graph.outputs:
        rows.append(("returns", value, [graphs.plan.layers[layer.name][a].outputs for a in axes]))
    text = []
    for name, value, states in rows:
        where = "".join(
            f", {a} {s.get(value.name, 'R')}" for a, s in zip(axes, states, strict=True)
        )
        text.append(f"    {name}: {value.type}{where}")
    sizes = ", ".join(f"{a}={n}" for a, n in axis_sizes(graphs.plan).items() if a in graphs.axes)
    head = f"On one rank of {sizes}:" if sizes else "On one rank:"
    return head + "\n" + "\n".join(text)


def document(layers: Sequence[str], detail: str, indent: int = 4) -> list[str]:
    """A docstring that names the layers a class stands for."""
    return docstring(f"{ranges(layers)}.\n\n{detail}", indent)


def ranges(paths: Sequence[str]) -> str:
    """``h.0 to h.5, g.1`` for the paths between."""
    runs: list[list[str]] = []
    for path in dict.fromkeys(paths):
        if runs and _follows(runs[-1][-1], path):
            runs[-1].append(path)
        else:
            runs.append([path])
    return ", ".join(r[0] if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs)


def _follows(before: str, path: str) -> bool:
    head, _, number = path.rpartition(".")
    head_before, _, number_before = before.rpartition(".")
    digits = number.isdigit() and number_before.isdigit()
    return head == head_before and digits and int(number) == int(number_before) + 1
