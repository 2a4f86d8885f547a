"""The program as one data-parallel rank runs it for one micro-batch.

Which rank and which micro-batch does not matter for costs, so the batch is split in one go into
``global batch / micro-batch size`` parts. Where samples interact, there are no micro-batches: the
batch is split over the ranks of ``dp`` alone, with collectives that an integer program places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypedDict

from autoshard.cluster import Cluster, Link, link
from autoshard.cost_models.costs import CostModel
from autoshard.cost_models.memory import saved_values
from autoshard.errors import InfeasibleError, OptionError
from autoshard.ir import Graph, LayerClass, Op, Program, TensorType, Value
from autoshard.passes.apply_axis import apply_axis
from autoshard.placement.hints import block_hints
from autoshard.placement.registry import localise, strategies
from autoshard.placement.state import P, R, S, State, V, local_shape
from autoshard.placement.strategy import Strategy
from autoshard.plan.batch_axis import split_batch
from autoshard.plan.plan import Assignment
from autoshard.plan.sharding import (
    ClassProblem,
    ShardingProblem,
    choose_shardings,
    interfaces,
    parameter_groups,
)


@dataclass(frozen=True, slots=True)
class LocalProgram:
    """Class graphs after the batch has been split.

    Attributes:
        dp, micro: assignments of every class on these axes; empty where the axis has size 1.
        coupled: where samples interact, if they do.
        cp: as ``dp``, of the positions.
    """

    program: Program
    graphs: Mapping[str, Graph]
    dp: Mapping[str, Assignment]
    micro: Mapping[str, Assignment]
    coupled: tuple[str, ...] = ()
    cp: Mapping[str, Assignment] = field(default_factory=dict)
    _saved: dict[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)

    def saved(self, device_kind: str) -> Mapping[str, Mapping[str, tuple[str, ...]]]:
        """By class and op: the values that its backward needs."""
        if not self._saved:
            for name, graph in self.graphs.items():
                self._saved[name] = saved_values(graph, device_kind=device_kind).needs
        return self._saved

    @property
    def counts(self) -> dict[str, int]:
        """How many segments are of each class."""
        found: dict[str, int] = {}
        for segment in self.program.segments:
            found[segment.layer.name] = found.get(segment.layer.name, 0) + 1
        return found


def whole_graphs(program: Program) -> dict[str, Graph]:
    return {layer.name: layer.graph for layer in program.classes}


def coupling(program: Program) -> tuple[str, ...]:
    """Where samples interact in forward; empty if they do not."""
    if program.batch_size < 2:
        return ()
    return split_batch(program, whole_graphs(program), program.batch_size).coupled


def localise_batch(
    program: Program, dp: int, num_micro_batches: int, costs: CostModel, cluster: Cluster, tp: int
) -> LocalProgram:
    """Split the batch over ``dp`` ranks and then into micro-batches.

    Raises:
        InfeasibleError: samples interact and the batch cannot be split over the ranks either.
    """
    graphs = whole_graphs(program)
    over_ranks: Mapping[str, Assignment] = {}
    over_time: Mapping[str, Assignment] = {}
    coupled: tuple[str, ...] = ()
    if dp > 1:
        split = split_batch(program, graphs, dp)
        coupled = split.coupled
        over_ranks = split.layers or _with_collectives(program, dp, costs, cluster, tp)
        graphs = {k: apply_axis(g, over_ranks[k], "dp", dp) for k, g in graphs.items()}
    if num_micro_batches > 1:
        split = split_batch(program, graphs, num_micro_batches)
        coupled = coupled or split.coupled
        if split.coupled:
            raise InfeasibleError(
                f"samples interact in forward ({'; '.join(split.coupled)}), so "
                f"{num_micro_batches} micro-batches would change the result"
            )
        over_time = split.layers
        graphs = {k: apply_axis(g, over_time[k], "micro", num_micro_batches)
                  for k, g in graphs.items()}  # fmt: skip
    return LocalProgram(program, graphs, over_ranks, over_time, coupled)


def _with_collectives(
    program: Program, dp: int, costs: CostModel, cluster: Cluster, tp: int
) -> Mapping[str, Assignment]:
    """Samples interact: the cheapest exact way to split them over ranks."""
    problem = axis_problem(
        program, whole_graphs(program), "dp", dp, costs, cluster, stride=tp,
        interface_states={
            **{v.name: (S(0),) if v.type.per_sample else (R,) for v in program.batch},
            program.loss: (P,),
        },
        parameter_states=lambda layer, name, kind: (V,) if kind.differentiable else (R,),
    )  # fmt: skip
    solution = choose_shardings(problem)
    if not solution.assignments:
        raise InfeasibleError(
            f"samples interact in forward, and the batch cannot be split over dp={dp} ranks: "
            "pin dp=1 and split tensors or stages instead"
        )
    return solution.assignments


ParameterStates = Callable[[LayerClass, str, TensorType], tuple[State, ...] | None]


def axis_problem(
    program: Program,
    graphs: Mapping[str, Graph],
    axis: str,
    n: int,
    costs: CostModel,
    cluster: Cluster,
    *,
    stride: int,
    interface_states: Mapping[str, tuple[State, ...]],
    parameter_states: ParameterStates = lambda layer, name, kind: None,
    allowed: Callable[[str, Op, Strategy], bool] = lambda layer, op, strategy: True,
    saved: Mapping[str, Mapping[str, tuple[str, ...]]] | None = None,
    state_bytes_per_byte: float = 4.0,
    links: Mapping[str, Link] | None = None,
) -> ShardingProblem:
    """The sharding program's data for one mesh axis of ``n`` ranks ``stride`` devices apart.

    Args:
        links: of other axes, which ops that are split over them already communicate on.
        graphs: class name -> graph as earlier axes left it.
        interface_states: program value -> states that it may pass in, for batch and loss.
        allowed: which strategies of an op of a class may be chosen.
        saved: class -> op -> values that its backward needs.
        state_bytes_per_byte: bytes of weights, gradients and optimizer state per parameter byte.

    Raises:
        OptionError: an op has no strategy that is allowed.
    """
    group = link(cluster, n, stride)
    links = {**(links or {}), axis: group}
    counts: dict[str, int] = {}
    for segment in program.segments:
        counts[segment.layer.name] = counts.get(segment.layer.name, 0) + 1

    def conversion_s(value: Value, source: State, target: State) -> float | None:
        try:
            forward, backward = costs.conversion(value.type, source, target, group)
        except KeyError:
            return None
        return forward + backward

    classes = tuple(
        ClassProblem(
            name=layer.name, graph=graphs[layer.name], count=counts[layer.name],
            saved=(saved or {}).get(layer.name, {}),
            **_options(layer.name, graphs[layer.name], axis, costs, links, allowed),
        )
        for layer in program.classes
    )  # fmt: skip
    given = (
        ((layer.name, value.name), parameter_states(layer, value.name, value.type))
        for layer in program.classes
        for value in graphs[layer.name].parameters
    )
    states = {port: found for port, found in given if found is not None}
    return ShardingProblem(
        classes=classes,
        interfaces=interfaces(program, interface_states),
        parameters=parameter_groups(program, states),
        conversion_s=conversion_s,
        parameter_bytes=lambda v, s: local_bytes(v.type, s, n) * state_bytes_per_byte,
        parameter_step_s=lambda v, s: sum(costs.conversion(v.type, P, R, group)) if s == V else 0.0,
        activation_bytes=lambda v, s: local_bytes(v.type, s, n),
    )


class _Options(TypedDict):
    strategies: dict[str, list[Strategy]]
    seconds: dict[str, list[float]]


def _options(
    name: str,
    graph: Graph,
    axis: str,
    costs: CostModel,
    links: Mapping[str, Link],
    allowed: Callable[[str, Op, Strategy], bool],
) -> _Options:
    """By op: the strategies that it may have, and what they take."""
    n, hints = links[axis].group_size, block_hints(graph)
    offered: dict[str, list[Strategy]] = {}
    seconds: dict[str, list[float]] = {}
    for op in graph.ops:
        known = strategies(op, n, hints)
        offered[op.name] = [s for s in known if allowed(name, op, s)]
        if not offered[op.name]:
            states = ", ".join(dict.fromkeys(str(s.outputs[0]) for s in known))
            raise OptionError(
                f"a sharding pin leaves no way to run {name}.{op.name} ({op.target}) on {n} ranks; "
                f"its output can be: {states}"
            )
        local = (localise(op, s, axis, n) for s in offered[op.name])
        seconds[op.name] = [_op_s(each, costs, links) for each in local]
    return {"strategies": offered, "seconds": seconds}


def _op_s(op: Op, costs: CostModel, links: Mapping[str, Link]) -> float:
    """Forward and backward of a localised op, with what it communicates within itself."""
    return costs.op(op).total_s + sum(costs.inner_collectives(op, links))


def local_bytes(kind: TensorType, state: State, n: int) -> int:
    return kind.with_shape(local_shape(kind.shape, state, n)).nbytes
