"""How the tensor axis may be used: the pins, and what shared values leave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from autoshard.cost_models.costs import CostModel
from autoshard.errors import OptionError, UnsupportedOpError
from autoshard.ir import Graph, LayerClass, Op, Program, TensorType
from autoshard.placement.conversion import is_conversion
from autoshard.placement.registry import has_rule
from autoshard.placement.rules.attention import ROWS
from autoshard.placement.state import R, S, State
from autoshard.placement.strategy import Strategy, uniform
from autoshard.plan.class_costs import names_op
from autoshard.plan.context_axis import is_stream
from autoshard.plan.expert_axis import expert_links
from autoshard.plan.local_program import LocalProgram, axis_problem
from autoshard.plan.plan import Assignment, Mesh
from autoshard.plan.request import Request
from autoshard.plan.sharding_problem import ShardingProblem
from autoshard.plan.stage_costs import optimizer_states

_SAMPLES, _POSITIONS = 0, 1
"""Dims of the activations that pass between layers."""


def replicated(graph: Graph) -> Assignment:
    """Every value whole on every rank."""
    return Assignment(
        ops={op.name: str(uniform(op, R)) for op in graph.ops},
        inputs={v.name: "R" for v in graph.inputs},
        parameters={v.name: "R" for v in graph.parameters},
        outputs={v.name: "R" for v in graph.outputs},
    )  # fmt: skip


def refuse_missing_rules(program: Program) -> None:
    """For ``strict``: every op must have a sharding rule.

    Raises:
        UnsupportedOpError: naming ops that have none, with their places.
    """
    missing = [op for layer in program.classes for op in layer.graph.ops if not has_rule(op)]
    if missing:
        places = "; ".join(f"{op.target} in {op.module} ({op.source})" for op in missing[:5])
        raise UnsupportedOpError(
            f"strict=True, but {len(missing)} op(s) have no sharding rule: {places}. "
            "Use strict=False to replicate them; the plan then says what that costs"
        )


def tensor_problem(
    request: Request, local: LocalProgram, mesh: Mesh, costs: CostModel
) -> ShardingProblem:
    """The sharding problem of the tensor axis, pins and all, for one micro-batch per step."""
    rules = _Rules(request, local.graphs)
    return axis_problem(
        request.program, local.graphs, "tp", mesh.tp, costs, request.cluster, stride=1,
        interface_states={
            **rules.between_layers(), **dict.fromkeys(rules.whole_values(), (R,)),
        },
        parameter_states=rules.parameter_states, allowed=rules.allowed,
        saved=local.saved(request.cluster.device.kind),
        state_bytes_per_byte=2.0 + optimizer_states(request.optimizer),
        links=expert_links(request.cluster, mesh.ep, mesh.cp * mesh.tp, mesh.tp),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Rules:
    """What the pins and the shared values leave."""

    request: Request
    graphs: Mapping[str, Graph]
    _shared: frozenset[str] = field(init=False)
    _stream: tuple[int, ...] | None = field(init=False)
    _pinned: dict[str, dict[str, State]] = field(init=False)

    def __post_init__(self) -> None:
        shared = frozenset(c.name for c in self.request.program.classes if c.kind == "shared")
        object.__setattr__(self, "_shared", shared)
        _validate_pins(self.request)
        outputs = (v.type for g in self.graphs.values() for v in g.outputs)
        stream = next((kind.shape for kind in outputs if is_stream(kind)), None)
        object.__setattr__(self, "_stream", stream)
        object.__setattr__(self, "_pinned", self._pinned_parameters())

    def _pinned_parameters(self) -> dict[str, dict[str, State]]:
        """By class: its parameters that are pinned, and how."""
        found: dict[str, dict[str, State]] = {}
        for layer in self.request.program.classes:
            for value in self.graphs[layer.name].parameters:
                states = self.parameter_states(layer, value.name, value.type)
                if layer.name not in self._shared and states:
                    found.setdefault(layer.name, {})[value.name] = states[0]
        return found

    def whole_values(self) -> Iterator[str]:
        """What every rank of the axis holds whole: the batch, shared values, the loss."""
        program = self.request.program
        yield from (v.name for v in program.batch)
        yield program.loss
        for segment in program.segments:
            if segment.layer.kind == "shared":
                yield from segment.outputs

    def between_layers(self) -> dict[str, tuple[State, ...]]:
        """With a pin on sequence parallelism: how activations pass from segment to segment."""
        pinned = self.request.constraints.sequence_parallel
        if pinned is None:
            return {}
        states = (S(_POSITIONS),) if pinned else (R,)
        return {
            segment.bindings[value.name]: states
            for segment in self.request.program.segments
            for value in segment.layer.graph.outputs
            if is_stream(value.type)
        }

    def _follows_pins(self, layer: str, op: Op, strategy: Strategy) -> bool:
        """Pinned weights are used as they rest, and activations pass between them as pinned."""
        resting = self._pinned.get(layer, {})
        for value, state in zip(op.operands, strategy.inputs, strict=True):
            pinned = resting.get(value.name)
            if pinned is not None and pinned.is_split and state != pinned:
                return False
        wanted = self.request.constraints.sequence_parallel
        pairs = zip((*op.operands, *op.outputs), (*strategy.inputs, *strategy.outputs), strict=True)
        streams = [(value.type, state) for value, state in pairs if is_stream(value.type)]
        if wanted is None or not streams:
            return True
        if any(state.is_split and state.dim == _SAMPLES for _, state in streams):
            return False
        between = all(kind.shape == self._stream for kind, _ in streams) and not _has_weights(op)
        if wanted:
            return not between or all(state == S(_POSITIONS) for _, state in streams)
        return not any(
            state.is_split and (between or state.dim == _POSITIONS) for _, state in streams
        )

    def parameter_states(
        self, layer: LayerClass, name: str, kind: TensorType
    ) -> tuple[State, ...] | None:
        if layer.name in self._shared:
            return (R,)
        full_names = [
            segment.bindings[name]
            for segment in self.request.program.segments
            if segment.layer.name == layer.name
        ]
        for pattern, state in self.request.constraints.sharding.items():
            if any(fnmatchcase(full, pattern) for full in full_names) or name == pattern:
                return (State.parse(state),)
        return None

    def allowed(self, layer: str, op: Op, strategy: Strategy) -> bool:
        if is_conversion(op):  # of an outer axis: it keeps its operand's state
            return strategy.inputs == strategy.outputs
        if strategy.implementation == ROWS:  # the context axis is for that
            return False
        if layer in self._shared:  # every rank has the whole batch, and needs no collectives
            return all(s == R for s in (*strategy.inputs, *strategy.outputs))
        if not self._follows_pins(layer, op, strategy):
            return False
        for pattern, state in self.request.constraints.sharding.items():
            if names_op((pattern,), layer, op):
                split = any(s.is_split for s in strategy.inputs)
                return str(strategy.outputs[0]) == state and not (state == str(R) and split)
        return True


def _has_weights(op: Op) -> bool:
    return any(v.type.parametric and v.type.ndim > 1 for v in op.operands)


def _validate_pins(request: Request) -> None:
    """Every sharding pin names something.

    Raises:
        OptionError: naming the pin that does not.
    """
    program: Program = request.program
    for pattern in request.constraints.sharding:
        if any(fnmatchcase(name, pattern) for name in program.parameters):
            continue
        ports = (v.name for c in program.classes for v in c.graph.parameters)
        ops = ((c.name, op) for c in program.classes for op in c.graph.ops)
        if pattern in ports or any(names_op((pattern,), name, op) for name, op in ops):
            continue
        raise OptionError(
            f"constraint sharding[{pattern!r}] expects the name or pattern of a parameter or op "
            "but the program has none of that name; plan.explain(name) knows the names"
        )
