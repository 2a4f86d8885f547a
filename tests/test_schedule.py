"""Schedules as data: their text, what they hold in flight, and what the dry run refuses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoshard.errors import OptionError
from autoshard.schedule import Action, Schedule, dry_run
from autoshard.schedules import by_name, gpipe, one_f_one_b, sequential

sizes = st.integers(1, 7), st.integers(1, 9)


def test_text_of_1f1b() -> None:
    assert str(one_f_one_b(3, 4)) == (
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3\n"
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3\n"
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3"
    )


def test_text_of_gpipe() -> None:
    assert str(gpipe(2, 2)) == "0F0 0F1 0B0 0B1\n1F0 1F1 1B0 1B1"


@given(*sizes)
def test_schedules_run_and_print(num_stages: int, num_micro_batches: int) -> None:
    for make, held in (
        (sequential, lambda s: 1),
        (gpipe, lambda s: num_micro_batches),
        (one_f_one_b, lambda s: min(num_micro_batches, num_stages - s)),
    ):
        schedule = make(num_stages, num_micro_batches)
        run = dry_run(schedule)
        assert run.in_flight == tuple(held(s) for s in range(num_stages))
        assert len(run.order) == len(set(run.order)) == 2 * num_stages * num_micro_batches
        assert Schedule.parse(str(schedule)) == schedule


@given(*sizes, st.randoms(use_true_random=False))
def test_order_of_a_dry_run_respects_what_each_action_needs(
    num_stages: int, num_micro_batches: int, random: object
) -> None:
    done: set[Action] = set()
    for action in dry_run(one_f_one_b(num_stages, num_micro_batches)).order:
        if action.kind == "F":
            assert action.stage == 0 or Action(action.stage - 1, "F", action.micro_batch) in done
        else:
            assert Action(action.stage, "F", action.micro_batch) in done
            last = action.stage == num_stages - 1
            assert last or Action(action.stage + 1, "B", action.micro_batch) in done
        done.add(action)


def test_several_stages_on_one_rank() -> None:
    """A looped placement: stages 0 and 2 on rank 0, 1 and 3 on rank 1."""
    text = "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1\n1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1"
    schedule = Schedule.parse(text)
    assert (schedule.num_stages, schedule.num_micro_batches) == (4, 2)
    assert [schedule.rank_of(s) for s in range(4)] == [0, 1, 0, 1]
    assert dry_run(schedule).in_flight == (2, 2, 2, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one action"),
        ("0X0", "an action such as 2F0"),
        ("0F0 0F0 0B0", "0F0 once but got it twice"),
        ("0F0", "0B0 is missing"),
        ("0B0 0F0", "deadlock: rank 0 at 0B0"),
        ("0F0 0B0 0F1 0B1\n1F1 1F0 1B0 1B1", "ascending order but got \\[1, 0\\]"),
        ("0F0 0B0\n1B0 1F0", "deadlock"),
        ("0F0 0F1 0B1 0B0\n1F0 1B0 1F1 1B1 0F0", "stage 0 on one rank"),
        ("0F0 0F2 0B0 0B2", "0F1 is missing"),
    ],
)  # fmt: skip
def test_wrong_schedules(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        dry_run(Schedule.parse(text))


def test_too_many_stages_or_micro_batches() -> None:
    (actions,) = sequential(1, 2).ranks
    with pytest.raises(OptionError, match="stages below 0"):
        dry_run(Schedule(num_stages=0, num_micro_batches=2, ranks=(actions,)))
    with pytest.raises(OptionError, match="micro-batches below 1"):
        dry_run(Schedule(num_stages=1, num_micro_batches=1, ranks=(actions,)))


def test_by_name() -> None:
    assert by_name("1f1b", 2, 4) == one_f_one_b(2, 4)
    assert by_name("none", 1, 4) == sequential(1, 4)
    with pytest.raises(OptionError, match="expected a schedule of none, naive, gpipe, 1f1b, pipe"):
        by_name("zigzag", 2, 4)
    with pytest.raises(OptionError, match="pipeline schedule for 2 stages"):
        by_name("none", 2, 4)
    with pytest.raises(OptionError, match="at least one stage"):
        by_name("gpipe", 2, 0)
