"""Two plans side by side: what a hand-tuned one costs, and what the difference is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autoshard.plan.plan import Breakdown, Plan
from autoshard.report.breakdown import busiest, rank_table, rank_unit
from autoshard.report.stages import memory_table, memory_unit
from autoshard.report.units import nbytes, percent, seconds

WORTH_SAYING = 0.02
"""Share of the difference below which a part of it is not spelled out."""


HIDDEN = "(hidden communication)"
_LAST = ("optimizer", "bubble", HIDDEN)
"""Rows after those that only one of the plans has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A plan and another one of the same program on the same cluster.

    Attributes:
        name: of the other one.
        too_large: why the other does not fit; its figures are then those of devices with enough
            memory. Empty if it fits.
    """

    chosen: Plan
    other: Plan
    name: str
    too_large: str = ""

    @property
    def ratio(self) -> float:
        """Seconds of the other's step over the chosen one's."""
        return self.other.prediction.step_s / self.chosen.prediction.step_s

    def differences(self) -> dict[str, float]:
        """Seconds by which the other takes longer, by part, on the busiest rank of each."""
        mine, theirs = (parts(p.prediction.ranks[busiest(p)]) for p in (self.chosen, self.other))
        names = dict.fromkeys((*mine, *theirs))
        found = {name: theirs.get(name, 0.0) - mine.get(name, 0.0) for name in names}
        return dict(sorted(found.items(), key=lambda item: -abs(item[1])))

    def reasons(self) -> Iterator[str]:
        """What a person would say."""
        difference_s = self.other.prediction.step_s - self.chosen.prediction.step_s
        if self.too_large:
            yield f"{self.name} does not fit: {self.too_large}"
        if abs(difference_s) < 1e-4 * self.chosen.prediction.step_s:
            yield f"{self.name} takes as long as the chosen plan"
            return
        word = "longer" if difference_s > 0 else "less"
        share = percent(abs(self.ratio - 1))
        yield f"{self.name} takes {seconds(abs(difference_s))} {word} per step ({share}):"
        for name, part_s in self.differences().items():
            if abs(part_s) >= WORTH_SAYING * abs(difference_s):
                yield f"  {'+' if part_s > 0 else '-'}{seconds(abs(part_s))} {name}"

    def as_data(self) -> dict[str, Any]:
        """For ``--json``, beside the summaries of both plans."""
        return {
            "name": self.name,
            "ratio": self.ratio,
            "fits": not self.too_large,
            "too_large": self.too_large,
            "differences_s": self.differences(),
        }


def parts(rank: Breakdown) -> dict[str, float]:
    """Seconds of a step by part; they add up to it."""
    moved = {
        f"{c.kind.replace('_', '-')} on {c.axis}": c.exposed_s for c in rank.communication
    }  # one entry per kind and axis
    return {
        "compute": rank.compute_s, "recompute": rank.recompute_s, **moved,
        "optimizer": rank.optimizer_s, "bubble": rank.bubble_s,
    }  # fmt: skip


def render(comparison: Comparison) -> RenderableType:
    """Choices, seconds and bytes next to each other, and each plan's pipeline ranks."""
    plans = {"chosen": comparison.chosen, comparison.name: comparison.other}
    pieces: list[RenderableType] = [Text(line) for line in comparison.reasons()]
    pieces += _section("Side by side", _side_by_side(plans))
    for name, plan in plans.items():
        if plan.mesh.pp > 1:
            title = f"Each pipeline rank of {name}, one step ({rank_unit(plan)})"
            pieces += _section(title, rank_table(plan))
            pieces += _section(
                f"Peak memory of a rank of {name} ({memory_unit(plan)})", memory_table(plan)
            )
    return Group(*pieces)


def as_text(comparison: Comparison, width: int = 100) -> str:
    """The same without colours, for logs."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(render(comparison))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _section(title: str, body: RenderableType) -> list[RenderableType]:
    return [Text(""), Text(title, style="bold"), Padding(body, (0, 0, 0, 2))]


def _side_by_side(plans: Mapping[str, Plan]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column("", no_wrap=True)
    for name in plans:
        table.add_column(name, justify="right", overflow="fold")
    for rows in (_choices, _times, _memory):
        columns = [rows(plan) for plan in plans.values()]
        names = dict.fromkeys(name for column in columns for name in column)
        for name in sorted(names, key=lambda name: name in _LAST):  # stable
            table.add_row(name, *(column.get(name, "-") for column in columns))
        table.add_section()
    return table


def _choices(plan: Plan) -> dict[str, str]:
    mesh = plan.mesh
    modes = sorted({s.recompute.mode for k in plan.stages for s in k.segments if s.layer})
    return {
        "pipeline x data x context x tensor": f"{mesh.pp} x {mesh.dp} x {mesh.cp} x {mesh.tp}",
        "micro-batches": f"{plan.num_micro_batches} of {plan.micro_batch_size}",
        "schedule": plan.schedule,
        "data parallel": plan.data_parallel,
        "recompute": ", ".join(m for m in modes if m != "none") or "none",
        "segments per stage": ", ".join(str(len(k.segments)) for k in plan.stages),
    }


def _times(plan: Plan) -> dict[str, str]:
    """The busiest rank; communication that compute hides is listed, but adds nothing."""
    rank = plan.prediction.ranks[busiest(plan)]
    total = {"step": seconds(plan.prediction.step_s)}
    shown = {name: seconds(value) for name, value in parts(rank).items()}
    return {**total, **shown, HIDDEN: seconds(rank.hidden_s)}


def _memory(plan: Plan) -> dict[str, str]:
    """Of the rank that holds most; its stages together."""
    by_rank: dict[int, dict[str, int]] = {}
    for home, stage in zip(plan.homes, plan.stages, strict=True):
        m, held = stage.memory, by_rank.setdefault(home, {})
        own = {
            "peak memory": m.total, "weights": m.parameters, "gradients": m.gradients,
            "optimizer state": m.optimizer, "activations": m.activations, "workspace": m.workspace,
        }  # fmt: skip
        for name, size in own.items():
            held[name] = held.get(name, 0) + size
    fullest = max(by_rank.values(), key=lambda held: held["peak memory"])
    return {name: nbytes(size) for name, size in fullest.items()}
