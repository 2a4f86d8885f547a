"""How every layer class lies on one mesh axis: an integer program over all classes at once.

Sets
    classes ``c`` with multiplicity ``m_c``; ops ``o`` with strategies ``k``; values ``v`` with
    states ``s``; interfaces ``g``: ports of classes that some segment connects, which must agree
    on one state; parameter groups ``p``: parameters of classes that are one tensor (ties).
Variables
    ``x[o, k]`` binary: op ``o`` runs under strategy ``k`` (:func:`_choose_strategies`).
    ``z[g, s]`` binary: the interface's values pass in state ``s`` (:func:`_choose_interfaces`).
    ``w[p, s]`` binary: the parameters rest in state ``s`` (:func:`_choose_rest_states`).
    ``e[o, v, s0, s]`` in 0..1: ``o`` reads ``v``, produced in ``s0``, in state ``s``.
    ``f[v, s0, s]`` in 0..1: ``v`` is converted from ``s0`` to ``s``, once for all that read it.
    ``a[v, s]`` in 0..1: backward holds ``v`` in state ``s``.
    The last three are integral of themselves once the first three are.
Objective, seconds of one micro-batch
    ``sum m_c (time[o, k] x[o, k] + convert[v, s0, s] f[v, s0, s])
    + sum step[p, s] w[p, s] / num_micro_batches``.
Constraints
    one strategy per op, one state per interface and parameter group;
    conversions (:func:`_route`): what an op reads was produced,
    ``sum_s e[o, v, s0, s] = produced[v, s0]`` and ``sum_s0 e[o, v, s0, s] = needed[o, v, s]``,
    where ``produced`` and ``needed`` are sums of ``x``, ``z``, ``w``; ``e <= f`` if several ops
    read the value. Every conversion starts from the state that the value was produced in.
    An operand that an op writes to is read in its state at rest;
    memory (:func:`_hold_activations`, :func:`_limit_memory`): parameter bytes, activation bytes
    and their sum, weighted by ``m_c``, each within its budget if it has one.

The transport form of the conversions makes the linear relaxation nearly integral, so that most
programs are solved at the root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from autoshard.errors import InternalError, OptionError
from autoshard.ir import Op, TensorType, Value
from autoshard.placement.state import P, R, State, V
from autoshard.plan.plan import Assignment
from autoshard.plan.sharding_problem import (
    Budget,
    ClassProblem,
    ParameterGroup,
    Port,
    ShardingProblem,
)
from autoshard.plan.solver import INFINITY, Builder

Choice = dict[State, list[int]]
"""For each state the binaries of which at most one is set, if the value is in that state."""


def canonical(value: Value, state: State) -> State:
    """``R`` for the ``V`` of a value without gradient: there they are one state."""
    return R if state == V and not value.type.differentiable else state


def held_as(state: State) -> State:
    """``R`` for ``V``: the same forward value, so one storage serves both."""
    return R if state == V else state


def tensor_of(problem: ShardingProblem, group: ParameterGroup) -> Value:
    """A parameter that stands for the group: one with a gradient if there is one."""
    graphs = {layer.name: layer.graph for layer in problem.classes}
    values = [
        value
        for class_name, name in group.ports
        for value in graphs[class_name].parameters
        if value.name == name
    ]
    return next((v for v in values if v.type.differentiable), values[0])


def allowed_strategies(layer: ClassProblem, op: Op) -> tuple[int, ...]:
    """Positions of the strategies that the pins leave.

    Raises:
        OptionError: if the op is pinned to a strategy that it does not have.
    """
    texts = [str(s) for s in layer.strategies[op.name]]
    pin = layer.pins.get(op.name)
    if pin is None:
        return tuple(range(len(texts)))
    if pin not in texts:
        known = "; ".join(texts)
        raise OptionError(
            f"expected a strategy of {layer.name}.{op.name} ({op.target}) but got {pin!r}; "
            f"pin one of: {known}"
        )
    return (texts.index(pin),)


class Conversions:
    """Costs of conversions, each computed once per type of value."""

    def __init__(self, cost: Callable[[Value, State, State], float | None]) -> None:
        self._cost = cost
        self._known: dict[tuple[TensorType, State, State], float | None] = {}

    def seconds(self, value: Value, source: State, target: State) -> float | None:
        """Zero if nothing is to be done, ``None`` if there is no way.

        Two splits of one dim with different blocks go through the whole value.
        """
        source, target = canonical(value, source), canonical(value, target)
        if source == target:
            return 0.0
        key = (value.type, source, target)
        if key not in self._known:
            self._known[key] = self._compute(value, source, target)
        return self._known[key]

    def _compute(self, value: Value, source: State, target: State) -> float | None:
        if target == P and not value.type.dtype.is_floating_point:
            return None
        if source.is_split and target.is_split and source.dim == target.dim:
            whole = canonical(value, V)
            ways = self._cost(value, source, whole), self._cost(value, whole, target)
            return None if ways[0] is None or ways[1] is None else ways[0] + ways[1]
        return self._cost(value, source, target)


@dataclass(slots=True)
class ShardingProgram:
    """The integer program of a problem, with what its variables mean.

    Attributes:
        budget_terms: by kind of budget the terms of the bytes.
        budget_rows: by kind of budget the row that limits it.
    """

    problem: ShardingProblem
    conversions: Conversions
    builder: Builder = field(default_factory=Builder)
    strategy: dict[tuple[str, str], dict[int, int]] = field(default_factory=dict)
    interface: list[dict[State, int]] = field(default_factory=list)
    rest: list[dict[State, int]] = field(default_factory=list)
    budget_terms: dict[Budget, list[tuple[int, float]]] = field(default_factory=dict)
    budget_rows: dict[Budget, int] = field(default_factory=dict)

    def assignments(self, values: Sequence[float]) -> dict[str, Assignment]:
        """The choice that a solution of the program means."""
        at_interface = _chosen(self.interface, (i.ports for i in self.problem.interfaces), values)
        at_rest = _chosen(self.rest, (p.ports for p in self.problem.parameters), values)
        found = {}
        for layer in self.problem.classes:
            graph = layer.graph
            ops = {}
            for op in graph.ops:
                options = self.strategy[layer.name, op.name]
                best = max(options, key=lambda k: values[options[k]])
                ops[op.name] = str(layer.strategies[op.name][best])
            states = {v.name: at_rest[layer.name, v.name] for v in graph.parameters}
            ins = {v.name: at_interface[layer.name, v.name] for v in graph.inputs}
            outs = {v.name: at_interface[layer.name, v.name] for v in graph.outputs}
            found[layer.name] = Assignment(
                ops=ops,
                inputs={v.name: str(canonical(v, ins[v.name])) for v in graph.inputs},
                parameters={v.name: str(canonical(v, states[v.name])) for v in graph.parameters},
                outputs={v.name: str(canonical(v, outs[v.name])) for v in graph.outputs},
            )
        return found


def _chosen(
    options: Sequence[Mapping[State, int]],
    ports: Iterable[tuple[Port, ...]],
    values: Sequence[float],
) -> dict[Port, State]:
    found: dict[Port, State] = {}
    for states, group in zip(options, ports, strict=True):
        best = max(states, key=lambda s: values[states[s]])
        found.update(dict.fromkeys(group, best))
    return found


def formulate(problem: ShardingProblem, limited: Sequence[Budget]) -> ShardingProgram:
    """The program, with a row for each budget in ``limited`` (without a budget: no limit)."""
    program = ShardingProgram(problem, Conversions(problem.conversion_s))
    _choose_strategies(program)
    _choose_interfaces(program)
    _choose_rest_states(program)
    for layer in problem.classes:
        produced, readers = _ends(program, layer)
        for name, uses in readers.items():
            _route(program, layer, produced[name], uses)
        if any(kind != "parameter_bytes" for kind in limited):
            _hold_activations(program, layer, produced)
    _limit_memory(program, limited)
    return program


def _choose_strategies(program: ShardingProgram) -> None:
    """Exactly one strategy per op, at its time."""
    builder = program.builder
    for layer in program.problem.classes:
        for op in layer.graph.ops:
            seconds = layer.seconds[op.name]
            if not len(seconds) == len(layer.strategies[op.name]) > 0:
                raise InternalError(f"sharding: strategies and seconds of {op.name} do not match")
            options = {
                k: builder.variable(layer.count * seconds[k]) for k in allowed_strategies(layer, op)
            }
            builder.row(list(options.values()), lower=1.0, upper=1.0)
            program.strategy[layer.name, op.name] = options


def _choose_interfaces(program: ShardingProgram) -> None:
    """Exactly one state per interface; the candidates are ``R`` and what its ops give and take."""
    for group in program.problem.interfaces:
        known = _known_states(program.problem, group.ports)
        states = [s for s in known if group.states is None or s in group.states]
        if group.states is not None:
            # A given state that no op knows is still a state that it can be in.
            states += [s for s in group.states if s not in states]
        program.interface.append(_one_of(program.builder, states, {}))


def _choose_rest_states(program: ShardingProgram) -> None:
    """Exactly one state at rest per parameter group, at its price per step."""
    problem = program.problem
    for group in problem.parameters:
        value = tensor_of(problem, group)
        candidates = group.states
        if candidates is None:
            known = _known_states(problem, group.ports)
            candidates = (R, V, *(s for s in known if s != P))
        states = list(dict.fromkeys(canonical(value, s) for s in candidates))
        steps = problem.num_micro_batches
        costs = {s: group.count * problem.parameter_step_s(value, s) / steps for s in states}
        options = _one_of(program.builder, states, costs)
        program.rest.append(options)
        program.budget_terms.setdefault("parameter_bytes", []).extend(
            (options[s], group.count * problem.parameter_bytes(value, s)) for s in states
        )


def _one_of(
    builder: Builder, states: Sequence[State], costs: Mapping[State, float]
) -> dict[State, int]:
    options = {s: builder.variable(costs.get(s, 0.0)) for s in states}
    builder.row(list(options.values()), lower=1.0, upper=1.0)
    return options


def _known_states(problem: ShardingProblem, ports: Sequence[Port]) -> list[State]:
    """``R`` and every state in which some op gives or takes one of the ports, in fixed order."""
    wanted = set(ports)
    found = {R: None}
    for layer in problem.classes:
        names = {name for name in layer.graph.values if (layer.name, name) in wanted}
        for op in layer.graph.ops:
            ends = [(i, v) for i, v in enumerate((*op.operands, *op.outputs)) if v.name in names]
            if ends:
                for strategy in layer.strategies[op.name]:
                    states = (*strategy.inputs, *strategy.outputs)
                    found.update((canonical(v, states[i]), None) for i, v in ends)
    return list(found)


def _ends(
    program: ShardingProgram, layer: ClassProblem
) -> tuple[dict[str, tuple[Value, Choice]], dict[str, list[Choice]]]:
    """For each value of a class: in which state it is produced, and by whom it is read in which."""
    at_interface = {
        port: options
        for group, options in zip(program.problem.interfaces, program.interface, strict=True)
        for port in group.ports
    }
    produced: dict[str, tuple[Value, Choice]] = {}
    for value in layer.graph.inputs:
        produced[value.name] = (value, _choice(value, at_interface[layer.name, value.name].items()))
    for group, options in zip(program.problem.parameters, program.rest, strict=True):
        for class_name, name in group.ports:
            if class_name == layer.name:
                value = layer.graph.values[name]
                produced[name] = (value, _choice(value, options.items()))
    readers: dict[str, list[Choice]] = {}
    for op in layer.graph.ops:
        options_of = program.strategy[layer.name, op.name]
        strategies = layer.strategies[op.name]
        written = {v.name for v in op.mutates}
        for i, value in enumerate(op.operands):
            read = _choice(value, ((strategies[k].inputs[i], x) for k, x in options_of.items()))
            uses = readers.setdefault(value.name, [])
            if read not in uses:
                uses.append(read)
            if value.name in written:
                _forbid_conversion(program.builder, produced[value.name][1], read)
        for i, value in enumerate(op.outputs):
            given = ((strategies[k].outputs[i], x) for k, x in options_of.items())
            produced[value.name] = (value, _choice(value, given))
    for value in layer.graph.outputs:
        read = _choice(value, at_interface[layer.name, value.name].items())
        readers.setdefault(value.name, []).append(read)
    return produced, readers


def _choice(value: Value, pairs: Iterable[tuple[State, int]]) -> Choice:
    found: Choice = {}
    for state, variable in pairs:
        found.setdefault(canonical(value, state), []).append(variable)
    return found


def _forbid_conversion(builder: Builder, produced: Choice, read: Choice) -> None:
    """An operand that is written to is read where it lies: a converted copy would be lost."""
    for state, variables in read.items():
        others = produced.get(state, [])
        builder.row([*variables, *others], [1.0] * len(variables) + [-1.0] * len(others), upper=0.0)


def _route(
    program: ShardingProgram,
    layer: ClassProblem,
    source: tuple[Value, Choice],
    readers: Sequence[Choice],
) -> None:
    """From the state that a value is produced in to each state that it is read in.

    One transport problem per reader. If there are several readers, they share conversions.
    """
    value, produced = source
    builder = program.builder
    shared: dict[tuple[State, State], int] = {}
    for read in readers:
        sent: dict[State, list[int]] = {s: [] for s in produced}
        received: dict[State, list[int]] = {s: [] for s in read}
        for start in produced:
            for end in read:
                seconds = program.conversions.seconds(value, start, end)
                if seconds is None:
                    continue
                cost = layer.count * seconds
                arc = builder.variable(cost if len(readers) == 1 else 0.0, integer=False)
                sent[start].append(arc)
                received[end].append(arc)
                if cost and len(readers) > 1:
                    if (start, end) not in shared:
                        shared[start, end] = builder.variable(cost, integer=False)
                    builder.row([arc, shared[start, end]], [1.0, -1.0], upper=0.0)
        for choice, arcs in ((produced, sent), (read, received)):
            for state, variables in choice.items():
                ends = [*variables, *arcs[state]]
                signs = [1.0] * len(variables) + [-1.0] * len(arcs[state])
                builder.row(ends, signs, lower=0.0, upper=0.0)


def _hold_activations(
    program: ShardingProgram, layer: ClassProblem, produced: Mapping[str, tuple[Value, Choice]]
) -> None:
    """What backward needs is held once per state, however many ops need it."""
    builder = program.builder
    terms = program.budget_terms.setdefault("activation_bytes", [])
    at_rest = {v.name for v in layer.graph.parameters}
    held: dict[tuple[str, State], int] = {}
    for op in layer.graph.ops:
        options = program.strategy[layer.name, op.name]
        strategies = layer.strategies[op.name]
        for position, value in saved_values(layer, op):
            savers: Choice = {}
            for k, x in options.items():
                states = (*strategies[k].inputs, *strategies[k].outputs)
                state = held_as(canonical(value, states[position]))
                savers.setdefault(state, []).append(x)
            for state, variables in savers.items():
                key = (value.name, state)
                if key not in held:
                    held[key] = builder.variable(integer=False)
                    size = program.problem.activation_bytes(value, state)
                    terms.append((held[key], layer.count * size))
                free: list[int] = []
                if value.name in at_rest:
                    lying = produced[value.name][1]
                    free = [x for s, xs in lying.items() if held_as(s) == state for x in xs]
                signs = [1.0] * len(variables) + [-1.0] * (len(free) + 1)
                builder.row([*variables, *free, held[key]], signs, upper=0.0)
        for k, size in enumerate(layer.extra_bytes.get(op.name, ())):
            if size and k in options:
                terms.append((options[k], layer.count * size))


def saved_values(layer: ClassProblem, op: Op) -> list[tuple[int, Value]]:
    """The operands and outputs that backward of ``op`` needs, with their positions."""
    names = set(layer.saved.get(op.name, ()))
    return [(i, v) for i, v in enumerate((*op.operands, *op.outputs)) if v.name in names]


def _limit_memory(program: ShardingProgram, limited: Sequence[Budget]) -> None:
    """One row per limited kind of bytes."""
    terms = program.budget_terms
    terms["total_bytes"] = [*terms.get("parameter_bytes", ()), *terms.get("activation_bytes", ())]
    for kind in limited:
        pairs = terms.setdefault(kind, [])
        budget = program.problem.budgets.get(kind, INFINITY)
        program.budget_rows[kind] = program.builder.row(
            [variable for variable, _ in pairs], [size for _, size in pairs], upper=budget
        )
