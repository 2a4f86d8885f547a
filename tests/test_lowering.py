"""Schedules with their communication: the text, what is added, and what the check refuses."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoshard.errors import OptionError
from autoshard.lowering import Instruction, Lowered, check, lower
from autoshard.schedule import Schedule
from autoshard.schedules import SCHEDULES, by_name

NAMES = [name for name in SCHEDULES if name != "none"]


def test_text_of_1f1b() -> None:
    lowered = lower(by_name("1f1b", 2, 2), gathers=True, reduces=True)
    assert str(lowered) == (
        "0GATHER 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1 0REDUCE 0STEP\n"
        "1RECV_F0 1RECV_F1 1GATHER 1F0 1B0 1SEND_B0 1F1 1B1 1SEND_B1 1REDUCE 1STEP"
    )


def test_a_folded_schedule_hands_on_within_a_rank() -> None:
    (first, last) = str(lower(by_name("zb-v", 2, 1, 2))).splitlines()
    assert first == "0F0 0SEND_F0 3RECV_F0 3F0 3I0 3SEND_B0 3W0 0RECV_B0 0I0 0W0 0STEP 3STEP"
    assert last == "1RECV_F0 1F0 2F0 2SEND_F0 2RECV_B0 2I0 2W0 1I0 1SEND_B0 1W0 1STEP 2STEP"


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(NAMES), p=st.integers(2, 5), m=st.integers(1, 11),
    gathers=st.booleans(), reduces=st.booleans(),
)  # fmt: skip
def test_every_schedule(name: str, p: int, m: int, gathers: bool, reduces: bool) -> None:
    schedule = by_name(name, p, m, SCHEDULES[name].least_virtual)
    lowered = lower(schedule, gathers=gathers, reduces=reduces)
    check(lowered)
    assert lowered.compute == schedule
    assert Lowered.parse(str(lowered)) == lowered
    every = list(itertools.chain(*lowered.ranks))
    counts = {what: sum(i.what == what for i in every) for what in ("GATHER", "REDUCE", "STEP")}
    stages = schedule.num_stages
    assert counts == {"GATHER": gathers * stages, "REDUCE": reduces * stages, "STEP": stages}
    between_ranks = sum(a != b for a, b in itertools.pairwise(schedule.homes))
    assert sum(i.what == "SEND_F" for i in every) == m * between_ranks
    assert sum(i.what == "RECV_B" for i in every) == m * between_ranks


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_is_the_forwards_alone(name: str) -> None:
    schedule = by_name(name, 3, 4, SCHEDULES[name].least_virtual)
    lowered = lower(schedule, trains=False)
    assert {i.what for rank in lowered.ranks for i in rank} == {"F", "SEND_F", "RECV_F"}
    for ours, theirs in zip(lowered.compute.ranks, schedule.ranks, strict=True):
        assert list(ours) == [action for action in theirs if action.kind == "F"]


GOOD = [
    "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
    "1RECV_F0 1F0 1RECV_F1 1F1 1B0 1SEND_B0 1B1 1SEND_B1",
]


def test_a_list_by_hand() -> None:
    check(Lowered.parse("\n".join(GOOD)))


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([GOOD[0], GOOD[1].replace("1RECV_F0 1F0 1RECV_F1", "1RECV_F1 1RECV_F0 1F0")],
         "in the order of its sends, 1RECV_F0 next, but got 1RECV_F1"),
        ([GOOD[0].replace("0RECV_B1 ", ""), GOOD[1]], "expected 0RECV_B1 before 0B1 on rank 0"),
        ([GOOD[0].replace("0F0 0SEND_F0", "0SEND_F0 0F0"), GOOD[1]],
         "expected 0F0 before 0SEND_F0"),
        ([GOOD[0].replace(" 0SEND_F1", ""), GOOD[1]], "as many receives on rank 1 .* 1, but got 2"),
        ([GOOD[0].replace("0RECV_B0 0B0 0RECV_B1", "0RECV_B0 0RECV_B1 0B0"),
          GOOD[1].replace("1SEND_B0 1B1 1SEND_B1", "1B1 1SEND_B1 1SEND_B0")],
         "rank 0 to receive from rank 1 in the order of its sends, 0RECV_B1 next"),
        (["0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
          "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1"], "rank 0 at 0SEND_F1, rank 1"),
    ],
)  # fmt: skip
def test_what_is_refused(ranks: list[str], words: str) -> None:
    """Torch accepts all of these; it would compute with swapped micro-batches, or wait for ever."""
    with pytest.raises(OptionError, match=words):
        check(Lowered.parse("\n".join(ranks)))


@pytest.mark.parametrize("text", ["", "0F", "0REDUCE3", "0SEND0", "F0"])
def test_what_is_no_instruction(text: str) -> None:
    with pytest.raises(OptionError, match=r"expected (an|at least one) instruction"):
        Lowered.parse(text)


def test_only_valid_schedules_are_lowered() -> None:
    with pytest.raises(OptionError, match="deadlock"):
        lower(Schedule.parse("0B0 0F0"))
    assert str(Instruction.parse("12SEND_B7")) == "12SEND_B7"
