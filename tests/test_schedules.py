"""Every schedule runs, and takes what its paper says that it takes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoshard.cost_models.pipeline import Simulation, StageSeconds, held_at_peak, simulate
from autoshard.errors import OptionError
from autoshard.schedule import Schedule, dry_run
from autoshard.schedules import SCHEDULES, WeightSplit, by_name, homes

CASES = [
    ("none", 1), ("naive", 1), ("gpipe", 1), ("1f1b", 1), ("interleaved-1f1b", 2),
    ("interleaved-1f1b", 3),
    ("looped-bfs", 2), ("looped-bfs", 4), ("zb-h1", 1), ("zb-1p", 1), ("zb-2p", 1), ("zb-v", 2),
    ("interleaved-zb", 2), ("interleaved-zb", 3), ("dualpipe-v", 2),
]  # fmt: skip


def equal(
    name: str, p: int, m: int, v: int = 1, *, f: float = 1.0, i: float = 1.0, w: float = 1.0
) -> Simulation:
    """The schedule with equal stages, where a rank's forward takes ``f``, and so on."""
    split = WeightSplit(patience=(f + i) / w)
    stage = StageSeconds(forward_s=f / v, backward_s=(i + w) / v, weight_s=w / v)
    return simulate(by_name(name, p, m, v, split), [stage] * (p * v))


def held(schedule: Schedule, per_stage: float = 1.0) -> list[float]:
    """Per rank the most that it holds."""
    parts = held_at_peak(schedule, [per_stage] * schedule.num_stages)
    ranks = [0.0] * len(schedule.ranks)
    for stage, home in enumerate(schedule.homes):
        ranks[home] += parts[stage]
    return ranks


def test_all_schedules_are_tested() -> None:
    """Those of older weights are in test_versioned.py."""
    assert {name for name, _ in CASES} == {n for n, kind in SCHEDULES.items() if not kind.stale}


@settings(deadline=None)
@given(case=st.sampled_from(CASES), p=st.integers(1, 7), m=st.integers(1, 17))
def test_they_run_wherever_they_are_made_for(case: tuple[str, int], p: int, m: int) -> None:
    name, v = case
    p = 1 if name == "none" else p
    schedule = by_name(name, p, m, v)
    run = dry_run(schedule)
    assert len(run.order) == len(set(run.order))
    forwards = sum(action.kind == "F" for action in run.order)
    backwards = sum(action.kind in ("B", "W") for action in run.order)
    assert forwards == backwards == p * v * m
    assert SCHEDULES[name].splits or not schedule.splits
    if m >= 2 * p:
        assert schedule.splits is SCHEDULES[name].splits
    assert schedule.homes == homes(name, p, v)
    assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (4, 16), (8, 24)])
@pytest.mark.parametrize("v", [2, 3, 4])
@pytest.mark.parametrize("name", ["interleaved-1f1b", "looped-bfs"])
def test_chunks_divide_the_bubble(name: str, p: int, m: int, v: int) -> None:
    """Narayanan et al. 2021, section 2.2: ``(p - 1)(f + b) / v``."""
    assert equal(name, p, m, v).step_s - 3 * m == pytest.approx(3 * (p - 1) / v)


@pytest.mark.parametrize(("p", "v"), [(2, 2), (4, 2), (4, 3), (8, 4)])
def test_what_interleaving_holds(p: int, v: int) -> None:
    """The first rank holds ``1 + (p - 1) / (p v)`` of what it holds under 1F1B (Korthikanti et al.
    2022, section 4.2.3)."""
    m = 4 * p
    assert held(by_name("1f1b", p, m))[0] == p
    assert held(by_name("interleaved-1f1b", p, m, v), 1 / v)[0] == pytest.approx(
        p * (1 + (p - 1) / (p * v))
    )


def test_an_interleaved_group_that_is_not_full() -> None:
    schedule = by_name("interleaved-1f1b", 2, 3, 2)
    assert str(schedule) == (
        "0F0 0F1 2F0 2F1 0F2 2B0 2B1 2F2 0B0 0B1 2B2 0B2\n"
        "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1B1 3F2 3B2 1B2"
    )


_TIMES = [(1.0, 1.0, 1.0), (1.0, 1.2, 0.8), (1.0, 1.1, 0.5)]


@pytest.mark.parametrize(("f", "i", "w"), _TIMES)
@pytest.mark.parametrize(("p", "m"), [(4, 8), (8, 24)])
def test_bubble_of_h1(p: int, m: int, f: float, i: float, w: float) -> None:
    """Qi et al. 2023, table 2: ``(p - 1)(f + i - w)``, in the memory of 1F1B."""
    found = equal("zb-h1", p, m, f=f, i=i, w=w)
    assert found.step_s - m * (f + i + w) == pytest.approx((p - 1) * (f + i - w))
    assert set(found.in_flight) == {p}


@pytest.mark.parametrize("m", [8, 16, 31])
def test_h2_has_no_bubble(m: int) -> None:
    """Qi et al. 2023, section 2.2: each rank works without a pause, and holds ``2p - 1``."""
    found = equal("zb-2p", 4, m)
    assert found.span_s == pytest.approx((3 * m,) * 4)
    assert max(found.in_flight) == 7


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (8, 24)])
def test_v_has_no_bubble_in_the_memory_of_1f1b(p: int, m: int) -> None:
    schedule = by_name("zb-v", p, m, 2)
    assert equal("zb-v", p, m, 2).span_s == pytest.approx((3 * m,) * p)
    assert held(schedule, 0.5) == [p] * p


@pytest.mark.parametrize(("f", "i", "w"), _TIMES)
@pytest.mark.parametrize(("p", "m", "v"), [(2, 4, 2), (4, 8, 2), (4, 16, 3), (8, 24, 2)])
def test_interleaving_divides_the_bubble_of_h1(
    p: int, m: int, v: int, f: float, i: float, w: float
) -> None:
    """And holds what is in flight twice over: ``(v p + p) / v`` at most."""
    found = equal("interleaved-zb", p, m, v, f=f, i=i, w=w)
    assert found.step_s - m * (f + i + w) == pytest.approx((p - 1) * (f + i - w) / v)
    assert max(held(by_name("interleaved-zb", p, m, v), 1 / v)) <= p * (v + 1) / v


@pytest.mark.parametrize(("f", "i", "w"), _TIMES)
@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (4, 20), (8, 24)])
def test_dualpipe_v(p: int, m: int, f: float, i: float, w: float) -> None:
    """Its authors' table, with as many chunks as there are stages: a bubble of ``(PP / 2 - 1)
    (F&B + B - 3 W)`` of a chunk's times, and ``PP + 1`` chunks held."""
    found = equal("dualpipe-v", p, m, 2, f=f, i=i, w=w)
    backward = i + w
    bubble = (p - 1) * (f + backward + backward - 3 * w) / 2
    assert max(m * (f + backward), found.step_s) - m * (f + backward) <= bubble + 1e-9
    assert held(by_name("dualpipe-v", p, m, 2)) == [min(2 * p + 1, 2 * m)] * p


@pytest.mark.parametrize(("p", "m"), [(2, 3), (4, 8)])
def test_one_after_the_other_gains_nothing(p: int, m: int) -> None:
    """Naive model parallelism: one stage works at a time, and holds one micro-batch."""
    found = equal("naive", p, m)
    assert found.step_s == pytest.approx(3 * p * m)
    assert found.bubble == pytest.approx((p - 1) / p)
    assert set(found.in_flight) == {1}


_PROFILES = {"1.5B": (18.522, 18.086, 9.337, 0.601), "6.2B": (29.718, 29.444, 19.927, 0.527)}
"""Milliseconds of F, B, W and a transfer on 8 stages, as Qi et al. 2023 profiled them."""


@pytest.mark.parametrize(
    ("model", "name", "bubble"),
    [
        ("1.5B", "1f1b", 0.2431), ("1.5B", "zb-1p", 0.1585), ("1.5B", "zb-2p", 0.0433),
        ("6.2B", "1f1b", 0.2347), ("6.2B", "zb-1p", 0.1323), ("6.2B", "zb-2p", 0.0029),
    ],
)  # fmt: skip
def test_bubbles_of_the_zero_bubble_paper(model: str, name: str, bubble: float) -> None:
    """Its simulated rates, 24 micro-batches; of 34 + 5 a s / h bytes 32 remain from I to W."""
    f, i, w, transfer = _PROFILES[model]
    kept = {"1.5B": 32 / (34 + 5 * 24 * 1024 / 2304), "6.2B": 32 / (34 + 5 * 32 * 1024 / 4096)}
    split = WeightSplit(patience=(f + i) / w, kept=kept[model])
    stage = StageSeconds(forward_s=f, backward_s=i + w, weight_s=w, send_s=transfer)
    found = simulate(by_name(name, 8, 24, 1, split), [stage] * 8)
    assert 1 - 24 * (f + i + w) / max(found.span_s) == pytest.approx(bubble, abs=1e-4)


def test_memory_that_waits_for_gradients_of_weights() -> None:
    schedule = Schedule.parse("0F0 0F1 0I0 0I1 0W0 0W1")
    assert held_at_peak(schedule, [10.0], [4.0]) == (20.0,)
    assert held_at_peak(schedule, [10.0], [15.0]) == (30.0,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0 0I0", "0W0 is missing"),
        ("0F0 0W0", "0I0 is missing"),
        ("0F0 0I0 0W0 0B0", "one backward of a micro-batch but got 0B0"),
        ("0F0 0W0 0I0", "deadlock: rank 0 at 0W0"),
    ],
)
def test_wrong_split_backwards(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        dry_run(Schedule.parse(text))


@pytest.mark.parametrize(
    ("name", "v", "message"),
    [
        ("1f1b", 2, "'1f1b' expects virtual_stages of at most 1 but got 2; choose inter"),
        ("interleaved-1f1b", 1, "1f1b' expects virtual_stages of at least 2 but got 1"),
        ("zb-v", 3, "'zb-v' expects virtual_stages of at most 2 but got 3"),
    ],
)  # fmt: skip
def test_numbers_of_chunks(name: str, v: int, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        by_name(name, 2, 4, v)
