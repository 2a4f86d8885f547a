"""Measure distinct ops and layers once, and keep the results on disk."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from autoshard.cluster import Device
from autoshard.cost_models.compute import OpCost, op_cost
from autoshard.cost_models.costs import op_key
from autoshard.cost_models.work import work_of
from autoshard.ir import Graph, Op
from autoshard.profile.cache import Cache, key_of
from autoshard.profile.measure import Failure, Measurement, graph_of, measure_graph
from autoshard.profile.timing import environment, present_device, time_calls


@dataclass(frozen=True, slots=True, kw_only=True)
class OpProfile:
    """What was measured of a set of ops.

    Attributes:
        table: by :func:`autoshard.cost_models.costs.op_key`; for ``MeasuredCosts``.
        failures: key -> reason, of ops that could not be measured.
        skipped: keys that the time limit left out.
    """

    table: Mapping[str, OpCost]
    failures: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


def profile_ops(
    ops: Iterable[Op],
    device: Device,
    *,
    cache: Cache | None = None,
    time_limit_s: float | None = None,
    repeats: int = 7,
) -> OpProfile:
    """Measure each distinct op at its (local) shapes, the most expensive ones first.

    Args:
        ops: of localised graphs; those that need other ranks are left to the analytic costs.
        device: for the analytic figures that say which ops are worth measuring.
        cache: ``None``: the user's own on disk.
        time_limit_s: start no further measurement after this long.
    """
    store = cache if cache is not None else Cache()
    where = present_device()
    facts = environment(where)
    distinct = {op_key(op): op for op in ops if _measurable(op)}
    order = sorted(distinct, key=lambda k: (-op_cost(distinct[k], device).total_s, k))
    table: dict[str, OpCost] = {}
    failures: dict[str, str] = {}
    skipped: list[str] = []
    overhead_s = _overhead_s(where)
    start = time.perf_counter()
    for key in order:
        name = key_of("op", key, facts)
        entry = store.get(name)
        if entry is None:
            if time_limit_s is not None and time.perf_counter() - start > time_limit_s:
                skipped.append(key)
                continue
            result = measure_graph(graph_of(distinct[key]), repeats=repeats, max_s=0.5)
            if isinstance(result, Failure):  # not kept on disk: it may pass next time
                failures[key] = result.reason
                continue
            entry = msgspec.to_builtins(result)
            store.put(name, entry, note=key)
        table[key] = _cost_of(distinct[key], entry, overhead_s)
    return OpProfile(table=table, failures=failures, skipped=tuple(skipped))


def profile_layer(
    graph: Graph, *, cache: Cache | None = None, repeats: int = 7
) -> Measurement | Failure:
    """Forward and backward time and memory of one distinct layer, from the cache if it is there."""
    store = cache if cache is not None else Cache()
    name = key_of("layer", str(graph), environment())
    entry = store.get(name)
    if entry is not None:
        return msgspec.convert(entry, Measurement)
    result = measure_graph(graph, repeats=repeats)
    if isinstance(result, Measurement):
        store.put(name, msgspec.to_builtins(result), note="layer")
    return result


def _measurable(op: Op) -> bool:
    """It does something, and alone: no other ranks are needed."""
    names = {name for name, _ in op.kwargs}
    if names & {"axis", "axes"}:
        return False
    work = work_of(op)
    return work.forward.kernels + work.backward.kernels > 0


def _cost_of(op: Op, entry: Mapping[str, Any], overhead_s: tuple[float, float]) -> OpCost:
    """Less what calling the graph and the autograd engine by itself takes, once per measurement."""
    measured = msgspec.convert(entry, Measurement)
    forward_s, backward_s = measured.forward_s, measured.backward_s
    work = work_of(op)
    return OpCost(
        max(forward_s - overhead_s[0], 0.1 * forward_s),
        max(backward_s - overhead_s[1], 0.1 * backward_s),
        work.forward.flops + sum(p.flops for p in work.forward.products),
        work.backward.flops + sum(p.flops for p in work.backward.products),
        "measured",
    )


def _overhead_s(device: torch.device) -> tuple[float, float]:
    """What an empty measurement takes, forward (interpreter) and backward (engine)."""
    from autoshard.capture.interpret import run_graph
    from autoshard.ir import TensorType, Value

    kind = TensorType((1,), torch.float32, True)
    x, y = Value("x", kind), Value("y", kind)
    graph = graph_of(Op("y", "aten.view_as.default", (x, x), (), (y,)))
    env = {"x": torch.ones(1, device=device, requires_grad=True)}
    forward = time_calls(lambda: run_graph(graph, env), device=device, warm_up=10, repeats=50)
    out = run_graph(graph, env)[0]
    ones = torch.ones_like(out)
    backward = time_calls(
        lambda: torch.autograd.grad(out, env["x"], ones, retain_graph=True),
        device=device, warm_up=10, repeats=50,
    )  # fmt: skip
    return forward.median_s, backward.median_s
