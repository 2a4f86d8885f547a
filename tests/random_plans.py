"""Plans drawn at random: any legal assignment must train to the numbers of the plain model.

For every op a random strategy of those that the registry offers, for every parameter a random
state at rest, for every value between layers a random state that all its segments agree on; what
does not match is converted, as always. Such plans are far from good ones, and so go through
conversions and combinations that no planner would choose.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from plans import make_plan

from autoshard.ir import Graph, Op, Program, Value
from autoshard.passes.apply_axis import apply_axis
from autoshard.placement.hints import block_hints
from autoshard.placement.registry import strategies
from autoshard.placement.state import P, R, S, State, V
from autoshard.placement.strategy import Strategy
from autoshard.plan.batch_axis import split_batch
from autoshard.plan.plan import Assignment, Plan, Recompute, SegmentPlan, StagePlan
from autoshard.plan.sharding import Port, interfaces, parameter_groups
from autoshard.plan.sharding_program import canonical

MESHES = {(1, 4): 4, (2, 2): 4, (4, 1): 2, (2, 4): 1, (4, 2): 1, (1, 8): 1}
"""Degrees of data and tensor parallelism, and how often they are drawn: 8 ranks cost the most."""


def draw_plan(program: Program, seed: int) -> Plan:
    """A legal plan; the same for the same program and seed."""
    rng = random.Random(seed)
    dp, tp = rng.choices(list(MESHES), list(MESHES.values()))[0]
    graphs = {c.name: c.graph for c in program.classes}
    layers: dict[str, dict[str, Assignment]] = {c.name: {} for c in program.classes}
    count = rng.choice([1, 1, 2]) if program.batch_size % (2 * dp) == 0 else 1
    if count > 1 and split_batch(program, graphs, dp * count).coupled:
        count = 1
    for axis, n in (("dp", dp), ("micro", count), ("tp", tp)):
        if n == 1:
            continue
        if axis == "tp" or (axis == "dp" and count == 1 and rng.random() < 0.5):
            found: Mapping[str, Assignment] = _Drawing(rng, program, graphs, axis, n).run()
        else:
            split = split_batch(program, graphs, n)
            found = split.layers or _Drawing(rng, program, graphs, axis, n).run()
        for name, assignment in found.items():
            layers[name][axis] = assignment
            graphs[name] = apply_axis(graphs[name], assignment, axis, n)
    base = make_plan(program)
    stages = _drawn_stages(rng, base.stages[0])
    return replace(
        base, world_size=dp * tp, mesh=replace(base.mesh, dp=dp, tp=tp),
        micro_batch_size=program.batch_size // dp // count, layers=layers, seed=seed,
        stages=stages, virtual_stages=len(stages),
    )  # fmt: skip


def _drawn_stages(rng: random.Random, all_in_one: StagePlan) -> tuple[StagePlan, ...]:
    """One to three stages; some segments are recomputed."""
    segments: list[SegmentPlan] = [
        replace(s, recompute=Recompute(mode=rng.choice(["none", "none", "full"])))
        for s in all_in_one.segments
    ]
    cuts = sorted(rng.sample(range(1, len(segments)), rng.randint(0, min(2, len(segments) - 1))))
    ends = zip([0, *cuts], [*cuts, len(segments)], strict=True)
    return tuple(replace(all_in_one, segments=tuple(segments[a:b])) for a, b in ends)


@dataclass
class _Drawing:
    """One axis of a plan."""

    rng: random.Random
    program: Program
    graphs: Mapping[str, Graph]
    axis: str
    n: int

    def run(self) -> dict[str, Assignment]:
        self.offered = {
            name: {op.name: strategies(op, self.n, block_hints(graph)) for op in graph.ops}
            for name, graph in self.graphs.items()
        }
        between = self._interfaces()
        rest = self._parameters()
        return {
            name: Assignment(
                ops={op.name: str(self._strategy(name, op, rest)) for op in graph.ops},
                inputs={v.name: str(between[name, v.name]) for v in graph.inputs},
                parameters={v.name: str(rest[name, v.name]) for v in graph.parameters},
                outputs={v.name: str(between[name, v.name]) for v in graph.outputs},
            )
            for name, graph in self.graphs.items()
        }

    def _strategy(self, layer: str, op: Op, rest: Mapping[Port, State]) -> Strategy:
        """What an op writes to must be in its state at rest."""
        written = {v.name for v in op.mutates}
        shared = self._is_shared(layer) and self.axis == "tp"  # replicated by every planner
        options = [
            s
            for s in self.offered[layer][op.name]
            if not (shared and s.splits_work)
            and all(
                v.name not in written or canonical(v, state) == rest[layer, v.name]
                for v, state in zip(op.operands, s.inputs, strict=True)
            )
        ]
        weights = [4 if s.splits_work else 1 for s in options]
        return self.rng.choices(options, weights)[0]

    def _is_shared(self, layer: str) -> bool:
        return any(
            s.layer.name == layer and s.layer.kind == "shared" for s in self.program.segments
        )

    def _interfaces(self) -> dict[Port, State]:
        """The state of every class input and output."""
        given: dict[str, Sequence[State]] = {}
        for value in self.program.batch:
            cut = self.axis == "dp" and value.type.per_sample
            given[value.name] = (S(0),) if cut else (R,)
        given[self.program.loss] = (P,) if self.axis == "dp" else (R,)
        found: dict[Port, State] = {}
        for group in interfaces(self.program, given):
            layer, name = group.ports[0]
            value = self.graphs[layer].values[name]
            replicated = self.axis == "tp" and any(self._is_shared(c) for c, _ in group.ports)
            states = group.states or ((R,) if replicated else self._states_of(value))
            state = self.rng.choice(states)
            found.update((port, state) for port in group.ports)
        return found

    def _states_of(self, value: Value) -> tuple[State, ...]:
        splits = [
            S(d) for d, size in enumerate(value.type.shape) if size >= self.n and not size % self.n
        ]
        whole = [R, V, P] if value.type.differentiable else [R]
        return (*whole, *splits, *splits)

    def _parameters(self) -> dict[Port, State]:
        """The state at rest of every class parameter."""
        written = self._written()
        found: dict[Port, State] = {}
        for group in parameter_groups(self.program):
            values = [self.graphs[c].values[name] for c, name in group.ports]
            trained = any(v.type.differentiable for v in values)
            given = [written[port] for port in group.ports if port in written]
            if given:
                (state,) = set(given)
            elif self.axis == "dp":  # gradients are reduced once per step
                state = V if trained else R
            elif any(self._is_shared(c) for c, _ in group.ports):
                state = R
            else:
                state = self.rng.choice(self._rest_states(group.ports, trained))
            found.update((port, canonical(v, state))
                         for port, v in zip(group.ports, values, strict=True))  # fmt: skip
        return found

    def _written(self) -> dict[Port, State]:
        """Buffers lie at rest as one strategy of the op that writes to them has them."""
        found: dict[Port, State] = {}
        for layer, graph in self.graphs.items():
            for op in graph.ops:
                names = {v.name for v in op.mutates}
                if not names:
                    continue
                chosen = self.rng.choice(self._allowed(layer, op))
                for value, state in zip(op.operands, chosen.inputs, strict=True):
                    if value.name in names:
                        found[layer, value.name] = canonical(value, state)
        return found

    def _allowed(self, layer: str, op: Op) -> list[Strategy]:
        """On ``dp`` buffers are whole: ranks take them from rank 0 after a checkpoint."""
        if self.axis != "dp":
            return list(self.offered[layer][op.name])
        return [
            s
            for s in self.offered[layer][op.name]
            if all(
                v not in op.mutates or state == R
                for v, state in zip(op.operands, s.inputs, strict=True)
            )
        ]

    def _rest_states(self, ports: Sequence[Port], trained: bool) -> list[State]:
        """Whole, and as any op would like to have it."""
        known = {
            canonical(v, state)
            for layer, name in ports
            for op in self.graphs[layer].ops
            for s in self.offered[layer][op.name]
            for v, state in zip(op.operands, s.inputs, strict=True)
            if v.name == name
        }
        splits = sorted((s for s in known if s.is_split), key=str)
        return [R, *([V] if trained else []), *splits, *splits]
