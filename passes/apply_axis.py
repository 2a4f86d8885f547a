"""Rewrite a graph into the graph that one rank of a mesh axis runs.

This is the one mechanism behind data, micro-batch, tensor and sequence parallelism. Each op gets
a strategy (the states of its operands and outputs on the axis); where a value is not in the state
that a consumer needs, a conversion is inserted; each op is then written for local tensors. The
result is an ordinary graph with smaller shapes, to which the next axis is applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from autoshard.errors import InternalError
from autoshard.ir import Arg, Graph, Op, Value
from autoshard.passes.base import SEQUENTIAL, Layer, StageGraphs, axis_sizes
from autoshard.passes.conversions import conversion_op, way
from autoshard.placement.conversion import is_conversion
from autoshard.placement.hints import block_hints
from autoshard.placement.registry import localise, strategies
from autoshard.placement.state import R, State
from autoshard.placement.strategy import Hints, Strategy, local_value
from autoshard.plan.plan import Assignment


def apply_axis(graph: Graph, assignment: Assignment, axis: str, n: int) -> Graph:
    """What one of ``n`` ranks of ``axis`` runs.

    Args:
        graph: ops and shapes as earlier axes left them.
        assignment: strategies and states by name, as text.

    Returns:
        The local graph; names of inputs, parameters, outputs and ops stay, conversions are added.

    Raises:
        InternalError: if the assignment names a strategy that an op does not have, or leaves a
            value in a state from which there is no way to the one that is needed.
    """
    return _Application(graph, assignment, axis, n).run()


@dataclass
class _Application:
    """The walk over one graph; ``held`` has every value in every state it exists in so far."""

    graph: Graph
    assignment: Assignment
    axis: str
    n: int
    hints: Hints = field(init=False)
    types: dict[str, Value] = field(default_factory=dict)
    origin: dict[str, State] = field(default_factory=dict)
    held: dict[str, dict[State, Value]] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.hints = block_hints(self.graph)
        self.names = {*self.graph.values, *(op.name for op in self.graph.ops)}

    def run(self) -> Graph:
        inputs = [self._arrive(v, self.assignment.inputs) for v in self.graph.inputs]
        parameters = [self._arrive(v, self.assignment.parameters) for v in self.graph.parameters]
        for op in self.graph.ops:
            self._apply(op)
        outputs, swaps = self._outputs()
        local = Graph(tuple(inputs), tuple(parameters), tuple(self.ops), tuple(outputs))
        local = local.renamed(swaps) if swaps else local
        return local.without_dead_ops() if self.axis == SEQUENTIAL else local

    def _arrive(self, value: Value, states: Mapping[str, str]) -> Value:
        if value.name not in states:
            raise self._error(f"the assignment has no state for %{value.name}")
        state = normal(State.parse(states[value.name]), value)
        return self._define(value, state, local_value(value, state, self.n))

    def _define(self, value: Value, state: State, local: Value) -> Value:
        self.types[value.name] = value
        self.origin[value.name] = state
        self.held[value.name] = {state: local}
        return local

    def _apply(self, op: Op) -> None:
        strategy = self._strategy(op)
        needs = [normal(s, v) for s, v in zip(strategy.inputs, op.operands, strict=True)]
        converted = iter([self._convert(v, s, op) for v, s in zip(op.operands, needs, strict=True)])

        def renamed(value: Value) -> Arg:
            return replace(value, name=next(converted).name)

        local = localise(op.map(renamed), strategy, self.axis, self.n)
        self.ops.append(local)
        for value, state, out in zip(op.outputs, strategy.outputs, local.outputs, strict=True):
            self._define(value, normal(state, value), out)
        for value in op.mutates:
            if len(self.held[value.name]) > 1:
                raise self._error(f"op {op.name} writes to %{value.name}, which was converted")

    def _strategy(self, op: Op) -> Strategy:
        text = self.assignment.ops.get(op.name)
        if text is None and is_conversion(op):
            return self._pass_through(op)
        if text is None:
            raise self._error(f"the assignment has no strategy for op {op.name} ({op.target})")
        offered = {str(s): s for s in strategies(op, self.n, self.hints)}
        if text not in offered:
            raise self._error(
                f"op {op.name} ({op.target}) has no strategy {text!r}; it has {sorted(offered)}"
            )
        return offered[text]

    def _pass_through(self, op: Op) -> Strategy:
        """A conversion on another axis keeps the state that its operand has on this one."""
        state = self.origin[op.operands[0].name]
        return Strategy((state,), tuple(state for _ in op.outputs))

    def _convert(self, value: Value, need: State, user: Op) -> Value:
        held = self.held[value.name]
        if need in held:
            return held[need]
        state = self.origin[value.name]
        if self.axis == SEQUENTIAL and need == R and not value.type.differentiable:
            return self._compute_whole(value, user)
        steps = way(state, need)
        if steps is None:
            raise self._error(f"op {user.name}: no way for %{value.name} from {state} to {need}")
        for target in steps:
            if target not in held:
                whole = self.types[value.name]
                name = self._name(f"{value.name}_{self.axis}_{_word(target)}")
                out = replace(local_value(whole, target, self.n), name=name)
                module = user.module
                if state.kind == "P" and self.ops and held[state] in self.ops[-1].outputs:
                    module = self.ops[-1].module  # the sum belongs to the op that left addends
                self.ops.append(
                    conversion_op(whole, held[state], out, state, target, self.axis, module)
                )
                held[target] = out
            state = target
        return held[need]

    def _compute_whole(self, value: Value, user: Op) -> Value:
        """A value for all micro-batches together, computed again from the whole local batch.

        Nothing can be gathered from micro-batches that have not run, but a value without
        parameters can be had before the first one starts. Only graph inputs are marked as
        gathered: :mod:`autoshard.passes.micro_batches` lets them arrive whole.
        """
        held = self.held[value.name]
        if R in held:
            return held[R]
        op = self.graph.producers().get(value.name)
        if value.type.parametric or (op is not None and op.mutates):
            raise self._error(f"op {user.name} needs %{value.name} of all micro-batches together")
        if op is None:
            state = self.origin[value.name]
            out = replace(value, name=self._name(f"{value.name}_whole"))
            self.ops.append(conversion_op(value, held[state], out, state, R, self.axis, ""))
            held[R] = out
            return out
        operands = [self._compute_whole(v, user) for v in op.operands]
        names = iter(operands)
        outputs = tuple(replace(v, name=self._name(f"{v.name}_whole")) for v in op.outputs)
        self.ops.append(
            replace(
                op.map(lambda _: next(names)), name=self._name(f"{op.name}_whole"), outputs=outputs
            )
        )
        for original, out in zip(op.outputs, outputs, strict=True):
            self.held[original.name][R] = out
        return held[R]

    def _outputs(self) -> tuple[list[Value], dict[str, str]]:
        """The outputs in their assigned states, and the renaming that lets them keep their names.

        Segments are wired by the names of outputs, so a converted output takes over the name and
        what it is converted from gets the new one.
        """
        outputs: list[Value] = []
        swaps: dict[str, str] = {}
        fixed = {v.name for v in (*self.graph.inputs, *self.graph.parameters)}
        end = Op("the end", "", (), (), ())
        for value in self.graph.outputs:
            need = normal(State.parse(self.assignment.outputs[value.name]), value)
            local = self._convert(value, need, end)
            if local.name != value.name:
                if value.name in fixed:
                    raise self._error(f"%{value.name} is an input and a converted output")
                swaps[value.name], swaps[local.name] = local.name, value.name
            outputs.append(local)
        return outputs, swaps

    def _name(self, wish: str) -> str:
        name, count = wish, 2
        while name in self.names:
            name, count = f"{wish}_{count}", count + 1
        self.names.add(name)
        return name

    def _error(self, text: str) -> InternalError:
        return InternalError(f"apply_axis {self.axis}={self.n}: {text}")


def _with_values_renamed(graph: Graph, names: Mapping[str, str]) -> Graph:
    """Rename values but not ops: assignments of further axes know ops by name."""
    if not names:
        return graph
    renamed = graph.renamed(names)
    ops = (replace(new, name=old.name) for new, old in zip(renamed.ops, graph.ops, strict=True))
    return replace(renamed, ops=tuple(ops))


def normal(state: State, value: Value) -> State:
    """A value without a gradient has one whole state: ``R``."""
    return R if state.kind == "V" and not value.type.differentiable else state


def _word(state: State) -> str:
    if not state.is_split:
        return state.kind.lower()
    return f"s{state.dim}" + ("b" if state.blocks else "")


@dataclass(frozen=True, slots=True)
class ApplyAxis:
    """Apply one mesh axis to every layer."""

    axis: str

    @property
    def name(self) -> str:
        return f"apply_{self.axis}"

    def accepts(self, graphs: StageGraphs) -> bool:
        return axis_sizes(graphs.plan)[self.axis] > 1

    def apply(self, graphs: StageGraphs) -> StageGraphs:
        n = axis_sizes(graphs.plan)[self.axis]
        for_layers = {name: graphs.plan.layers[name][self.axis] for name in graphs.layers}
        _check_wiring(graphs, for_layers, self.axis)
        layers = []
        for layer in graphs.layers.values():
            assignment = for_layers[layer.name]
            layers.append(
                replace(
                    layer,
                    graph=apply_axis(layer.graph, assignment, self.axis, n),
                    random_axes=self._random_axes(layer, assignment, n),
                )
            )
        return replace(graphs.with_layers(layers), axes=(*graphs.axes, self.axis))

    def _random_axes(
        self, layer: Layer, assignment: Assignment, n: int
    ) -> Mapping[str, tuple[str, ...]]:
        """Ranks that hold different parts of a random op's output draw different numbers.

        Micro-batches do already: their number is in the key.
        """
        axes = dict(layer.random_axes)
        if not axes or self.axis == SEQUENTIAL:
            return axes
        hints = block_hints(layer.graph)
        for op in layer.graph.ops:
            if op.name in axes:
                offered = {str(s): s for s in strategies(op, n, hints)}
                split = offered[assignment.ops[op.name]].outputs[0].is_split
                axes[op.name] += (self.axis,) if split else ()
        return axes


def _check_wiring(graphs: StageGraphs, assignments: Mapping[str, Assignment], axis: str) -> None:
    """Every consumer expects a value in the state in which its producer hands it on."""
    handed: dict[str, tuple[str, str]] = {}
    for segment in graphs.program.segments:
        assignment = assignments[segment.layer.name]
        for value in segment.layer.graph.inputs:
            name = segment.bindings[value.name]
            expected = str(normal(State.parse(assignment.inputs[value.name]), value))
            path, given = handed.get(name, ("", expected))
            if given != expected:
                raise InternalError(
                    f"apply_{axis}: {path} hands on %{name} as {given} "
                    f"but {segment.path} expects {expected}"
                )
        for value in segment.layer.graph.outputs:
            state = normal(State.parse(assignment.outputs[value.name]), value)
            handed[segment.bindings[value.name]] = (segment.path, str(state))
