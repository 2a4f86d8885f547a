"""Choosing how every layer class lies on one mesh axis, and what a choice costs.

:func:`choose_shardings` gives the optimum of the program that
:mod:`autoshard.plan.sharding_program` states; :func:`evaluate` is the same cost of any given
assignment, written directly, so that automatic and hand-made plans are compared by one measure
(and the tests have something to check the program against).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from autoshard.errors import InternalError, OptionError
from autoshard.ir import Op, Value
from autoshard.placement.state import State
from autoshard.placement.strategy import Strategy
from autoshard.plan.plan import Assignment
from autoshard.plan.sharding_problem import (
    BUDGETS,
    NO_COST,
    Budget,
    ClassProblem,
    Interface,
    ParameterGroup,
    Port,
    ShardingCost,
    ShardingProblem,
    ShardingSolution,
    interfaces,
    parameter_groups,
)
from autoshard.plan.sharding_program import (
    Conversions,
    ShardingProgram,
    canonical,
    formulate,
    held_as,
    saved_values,
    tensor_of,
)
from autoshard.plan.solver import Milp, solve

__all__ = [
    "Budget",
    "ClassProblem",
    "Interface",
    "ParameterGroup",
    "Port",
    "ShardingCost",
    "ShardingProblem",
    "ShardingSolution",
    "choose_shardings",
    "evaluate",
    "interfaces",
    "parameter_groups",
    "pareto",
]


def choose_shardings(
    problem: ShardingProblem, *, time_limit_s: float = 30.0, gap: float = 1e-6
) -> ShardingSolution:
    """The fastest assignment of every class within the budgets.

    That there is none is a result: its ``least_bytes`` says what each budget would have to be.

    Raises:
        OptionError: if an op is pinned to a strategy that it does not have.
    """
    program = formulate(problem, tuple(k for k in BUDGETS if k in problem.budgets))
    return _solve(program, program.builder.build(), time_limit_s, gap)


def pareto(
    problem: ShardingProblem,
    num_points: int,
    *,
    budget: Budget = "total_bytes",
    time_limit_s: float = 30.0,
    gap: float = 1e-6,
) -> tuple[ShardingSolution, ...]:
    """Assignments none of which is both slower and larger than another, fastest first.

    The first is the fastest, the last the smallest; between them the widest gap in bytes is
    halved (geometrically) again and again, at twice as many solves as ``num_points`` at most.
    Empty if the problem is infeasible.
    """
    kinds = {k for k in BUDGETS if k in problem.budgets} | {budget}
    program = formulate(problem, tuple(k for k in BUDGETS if k in kinds))
    milp = program.builder.build()
    row = program.budget_rows[budget]

    def within(limit: float) -> ShardingSolution:
        upper = milp.row_upper.copy()
        # Limits are known to the solver's tolerance only.
        upper[row] = min(upper[row], limit * (1 + 1e-6))
        return _solve(program, replace(milp, row_upper=upper), time_limit_s, gap)

    found = [_solve(program, milp, time_limit_s, gap)]
    least = _least_bytes(program, milp, budget, time_limit_s)
    if not found[0].assignments or least is None:
        return ()
    found.append(within(least))
    gaps = [(_bytes(found[0].cost, budget), max(least, 1.0))]
    for _ in range(2 * num_points):
        if len(front := _undominated(found, budget)) >= num_points or not gaps:
            break
        high, low = gaps.pop(max(range(len(gaps)), key=lambda i: gaps[i][0] / gaps[i][1]))
        if high <= low * 1.01:
            break
        middle = math.sqrt(high * low)
        found.append(within(middle))
        # Nothing worth having lies between what came back and the limit that it was given.
        gaps += [(high, middle), (_bytes(found[-1].cost, budget), low)]
    front = _undominated(found, budget)
    return front if num_points > 1 else front[:1]


def evaluate(problem: ShardingProblem, assignments: Mapping[str, Assignment]) -> ShardingCost:
    """What a given assignment costs by the problem's own cost functions.

    Raises:
        OptionError: if a strategy is unknown, states that must agree do not, or a value cannot be
            converted to where it is needed.
    """
    _check_agreement(problem, assignments)
    conversions = Conversions(problem.conversion_s)
    seconds = conversion_s = activation_bytes = 0.0
    for layer in problem.classes:
        own_s, own_conversion_s, own_bytes = _class_cost(
            problem, conversions, layer, assignments[layer.name]
        )
        seconds += layer.count * own_s
        conversion_s += layer.count * own_conversion_s
        activation_bytes += layer.count * own_bytes
    parameter_bytes = step_s = 0.0
    for group in problem.parameters:
        value = tensor_of(problem, group)
        states = (State.parse(assignments[c].parameters[name]) for c, name in group.ports)
        # A tie may be read with a gradient here and without there: V in one is R in the other.
        state = max(states, key=lambda s: s.kind == "V")
        parameter_bytes += group.count * problem.parameter_bytes(value, state)
        step_s += group.count * problem.parameter_step_s(value, state)
    step_s /= problem.num_micro_batches
    return ShardingCost(
        seconds=seconds + conversion_s + step_s,
        conversion_s=conversion_s + step_s,
        parameter_bytes=parameter_bytes,
        activation_bytes=activation_bytes,
    )


def _class_cost(
    problem: ShardingProblem, conversions: Conversions, layer: ClassProblem, choice: Assignment
) -> tuple[float, float, float]:
    """Seconds of ops, seconds of conversions, bytes of activations of one segment."""
    graph = layer.graph
    seconds = conversion_s = extra_bytes = 0.0
    at: dict[str, State] = {
        v.name: canonical(v, State.parse(text))
        for values, texts in ((graph.inputs, choice.inputs), (graph.parameters, choice.parameters))
        for v in values
        for text in (texts[v.name],)
    }
    reads: dict[tuple[str, State], Value] = {}
    held: dict[tuple[str, State], Value] = {}
    resting = {(v.name, held_as(at[v.name])) for v in graph.parameters}
    for op in graph.ops:
        position, strategy = _strategy(layer, op, choice.ops[op.name])
        seconds += layer.seconds[op.name][position]
        if extra := layer.extra_bytes.get(op.name):
            extra_bytes += extra[position]
        at.update(
            (v.name, canonical(v, s)) for v, s in zip(op.outputs, strategy.outputs, strict=True)
        )
        for value, state in zip(op.operands, strategy.inputs, strict=True):
            reads[value.name, canonical(value, state)] = value
            if (
                value.name in {v.name for v in op.mutates}
                and canonical(value, state) != at[value.name]
            ):
                raise OptionError(
                    f"expected {layer.name}.{op.name} to take {value.name}, which it writes to, in "
                    f"its state at rest {at[value.name]} but got {state}; choose equal ones"
                )
        states = (*strategy.inputs, *strategy.outputs)
        for i, value in saved_values(layer, op):
            held[value.name, held_as(canonical(value, states[i]))] = value
    for value in graph.outputs:
        reads[value.name, canonical(value, State.parse(choice.outputs[value.name]))] = value
    for (name, state), value in reads.items():
        cost = conversions.seconds(value, at[name], state)
        if cost is None:
            raise OptionError(
                f"expected {layer.name}.{name} to be convertible to {state} but it is {at[name]}; "
                "choose another strategy for one of its ops"
            )
        conversion_s += cost
    sizes = (
        problem.activation_bytes(value, state)
        for (name, state), value in held.items()
        if (name, state) not in resting
    )
    return seconds, conversion_s, extra_bytes + sum(sizes)


def _strategy(layer: ClassProblem, op: Op, text: str) -> tuple[int, Strategy]:
    for position, strategy in enumerate(layer.strategies[op.name]):
        if str(strategy) == text:
            return position, strategy
    raise OptionError(
        f"expected a strategy of {layer.name}.{op.name} ({op.target}) but got {text!r}; "
        f"use one of: {'; '.join(map(str, layer.strategies[op.name]))}"
    )


def _check_agreement(problem: ShardingProblem, assignments: Mapping[str, Assignment]) -> None:
    """Ports of one interface, and parameters that are one tensor, are in one state."""
    layers = {layer.name: layer for layer in problem.classes}
    groups: list[tuple[tuple[Port, ...], tuple[str, ...]]] = [
        *((g.ports, ("inputs", "outputs")) for g in problem.interfaces),
        *((g.ports, ("parameters",)) for g in problem.parameters),
    ]
    for ports, sides in groups:
        common: set[str] | None = None
        for class_name, name in ports:
            for texts in (getattr(assignments[class_name], side) for side in sides):
                if name not in texts:
                    continue
                value = layers[class_name].graph.values[name]
                ambiguous = not value.type.differentiable and texts[name] in {"R", "V"}
                own = {"R", "V"} if ambiguous else {texts[name]}
                if common is not None and not common & own:
                    raise OptionError(
                        f"expected {class_name}.{name} in state {' or '.join(sorted(common))} "
                        f"like what it is connected to but got {texts[name]}; choose equal states"
                    )
                common = own if common is None else common & own


def _solve(
    program: ShardingProgram, milp: Milp, time_limit_s: float, gap: float
) -> ShardingSolution:
    solution = solve(milp, time_limit_s=time_limit_s, gap=gap, relax_first=True)
    if not solution.found:
        least = {}
        if solution.status == "infeasible":
            for kind in program.problem.budgets:
                value = _least_bytes(program, _unlimited(program, milp), kind, time_limit_s)
                if value is not None:
                    least[kind] = value
        return ShardingSolution(
            assignments={}, cost=NO_COST, bound=solution.bound, status=solution.status,
            least_bytes=least,
        )  # fmt: skip
    assignments = program.assignments(solution.values.tolist())
    cost = evaluate(program.problem, assignments)
    if abs(cost.seconds - solution.objective) > 1e-4 * max(cost.seconds, solution.objective):
        raise InternalError(
            f"sharding: the program says {solution.objective} s, its assignment {cost.seconds} s"
        )
    bound = min(solution.bound, cost.seconds)
    return ShardingSolution(assignments=assignments, cost=cost, bound=bound, status=solution.status)


def _unlimited(program: ShardingProgram, milp: Milp) -> Milp:
    upper = milp.row_upper.copy()
    upper[list(program.budget_rows.values())] = np.inf
    return replace(milp, row_upper=upper)


def _least_bytes(
    program: ShardingProgram, milp: Milp, kind: Budget, time_limit_s: float
) -> float | None:
    """The fewest bytes of a kind at any price in time; ``None`` if nothing is feasible."""
    objective = np.zeros_like(milp.objective)
    for variable, size in program.budget_terms[kind]:
        objective[variable] += size
    solution = solve(replace(milp, objective=objective), time_limit_s=time_limit_s)
    if not solution.found:
        return None
    assignments = program.assignments(solution.values.tolist())
    return _bytes(evaluate(program.problem, assignments), kind)


def _bytes(cost: ShardingCost, kind: Budget) -> float:
    sizes: dict[Budget, float] = {
        "parameter_bytes": cost.parameter_bytes,
        "activation_bytes": cost.activation_bytes,
        "total_bytes": cost.total_bytes,
    }
    return sizes[kind]


def _undominated(solutions: list[ShardingSolution], budget: Budget) -> tuple[ShardingSolution, ...]:
    kept: list[ShardingSolution] = []
    for solution in sorted(solutions, key=lambda s: (s.seconds, _bytes(s.cost, budget))):
        if not kept or _bytes(solution.cost, budget) < _bytes(kept[-1].cost, budget):
            kept.append(solution)
    return tuple(kept)
