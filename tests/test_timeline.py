"""Timelines: predicted from a plan, measured on ranks, and their pictures."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import parallel_runs as runs
import pytest
from parallel_runs import Setup
from ranks import Pool
from small_plan import small_plan

from autoshard.commands import main
from autoshard.errors import OptionError, PlanFileError
from autoshard.plan.timeline import predicted_timeline
from autoshard.report import trace
from autoshard.report.chart import chart
from autoshard.schedules import by_name
from autoshard.timeline import Span, Timeline


def test_prediction_is_the_schedule_on_the_clock() -> None:
    """Two stages and four micro-batches of 1.25 + 3.5 ms: GPipe's and 1F1B's (m + p - 1)(f + b)."""
    plan = small_plan()
    plan = replace(plan, prediction=replace(plan.prediction, step_s=0.03))
    timeline = predicted_timeline(plan)
    assert timeline.lanes == ("pipeline rank 0", "pipeline rank 1")
    schedule = by_name("1f1b", 2, 4)
    for lane, actions in enumerate(schedule.ranks):
        own = [s for s in timeline.spans if s.lane == lane]
        computed = [s for s in own if s.kind in "FB"]
        assert [s.label for s in computed] == [str(a) for a in actions]
        assert all(a.end_s <= b.start_s + 1e-12 for a, b in pairwise(computed))
        # Reduction as long as it is exposed, then the optimizer.
        (reduced,), (stepped,) = ([s for s in own if s.kind == k] for k in ("reduce", "step"))
        assert reduced.start_s == computed[-1].end_s and stepped.start_s == reduced.end_s
    sends = [s for s in timeline.spans if s.kind == "send"]
    assert Counter((s.lane, s.stage) for s in sends) == {(0, 0): 4, (1, 1): 4}
    by_label = {s.label: s for s in timeline.spans}
    for micro_batch in range(4):  # a send lies between the two ends of a transfer
        sent = by_label[f"send 0.{micro_batch}"]
        assert sent.start_s == by_label[f"0F{micro_batch}"].end_s
        assert sent.end_s <= by_label[f"1F{micro_batch}"].start_s + 1e-12
    compute_s = max(s.end_s for s in timeline.spans if s.kind == "B")
    assert compute_s == pytest.approx(5 * 4.75e-3, rel=0.02)


def test_split_backward_and_several_stages_per_rank() -> None:
    plan = replace(small_plan(), schedule="zb-v", virtual_stages=2)
    plan = replace(plan, stages=plan.stages * 2)
    timeline = predicted_timeline(plan)
    found = Counter((s.lane, s.kind) for s in timeline.spans)
    assert found[0, "F"] == found[0, "I"] == found[0, "W"] == 8
    assert {s.stage for s in timeline.spans if s.lane == 0 and s.kind == "F"} == {0, 3}


def test_a_plan_that_does_not_say_where_its_step_goes() -> None:
    plan = small_plan()
    plan = replace(plan, prediction=replace(plan.prediction, ranks=()))
    with pytest.raises(PlanFileError, match="plan it again"):
        predicted_timeline(plan)


def test_trace_reads_back(tmp_path: Path) -> None:
    predicted = predicted_timeline(small_plan())
    other = Timeline(
        name="measured", lanes=("rank 0",),
        spans=(Span(lane=0, kind="step", start_s=0.0, end_s=0.25),),
    )  # fmt: skip
    path = tmp_path / "trace.json"
    path.write_text(trace.chrome_trace([predicted, other]))
    found = trace.read(path)
    assert [(t.name, t.lanes) for t in found] == [(t.name, t.lanes) for t in (predicted, other)]
    assert [s.label for s in found[0].spans] == [s.label for s in predicted.spans]
    assert found[1].spans == other.spans
    assert found[0].step_s == pytest.approx(predicted.step_s)
    events = json.loads(path.read_text())["traceEvents"]
    threads = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    for event in (e for e in events if e["ph"] == "X"):  # all that Chrome's format requires
        assert event["ts"] >= 0 and event["dur"] >= 0
        assert (event["pid"], event["tid"]) in threads


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"otherData": {"timelines": 3}}'])
def test_what_is_no_trace(content: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(content)
    with pytest.raises(OptionError, match="autoshard train --trace"):
        trace.read(path)
    with pytest.raises(OptionError, match="expected a trace at"):
        trace.read(tmp_path / "missing.json")


def test_chart() -> None:
    timeline = predicted_timeline(small_plan())
    assert chart([timeline, timeline], "png").startswith(b"\x89PNG")
    svg = chart([timeline], "svg").decode()
    assert "</svg>" in svg
    with pytest.raises(OptionError, match="png or svg"):
        chart([timeline], "pdf")


def traced(given: Setup) -> tuple[float, Timeline, list[float]]:
    made = runs.parallel(given)
    batches = list(runs.data(given, range(2)))
    loss, timeline = made.trace(made.local_batch(batches[0]))
    return loss, timeline, [made.step(made.local_batch(batches[1]))]


@pytest.mark.parametrize(
    "pins",
    [
        {"pp": 2, "dp": 2, "micro_batch_size": 2, "schedule": "1f1b"},
        {"dp": 2},
        {"pp": 2, "micro_batch_size": 2, "schedule": "zb-h1"},
    ],
    ids=str,
)  # fmt: skip
def test_measured_timeline(pins: dict[str, Any], ranks: Pool) -> None:
    """Every rank does what the plan's schedule says, in its order, and trains as ever."""
    given = runs.setup("odd", **pins)
    plan = given.plan
    results = ranks.run(traced, given, world=plan.world_size)
    timeline = results[0][1]
    assert all(other[1] == timeline for other in results)
    expected = runs.plain("odd", 2).losses
    assert [results[0][0], *results[0][2]] == pytest.approx(expected, rel=1e-9)
    schedule = by_name(plan.schedule, plan.mesh.pp, plan.num_micro_batches)
    assert len(timeline.lanes) == plan.world_size
    for lane, name in enumerate(timeline.lanes):
        own = sorted((s for s in timeline.spans if s.lane == lane), key=lambda s: s.start_s)
        rank = int(name.partition("pp=")[2][:1] or 0)
        actions = [s.label for s in own if s.kind in "FBIW"]
        assert actions == [str(a) for a in schedule.ranks[rank]]
        assert [s.kind for s in own][-2:] == ["reduce", "step"]
        assert all(0 <= s.start_s <= s.end_s for s in own)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = str(small_plan().save(tmp_path / "plan.json"))
    measured = tmp_path / "run.json"
    timeline = Timeline(
        name="measured", lanes=("rank 0",),
        spans=(Span(lane=0, kind="step", start_s=0.0, end_s=0.25),),
    )  # fmt: skip
    measured.write_text(trace.chrome_trace([timeline]))
    for name in ("both.json", "both.png", "both.svg"):
        out = tmp_path / name
        assert main(["trace", plan, "--out", str(out), "--measured", str(measured)]) == 0
        assert "measured   0.25 s per step" in capsys.readouterr().out
        assert out.stat().st_size > 1000
    assert [t.name for t in trace.read(tmp_path / "both.json")] == ["predicted", "measured"]
    for bad, message in (
        (["--out", str(tmp_path / "both.png")], "--force"),
        (["--out", str(tmp_path / "step.pdf")], "expects a file .json, .png or .svg"),
        (["--out", str(tmp_path / "x.svg"), "--measured", plan], "autoshard train --trace"),
    ):
        assert main(["trace", plan, *bad]) == 2
        assert message in capsys.readouterr().err
