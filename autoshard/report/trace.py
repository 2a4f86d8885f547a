"""Timelines as a trace in Chrome's JSON format, which Perfetto (ui.perfetto.dev) shows.

A timeline is a process of the trace, a rank one of its threads; sends overlap with compute, so they
have a thread of their own. What :func:`read` needs to make the timeline again is in ``otherData``
and in the arguments of the events.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from autoshard.errors import OptionError
from autoshard.timeline import KINDS, NAMES, Span, Timeline


def chrome_trace(timelines: Sequence[Timeline]) -> str:
    """One trace of several timelines, side by side."""
    events = [e for number, t in enumerate(timelines) for e in _events(number, t)]
    lanes = [{"name": t.name, "lanes": list(t.lanes)} for t in timelines]
    return json.dumps(
        {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"timelines": lanes}}
    )


def _events(process: int, timeline: Timeline) -> Iterator[dict[str, Any]]:
    def named(what: str, name: str, **of: int) -> dict[str, Any]:
        return {"ph": "M", "name": what, "pid": process, **of, "args": {"name": name}}

    yield named("process_name", timeline.name)
    for lane, name in enumerate(timeline.lanes):
        yield named("thread_name", name, tid=2 * lane)
        yield named("thread_name", f"{name}, sends", tid=2 * lane + 1)
    for span in timeline.spans:
        yield {
            "ph": "X", "name": span.label, "cat": NAMES[span.kind], "pid": process,
            "tid": 2 * span.lane + (span.kind == "send"),
            "ts": span.start_s * 1e6, "dur": (span.end_s - span.start_s) * 1e6,
            "args": {"kind": span.kind, "stage": span.stage, "micro_batch": span.micro_batch},
        }  # fmt: skip


def read(path: Path) -> tuple[Timeline, ...]:
    """The timelines of a trace that :func:`chrome_trace` made.

    Raises:
        OptionError: the file is missing, or no such trace.
    """
    try:
        document = json.loads(path.read_bytes())
        lanes = document["otherData"]["timelines"]
        spans: list[list[Span]] = [[] for _ in lanes]
        for event in document["traceEvents"]:
            if event["ph"] == "X":
                spans[event["pid"]].append(_span(event))
        return tuple(
            Timeline(name=str(t["name"]), lanes=tuple(map(str, t["lanes"])), spans=tuple(own))
            for t, own in zip(lanes, spans, strict=True)
        )
    except OSError as error:
        raise OptionError(f"expected a trace at {path} but: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise OptionError(
            f"expected a trace that autoshard wrote in {path} but got something else ({error!r}): "
            "write one with autoshard train --trace FILE"
        ) from error


def _span(event: dict[str, Any]) -> Span:
    about = event["args"]
    kind, start_s, lasts_s = about["kind"], event["ts"] / 1e6, event["dur"] / 1e6
    if kind not in KINDS or not math.isfinite(start_s + lasts_s) or lasts_s < 0:
        raise ValueError(f"event {event!r}")
    return Span(
        lane=event["tid"] // 2, kind=kind, start_s=start_s, end_s=start_s + lasts_s,
        stage=about["stage"], micro_batch=about["micro_batch"],
    )  # fmt: skip
