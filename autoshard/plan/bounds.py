"""What no plan of a configuration can beat, from the whole program on one ideal device.

Splitting a program into ``k`` parts makes none of its ops more than ``k`` times faster and none of
its tensors more than ``k`` times smaller, once products are taken to fill the device whatever their
shape. So of a micro-batch a rank of ``tp`` takes at least ``1 / tp`` of the seconds, and a pipeline
of ``p`` stages at least

    ``(m + p - 1) / p * (seconds + recompute seconds)``

for ``m`` micro-batches: it takes ``(m - 1) max_s t_s + sum_s t_s``, which is least when its stages
are equal (Narayanan et al. 2021, section 2.2). Memory enters through the recompute seconds: what
is saved beyond the room that the least parameter state leaves on all stages together has to be
made again, the cheapest bytes first. :mod:`autoshard.plan.stage_bounds` has other schedules, and
what the micro-batches in flight on each rank need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from autoshard.cost_models.costs import AnalyticCosts, CostModel
from autoshard.cost_models.memory import saved_values
from autoshard.cost_models.state import state_bytes
from autoshard.ir import Graph, Program, Segment, TensorType
from autoshard.plan.class_costs import shared_inputs
from autoshard.plan.recompute import LayerCosts, Point, freed_bytes
from autoshard.plan.request import Request
from autoshard.plan.space import Configuration
from autoshard.plan.stage_bounds import Ends, Layers, missing_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Parameters, each once.

    Attributes:
        trainable: types of those that are trained.
        frozen_bytes: of the others.
        states: bytes of state that were asked for, by data-parallel mode, ranks and whether there
            are several micro-batches.
    """

    trainable: tuple[TensorType, ...]
    trainable_bytes: int
    trainable_elements: int
    frozen_bytes: int
    states: dict[tuple[str, int, int], float] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeModel:
    """A program on one device at the global batch size, as if splitting it lost nothing.

    Attributes:
        seconds: forward and backward.
        parameters: all of them.
        of_layers: those of its repeated layers.
        num_layers: repeated layers.
        ends: of the repeated layers, if nothing is between them.
        layers_s: forward and backward of its repeated layers, if these are all of one class.
        saved_bytes: by its repeated layers, for backward, without recompute.
        pieces: (bytes freed, seconds to make them again), cheapest bytes first.
    """

    seconds: float
    parameters: Parameters
    of_layers: Parameters
    num_layers: int
    ends: Ends | None
    layers_s: float | None
    saved_bytes: float
    pieces: tuple[Point, ...]

    @property
    def memory_price(self) -> float:
        """Seconds that full recompute takes per byte that it frees."""
        freed = sum(b for b, _ in self.pieces)
        return sum(s for _, s in self.pieces) / freed if freed else 0.0


@dataclass(frozen=True, slots=True)
class Bound:
    """Seconds, infinite if nothing fits, and the bytes that each stage then lacks."""

    seconds: float
    missing_bytes: float = 0.0


def ideal(costs: CostModel) -> CostModel:
    """The same costs on a device that products always fill.

    A measured table has no ideal: then bounds are estimates, and pruning may lose what is within
    their error.
    """
    if type(costs) is not AnalyticCosts:
        return costs
    return AnalyticCosts(replace(costs.cluster, device=replace(costs.device, num_units=0)))


def seconds_of(graph: Graph, costs: CostModel) -> float:
    """Forward and backward of a graph's ops, without collectives."""
    return sum(costs.op(op).total_s for op in graph.ops)


def whole_model(program: Program, costs: CostModel) -> WholeModel:
    """The facts of a program that bounds need; ``costs`` should be ideal ones."""
    counts: dict[str, int] = {}
    for segment in program.segments:
        counts[segment.layer.name] = counts.get(segment.layer.name, 0) + 1
    shared = shared_inputs(program)
    seconds = saved_bytes = layers_s = 0.0
    pieces: list[Point] = []
    for layer in program.classes:
        number = counts[layer.name]
        seconds += number * seconds_of(layer.graph, costs)
        if layer.kind != "layer":
            continue
        layers_s += number * seconds_of(layer.graph, costs)
        saved, freed = freed_bytes(_layer_costs(layer.graph, costs, shared[layer.name]))
        saved_bytes += number * saved
        pieces += [(number * b, number * s) for b, s in freed]
    alike = sum(layer.kind == "layer" for layer in program.classes) == 1
    return WholeModel(
        seconds=seconds,
        parameters=_parameters(program, program.segments),
        of_layers=_parameters(program, [s for s in program.segments if s.layer.kind == "layer"]),
        num_layers=sum(s.layer.kind == "layer" for s in program.segments),
        ends=_ends(program, costs),
        layers_s=layers_s if alike else None,
        saved_bytes=saved_bytes,
        pieces=tuple(sorted(pieces, key=lambda piece: piece[1] / piece[0])),
    )  # fmt: skip


def _ends(program: Program, costs: CostModel) -> Ends | None:
    segments = [s for s in program.segments if s.layer.kind != "shared"]
    layers = [i for i, s in enumerate(segments) if s.layer.kind == "layer"]
    if not layers or layers[-1] - layers[0] + 1 != len(layers):
        return None
    before, after = segments[: layers[0]], segments[layers[-1] + 1 :]
    return Ends(
        number=len(layers),
        before=sum(bool(s.layer.graph.parameters) for s in before),
        after=sum(bool(s.layer.graph.parameters) for s in after),
        first_s=seconds_of(before[0].layer.graph, costs) if before else 0.0,
        last_s=seconds_of(after[-1].layer.graph, costs) if after else 0.0,
    )


def _parameters(program: Program, segments: Sequence[Segment]) -> Parameters:
    used = {name for s in segments for name in s.parameters}
    infos = [i for name in sorted(used) if not (i := program.parameters[name]).buffer]
    trainable = tuple(i.type for i in infos if i.trainable)
    return Parameters(
        trainable=trainable,
        trainable_bytes=sum(kind.nbytes for kind in trainable),
        trainable_elements=sum(kind.numel for kind in trainable),
        frozen_bytes=sum(i.type.nbytes for i in infos if not i.trainable),
    )


def _layer_costs(graph: Graph, costs: CostModel, shared: frozenset[str]) -> LayerCosts:
    return LayerCosts(
        graph=graph,
        forward_s={op.name: costs.op(op).forward_s for op in graph.ops},
        saved=saved_values(graph, device_kind=costs.cluster.device.kind),
        shared_inputs=shared,
    )


def recompute_bound(whole: WholeModel, configuration: Configuration, request: Request) -> Bound:
    """Seconds of a micro-batch, over all stages, that no plan of the configuration can avoid.

    Stages together have ``pp`` times the memory of one; what the least parameter state leaves of
    it is room for what the layers save of at least one micro-batch (``gpipe``: of all).
    """
    mesh, m = configuration.mesh, configuration.num_micro_batches
    parts = _parts(configuration, request)
    held = m if configuration.schedule == "gpipe" else 1
    room = mesh.pp * request.memory_bytes - _state(whole.parameters, configuration, request)
    lacking = held * whole.saved_bytes / parts - room
    extra_s = 0.0
    for freed, seconds in whole.pieces:
        if lacking <= 0:
            break
        share = min(1.0, lacking / (held * freed / parts))
        extra_s += share * seconds / parts
        lacking -= share * held * freed / parts
    if lacking > 1e-6 * request.memory_bytes:
        return Bound(float("inf"), lacking / mesh.pp)
    layers = layers_of(whole, configuration, request)
    if layers is not None:
        lacking = missing_bytes(configuration.looped, layers, request.memory_bytes)
        if lacking > 1e-6 * request.memory_bytes:
            return Bound(float("inf"), lacking)
    return Bound(extra_s)


def layers_of(whole: WholeModel, configuration: Configuration, request: Request) -> Layers | None:
    """What repeated layers of one class take of a rank at least; ``None`` if there are several."""
    if whole.layers_s is None:
        return None
    parts = _parts(configuration, request)
    return Layers(
        seconds=whole.layers_s / parts, saved_bytes=whole.saved_bytes / parts,
        pieces=tuple((freed / parts, seconds / parts) for freed, seconds in whole.pieces),
        state_bytes=_state(whole.of_layers, configuration, request),
        ends=whole.ends and replace(
            whole.ends, first_s=whole.ends.first_s / parts, last_s=whole.ends.last_s / parts
        ),
    )  # fmt: skip


def _parts(configuration: Configuration, request: Request) -> float:
    """What is whole on one device at the global batch size, over a rank's part per micro-batch."""
    mesh = configuration.mesh
    return request.program.batch_size / configuration.micro_batch_size * mesh.cp * mesh.tp


def _state(parameters: Parameters, configuration: Configuration, request: Request) -> float:
    """The least bytes of parameters, gradients and optimizer state, over all stages."""
    mesh = configuration.mesh
    modes = configuration.data_parallel
    state = min(_trained(parameters, configuration, request, mode) for mode in modes)
    # How much of the state is that of experts is not known here: at most all of it is spread.
    return (state / mesh.ep + parameters.frozen_bytes) / mesh.tp


def _trained(
    parameters: Parameters, configuration: Configuration, request: Request, mode: str
) -> float:
    """State of trainable parameters before ``tp``, nothing of it in transit."""
    # Of the micro-batches it matters only whether there are several.
    some = min(2, configuration.num_micro_batches)
    key = (mode, configuration.mesh.replicas, some)
    if key not in parameters.states:
        found = state_bytes(
            parameters.trainable, data_parallel=mode, dp=configuration.mesh.replicas,
            optimizer=request.optimizer, unit_bytes=0, num_micro_batches=some,
            software=request.software,
        )  # fmt: skip
        parameters.states[key] = float(found.total)
    return parameters.states[key]
