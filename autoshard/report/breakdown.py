"""Tables of where a step goes: per pipeline rank, and per kind of communication."""

from __future__ import annotations

from itertools import groupby

from rich import box
from rich.table import Table

from autoshard.plan.plan import Breakdown, Communication, Plan
from autoshard.report.units import in_seconds, nbytes, percent, second_unit, seconds

NOTHING = 1e-6
"""Share of a step below which a part of it is rounding."""


def busiest(plan: Plan) -> int:
    """The pipeline rank that waits least."""
    ranks = plan.prediction.ranks
    return min(range(len(ranks)), key=lambda r: ranks[r].bubble_s)


def rank_unit(plan: Plan) -> str:
    """The unit of :func:`rank_table`."""
    return second_unit(plan.prediction.step_s)


def rank_table(plan: Plan) -> Table:
    """One row per run of alike pipeline ranks: seconds of a step by kind."""
    names = ("compute", "recompute", "collectives", "optimizer", "bubble", "hidden collectives")
    table = _table("rank", *names)
    rows = [_cells(rank, rank_unit(plan)) for rank in plan.prediction.ranks]
    for cells, group in groupby(enumerate(rows), key=lambda pair: pair[1]):
        numbers = [index for index, _ in group]
        first, last = numbers[0], numbers[-1]
        table.add_row(f"{first}" if first == last else f"{first}-{last}", *cells)
    return table


def _cells(rank: Breakdown, unit: str) -> tuple[str, ...]:
    parts = (
        rank.compute_s, rank.recompute_s, rank.exposed_s, rank.optimizer_s, rank.bubble_s,
        rank.hidden_s,
    )  # fmt: skip
    return tuple(in_seconds(part, unit) for part in parts)


def communication_table(plan: Plan, rank: int) -> Table:
    """What one pipeline rank communicates in a step, dearest first."""
    table = _table("what", "axis", "calls", "bytes in all", "takes", "adds to the step")
    for one in shown(plan, rank):
        share = one.exposed_s / plan.prediction.step_s if plan.prediction.step_s else 0.0
        table.add_row(
            one.kind.replace("_", "-"), one.axis, str(one.count), nbytes(one.num_bytes),
            seconds(one.seconds), f"{seconds(one.exposed_s)} ({percent(share)})",
        )  # fmt: skip
    return table


def shown(plan: Plan, rank: int) -> list[Communication]:
    """The communication of a rank that is more than rounding."""
    least = NOTHING * plan.prediction.step_s
    return [c for c in plan.prediction.ranks[rank].communication if c.seconds > least]


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for name in names:
        left = name in ("rank", "what", "axis")
        table.add_column(name, justify="left" if left else "right", no_wrap=left)
    return table
