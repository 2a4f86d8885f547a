"""What the choice of shardings on one mesh axis depends on, and what it gives: plain data.

Built from a captured program with :func:`interfaces` and :func:`parameter_groups`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from autoshard.ir import Graph, Program, Value
from autoshard.placement.state import State
from autoshard.placement.strategy import Strategy
from autoshard.plan.plan import Assignment
from autoshard.plan.solver import INFINITY, Status

Port = tuple[str, str]
"""Class name and the name of one of its inputs, outputs or parameters."""

Budget = Literal["parameter_bytes", "activation_bytes", "total_bytes"]
BUDGETS: tuple[Budget, ...] = ("parameter_bytes", "activation_bytes", "total_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassProblem:
    """One layer class on the axis.

    Attributes:
        count: how many segments are of this class.
        strategies: op name -> its strategies.
        seconds: op name -> forward and backward time of one micro-batch, per strategy.
        saved: op name -> the operands and outputs that backward of the op needs.
        extra_bytes: op name -> what it saves besides values (masks, log-sums), per strategy.
        pins: op name -> the text of the strategy that it must have.
    """

    name: str
    graph: Graph
    count: int
    strategies: Mapping[str, Sequence[Strategy]]
    seconds: Mapping[str, Sequence[float]]
    saved: Mapping[str, Sequence[str]] = field(default_factory=dict)
    extra_bytes: Mapping[str, Sequence[float]] = field(default_factory=dict)
    pins: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """Class inputs and outputs that must be in one state.

    Attributes:
        states: the states it may take; ``None`` for all that its ops know.
    """

    ports: tuple[Port, ...]
    states: tuple[State, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """Class parameters that rest in one state, because some of them are the same tensor.

    Attributes:
        count: how many tensors of the program they stand for.
        states: the states it may rest in; ``None`` for ``R``, ``V`` (if trainable) and every
            split that an op knows.
    """

    ports: tuple[Port, ...]
    count: int
    states: tuple[State, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingProblem:
    """Everything that the choice on one axis depends on.

    Attributes:
        conversion_s: ``(value, from, to)`` -> seconds forward and backward, ``None`` if there is
            no way. It may depend on the value's type, not on its name.
        parameter_bytes: what one parameter costs at rest in a state, with whatever belongs to it
            (gradient, optimizer state) in the same unit as the budget.
        parameter_step_s: seconds once per step for a parameter at rest in a state (``V``: the
            all-reduce of its gradient).
        activation_bytes: what a saved value occupies in a state, of one micro-batch.
        budgets: most bytes, by kind.
    """

    classes: tuple[ClassProblem, ...]
    interfaces: tuple[Interface, ...]
    parameters: tuple[ParameterGroup, ...]
    conversion_s: Callable[[Value, State, State], float | None]
    parameter_bytes: Callable[[Value, State], float]
    parameter_step_s: Callable[[Value, State], float] = lambda value, state: 0.0
    activation_bytes: Callable[[Value, State], float] = lambda value, state: 0.0
    num_micro_batches: int = 1
    budgets: Mapping[Budget, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingCost:
    """Seconds of one micro-batch and bytes of one rank, summed over all segments."""

    seconds: float
    conversion_s: float
    parameter_bytes: float
    activation_bytes: float

    @property
    def total_bytes(self) -> float:
        return self.parameter_bytes + self.activation_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingSolution:
    """The best assignment of each class, or why there is none.

    Attributes:
        assignments: by class name; empty if infeasible.
        bound: no assignment within the budgets takes fewer seconds.
        least_bytes: for an infeasible problem the least that is reachable by kind of budget, each
            on its own; empty if not even that exists, because pinned states contradict each other.
    """

    assignments: Mapping[str, Assignment]
    cost: ShardingCost
    bound: float
    status: Status
    least_bytes: Mapping[Budget, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.cost.seconds


NO_COST = ShardingCost(
    seconds=INFINITY, conversion_s=INFINITY, parameter_bytes=INFINITY, activation_bytes=INFINITY
)


def interfaces(
    program: Program, states: Mapping[str, Sequence[State]] | None = None
) -> tuple[Interface, ...]:
    """The groups of class inputs and outputs that the program's segments connect.

    Args:
        states: for program values whose state is given (batch inputs, the loss): what it may be.
    """
    groups = _Groups()
    for segment in program.segments:
        graph = segment.layer.graph
        for value in (*graph.inputs, *graph.outputs):
            groups.join((segment.layer.name, value.name), segment.bindings[value.name])
    found = []
    for ports, names in groups.all():
        allowed: tuple[State, ...] | None = None
        for name in names:
            if states and name in states:
                given = tuple(states[name])
                allowed = given if allowed is None else tuple(s for s in allowed if s in given)
        found.append(Interface(ports=ports, states=allowed))
    return tuple(found)


def parameter_groups(
    program: Program, states: Mapping[Port, Sequence[State]] | None = None
) -> tuple[ParameterGroup, ...]:
    """The groups of class parameters that share a tensor of the program.

    Args:
        states: for class parameters the states that they may rest in.
    """
    groups = _Groups()
    for segment in program.segments:
        for value in segment.layer.graph.parameters:
            groups.join((segment.layer.name, value.name), segment.bindings[value.name])
    found = []
    for ports, names in groups.all():
        allowed: tuple[State, ...] | None = None
        for port in ports:
            if states and port in states:
                given = tuple(states[port])
                allowed = given if allowed is None else tuple(s for s in allowed if s in given)
        found.append(ParameterGroup(ports=ports, count=len(names), states=allowed))
    return tuple(found)


class _Groups:
    """Union-find over ports, connected by the program values that they are bound to."""

    def __init__(self) -> None:
        self._parent: dict[Port | str, Port | str] = {}

    def _root(self, item: Port | str) -> Port | str:
        self._parent.setdefault(item, item)
        while (parent := self._parent[item]) != item:
            self._parent[item] = self._parent[parent]
            item = parent
        return item

    def join(self, port: Port, name: str) -> None:
        self._parent[self._root(name)] = self._root(port)

    def all(self) -> Iterable[tuple[tuple[Port, ...], tuple[str, ...]]]:
        """Ports and names of each group, in order of first appearance."""
        members: dict[Port | str, tuple[list[Port], list[str]]] = {}
        for item in self._parent:
            ports, names = members.setdefault(self._root(item), ([], []))
            if isinstance(item, str):
                names.append(item)
            else:
                ports.append(item)
        return tuple((tuple(ports), tuple(names)) for ports, names in members.values())
