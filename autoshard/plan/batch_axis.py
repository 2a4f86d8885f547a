"""How the batch is split: over data-parallel ranks (``dp``) and over micro-batches (``micro``).

Both split the samples, so both are found by one walk through the program: batch tensors start as
``S(0)``, parameters as ``V``, and each op takes the strategy that fits the states that its operands
already have, without any communication. The loss comes out as ``P``: each rank and each
micro-batch holds an addend of the global loss.

Where no strategy fits, samples interact: batch norm, in-batch negatives. Over ranks that is still
exact, with collectives (:mod:`autoshard.plan.sharding` finds them); over micro-batches it is not,
since they run one after the other. :attr:`BatchSplit.coupled` names the ops.

Values without parameters (positions, masks, the number of targets that a mean divides by) are the
exception: they are known before the first micro-batch starts, so they may be had whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from autoshard.ir import Graph, LayerClass, Op, Program, Segment
from autoshard.placement.hints import block_hints
from autoshard.placement.registry import strategies
from autoshard.placement.state import P, R, S, State, V
from autoshard.placement.strategy import Strategy
from autoshard.plan.plan import Assignment


@dataclass(frozen=True, slots=True)
class BatchSplit:
    """The outcome of the walk.

    Attributes:
        layers: class name -> its assignment on the axis; empty if samples interact.
        coupled: the ops at which samples interact, as text that names the user's line.
    """

    layers: Mapping[str, Assignment]
    coupled: tuple[str, ...] = ()


class _Coupled(Exception):
    """An op has no strategy that fits, or none that splits its work.

    Attributes:
        wishes: values without samples (by name) that would have to be split for it to fit, such
            as a class token that is expanded to the size of the batch.
        fits: the op could run on all samples everywhere.
    """

    def __init__(self, op: Op, wishes: Mapping[str, State], *, fits: bool) -> None:
        self.op = op
        self.wishes = wishes
        self.fits = fits


@dataclass
class _Walk:
    """State of values by program name, while walking.

    ``shared`` names the values without parameters; any of them may be asked for whole instead of
    in its own state, and ``whole`` remembers which were. ``constants`` do not depend on the batch
    (the zeros that a recurrence starts from), so they come in whichever state is asked for first.
    ``wishes`` are states, by class and value, that an earlier walk found to be needed;
    ``settled`` are ops that must run on all samples everywhere, by class and name.
    """

    n: int
    wishes: Mapping[tuple[str, str], State]
    settled: Set[tuple[str, str]]
    states: dict[str, State] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)
    whole: set[str] = field(default_factory=set)
    constants: dict[str, tuple[Strategy, ...]] = field(default_factory=dict)

    def constant(self, name: str, need: State) -> bool:
        """``name`` is a constant that can be made in state ``need``."""
        return any(s.outputs[0] == need for s in self.constants.get(name, ()))


def split_batch(program: Program, graphs: Mapping[str, Graph], n: int) -> BatchSplit:
    """Assign every layer class for an axis of ``n`` ranks or micro-batches that split the batch.

    Args:
        program: says how the layers are wired.
        graphs: class name -> the graph to assign (as earlier axes left it).
        n: ranks or micro-batches; dim 0 of every per-sample input is split in ``n``.
    """
    wishes: dict[tuple[str, str], State] = {}
    denied: set[tuple[str, str]] = set()
    settled: set[tuple[str, str]] = set()
    while True:
        try:
            return BatchSplit(_walk(program, graphs, _Walk(n, wishes, settled)))
        except _CoupledIn as failure:
            op, layer = failure.reason.op, failure.segment.layer.name
            made = _made_where(program, failure)
            new = {k: state for k, state in made.items() if k not in wishes and k not in denied}
            if new:
                wishes |= new
            elif failure.reason.fits:
                settled.add((layer, op.name))
            elif (layer, op.output.name) in wishes:  # its op cannot make it so
                denied.add((layer, op.output.name))
                del wishes[layer, op.output.name]
            else:
                return BatchSplit({}, (_describe(op),))


class _CoupledIn(Exception):
    """Where an op did not fit."""

    def __init__(self, segment: Segment, reason: _Coupled) -> None:
        self.segment = segment
        self.reason = reason


def _made_where(program: Program, failure: _CoupledIn) -> dict[tuple[str, str], State]:
    """Wishes by the class that makes the value, which may be another than the one that asks."""
    own = failure.segment
    makers = {
        segment.bindings[v.name]: (segment.layer.name, v.name)
        for segment in program.segments
        for v in segment.layer.graph.outputs
    }
    inputs = {v.name for v in own.layer.graph.inputs}
    return {
        makers[own.bindings[name]] if name in inputs else (own.layer.name, name): state
        for name, state in failure.reason.wishes.items()
        if name not in inputs or own.bindings[name] in makers
    }


def _walk(program: Program, graphs: Mapping[str, Graph], walk: _Walk) -> dict[str, Assignment]:
    for value in program.batch:
        walk.states[value.name] = S(0) if value.type.per_sample else R
        walk.shared.add(value.name)
    found: dict[str, Assignment] = {}
    for segment in program.segments:
        layer, graph = segment.layer, graphs[segment.layer.name]
        if layer.name not in found:
            try:
                found[layer.name] = _assign(layer, graph, segment.bindings, walk)
            except _Coupled as reason:
                raise _CoupledIn(segment, reason) from None
        for value in graph.outputs:
            name = segment.bindings[value.name]
            walk.states[name] = State.parse(found[layer.name].outputs[value.name])
            if layer.kind == "shared":
                walk.shared.add(name)
        if layer.kind == "shared":
            _note_constants(graph, segment.bindings, walk)
    return _with_shared_states(program, found, walk)


def _note_constants(graph: Graph, bindings: Mapping[str, str], walk: _Walk) -> None:
    hints = block_hints(graph)
    for op in graph.ops:
        if op.output.name in bindings and not any(v.type.per_sample for v in op.operands):
            walk.constants[bindings[op.output.name]] = tuple(
                s for s in strategies(op, walk.n, hints) if all(i == R for i in s.inputs)
            )


def _assign(
    layer: LayerClass, graph: Graph, bindings: Mapping[str, str], walk: _Walk
) -> Assignment:
    hints = block_hints(graph)
    states: dict[str, State] = {}
    optional: set[str] = set()
    for value in graph.inputs:
        states[value.name] = walk.states[bindings[value.name]]
        if bindings[value.name] in walk.shared:
            optional.add(value.name)
    for value in graph.parameters:
        states[value.name] = V if value.type.differentiable else R
    chosen: dict[str, str] = {}
    for op in graph.ops:
        offered = strategies(op, walk.n, hints)
        wish = walk.wishes.get((layer.name, op.output.name))
        strategy = _choose(op, states, optional, offered, walk, bindings, wish)
        if strategy is None or _idles(op, strategy, states, (layer.name, op.name) in walk.settled):
            wishes = _wishes(op, states, optional, offered)
            if strategy is None or wishes:
                raise _Coupled(op, wishes, fits=strategy is not None)
        chosen[op.name] = str(strategy)
        for value, need in zip(op.operands, strategy.inputs, strict=True):
            name = bindings.get(value.name, "")
            if states[value.name] == R and walk.constant(name, need):
                states[value.name] = walk.states[name] = need
            elif value.name in optional and need == R and states[value.name] != R and name:
                walk.whole.add(name)
        for value, state in zip(op.outputs, strategy.outputs, strict=True):
            states[value.name] = state
            if layer.kind == "shared":
                optional.add(value.name)
    outputs = {v.name: states[v.name] for v in graph.outputs}
    for value in graph.outputs:
        if value.type.shape == () and outputs[value.name] == V and value.type.differentiable:
            outputs[value.name] = P  # a loss that depends on no sample: every rank gives 1/n of it
    return Assignment(
        ops=chosen,
        inputs={v.name: str(walk.states[bindings[v.name]]) for v in graph.inputs},
        parameters={v.name: str(states[v.name]) for v in graph.parameters},
        outputs={k: str(s) for k, s in outputs.items()},
    )


def _choose(
    op: Op,
    states: Mapping[str, State],
    optional: set[str],
    offered: tuple[Strategy, ...],
    walk: _Walk,
    bindings: Mapping[str, str],
    wish: State | None,
) -> Strategy | None:
    """The strategy that fits best: split work first, then the fewest adaptations."""
    best: tuple[tuple[bool, int], Strategy] | None = None
    batched = any(v.type.per_sample for v in (*op.operands, *op.outputs))
    for strategy in offered:
        if wish is not None and strategy.outputs[0] != wish:
            continue
        if wish is None and strategy.splits_work and not batched:
            continue
        if _unites_samples(op, strategy):
            continue
        adaptations = 0
        for value, need in zip(op.operands, strategy.inputs, strict=True):
            if walk.constant(bindings.get(value.name, ""), need):
                continue
            step = _adaptation(states[value.name], need, value.name in optional)
            if step is None:
                break
            adaptations += step
        else:
            if op.mutates and strategy.implementation:
                continue  # statistics over all samples: not without communication
            rank = (not strategy.splits_work, adaptations)
            if best is None or rank < best[0]:
                best = (rank, strategy)
    return best[1] if best else None


def _idles(op: Op, strategy: Strategy, states: Mapping[str, State], settled: bool) -> bool:
    """Every rank would work on all samples, though samples of its own arrive."""
    arriving = any(states[v.name].is_split for v in op.operands)
    return arriving and not strategy.splits_work and not settled


def _unites_samples(op: Op, strategy: Strategy) -> bool:
    """Every part of the batch would have a trained result of all samples, computed again by each.

    Right for loss and gradients, but the work is not split, and statistics would be updated by
    every micro-batch.
    """
    return any(
        v.type.per_sample and v.type.parametric and s.is_whole
        for v, s in zip(op.outputs, strategy.outputs, strict=True)
    )


def _adaptation(have: State, need: State, optional: bool) -> int | None:
    """How far a state is from what is needed without communication; ``None``: out of reach."""
    if have == need:
        return 0
    if optional and need == R:
        return 1
    if optional and have == R and need == S(0):
        return 3  # had whole and cut
    return 2 if have == V and need == P else None


def _wishes(
    op: Op, states: Mapping[str, State], optional: set[str], offered: tuple[Strategy, ...]
) -> dict[str, State]:
    """What would have to be split, though it depends on no sample, for some strategy to fit."""
    for strategy in offered:
        wishes: dict[str, State] = {}
        for value, need in zip(op.operands, strategy.inputs, strict=True):
            if _adaptation(states[value.name], need, value.name in optional) is None:
                if value.type.per_sample or not need.is_split:
                    break
                wishes[value.name] = need
        else:
            if strategy.splits_work and wishes:
                return wishes
    return {}


def _with_shared_states(
    program: Program, found: Mapping[str, Assignment], walk: _Walk
) -> dict[str, Assignment]:
    """Settle the states in which shared values pass: as their consumers asked for them.

    A value that anybody asked for whole is handed out whole; who needs a part of it takes it.
    """
    batch = {v.name for v in program.batch}
    result = dict(found)
    for segment in program.segments:
        old = result[segment.layer.name]
        ops, inputs, outputs = dict(old.ops), dict(old.inputs), dict(old.outputs)
        for ports in (inputs, outputs):
            for port in ports:
                name = segment.bindings[port]
                if name in walk.shared and name not in batch:
                    ports[port] = str(R if name in walk.whole else walk.states[name])
        if segment.layer.kind == "shared":
            producers = segment.layer.graph.producers()
            for port in outputs:
                for strategy in walk.constants.get(segment.bindings[port], ()):
                    if str(strategy.outputs[0]) == outputs[port]:
                        ops[producers[port].name] = str(strategy)
        result[segment.layer.name] = Assignment(
            ops=ops, inputs=inputs, parameters=old.parameters, outputs=outputs
        )
    return result


def _describe(op: Op) -> str:
    place = f" at {op.source}" if op.source else ""
    return f"{op.target.split('.')[1]} in {op.module or 'the model'}{place}"
