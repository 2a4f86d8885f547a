"""What a plan remembers of the search: runner-up plans, and the front of time against memory."""

from __future__ import annotations

import itertools
import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_plan import small_plan
from test_search import plan_for

from autoshard.commands.shared import as_json
from autoshard.plan import files
from autoshard.plan.alternatives import NUM_RUNNERS_UP, front, runners_up
from autoshard.plan.plan import Alternative, Mesh, Plan
from autoshard.report.table import as_text


@cache
def plan() -> Plan:
    """Four devices that are a little too small."""
    return plan_for(memory_bytes=900_000)


def pins_of(other: Alternative, **more: Any) -> dict[str, Any]:
    mesh = other.mesh
    if mesh.pp > 1:
        more = {"schedule": other.schedule, "virtual_stages": other.virtual_stages, **more}
    return {
        "pp": mesh.pp, "dp": mesh.dp, "tp": mesh.tp, "micro_batch_size": other.micro_batch_size,
        **more,
    }  # fmt: skip


def test_runners_up_are_ordered_and_distinct() -> None:
    found = plan()
    kinds = [other.kind for other in found.runners_up]
    steps = [other.step_s for other in found.runners_up]
    assert len(kinds) >= 2
    assert (found.mesh, found.schedule, found.virtual_stages) not in kinds
    assert len(set(kinds)) == len(kinds)
    assert steps == sorted(steps)
    assert found.prediction.step_s <= steps[0]


def test_runners_up_are_what_pinning_them_gives() -> None:
    for other in plan_for().runners_up:  # memory is ample: there is no leaner sharding to find
        pinned = plan_for(**pins_of(other))
        assert pinned.prediction.step_s == pytest.approx(other.step_s)
        assert pinned.prediction.peak_bytes == other.peak_bytes
        assert pinned.data_parallel == other.data_parallel
        assert pinned.schedule == other.schedule


def test_the_front_begins_with_the_plan_and_falls() -> None:
    found = plan()
    first = found.front[0]
    assert first.kind == (found.mesh, found.schedule, found.virtual_stages)
    assert first.step_s == found.prediction.step_s
    assert first.peak_bytes == found.prediction.peak_bytes
    assert len(found.front) >= 2
    for faster, leaner in itertools.pairwise(found.front):
        assert faster.step_s < leaner.step_s
        assert faster.peak_bytes > leaner.peak_bytes
    for other in found.runners_up:
        assert any(
            point.step_s <= other.step_s and point.peak_bytes <= other.peak_bytes
            for point in found.front
        )


def test_points_of_the_front_can_be_pinned() -> None:
    for point in plan().front:
        pinned = plan_for(**pins_of(point, memory_bytes=point.peak_bytes))
        assert pinned.prediction.step_s <= point.step_s * (1 + 1e-6)
        assert pinned.prediction.peak_bytes <= point.peak_bytes


def made(step_s: float, peak_bytes: int, pp: int = 1) -> Alternative:
    return Alternative(
        mesh=Mesh(pp=pp), schedule="1f1b", virtual_stages=1, micro_batch_size=1,
        data_parallel="ddp", recompute={}, step_s=step_s, peak_bytes=peak_bytes,
    )  # fmt: skip


POINTS = st.lists(st.builds(made, st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)))


@given(POINTS)
def test_the_front_is_what_nothing_beats(points: list[Alternative]) -> None:
    kept = {(p.step_s, p.peak_bytes) for p in front(points)}
    expected = {
        (p.step_s, p.peak_bytes)
        for p in points
        if not any(
            q.step_s <= p.step_s and q.peak_bytes <= p.peak_bytes
            and (q.step_s, q.peak_bytes) != (p.step_s, p.peak_bytes)
            for q in points
        )
    }  # fmt: skip
    assert kept == expected


def test_runners_up_are_the_fastest_of_their_kind() -> None:
    points = [made(step, 1, pp) for pp in range(1, 15) for step in (pp + 20, pp + 10)]
    found = runners_up(made(1.0, 1, pp=3), points)
    assert [other.mesh.pp for other in found] == [1, 2, 4, 5, 6, 7, 8, 9]
    assert [other.step_s for other in found] == [other.mesh.pp + 10 for other in found]
    assert len(found) == NUM_RUNNERS_UP


def test_plan_files_keep_them(tmp_path: Any) -> None:
    found = plan()
    assert Plan.load(found.save(tmp_path / "plan.json")) == found


def test_plan_files_without_them_are_read(tmp_path: Any) -> None:
    path = small_plan().save(tmp_path / "plan.json")
    document = json.loads(path.read_text())
    del document["runners_up"], document["front"]
    old = files.loads(json.dumps(document).encode())
    assert (old.runners_up, old.front) == ((), ())
    assert old.diff(small_plan()) == ""


def test_reports_show_them() -> None:
    found = plan()
    text, data = as_text(found), json.loads(as_json(found))
    assert "Runner-up plans" in text
    assert "Time against memory" in text
    assert [a["predicted_step_s"] for a in data["front"]] == [a.step_s for a in found.front]
    assert data["runners_up"][0]["mesh"]["dp"] == found.runners_up[0].mesh.dp
    assert "Time against memory" in found._repr_html_()
