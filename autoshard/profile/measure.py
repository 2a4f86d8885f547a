"""Forward and backward time and memory of a graph on the present device.

A failed measurement is a :class:`Failure` with its reason, never a number.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoshard.capture.interpret import run_graph
from autoshard.ir import Graph, Value
from autoshard.profile.inputs import tensors_for
from autoshard.profile.timing import Timing, elapsed_s, present_device, summarise


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What a graph takes.

    Attributes:
        backward: ``None`` if nothing in the graph needs a gradient.
        saved_bytes: storages that autograd holds between forward and backward, parameters aside.
        peak_bytes: allocated at most beyond parameters and inputs; ``None`` on a CPU, whose
            allocator does not count.
    """

    forward: Timing
    backward: Timing | None
    saved_bytes: int
    peak_bytes: int | None

    @property
    def forward_s(self) -> float:
        return self.forward.median_s

    @property
    def backward_s(self) -> float:
        return self.backward.median_s if self.backward else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A measurement that could not be made, and why."""

    reason: str


def measure_graph(
    graph: Graph,
    *,
    device: torch.device | None = None,
    warm_up: int = 2,
    repeats: int = 7,
    max_s: float = 2.0,
) -> Measurement | Failure:
    """Run a graph forward and backward with real tensors of its own shapes.

    Args:
        graph: a layer class, global or localised, without collectives of axes with more than one
            rank.
        device: where; by default the GPU if there is one.
        warm_up: runs that are not timed.
        repeats: runs that are; at least three, fewer than asked once they took ``max_s``.
    """
    where = device or present_device()
    try:
        if reason := too_large([graph], where):
            return Failure(reason=reason)
        env = tensors_for(graph, where)
        return _measure(graph, env, where, warm_up, repeats, max_s)
    except Exception as error:  # whatever a user's op raises is this measurement's failure
        return Failure(reason=f"{type(error).__name__}: {error}".splitlines()[0])
    finally:
        if where.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def _measure(
    graph: Graph,
    env: dict[str, Tensor],
    device: torch.device,
    warm_up: int,
    repeats: int,
    max_s: float,
) -> Measurement:
    leaves = [env[v.name] for v in _wanted(graph, env)]
    forward_samples: list[float] = []
    backward_samples: list[float] = []
    peak = 0
    saved = _saved_bytes(graph, env)
    spent_s = 0.0
    for run in range(warm_up + repeats):
        held = _start_counting(device)
        outputs: list[tuple[Tensor, ...]] = []
        forward_s = elapsed_s(lambda: outputs.append(run_graph(graph, env, device)), device)  # noqa: B023
        roots = [t for t in outputs[0] if t.requires_grad]
        backward_s = 0.0
        if roots and leaves:
            gradients = [torch.ones_like(t) for t in roots]
            backward_s = elapsed_s(
                lambda: torch.autograd.grad(roots, leaves, gradients, allow_unused=True),  # noqa: B023
                device,
            )
        peak = max(peak, _allocated_since(held, device))
        if run >= warm_up:
            forward_samples.append(forward_s)
            backward_samples.append(backward_s)
            spent_s += forward_s + backward_s
            if len(forward_samples) >= 3 and spent_s > max_s:
                break
    return Measurement(
        forward=summarise(forward_samples),
        backward=summarise(backward_samples) if any(backward_samples) else None,
        saved_bytes=saved,
        peak_bytes=peak if device.type == "cuda" else None,
    )


def _wanted(graph: Graph, env: dict[str, Tensor]) -> list[Value]:
    return [v for v in (*graph.inputs, *graph.parameters) if env[v.name].requires_grad]


def _saved_bytes(graph: Graph, env: dict[str, Tensor]) -> int:
    parameters = {env[p.name].untyped_storage()._cdata for p in graph.parameters}
    found: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run_graph(graph, env)
    return sum(found.values())


def _start_counting(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _allocated_since(held: int, device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else 0


def too_large(graphs: Sequence[Graph], device: torch.device, *, copies: int = 2) -> str:
    """A reason not to try, before the machine starts swapping; empty if there is none.

    Args:
        copies: tensors like each value that are there at once: itself, its gradient, ...
    """
    needed = copies * sum(v.type.nbytes for graph in graphs for v in graph.values.values())
    available = _available_bytes(device)
    if needed > available:
        return f"needs about {needed} bytes but {available} are free on {device.type}"
    return ""


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            facts = dict(line.split(":", 1) for line in lines)
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 1 << 62
