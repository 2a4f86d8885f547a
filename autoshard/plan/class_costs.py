"""What each layer class costs one rank for one micro-batch, once it is split over ``tp``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import groupby

from autoshard.cluster import Cluster, Link, link
from autoshard.cost_models.compute import OpCost, fan_out_s, work_cost
from autoshard.cost_models.costs import CostModel
from autoshard.cost_models.float8 import in_float8
from autoshard.cost_models.memory import SavedActivations, regathered
from autoshard.cost_models.work import work_of
from autoshard.ir import Graph, Op, Program, TensorType
from autoshard.options import Constraints
from autoshard.placement.conversion import conversion_states, is_conversion
from autoshard.placement.state import State
from autoshard.plan.expert_axis import expert_links
from autoshard.plan.memo import RankClass
from autoshard.plan.plan import Assignment, Mesh
from autoshard.plan.recompute import LayerCosts, MenuEntry, pinned_menu, recompute_menu
from autoshard.software import OWN, Software

NUM_POINTS, FEW_POINTS = 5, 3
"""Entries of a recompute menu, in general and in programs of many distinct runs."""
MANY_RUNS = 8
"""From so many runs of equal segments on, stages have too many mixes of long menus."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassCosts:
    """One layer class on one rank, for one micro-batch.

    Attributes:
        graph: as the rank runs it.
        forward_s, backward_s: without recompute, collectives included.
        communication_s: the part of both that collectives take.
        measured_s: the part of both that was measured on this machine rather than computed.
        menu: ways to recompute it.
        parameters: local types of its trainable parameters, by class name.
        buffer_bytes: of buffers and frozen parameters.
        reduced_s: seconds once per step to sum gradients that are addends over ``tp``.
        op_s: forward and backward of each op, by name.
        saved: what its backward needs, without recompute.
    """

    name: str
    graph: Graph
    forward_s: float
    backward_s: float
    communication_s: float
    measured_s: float
    menu: tuple[MenuEntry, ...]
    workspace_bytes: int
    parameters: Mapping[str, TensorType]
    buffer_bytes: int
    reduced_s: float
    op_s: Mapping[str, float]
    saved: SavedActivations


def at_pace(layer: ClassCosts, pace: float) -> ClassCosts:
    """The class where all that a micro-batch needs takes ``pace`` times as long."""
    menu = (replace(e, extra_backward_s=pace * e.extra_backward_s) for e in layer.menu)
    return replace(
        layer, forward_s=pace * layer.forward_s, backward_s=pace * layer.backward_s,
        communication_s=pace * layer.communication_s, measured_s=pace * layer.measured_s,
        menu=tuple(menu), op_s={name: pace * seconds for name, seconds in layer.op_s.items()},
    )  # fmt: skip


def axis_links(cluster: Cluster, mesh: Mesh) -> dict[str, Link]:
    """The links of the mesh axes on which layers communicate, ``tp`` innermost."""
    return {
        "tp": link(cluster, mesh.tp, 1),
        "cp": link(cluster, mesh.cp, mesh.tp),
        "dp": link(cluster, mesh.dp, mesh.cp * mesh.tp),
        **expert_links(cluster, mesh.ep, mesh.cp * mesh.tp, mesh.tp),
    }


def cost_classes(
    program: Program,
    ranks: Mapping[str, RankClass],
    assignments: Mapping[str, Assignment],
    links: Mapping[str, Link],
    costs: CostModel,
    pins: Constraints | None = None,
    software: Software = OWN,
    known: dict[tuple[str, str], ClassCosts] | None = None,
) -> dict[str, ClassCosts]:
    """Costs of every class under an assignment on ``tp``.

    Args:
        ranks: the classes as one rank runs them.
        links: of ``dp`` and ``tp``.
        pins: those on recompute leave their own entries in the menus.
        software: whether it fuses elementwise ops, and replays kernels.
        known: by class and text of its assignment, what was found before with the same links,
            costs, pins and software; added to.
    """
    known = {} if known is None else known
    shared = shared_inputs(program)
    runs = sum(1 for _ in groupby(program.segments, key=lambda s: s.layer.name))
    num_points = FEW_POINTS if runs > MANY_RUNS else NUM_POINTS
    pins = pins or Constraints()
    if pins.recompute in ("none", "full"):
        num_points = 2
    found = {}
    for layer in program.classes:
        assignment = assignments.get(layer.name)
        key = (layer.name, repr(assignment))
        if key not in known:
            float8 = software.float8_products and layer.kind == "layer"
            own = replace(software, float8_products=float8)
            one = _Class(ranks[layer.name], links, costs, own, pins.recompute_ops)
            known[key] = one.cost(
                layer.name, assignment, shared[layer.name],
                num_points if layer.kind == "layer" else 0,
            )  # fmt: skip
        found[layer.name] = known[key]
    return found


def shared_inputs(program: Program) -> dict[str, frozenset[str]]:
    """By class, the inputs that a stage holds anyway: the batch, masks, positions."""
    names = {v.name for v in program.batch}
    for segment in program.segments:
        if segment.layer.kind == "shared":
            names.update(segment.outputs)
    found: dict[str, set[str]] = {}
    for segment in program.segments:
        ports = found.setdefault(segment.layer.name, set())
        ports.update(port for port, name in segment.bindings.items() if name in names)
    return {name: frozenset(ports) for name, ports in found.items()}


@dataclass(frozen=True, slots=True)
class _Class:
    """One class on one rank and what prices it."""

    rank: RankClass
    links: Mapping[str, Link]
    costs: CostModel
    software: Software
    recompute_ops: tuple[str, ...] = ()

    @property
    def graph(self) -> Graph:
        return self.rank.graph

    def cost(
        self,
        name: str,
        assignment: Assignment | None,
        shared: frozenset[str],
        num_points: int,
    ) -> ClassCosts:
        """Without recompute if ``num_points`` is 0."""
        graph = self.graph
        forward: dict[str, float] = {}
        backward: dict[str, float] = {}
        communication_s = measured_s = 0.0
        moves = [0, 0]
        for op in graph.ops:
            own, moved_s = self._op(op), collective_seconds(op, self.links, self.costs)
            alone = is_conversion(op) and moved_s is not None
            parts = (0.0, 0.0) if alone else (own.forward_s, own.backward_s)
            extra = moved_s or (0.0, 0.0)
            communication_s += sum(extra)
            measured_s += sum(parts) if own.origin == "measured" else 0.0
            forward[op.name] = parts[0] + extra[0]
            backward[op.name] = parts[1] + extra[1]
            moves[0] += extra[0] > 0
            moves[1] += extra[1] > 0
        forward = self._launched(forward, self.rank.launches[0] + moves[0])
        backward = self._launched(backward, self.rank.launches[1] + moves[1])
        saved = self.rank.saved
        if self.software.regathers:
            saved = regathered(graph, saved)
        layer = LayerCosts(graph=graph, forward_s=forward, saved=saved, shared_inputs=shared)
        if self.recompute_ops:
            menu = pinned_menu(
                layer, lambda op: names_op(self.recompute_ops, name, op),
                regions=self.software.checkpoints_regions,
            )  # fmt: skip
        else:
            menu = recompute_menu(layer, max(2, num_points))
        trainable = {v.name: v.type for v in graph.parameters if v.type.differentiable}
        forward_s = sum(forward.values())
        return ClassCosts(
            name=name, graph=graph, forward_s=forward_s,
            backward_s=sum(backward.values()) + self._sums_s(),
            communication_s=communication_s, measured_s=measured_s,
            menu=menu if num_points else menu[:1],
            workspace_bytes=self.rank.workspace_bytes, parameters=trainable,
            buffer_bytes=sum(v.type.nbytes for v in graph.parameters if not v.type.differentiable),
            reduced_s=sum_over_tp_s(trainable, assignment, self.links, self.costs),
            op_s={name: seconds + backward[name] for name, seconds in forward.items()},
            saved=saved,
        )  # fmt: skip

    def _op(self, op: Op) -> OpCost:
        software, device = self.software, self.costs.cluster.device
        if not (software.fuses_pointwise or software.float8_products):
            return self.costs.op(op)
        work = self.rank.fused[op.name] if software.fuses_pointwise else work_of(op)
        return work_cost(in_float8(op, work) if software.float8_products else work, device)

    def _launched(self, seconds: dict[str, float], kernels: int) -> dict[str, float]:
        """The device waits for the host where that takes longer over all ops of the class.

        Launches run ahead of kernels, so a long kernel makes up for short ones around it: what
        counts is the sum, in forward and in backward.
        """
        host_s = 0.0 if self.software.graphs else kernels * self.costs.cluster.device.host_s
        total = sum(seconds.values())
        if total >= host_s or not total:
            return seconds
        return {name: s * host_s / total for name, s in seconds.items()}

    def _sums_s(self) -> float:
        """Backward adds up the gradients of a value that several ops use."""
        uses: dict[str, int] = {}
        kinds: dict[str, TensorType] = {}
        for op in self.graph.ops:
            if any(v.type.differentiable for v in op.outputs):
                for value in op.operands:
                    if value.type.differentiable:
                        uses[value.name] = uses.get(value.name, 0) + 1
                        kinds[value.name] = value.type
        device = self.costs.cluster.device
        return sum(fan_out_s(kinds[name].nbytes, number, device) for name, number in uses.items())


def collective_seconds(
    op: Op, links: Mapping[str, Link], costs: CostModel
) -> tuple[float, float] | None:
    """Forward and backward seconds of what an op communicates; ``None`` if nothing."""
    axes = op.keywords.get("axes", (op.keywords.get("axis"),))
    found = [links[axis] for axis in axes if axis in links]
    if not found:
        return None
    if is_conversion(op):
        return _conversion_s(op, found[0], costs)
    return costs.inner_collectives(op, links)


def sum_over_tp_s(
    trainable: Mapping[str, TensorType],
    assignment: Assignment | None,
    links: Mapping[str, Link],
    costs: CostModel,
) -> float:
    """Seconds once per step to sum gradients that are addends over ``tp``."""
    if assignment is None:
        return 0.0
    addends = (t for port, t in trainable.items() if assignment.parameters[port] == "V")
    return sum(costs.collective("all_reduce", t.nbytes, links["tp"]) for t in addends)


def names_op(patterns: Iterable[str], layer: str, op: Op) -> bool:
    """Whether a pattern names an op, alone or below the name of its class."""
    return any(fnmatchcase(op.name, p) or fnmatchcase(f"{layer}.{op.name}", p) for p in patterns)


def _conversion_s(op: Op, link: Link, costs: CostModel) -> tuple[float, float]:
    source, target = conversion_states(op)
    whole = op.operands[0].type
    if source.is_split:
        whole = op.output.type if not target.is_split else _joined(whole, source, link.group_size)
    return costs.conversion(whole, source, target, link)


def _joined(kind: TensorType, state: State, n: int) -> TensorType:
    shape = list(kind.shape)
    shape[state.dim] *= n
    return kind.with_shape(shape)
