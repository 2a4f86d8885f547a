"""Pipeline schedules as data: for every pipeline rank the list of its forwards and backwards.

An action prints as ``<stage><kind><micro-batch>``, such as ``2F0``; a schedule as one line per
rank. A backward is one action (``B``), or two: ``I`` makes the gradient of the stage's input, on
which the stage before waits, and ``W`` the gradients of its weights, on which nothing waits. The
same data drives the runtime, the simulator of the cost model and pictures. Sends and receives are
not part of it: they follow from the order of the actions. A rank may run several stages.
:mod:`autoshard.schedules` has the schedules by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from autoshard.errors import OptionError

Kind = Literal["F", "B", "I", "W"]

_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")


@dataclass(frozen=True, slots=True)
class Action:
    """The forward (``F``) or backward (``B``, or ``I`` and ``W``) of one micro-batch and stage."""

    stage: int
    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"

    @staticmethod
    def parse(text: str) -> Action:
        """The inverse of ``str``.

        Raises:
            OptionError: if the text is no action.
        """
        match = _ACTION.fullmatch(text)
        if match is None:
            raise OptionError(
                f"expected an action such as 2F0 or 0B3 but got {text!r}; "
                "write <stage><F|B|I|W><micro-batch>"
            )
        return Action(int(match[1]), cast(Kind, match[2]), int(match[3]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What every pipeline rank does in one training step, in order.

    Attributes:
        ranks: one list of actions per pipeline rank.
    """

    num_stages: int
    num_micro_batches: int
    ranks: tuple[tuple[Action, ...], ...]

    def __str__(self) -> str:
        return "\n".join(" ".join(map(str, actions)) for actions in self.ranks)

    @staticmethod
    def parse(text: str) -> Schedule:
        """Read one line of actions per rank; ``parse(str(schedule)) == schedule``.

        Raises:
            OptionError: if the text holds no actions, or something that is none.
        """
        lines = [line for line in text.splitlines() if line.strip()]
        ranks = tuple(tuple(Action.parse(word) for word in line.split()) for line in lines)
        actions = [action for rank in ranks for action in rank]
        if not actions:
            raise OptionError(
                "expected a schedule of at least one action but got none; "
                "write one line of actions per pipeline rank"
            )
        return Schedule(
            num_stages=1 + max(a.stage for a in actions),
            num_micro_batches=1 + max(a.micro_batch for a in actions),
            ranks=ranks,
        )

    @property
    def homes(self) -> tuple[int, ...]:
        """The pipeline rank that runs each stage."""
        found = {a.stage: r for r, actions in enumerate(self.ranks) for a in actions}
        return tuple(found[stage] for stage in range(self.num_stages))

    @property
    def splits(self) -> bool:
        """Some backward is two actions."""
        return any(action.kind == "W" for actions in self.ranks for action in actions)

    def rank_of(self, stage: int) -> int:
        """The pipeline rank that runs a stage."""
        return self.homes[stage]


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What a schedule does when it runs.

    Attributes:
        order: all actions in an order in which they can run one after the other.
        in_flight: per stage the most micro-batches whose activations it holds at once, from
            forward to the end of backward.
    """

    order: tuple[Action, ...]
    in_flight: tuple[int, ...]


def dry_run(schedule: Schedule) -> DryRun:
    """Run the schedule without tensors and check it.

    Checked are: each stage lives on one rank and does one forward and one backward (in one action
    or in two) of every micro-batch, backward after forward; the last stage does its forwards in
    ascending order (the engine files losses in that order); no rank waits for ever.

    Raises:
        OptionError: names the first action that is wrong.
    """
    _check_complete(schedule)
    done: set[Action] = set()
    order: list[Action] = []
    next_index = [0] * len(schedule.ranks)
    held = [0] * schedule.num_stages
    peak = [0] * schedule.num_stages
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.ranks):
            while next_index[rank] < len(actions):
                action = actions[next_index[rank]]
                if not done.issuperset(needs(action, schedule.num_stages)):
                    break
                done.add(gradient(action) if action.kind == "B" else action)
                order.append(action)
                held[action.stage] += HOLDS[action.kind]
                peak[action.stage] = max(peak[action.stage], held[action.stage])
                next_index[rank] += 1
                moved = True
    stuck = [
        f"rank {rank} at {actions[i]}"
        for rank, (actions, i) in enumerate(zip(schedule.ranks, next_index, strict=True))
        if i < len(actions)
    ]
    if stuck:
        raise OptionError(
            f"expected a schedule that ends but got a deadlock: {', '.join(stuck)} wait(s) for "
            "something that never comes; reorder these actions"
        )
    return DryRun(order=tuple(order), in_flight=tuple(peak))


HOLDS: dict[Kind, int] = {"F": 1, "B": -1, "I": 0, "W": -1}
"""By how many micro-batches' activations a stage holds more after an action."""


def gradient(action: Action) -> Action:
    """What an action stands for that makes the gradient of its stage's input: ``I``."""
    return Action(action.stage, "I", action.micro_batch)


def needs(action: Action, num_stages: int) -> list[Action]:
    """The actions that must have run before this one; ``I`` stands for ``B``, too."""
    stage, micro_batch = action.stage, action.micro_batch
    if action.kind == "F":
        return [Action(stage - 1, "F", micro_batch)] if stage else []
    if action.kind == "W":
        return [Action(stage, "I", micro_batch)]
    own: list[Action] = [Action(stage, "F", micro_batch)]
    return own if stage == num_stages - 1 else [*own, Action(stage + 1, "I", micro_batch)]


def _check_complete(schedule: Schedule) -> None:
    home: dict[int, int] = {}
    seen: set[Action] = set()
    for rank, actions in enumerate(schedule.ranks):
        for action in actions:
            if action.stage >= schedule.num_stages:
                raise OptionError(
                    f"expected stages below {schedule.num_stages} but got action {action}; "
                    "remove it or add a stage"
                )
            if home.setdefault(action.stage, rank) != rank:
                raise OptionError(
                    f"expected stage {action.stage} on one rank but got it on ranks "
                    f"{home[action.stage]} and {rank}; move {action}"
                )
            if action in seen:
                raise OptionError(f"expected {action} once but got it twice; remove one")
            seen.add(action)
    for stage in range(schedule.num_stages):
        for m in range(schedule.num_micro_batches):
            _check_micro_batch(stage, m, seen)
    extra = [a for a in seen if a.micro_batch >= schedule.num_micro_batches]
    if extra:
        raise OptionError(
            f"expected micro-batches below {schedule.num_micro_batches} but got {extra[0]}; "
            "remove it"
        )
    _check_ascending(schedule)


def _check_micro_batch(stage: int, micro_batch: int, seen: set[Action]) -> None:
    forward, backward, of_input, of_weight = (
        Action(stage, kind, micro_batch) for kind in ("F", "B", "I", "W")
    )
    split = of_input in seen or of_weight in seen
    for kind, missing in (
        ("F", forward), *((("I", of_input), ("W", of_weight)) if split else (("B", backward),)),
    ):  # fmt: skip
        if missing not in seen:
            raise OptionError(
                f"expected a {kind} of every micro-batch in stage {stage} but {missing} is "
                "missing; add it"
            )
    if split and backward in seen:
        raise OptionError(
            f"expected one backward of a micro-batch but got {backward} besides {of_input} and "
            f"{of_weight}; remove one"
        )


def _check_ascending(schedule: Schedule) -> None:
    last = schedule.num_stages - 1
    forwards: Sequence[int] = [
        a.micro_batch for rank in schedule.ranks for a in rank if a.stage == last and a.kind == "F"
    ]
    if list(forwards) != sorted(forwards):
        raise OptionError(
            f"expected the last stage to run its forwards in ascending order but got "
            f"{list(forwards)}; sort them"
        )
