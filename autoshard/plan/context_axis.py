"""Context parallelism: positions split over ranks that work on the same samples.

One more axis of the algebra, applied between micro-batches and tensor parallelism. Batch and loss
are whole on every rank, parameters are used as ``V``, and what passes between layers is split over
positions; within layers the sharding program of the tensor axis finds how, with the least
communication. So attention gathers keys and values (as Llama 3 does: Dubey et al. 2024, section
3.3.2), or trades positions for heads (Ulysses: Jacobs et al. 2023), whichever is cheaper.

Parameters are reduced, and with ZeRO sharded, over data and context ranks together, which hold the
same ones: that is how FSDP is run with context parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping

from autoshard.cost_models.costs import CostModel
from autoshard.errors import OptionError
from autoshard.ir import Graph, LayerClass, Op, Program, TensorType
from autoshard.passes.apply_axis import apply_axis
from autoshard.placement.conversion import is_conversion
from autoshard.placement.state import R, S, State, V
from autoshard.placement.strategy import Strategy
from autoshard.plan.local_program import LocalProgram, axis_problem
from autoshard.plan.plan import Assignment
from autoshard.plan.sharding import choose_shardings

_POSITIONS = 1
"""Dim of the activations that pass between layers, ``[samples, positions, features]``."""


def split_positions(
    program: Program, graphs: Mapping[str, Graph], cp: int, tp: int, costs: CostModel
) -> Mapping[str, Assignment]:
    """Assign every layer class for ``cp`` ranks, which lie ``tp`` devices apart.

    Args:
        graphs: class name -> graph for one micro-batch.

    Raises:
        OptionError: the model has no dim of positions, or an op that cannot be split so.
    """
    shared = {c.name for c in program.classes if c.kind == "shared"}
    streams = {
        segment.bindings[v.name]
        for segment in program.segments
        for v in segment.layer.graph.outputs
        if is_stream(v.type)
    }
    if not streams:
        raise OptionError(
            f"cp={cp} splits positions, but nothing of the form [samples, positions, features] "
            f"passes between the layers of {program.model_name}; pin cp=1"
        )

    def allowed(layer: str, op: Op, strategy: Strategy) -> bool:
        if is_conversion(op):  # of an outer axis: it keeps its operand's state
            return strategy.inputs == strategy.outputs
        states = (*strategy.inputs, *strategy.outputs)
        if layer in shared:  # every rank has the whole batch, and needs no collectives
            return all(s == R for s in states)
        values = (*op.operands, *op.outputs)
        return not any(s.is_split and s.dim == 0 and is_stream(v.type)
                       for v, s in zip(values, states, strict=True))  # fmt: skip

    def parameters(layer: LayerClass, name: str, kind: TensorType) -> tuple[State, ...]:
        return (V,) if kind.differentiable and layer.name not in shared else (R,)

    whole = {*(v.name for v in program.batch), program.loss}
    for segment in program.segments:
        if segment.layer.kind == "shared":
            whole.update(segment.outputs)
    problem = axis_problem(
        program, graphs, "cp", cp, costs, costs.cluster, stride=tp,
        interface_states={**dict.fromkeys(streams, (S(_POSITIONS),)), **dict.fromkeys(whole, (R,))},
        parameter_states=parameters, allowed=allowed,
    )  # fmt: skip
    solution = choose_shardings(problem)
    if not solution.assignments:
        raise OptionError(
            f"cp={cp}: positions of {program.model_name} cannot be split over {cp} ranks; pin cp=1"
        )
    return solution.assignments


def with_split_positions(local: LocalProgram, cp: int, tp: int, costs: CostModel) -> LocalProgram:
    """The program of one context rank; errors as :func:`split_positions`."""
    over_ranks = split_positions(local.program, local.graphs, cp, tp, costs)
    graphs = {k: apply_axis(g, over_ranks[k], "cp", cp) for k, g in local.graphs.items()}
    return LocalProgram(local.program, graphs, local.dp, local.micro, local.coupled, cp=over_ranks)


def positions(program: Program) -> int:
    """Of the longest activations that pass between layers; 0: none are split by positions."""
    streams = (
        value.type
        for segment in program.segments
        for value in segment.layer.graph.outputs
        if is_stream(value.type)
    )
    return max((kind.shape[_POSITIONS] for kind in streams), default=0)


def is_stream(kind: TensorType) -> bool:
    """Activations of the form ``[samples, positions, features]``."""
    return kind.per_sample and kind.differentiable and kind.ndim == 3
