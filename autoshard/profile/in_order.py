"""Time every op of a rank's step, in the order in which a step runs them.

An op that is called again and again by itself finds its operands in caches and gets back the memory
that it has just given up. In a step it does neither, and takes up to twice as long where it only
moves bytes. So all layers are run forward, what backward needs stays alive, then all of them
backward, and each call is timed by itself.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from autoshard.capture.interpret import bind
from autoshard.cost_models.costs import op_key
from autoshard.ir import Graph, Op
from autoshard.profile.inputs import stand_in, tensors_for
from autoshard.profile.measure import Failure, too_large
from autoshard.profile.timing import Timing, elapsed_s, present_device, summarise

SAME_LAYERS = 4
"""As many of equal layers are run as it takes until none finds what another left in a cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpTimes:
    """What one op takes in a step; ``backward`` is ``None`` if it has none."""

    forward: Timing
    backward: Timing | None


def needs_ranks(op: Op) -> bool:
    """Whether the op communicates, so that no process can run it alone."""
    return bool({name for name, _ in op.kwargs} & {"axis", "axes"})


def measure_in_order(
    graphs: Sequence[Graph],
    *,
    device: torch.device | None = None,
    warm_up: int = 1,
    repeats: int = 3,
    least_s: float = 1.5,
) -> dict[str, OpTimes | Failure]:
    """Seconds of every distinct op, by :func:`autoshard.cost_models.costs.op_key`.

    Args:
        graphs: a rank's layers, localised, in the order of forward; of more than ``SAME_LAYERS``
            equal ones the others are left out. Values are made up, also what would come from other
            ranks: ops that communicate are not run.
        device: by default the GPU if there is one.
        warm_up: steps that are not timed.
        repeats: steps that are, at least.
        least_s: and as many more until they took so long: what else a machine does comes and goes
            by the second.
    """
    where = device or present_device()
    failures: dict[str, Failure] = {}
    samples: dict[str, list[tuple[float, float]]] = defaultdict(list)
    try:
        step = _Step(_some_of(graphs, where), where, failures)
    except MemoryError as error:
        failure = Failure(reason=str(error))
        return {op_key(op): failure for g in graphs for op in g.ops if not needs_ranks(op)}
    for _ in range(warm_up):
        step.run()
    start, runs = time.perf_counter(), 0
    while runs < repeats or time.perf_counter() - start < least_s:
        for key, pairs in step.run().items():
            samples[key] += pairs
        runs += 1
    return {**{key: _times(pairs) for key, pairs in samples.items()}, **failures}


def _times(pairs: Sequence[tuple[float, float]]) -> OpTimes:
    forward, backward = ([pair[i] for pair in pairs] for i in (0, 1))
    return OpTimes(
        forward=summarise(forward), backward=summarise(backward) if any(backward) else None
    )


def _some_of(graphs: Sequence[Graph], device: torch.device) -> list[Graph]:
    """As many of equal layers as matter and as memory holds.

    Raises:
        MemoryError: it does not even hold one of each.
    """
    for most in range(SAME_LAYERS, 0, -1):
        counts: dict[int, int] = defaultdict(int)
        chosen = []
        for graph in graphs:
            counts[id(graph)] += 1
            if counts[id(graph)] <= most:
                chosen.append(graph)
        reason = too_large(chosen, device, copies=4)
        if not reason:
            return chosen
    raise MemoryError(reason)


@dataclass(slots=True)
class _Layer:
    """One layer with tensors of its own: constant ones, and the gradients on their way back."""

    graph: Graph
    tensors: Mapping[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        own = {v.name: self.tensors[v.name] for v in self.graph.parameters}
        self.weights = {name: tensor for name, tensor in own.items() if tensor.requires_grad}


@dataclass(frozen=True, slots=True)
class _Call:
    """An op that was run forward and awaits its backward."""

    op: Op
    layer: _Layer
    leaves: Mapping[str, Tensor]
    roots: Mapping[str, Tensor]
    forward_s: float


class _Step:
    """Layers that are run forward and backward as often as one likes.

    Args:
        failures: where ops that raise are put, by key; they are not tried again.
    """

    def __init__(
        self, graphs: Sequence[Graph], device: torch.device, failures: dict[str, Failure]
    ) -> None:
        self._layers = [_Layer(graph, tensors_for(graph, device)) for graph in graphs]
        self._keys = {id(op): op_key(op) for graph in graphs for op in graph.ops}
        self._device = device
        self._failures = failures
        weights = [w for layer in self._layers for w in layer.weights.values()]
        # Between steps it goes over all parameters, and leaves none of them in a cache.
        self._optimizer = torch.optim.AdamW(weights, lr=0.0, fused=True) if weights else None

    def run(self) -> dict[str, list[tuple[float, float]]]:
        """Forward and backward seconds of every call, by key."""
        calls: list[_Call] = []
        for layer in self._layers:
            values = dict(layer.tensors)
            layer.gradients.clear()
            for op in layer.graph.ops:
                if (call := self._forward(op, layer, values)) is not None:
                    calls.append(call)
            del values
        seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
        while calls:
            call = calls.pop()
            key = self._keys[id(call.op)]
            try:
                backward_s = self._backward(call)
            except Exception as error:  # whatever a user's op raises is its measurement's failure
                self._failures[key] = _failure(error)
                continue
            seconds[key].append((call.forward_s, backward_s))
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad()
        return {key: pairs for key, pairs in seconds.items() if key not in self._failures}

    def _forward(self, op: Op, layer: _Layer, values: dict[str, Tensor]) -> _Call | None:
        """Run an op, or make its results up; ``None`` if they were."""
        key = self._keys[id(op)]
        if not needs_ranks(op) and key not in self._failures:
            leaves = {v.name: _leaf(values[v.name], v.type.differentiable) for v in op.operands}
            results: list[tuple[Tensor, ...]] = []
            try:
                call = bind(op, leaves, self._device)
                forward_s = elapsed_s(lambda: results.append(call()), self._device)
            except Exception as error:
                self._failures[key] = _failure(error)
            else:
                made = dict(zip((v.name for v in op.outputs), results[0], strict=True))
                values.update((name, tensor.detach()) for name, tensor in made.items())
                roots = {name: tensor for name, tensor in made.items() if tensor.requires_grad}
                return _Call(op, layer, leaves, roots, forward_s)
        values.update((v.name, stand_in(v, self._device)) for v in op.outputs)
        return None

    def _backward(self, call: _Call) -> float:
        gradients, weights = call.layer.gradients, call.layer.weights
        wanted = {name: leaf for name, leaf in call.leaves.items() if leaf.requires_grad}
        arrived = [gradients.pop(name, None) for name in call.roots]
        if not wanted or not call.roots:
            return 0.0
        roots = list(call.roots.values())
        pairs = zip(roots, arrived, strict=True)
        given = [torch.ones_like(root) if g is None else g for root, g in pairs]
        found: list[tuple[Tensor | None, ...]] = []
        backward_s = elapsed_s(
            lambda: found.append(
                torch.autograd.grad(roots, list(wanted.values()), given, allow_unused=True)
            ),
            self._device,
        )
        for name, gradient in zip(wanted, found[0], strict=True):
            if gradient is None:
                continue
            known = weights[name].grad if name in weights else gradients.get(name)
            total = gradient if known is None else known + gradient
            if name in weights:
                weights[name].grad = total
            else:
                gradients[name] = total
        return backward_s


def _leaf(tensor: Tensor, differentiable: bool) -> Tensor:
    return tensor.detach().requires_grad_(differentiable and tensor.is_floating_point())


def _failure(error: Exception) -> Failure:
    return Failure(reason=f"{type(error).__name__}: {error}".splitlines()[0])
