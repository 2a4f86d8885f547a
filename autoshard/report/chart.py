"""Timelines as a chart: a row per rank over time, colours by what it does."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autoshard.errors import OptionError
from autoshard.timeline import KINDS, NAMES, SpanKind, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "svg")
_COLOURS: dict[SpanKind, str] = {
    "F": "#4c78a8", "B": "#54a24b", "I": "#88d27a", "W": "#b79a20",
    "send": "#9d9da1", "reduce": "#e45756", "step": "#b279a2",
}  # fmt: skip
_HEIGHT = 0.8
_MOST_LABELS = 400
"""Spans that a chart names; more would not be legible."""


def chart(timelines: Sequence[Timeline], file_format: str) -> bytes:
    """All timelines, one below the other, on the same scale of time.

    Args:
        file_format: one of :data:`FORMATS`.

    Raises:
        OptionError: matplotlib is not installed, or another format.
    """
    if file_format not in FORMATS:
        raise OptionError(f"expected a chart as {' or '.join(FORMATS)} but got {file_format!r}")
    try:
        from matplotlib.figure import Figure  # without pyplot: no display, no global state
    except ImportError as error:
        raise OptionError(
            "expected matplotlib, which draws charts, but it is not installed: pip install "
            "'autoshard[plot]', or write a .json trace"
        ) from error
    rows = [max(1, len(t.lanes)) for t in timelines]
    figure = Figure(figsize=(12, 1.2 * len(rows) + 0.45 * sum(rows)), layout="constrained")
    every: Any = figure.subplots(
        len(rows), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": rows}
    )
    for axes, timeline in zip(every[:, 0], timelines, strict=True):
        _draw(axes, timeline)
    every[-1, 0].set_xlabel("ms")
    every[-1, 0].set_xlim(left=0)
    _legend(figure, timelines)
    file = io.BytesIO()
    figure.savefig(file, format=file_format, dpi=120)
    return file.getvalue()


def _draw(axes: Axes, timeline: Timeline) -> None:
    for kind in KINDS:
        for lane in range(len(timeline.lanes)):
            own = [s for s in timeline.spans if s.kind == kind and s.lane == lane]
            # Sends overlap with compute: a thin line below it.
            low, height = (0.5 * _HEIGHT, 0.12) if kind == "send" else (-0.5 * _HEIGHT, _HEIGHT)
            axes.broken_barh(
                [(1e3 * s.start_s, 1e3 * (s.end_s - s.start_s)) for s in own],
                (lane + low, height), facecolor=_COLOURS[kind], edgecolor="white", linewidth=0.4,
            )  # fmt: skip
    named = [s for s in timeline.spans if s.micro_batch is not None and s.kind != "send"]
    for span in named if len(named) <= _MOST_LABELS else ():
        axes.text(
            500 * (span.start_s + span.end_s), span.lane, str(span.micro_batch),
            ha="center", va="center", fontsize=7, color="white", clip_on=True,
        )  # fmt: skip
    axes.set_yticks(range(len(timeline.lanes)), timeline.lanes)
    axes.set_ylim(len(timeline.lanes) - 0.4, -0.6)
    axes.set_title(f"{timeline.name}: {1e3 * timeline.step_s:.4g} ms", loc="left", fontsize=10)


def _legend(figure: Any, timelines: Sequence[Timeline]) -> None:
    from matplotlib.patches import Patch

    present = {span.kind for timeline in timelines for span in timeline.spans}
    figure.legend(
        handles=[Patch(color=_COLOURS[k], label=NAMES[k]) for k in KINDS if k in present],
        loc="outside upper right", ncols=len(present) or 1, fontsize=8, frameon=False,
    )  # fmt: skip
