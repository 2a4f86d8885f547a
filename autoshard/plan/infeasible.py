"""Why nothing fits, and what would: suggestions are tried before they are made."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import replace

from autoshard.errors import InfeasibleError, OptionError
from autoshard.options import Constraints
from autoshard.plan.request import Request
from autoshard.plan.space import Configuration
from autoshard.plan.staged_plan import Infeasible
from autoshard.report.units import nbytes

MOST_DOUBLINGS = 6
"""World sizes of up to so many times twice the present one are tried."""
MOST_LOOKS = 20
"""Configurations of which it is found out what they lack to the byte."""
_PINS_OF_MEMORY = ("recompute", "data_parallel", "micro_batch_size", "schedule", "stages",
    "sharding", "pp", "dp", "tp", "memory_bytes",
)  # fmt: skip


def lacking_least(
    rejected: Mapping[Configuration, Infeasible],
    lack_exactly: Callable[[Configuration], Infeasible | None],
) -> Infeasible | None:
    """The configuration that lacks least, looking closer where only a bound is known.

    Configurations are taken in the order of what they lack at least, so the first of which it is
    known exactly is the nearest. After ``MOST_LOOKS`` the closest bound has to do.
    """
    queue = [(found.missing_bytes, i) for i, found in enumerate(rejected.values())]
    heapq.heapify(queue)
    lacks = list(rejected.values())
    for _ in range(MOST_LOOKS):
        if not queue or lacks[queue[0][1]].exact:
            break
        _, index = heapq.heappop(queue)
        found = lack_exactly(lacks[index].configuration)
        if found is not None:
            lacks[index] = found
            heapq.heappush(queue, (found.missing_bytes, index))
    return lacks[queue[0][1]] if queue else None


def why_infeasible(
    request: Request, nearest: Infeasible | None, is_feasible: Callable[[Request], bool]
) -> InfeasibleError:
    """The error for a request without a plan.

    Args:
        nearest: the configuration that lacks least.
        is_feasible: whether another request has a plan.
    """
    program, cluster = request.program, request.cluster
    text = (
        f"no plan for {program.model_name or 'the model'} fits on {request.world_size} x "
        f"{cluster.device.name} ({nbytes(request.memory_bytes)} each)"
    )
    if nearest is not None and nearest.missing_bytes < float("inf"):
        missing, least = nearest.missing_bytes, "" if nearest.exact else "at least "
        text += (
            f": the nearest, {nearest.configuration}, lacks {least}{nbytes(missing)} "
            f"({int(missing)} bytes) on stage {nearest.stage}"
        )
        if request.constraints.recompute is None:
            text += " even with full recompute"
    elif nearest is not None:
        text += f": {nearest.reason}"
    return InfeasibleError(f"{text}. {_suggestion(request, is_feasible)}")


def _suggestion(request: Request, is_feasible: Callable[[Request], bool]) -> str:
    """The first of these that leads to a plan: without one of the pins, with more devices."""
    pins = request.constraints
    for name in _PINS_OF_MEMORY:
        if name in pins.pins:
            try:
                without = Constraints.of({k: v for k, v in pins.pins.items() if k != name})
            except OptionError:  # another pin needs this one
                continue
            if is_feasible(replace(request, constraints=without)):
                return f"It fits without the pin {name}={pins.pins[name]}"
    world_size = request.world_size
    for _ in range(MOST_DOUBLINGS):
        world_size *= 2
        if is_feasible(replace(request, world_size=world_size)):
            return f"It fits with world_size={world_size}"
    return (
        f"No world size up to {world_size} fits either, nor does removing a pin: make samples "
        "smaller (shorter sequences), choose an optimizer with less state, or devices with more "
        "memory"
    )
