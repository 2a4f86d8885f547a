"""The pipeline schedules that there are, by name.

With several chunks of the model per rank (*virtual stages*), rank ``r`` of ``p`` holds the stages
``r, r + p, ...`` (Narayanan et al. 2021, section 2.2); in ``zb-v`` and ``dualpipe-v`` it holds
``r`` and ``2p - 1 - r``. The zero-bubble schedules (Qi et al. 2023) split backward in two, so that
gradients of weights fill what would be bubbles.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from autoshard.errors import OptionError
from autoshard.schedule import Action, Kind, Schedule


def sequential(num_stages: int, num_micro_batches: int) -> Schedule:
    """Each micro-batch forward and backward before the next starts: gradient accumulation.

    With several stages every stage but one idles at any time; it is the reference that others are
    compared with.
    """
    kinds: tuple[Kind, ...] = ("F", "B")
    return _schedule(
        num_stages,
        num_micro_batches,
        lambda s: (Action(s, k, m) for m in range(num_micro_batches) for k in kinds),
    )


def gpipe(num_stages: int, num_micro_batches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019); a stage holds every micro-batch."""
    return looped_breadth_first(num_stages, num_micro_batches, 1)


def looped_breadth_first(num_ranks: int, num_micro_batches: int, virtual_stages: int) -> Schedule:
    """Every micro-batch through a chunk before the next chunk (Lamy-Poirier 2022).

    It holds every micro-batch as GPipe does, but each chunk's gradients are complete early.
    """

    def rank(r: int) -> Iterator[Action]:
        stages = range(r, num_ranks * virtual_stages, num_ranks)
        yield from (Action(s, "F", m) for s in stages for m in range(num_micro_batches))
        yield from (Action(s, "B", m) for s in reversed(stages) for m in range(num_micro_batches))

    return _schedule(num_ranks, num_micro_batches, rank, virtual_stages)


def one_f_one_b(num_stages: int, num_micro_batches: int) -> Schedule:
    """Forward and backward in turn after a warm-up (Narayanan et al. 2019, with a flush).

    Stage ``s`` holds at most ``min(M, num_stages - s)`` micro-batches.
    """

    def rank(stage: int) -> Iterator[Action]:
        forwards = [Action(stage, "F", m) for m in range(num_micro_batches)]
        backwards = [Action(stage, "B", m) for m in range(num_micro_batches)]
        return _in_turn(forwards, backwards, num_stages - 1 - stage)

    return _schedule(num_stages, num_micro_batches, rank)


def interleaved(num_ranks: int, num_micro_batches: int, virtual_stages: int) -> Schedule:
    """1F1B over several chunks per rank (Narayanan et al. 2021, section 2.2).

    Micro-batches go through a rank's chunks in groups of ``num_ranks``: a group through the first
    chunk, then through the second, and so on. The bubble is that of 1F1B divided by the number of
    chunks; rank ``r`` warms up by ``2 (p - 1 - r) + (v - 1) p`` forwards of a chunk. A last group
    that is not full is one whose missing micro-batches are left out.
    """

    def rank(r: int) -> Iterator[Action]:
        forwards, backwards = _in_groups(r, num_ranks, num_micro_batches, virtual_stages, "B")
        warm_up = 2 * (num_ranks - 1 - r) + (virtual_stages - 1) * num_ranks
        return _in_turn(forwards, backwards, warm_up)

    return _schedule(num_ranks, num_micro_batches, rank, virtual_stages)


def _in_groups(
    rank: int, num_ranks: int, num_micro_batches: int, virtual_stages: int, backward: Kind
) -> tuple[list[Action], list[Action]]:
    """A rank's forwards and backwards, ``num_ranks`` micro-batches through a chunk at a time."""
    starts = range(0, num_micro_batches, num_ranks)
    groups = [range(start, start + num_ranks) for start in starts]
    stages = range(rank, num_ranks * virtual_stages, num_ranks)
    return (
        [Action(s, "F", m) for group in groups for s in stages for m in group],
        [Action(s, backward, m) for group in groups for s in reversed(stages) for m in group],
    )


def _in_turn(
    forwards: Sequence[Action], backwards: Sequence[Action], warm_up: int
) -> Iterator[Action]:
    """``warm_up`` forwards, then one forward and one backward in turn, then what is left."""
    ahead = min(warm_up, len(forwards))
    yield from forwards[:ahead]
    for index, backward in enumerate(backwards):
        yield from forwards[ahead + index : ahead + index + 1]
        yield backward


def interleaved_zero_bubble(
    num_ranks: int, num_micro_batches: int, virtual_stages: int
) -> Schedule:
    """Interleaved 1F1B whose gradients of weights fill bubbles, as in :func:`zb_h1`.

    Rank ``r`` warms up by ``p - 1 - r + (v - 1) p`` forwards of a chunk, and does the gradients of
    weights ``r`` chunks late. Groups of micro-batches as in :func:`interleaved`.
    """

    def rank(r: int) -> Iterator[Action]:
        forwards, backwards = _in_groups(r, num_ranks, num_micro_batches, virtual_stages, "I")
        ahead = num_ranks - 1 - r + (virtual_stages - 1) * num_ranks
        return _weights_late(forwards, backwards, ahead, r)

    return _schedule(num_ranks, num_micro_batches, rank, virtual_stages)


def zb_h1(num_stages: int, num_micro_batches: int) -> Schedule:
    """Zero bubble in the memory of 1F1B: a bubble of ``(p - 1)(f + i - w)``.

    As many forwards ahead as in 1F1B; stage ``s`` does the gradients of weights ``s`` micro-batches
    late, so that all stages hold ``p`` of them (Qi et al. 2023, section 2.1). Their automatic
    ``zb-1p`` comes to the same bubbles.
    """

    def rank(stage: int) -> Iterator[Action]:
        return _late_in_one_stage(stage, num_micro_batches, num_stages - 1 - stage, stage)

    return _schedule(num_stages, num_micro_batches, rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSplit:
    """How a backward falls into two parts.

    Attributes:
        patience: seconds of forward and ``I`` over seconds of ``W``.
        kept: bytes that wait for ``W`` after ``I``, over those that wait for ``I``.
    """

    patience: float = 2.0
    kept: float = 1.0


def zb_2p(num_stages: int, num_micro_batches: int, split: WeightSplit | None = None) -> Schedule:
    """Zero bubble in twice the memory of 1F1B (Qi et al. 2023, H2 in section 2.2).

    Twice as many forwards ahead as in 1F1B. The gradients of weights of stage ``s`` make up for its
    late start, ``s (f + i)``, at the end; so many of them wait as that takes and as twice the
    memory of 1F1B has room for. That is H2 where ``f``, ``i`` and ``w`` are equal.
    """
    split = split or WeightSplit()

    def rank(stage: int) -> Iterator[Action]:
        ahead = 2 * (num_stages - 1 - stage)
        room = int((2 * num_stages - 1 - ahead) / split.kept)
        late = min(math.ceil(stage * split.patience - 1e-9), room)
        return _late_in_one_stage(stage, num_micro_batches, ahead, late)

    return _schedule(num_stages, num_micro_batches, rank)


def _late_in_one_stage(stage: int, count: int, ahead: int, late: int) -> Iterator[Action]:
    forwards = [Action(stage, "F", m) for m in range(count)]
    backwards = [Action(stage, "I", m) for m in range(count)]
    return _weights_late(forwards, backwards, ahead, late)


def _weights_late(
    forwards: Sequence[Action], backwards: Sequence[Action], ahead: int, late: int
) -> Iterator[Action]:
    """1F1B after ``ahead`` forwards, with gradients of weights ``late`` backwards late."""
    waiting: deque[Action] = deque()
    for action in _in_turn(forwards, backwards, ahead):
        yield action
        if action.kind == "I":
            waiting.append(Action(action.stage, "W", action.micro_batch))
            if len(waiting) > late:
                yield waiting.popleft()
    yield from waiting


def zb_v(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Zero bubble with two chunks per rank in V shape, in the memory of 1F1B.

    (Qi et al. 2024, "Pipeline parallelism with controllable memory", section 4: no bubble where
    forward and both halves of backward take equally long.) Its phases need ``2 p - 1``
    micro-batches: with fewer, the actions of the others are left out.
    """
    count = max(num_micro_batches, 2 * num_ranks - 1)

    def rank(r: int) -> Iterator[Action]:
        down, up = _Chunk(r), _Chunk(2 * num_ranks - 1 - r)
        yield from (down.next("F") for _ in range(2 * (num_ranks - r) - 1))
        for _ in range(r):
            yield from (up.next("F"), down.next("F"))
        for _ in range(num_ranks - r):
            yield from (up.next("F"), up.next("I"), up.next("W"))
        while up.done["F"] < count:
            if down.done["F"] < count:
                yield down.next("F")
            yield from (down.next("I"), down.next("W"))
            yield from (up.next("F"), up.next("I"), up.next("W"))
        for _ in range(r):
            yield from (down.next("I"), up.next("I"))
        for _ in range(num_ranks - r):
            yield from (down.next("I"), down.next("W"))
        yield from (up.next("W") for _ in range(count - up.done["W"]))
        yield from (down.next("W") for _ in range(count - down.done["W"]))

    return _schedule(num_ranks, num_micro_batches, rank, 2)


def dualpipe_v(num_ranks: int, num_micro_batches: int) -> Schedule:
    """DualPipe cut in half: two chunks per rank in V shape, a forward beside each backward.

    (Liu et al. 2024, "DeepSeek-V3 technical report", section 3.2.1, and the table of bubbles that
    its authors publish with their code.) With ``p`` ranks, forward ``f`` and backward ``i + w`` of
    a chunk, a rank holds at most ``2 p + 1`` chunks and waits at most ``(p - 1)(f + 2 i - w)``,
    where a forward and a backward side by side take as long as one after the other, as they do
    here. Its phases need ``2 p`` micro-batches: with fewer, the actions of the others are left out.
    """
    count = max(num_micro_batches, 2 * num_ranks)

    def rank(r: int) -> Iterator[Action]:
        down, up, before = _Chunk(r), _Chunk(2 * num_ranks - 1 - r), num_ranks - 1 - r
        late: deque[Action] = deque()

        def split(chunk: _Chunk) -> Action:
            backward = chunk.next("I")
            late.append(chunk.next("W"))
            return backward

        yield from (down.next("F") for _ in range(2 * before))
        for _ in range(r + 1):
            yield from (down.next("F"), up.next("F"))
        for _ in range(before):
            yield from (split(up), late.popleft(), up.next("F"))
        for _ in range(count - 2 * num_ranks + r + 1):
            yield from (down.next("F"), up.next("B"), up.next("F"), down.next("B"))
        for _ in range(before):
            yield from (up.next("B"), up.next("F"), down.next("B"))
        for turn in range(r + 1):  # from the middle on gradients of weights wait
            waits = turn >= (r + 1) // 2
            yield split(up) if waits and (turn > (r + 1) // 2 or r % 2) else up.next("B")
            yield split(down) if waits else down.next("B")
        for _ in range(before):
            yield from (late.popleft(), split(down))
        yield from late

    return _schedule(num_ranks, num_micro_batches, rank, 2)


class _Chunk:
    """One chunk's actions, each kind micro-batch by micro-batch, whichever way backward is done."""

    def __init__(self, stage: int) -> None:
        self._stage = stage
        self.done: dict[Kind, int] = {"F": 0, "B": 0, "I": 0, "W": 0}

    def next(self, kind: Kind) -> Action:
        whole = self.done["B"] if kind in ("I", "W") else self.done["I"] if kind == "B" else 0
        self.done[kind] += 1
        return Action(self._stage, kind, whole + self.done[kind] - 1)


def _schedule(
    num_ranks: int,
    num_micro_batches: int,
    rank: Callable[[int], Iterator[Action] | Sequence[Action]],
    virtual_stages: int = 1,
) -> Schedule:
    """A schedule of what ``rank`` lists, without micro-batches that there are not."""
    return Schedule(
        num_stages=num_ranks * virtual_stages,
        num_micro_batches=num_micro_batches,
        ranks=tuple(
            tuple(a for a in rank(r) if a.micro_batch < num_micro_batches) for r in range(num_ranks)
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleKind:
    """What a name stands for.

    Attributes:
        make: from pipeline ranks, micro-batches, virtual stages and how backward is split.
        least_virtual, most_virtual: how many chunks a rank may have; ``None``: any number.
        closed_form: equal stages take ``(m + p - 1)`` turns.
        flushes: the optimizer waits until all ranks are done; the zero-bubble schedules let each
            rank go on to its next step at its own time (Qi et al. 2023, section 4).
        folds: of two chunks, a rank has one on the way down and one on the way up (V shape); else
            chunks lie in loops over the ranks.
        splits: backward is two actions, at least of some micro-batches.
        stale: gradients are of older weights than those they change, as the table of
            :mod:`autoshard.versioned` says; ``make`` has the order of its forwards and backwards.
    """

    make: Callable[[int, int, int, WeightSplit], Schedule]
    least_virtual: int = 1
    most_virtual: int | None = 1
    closed_form: bool = False
    flushes: bool = True
    folds: bool = False
    splits: bool = False
    stale: bool = False


SCHEDULES: dict[str, ScheduleKind] = {
    "none": ScheduleKind(make=lambda p, m, v, w: sequential(p, m), closed_form=True),
    "naive": ScheduleKind(make=lambda p, m, v, w: sequential(p, m)),
    "gpipe": ScheduleKind(make=lambda p, m, v, w: gpipe(p, m), closed_form=True),
    "1f1b": ScheduleKind(make=lambda p, m, v, w: one_f_one_b(p, m), closed_form=True),
    "pipedream": ScheduleKind(
        make=lambda p, m, v, w: one_f_one_b(p, m), flushes=False, stale=True
    ),
    "pipedream-2bw": ScheduleKind(
        make=lambda p, m, v, w: one_f_one_b(p, m), flushes=False, stale=True
    ),
    "interleaved-1f1b": ScheduleKind(
        make=lambda p, m, v, w: interleaved(p, m, v), least_virtual=2, most_virtual=None
    ),
    "looped-bfs": ScheduleKind(
        make=lambda p, m, v, w: looped_breadth_first(p, m, v), least_virtual=2, most_virtual=None
    ),
    "zb-h1": ScheduleKind(make=lambda p, m, v, w: zb_h1(p, m), splits=True, flushes=False),
    "zb-1p": ScheduleKind(make=lambda p, m, v, w: zb_h1(p, m), splits=True, flushes=False),
    "zb-2p": ScheduleKind(make=lambda p, m, v, w: zb_2p(p, m, w), splits=True, flushes=False),
    "interleaved-zb": ScheduleKind(
        make=lambda p, m, v, w: interleaved_zero_bubble(p, m, v),
        least_virtual=2, most_virtual=None, splits=True, flushes=False,
    ),
    "zb-v": ScheduleKind(
        make=lambda p, m, v, w: zb_v(p, m),
        least_virtual=2, most_virtual=2, folds=True, splits=True, flushes=False,
    ),
    "dualpipe-v": ScheduleKind(
        make=lambda p, m, v, w: dualpipe_v(p, m),
        least_virtual=2, most_virtual=2, folds=True, splits=True, flushes=False,
    ),
}  # fmt: skip
"""Schedules by the name that a plan gives."""


def by_name(
    name: str,
    num_ranks: int,
    num_micro_batches: int,
    virtual_stages: int = 1,
    split: WeightSplit | None = None,
) -> Schedule:
    """The schedule of that name.

    Args:
        split: for schedules that fit themselves to it; ``None``: forward and both parts of backward
            take and hold equally much.

    Raises:
        OptionError: for an unknown name, ``none`` with several ranks, or a number of virtual
            stages that the schedule does not have.
    """
    _check_name(name)
    if num_ranks < 1 or num_micro_batches < 1:
        raise OptionError(
            f"expected at least one stage and one micro-batch but got {num_ranks} and "
            f"{num_micro_batches}; choose another mesh or micro-batch size"
        )
    if name == "none" and num_ranks > 1:
        raise OptionError(
            f"expected a pipeline schedule for {num_ranks} stages but got 'none'; "
            "choose gpipe or 1f1b"
        )
    check_virtual_stages(name, virtual_stages)
    return SCHEDULES[name].make(
        num_ranks, num_micro_batches, virtual_stages, split or WeightSplit()
    )


def _check_name(name: str) -> None:
    if name not in SCHEDULES:
        raise OptionError(
            f"expected a schedule of {', '.join(SCHEDULES)} but got {name!r}; choose one of them"
        )


def homes(name: str, num_ranks: int, virtual_stages: int) -> tuple[int, ...]:
    """The rank of every stage under the schedule of that name."""
    stages = range(num_ranks * virtual_stages)
    if SCHEDULES[name].folds:
        return tuple(min(s, 2 * num_ranks - 1 - s) for s in stages)
    return tuple(s % num_ranks for s in stages)


WITH_SPLIT_BACKWARD = ("ddp", "zero1")
"""Data-parallel modes that can reduce gradients of weights after a backward that is split. The
others reduce them, or free weights, in each backward of inputs, which has none of them yet."""


def check_data_parallel(splits: bool, mode: str) -> None:
    """Whether gradients can be reduced by this data-parallel mode.

    Args:
        splits: the schedule splits backward.

    Raises:
        OptionError: they cannot; names the modes that can.
    """
    if splits and mode not in WITH_SPLIT_BACKWARD:
        raise OptionError(
            f"expected data_parallel {' or '.join(WITH_SPLIT_BACKWARD)} with a schedule that "
            f"splits backward but got {mode!r}, which reduces gradients with each backward; "
            "choose one of them, or a schedule such as 1f1b"
        )


def check_virtual_stages(name: str, virtual_stages: int) -> None:
    """Whether a schedule can have so many chunks per rank.

    Raises:
        OptionError: it cannot, or there is none of that name; names schedules that can.
    """
    _check_name(name)
    kind = SCHEDULES[name]
    if virtual_stages < kind.least_virtual:
        raise OptionError(
            f"schedule {name!r} expects virtual_stages of at least {kind.least_virtual} but got "
            f"{virtual_stages}; raise it, or choose 1f1b"
        )
    if kind.most_virtual is not None and virtual_stages > kind.most_virtual:
        others = [n for n, k in SCHEDULES.items() if k.most_virtual is None]
        raise OptionError(
            f"schedule {name!r} expects virtual_stages of at most {kind.most_virtual} but got "
            f"{virtual_stages}; choose {' or '.join(others)}"
        )
