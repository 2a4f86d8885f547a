"""Measure distinct ops and layers once, and keep the results on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from autoshard.cost_models.compute import OpCost
from autoshard.cost_models.costs import op_key
from autoshard.cost_models.work import work_of
from autoshard.ir import Graph, Op
from autoshard.profile.cache import Cache, key_of
from autoshard.profile.companions import companions
from autoshard.profile.in_order import OpTimes, measure_in_order, needs_ranks
from autoshard.profile.measure import Failure, Measurement, measure_graph
from autoshard.profile.timing import environment, present_device, time_calls

Step = Sequence[Graph]
"""The layers that a rank runs forward, in order, and backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpProfile:
    """What was measured of a set of ops.

    Attributes:
        table: by :func:`autoshard.cost_models.costs.op_key`; for ``MeasuredCosts``.
        failures: key -> reason, of ops that could not be measured.
    """

    table: Mapping[str, OpCost]
    failures: Mapping[str, str] = field(default_factory=dict)


def profile_ops(
    steps: Sequence[Step],
    *,
    processes: int = 1,
    cache: Cache | None = None,
) -> OpProfile:
    """Measure each distinct op of some ranks' steps, at its (local) shapes and in its place.

    Args:
        steps: localised graphs; ops that need other ranks are left to the analytic costs.
        processes: as many compute at once, as they will on the cores of this machine.
        cache: ``None``: the user's own on disk.
    """
    store = cache if cache is not None else Cache()
    where = present_device()
    facts = {**environment(where), "processes": str(processes)}
    distinct = {op_key(op): op for step in steps for graph in step for op in graph.ops}
    distinct = {key: op for key, op in distinct.items() if _measurable(op)}
    names = {key: key_of("op in order", key, facts) for key in distinct}
    failures: dict[str, str] = {}
    missing = {key for key, name in names.items() if store.get(name) is None}
    unknown = [step for step in steps if _holds(step, missing)]
    if unknown:
        with companions(processes - 1, unknown):
            for step in unknown:
                for key, found in measure_in_order(step).items():
                    if isinstance(found, Failure):  # not kept on disk: it may pass next time
                        failures[key] = found.reason
                    elif key in missing:
                        store.put(names[key], msgspec.to_builtins(found), note=key)
                        missing.discard(key)
    engine_s = _engine_s(where)
    entries = {key: store.get(name) for key, name in names.items()}
    table = {key: _cost_of(distinct[key], e, engine_s) for key, e in entries.items() if e}
    return OpProfile(table=table, failures={k: r for k, r in failures.items() if k in distinct})


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
    if needs_ranks(op):
        return False
    work = work_of(op)
    return work.forward.kernels + work.backward.kernels > 0


def _holds(step: Step, keys: set[str]) -> bool:
    return any(op_key(op) in keys for graph in step for op in graph.ops)


def _cost_of(op: Op, entry: Mapping[str, Any], engine_s: float) -> OpCost:
    """Less what entering the autograd engine takes, which a step does once and not for every op.

    The mean of all calls, since a step is the sum of them, those that were disturbed included.
    """
    measured = msgspec.convert(entry, OpTimes)
    backward_s = measured.backward.mean_s if measured.backward else 0.0
    work = work_of(op)
    return OpCost(
        measured.forward.mean_s,
        max(backward_s - engine_s, 0.1 * backward_s),
        work.forward.flops + sum(p.flops for p in work.forward.products),
        work.backward.flops + sum(p.flops for p in work.backward.products),
        "measured",
    )


def _engine_s(device: torch.device) -> float:
    """What the autograd engine takes for a backward in which nothing is computed."""
    x = torch.ones(1, device=device, requires_grad=True)
    out, ones = x.view_as(x), torch.ones(1, device=device)
    backward = time_calls(
        lambda: torch.autograd.grad([out], [x], [ones], retain_graph=True),
        device=device, warm_up=10, repeats=50,
    )  # fmt: skip
    return backward.median_s
