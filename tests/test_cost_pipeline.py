"""Simulated schedules against closed forms and against an independent simulation."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoshard.cost_models.pipeline import (
    StageSeconds,
    bubble_share,
    simulate,
    step_bound_s,
)
from autoshard.errors import OptionError
from autoshard.schedule import Schedule
from autoshard.schedules import by_name, gpipe, one_f_one_b


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 1), (2, 8), (4, 4), (4, 16), (8, 3)])
def test_equal_stages_take_the_closed_form(name: str, stages: int, micro_batches: int) -> None:
    times = [StageSeconds(forward_s=1.0, backward_s=2.0)] * stages
    found = simulate(by_name(name, stages, micro_batches), times)
    assert found.step_s == pytest.approx((micro_batches + stages - 1) * 3)
    assert found.bubble == pytest.approx(bubble_share(stages, micro_batches))
    assert found.busy_s == (3.0 * micro_batches,) * stages


def test_activations_in_flight() -> None:
    times = [StageSeconds(forward_s=1.0, backward_s=2.0)] * 4
    assert simulate(gpipe(4, 8), times).in_flight == (8, 8, 8, 8)
    assert simulate(one_f_one_b(4, 8), times).in_flight == (4, 3, 2, 1)


def test_two_stages_by_hand_with_transfers() -> None:
    times = [
        StageSeconds(forward_s=1.0, backward_s=2.0, send_s=0.5),
        StageSeconds(forward_s=1.0, backward_s=2.0),
    ]
    found = simulate(one_f_one_b(2, 1), times)
    assert found.step_s == 1 + 0.5 + 1 + 2 + 0.5 + 2
    assert found.finish_s(1) == 4.5
    ends = {str(action): end for action, _, end in found.timeline}
    assert ends == {"0F0": 1, "1F0": 2.5, "1B0": 4.5, "0B0": 7}


def test_stages_on_one_rank_send_nothing() -> None:
    times = [StageSeconds(forward_s=1, backward_s=1, send_s=100)] * 2
    alone = Schedule.parse("0F0 1F0 1B0 0B0")
    assert simulate(alone, times).step_s == 4


_SECONDS = st.floats(0.01, 10)


@settings(deadline=None, max_examples=60)
@given(
    times=st.lists(st.tuples(_SECONDS, _SECONDS, st.floats(0, 3)), min_size=1, max_size=5),
    micro_batches=st.integers(1, 9), name=st.sampled_from(["gpipe", "1f1b"]),
)  # fmt: skip
def test_longest_path(
    times: list[tuple[float, float, float]], micro_batches: int, name: str
) -> None:
    """The step is the longest path through order on ranks and data between stages."""
    stages = [StageSeconds(forward_s=f, backward_s=b, send_s=s) for f, b, s in times]
    schedule = by_name(name, len(stages), micro_batches)
    edges: dict[str, list[tuple[str, float]]] = {}
    for s, actions in enumerate(schedule.ranks):
        for before, after in itertools.pairwise(actions):
            edges.setdefault(str(after), []).append((str(before), 0.0))
        for m in range(micro_batches):
            edges.setdefault(f"{s}B{m}", []).append((f"{s}F{m}", 0.0))
            if s:
                send = stages[s - 1].send_s
                edges.setdefault(f"{s}F{m}", []).append((f"{s - 1}F{m}", send))
                edges.setdefault(f"{s - 1}B{m}", []).append((f"{s}B{m}", send))
    lasts = {
        str(a): stages[a.stage].forward_s if a.kind == "F" else stages[a.stage].backward_s
        for actions in schedule.ranks
        for a in actions
    }
    ends: dict[str, float] = {}

    def end(action: str) -> float:
        if action not in ends:
            ready = max((end(b) + wait for b, wait in edges.get(action, ())), default=0.0)
            ends[action] = ready + lasts[action]
        return ends[action]

    found = simulate(schedule, stages)
    assert found.step_s == pytest.approx(max(map(end, lasts)))
    assert found.step_s >= step_bound_s(stages, micro_batches) * (1 - 1e-9)
    assert 0 <= found.bubble < 1


def test_stages_must_match() -> None:
    with pytest.raises(OptionError, match="the seconds of 2 stages but got 3"):
        simulate(gpipe(2, 2), [StageSeconds(forward_s=1, backward_s=1)] * 3)
