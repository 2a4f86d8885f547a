"""Tables of pipeline stages: what each holds, its time, its memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich import box
from rich.table import Table

from autoshard.plan.plan import Plan, SegmentPlan, StagePlan
from autoshard.report.units import byte_unit, in_bytes, in_seconds, second_unit

SHARED = "shared"
"""The layer of parameter-free ops on the batch, which every stage that needs them repeats."""


def time_table(plan: Plan) -> Table:
    """One row per run of equal stages: layers, and seconds of one micro-batch."""
    unit = second_unit(max(max(s.forward_s, s.backward_s) for s in plan.stages))
    table = _table("stage", "layers")
    for name in ("forward", "backward", "of both, collectives"):
        table.add_column(f"{name} ({unit})", justify="right")
    for first, last, stage in equal_stages(plan):
        times = (stage.forward_s, stage.backward_s, stage.communication_s)
        table.add_row(
            _range(first, last),
            "\n".join(describe_segments(stage)),
            *(in_seconds(t, unit) for t in times),
        )
    return table


def memory_table(plan: Plan) -> Table:
    """One row per run of equal stages: bytes that one rank holds at its peak, by kind."""
    unit = byte_unit(max(s.memory.total for s in plan.stages))
    table = _table("stage")
    for name in ("weights", "gradients", "optimizer", "activations", "workspace", "total"):
        table.add_column(name, justify="right")
    for first, last, stage in equal_stages(plan):
        m = stage.memory
        sizes = (m.parameters, m.gradients, m.optimizer, m.activations, m.workspace, m.total)
        table.add_row(_range(first, last), *(in_bytes(b, unit) for b in sizes))
    return table


def memory_unit(plan: Plan) -> str:
    """The unit of :func:`memory_table`."""
    return byte_unit(max(s.memory.total for s in plan.stages))


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for name in names:
        table.add_column(name, no_wrap=name == "stage", overflow="fold")
    return table


def _range(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}-{last}"


def equal_stages(plan: Plan) -> Iterator[tuple[int, int, StagePlan]]:
    """Neighbouring stages with the same layers and memory, as (first, last, the first of them)."""

    def signature(pair: tuple[int, StagePlan]) -> tuple[object, ...]:
        stage = pair[1]
        return tuple((s.layer, s.recompute) for s in stage.segments), stage.memory

    for _, group in groupby(enumerate(plan.stages), key=signature):
        pairs = list(group)
        yield pairs[0][0], pairs[-1][0], pairs[0][1]


def describe_segments(stage: StagePlan) -> Iterator[str]:
    """``12 x GPT2Block, recompute full``: equal neighbours counted once."""

    def key(segment: SegmentPlan) -> tuple[str, str, str]:
        return segment.layer, segment.recompute.mode, ",".join(segment.recompute.keep)

    visible = [s for s in stage.segments if s.layer != SHARED]
    for (layer, mode, _), group in groupby(visible, key=key):
        members = list(group)
        name = layer if len(members) > 1 else members[0].path or layer
        count = f"{len(members)} x " if len(members) > 1 else ""
        yield f"{count}{name}" + (f", recompute {mode}" if mode != "none" else "")
