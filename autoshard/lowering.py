"""A schedule with its communication: what every pipeline rank does, one instruction after another.

:func:`lower` adds to a :class:`~autoshard.schedule.Schedule` what follows from it: a send after
each forward and each gradient of an input whose neighbour stage is on another rank, and the receive
on that rank; where parameters are sharded over data-parallel ranks, ``GATHER`` before the first
forward of a stage; where gradients are summed over them, ``REDUCE`` after the last backward of a
stage; ``STEP``, the optimizer's, at the end. The runtime executes the instructions and the picture
shows them.

A receive is posted in the same turn as its send, and all sends and receives stand in one common
order of which every rank has its part. So messages between two ranks arrive in the order in which
they are expected, and no two ranks wait for each other even if a send only returns when it has been
received: the first instruction of the common order that has not run can always run.
:func:`check` holds any other list of instructions to the same.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from autoshard.errors import OptionError
from autoshard.schedule import Action, Kind, Schedule, dry_run, gradient, needs

What = Literal[
    "F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B", "GATHER", "REDUCE", "STEP"
]  # fmt: skip
"""``SEND_F`` sends a stage's outputs on and ``SEND_B`` the gradient of its inputs back; ``RECV_F``
receives its inputs and ``RECV_B`` the gradient of its outputs."""

_TRANSFER_OF: dict[Kind, tuple[What, What, int]] = {
    "F": ("SEND_F", "RECV_F", 1), "B": ("SEND_B", "RECV_B", -1), "I": ("SEND_B", "RECV_B", -1),
}  # fmt: skip
"""What an action's result is sent and received by, and how much later the receiving stage is."""

_PER_STAGE = frozenset({"GATHER", "REDUCE", "STEP"})
_WORDS = "|".join(sorted(get_args(What), key=len, reverse=True))
_INSTRUCTION = re.compile(rf"(\d+)({_WORDS})(\d*)")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One thing that the rank of ``stage`` does.

    Attributes:
        micro_batch: ``None`` for ``GATHER``, ``REDUCE`` and ``STEP``.
    """

    stage: int
    what: What
    micro_batch: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}{self.what}{'' if self.micro_batch is None else self.micro_batch}"

    @staticmethod
    def parse(text: str) -> Instruction:
        """The inverse of ``str``.

        Raises:
            OptionError: if the text is no instruction.
        """
        match = _INSTRUCTION.fullmatch(text)
        if match is None or (match[2] in _PER_STAGE) != (match[3] == ""):
            raise OptionError(
                f"expected an instruction such as 2F0, 1SEND_F3 or 0REDUCE but got {text!r}; "
                f"write <stage><{'|'.join(get_args(What))}><micro-batch, if it has one>"
            )
        return Instruction(int(match[1]), cast(What, match[2]), int(match[3]) if match[3] else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """What every pipeline rank does in one training step, communication included.

    Attributes:
        ranks: one list of instructions per pipeline rank.
    """

    num_stages: int
    num_micro_batches: int
    ranks: tuple[tuple[Instruction, ...], ...]

    def __str__(self) -> str:
        return "\n".join(" ".join(map(str, instructions)) for instructions in self.ranks)

    @staticmethod
    def parse(text: str) -> Lowered:
        """Read one line of instructions per rank; ``parse(str(lowered)) == lowered``.

        Raises:
            OptionError: if the text holds no instructions, or something that is none.
        """
        lines = [line for line in text.splitlines() if line.strip()]
        ranks = tuple(tuple(Instruction.parse(word) for word in line.split()) for line in lines)
        every = [i for rank in ranks for i in rank]
        if not every:
            raise OptionError(
                "expected at least one instruction but got none; write one line of instructions "
                "per pipeline rank"
            )
        return Lowered(
            num_stages=1 + max(i.stage for i in every),
            num_micro_batches=1 + max(i.micro_batch or 0 for i in every),
            ranks=ranks,
        )

    @property
    def compute(self) -> Schedule:
        """Forwards and backwards alone: ``lower(schedule).compute == schedule``."""
        return Schedule(
            num_stages=self.num_stages,
            num_micro_batches=self.num_micro_batches,
            ranks=tuple(
                tuple(
                    Action(i.stage, cast(Kind, i.what), i.micro_batch)
                    for i in instructions
                    if i.what in get_args(Kind) and i.micro_batch is not None
                )
                for instructions in self.ranks
            ),
        )


def lower(
    schedule: Schedule, *, gathers: bool = False, reduces: bool = False, trains: bool = True
) -> Lowered:
    """A schedule with its communication.

    Args:
        gathers: parameters are sharded over data-parallel ranks.
        reduces: gradients are summed over data-parallel ranks.
        trains: false for evaluation, which does the forwards alone, in the same order.

    Raises:
        OptionError: if the schedule is no valid one; see :func:`autoshard.schedule.dry_run`.
    """
    dry_run(schedule)
    if not trains:
        schedule = _forwards(schedule)
    homes = schedule.homes
    ranks: list[list[Instruction]] = [[] for _ in schedule.ranks]
    left = _backwards_left(schedule)
    gathered: set[int] = set()
    for action in _in_turns(schedule):
        stage, rank = action.stage, ranks[homes[action.stage]]
        if gathers and stage not in gathered:
            rank.append(Instruction(stage, "GATHER"))
            gathered.add(stage)
        rank.append(Instruction(stage, action.kind, action.micro_batch))
        if action.kind in _TRANSFER_OF:
            send, receive, later = _TRANSFER_OF[action.kind]
            peer = stage + later
            if 0 <= peer < schedule.num_stages and homes[peer] != homes[stage]:
                rank.append(Instruction(stage, send, action.micro_batch))
                ranks[homes[peer]].append(Instruction(peer, receive, action.micro_batch))
        if action.kind in ("B", "W"):
            left[stage] -= 1
            if reduces and not left[stage]:
                rank.append(Instruction(stage, "REDUCE"))
    if trains:
        for stage, home in enumerate(homes):
            ranks[home].append(Instruction(stage, "STEP"))
    return Lowered(
        num_stages=schedule.num_stages,
        num_micro_batches=schedule.num_micro_batches,
        ranks=tuple(map(tuple, ranks)),
    )


def _forwards(schedule: Schedule) -> Schedule:
    return Schedule(
        num_stages=schedule.num_stages,
        num_micro_batches=schedule.num_micro_batches,
        ranks=tuple(tuple(a for a in rank if a.kind == "F") for rank in schedule.ranks),
    )


def _backwards_left(schedule: Schedule) -> list[int]:
    left = [0] * schedule.num_stages
    for rank in schedule.ranks:
        for action in rank:
            left[action.stage] += action.kind in ("B", "W")
    return left


def _in_turns(schedule: Schedule) -> list[Action]:
    """All actions in the order in which they run if each takes one turn of its rank."""
    done: set[Action] = set()
    order: list[Action] = []
    waiting = [deque(actions) for actions in schedule.ranks]
    while any(waiting):
        turn = [
            actions.popleft()
            for actions in waiting
            if actions and done.issuperset(needs(actions[0], schedule.num_stages))
        ]
        done.update(gradient(action) if action.kind == "B" else action for action in turn)
        order += turn
    return order


def check(lowered: Lowered) -> None:
    """Run the instructions without tensors, each send waiting until it is received.

    Checked are, besides what :func:`autoshard.schedule.dry_run` checks: every input and gradient
    that comes from another rank is received before it is used; between two ranks, receives are
    posted in the order of the sends; no rank waits for ever.

    Raises:
        OptionError: names the first instruction that is wrong.
    """
    schedule = lowered.compute
    dry_run(schedule)
    homes = schedule.homes
    _check_received(lowered, homes)
    _check_message_order(lowered, homes)
    _check_ends(lowered, homes)


def _peer(instruction: Instruction) -> int:
    """The stage at the other end of a transfer."""
    return instruction.stage + (1 if instruction.what in ("SEND_F", "RECV_B") else -1)


def _other_end(instruction: Instruction) -> Instruction:
    other = {"SEND_F": "RECV_F", "SEND_B": "RECV_B", "RECV_F": "SEND_F", "RECV_B": "SEND_B"}
    what = cast(What, other[instruction.what])
    return Instruction(_peer(instruction), what, instruction.micro_batch)


def _check_received(lowered: Lowered, homes: Sequence[int]) -> None:
    last = lowered.num_stages - 1
    for rank, instructions in enumerate(lowered.ranks):
        seen: set[Instruction] = set()
        for i in instructions:
            awaited: Instruction | None = None
            if i.what == "F" and i.stage and homes[i.stage - 1] != rank:
                awaited = Instruction(i.stage, "RECV_F", i.micro_batch)
            elif i.what in ("B", "I") and i.stage < last and homes[i.stage + 1] != rank:
                awaited = Instruction(i.stage, "RECV_B", i.micro_batch)
            elif i.what in ("SEND_F", "SEND_B"):
                kinds: tuple[What, ...] = ("F",) if i.what == "SEND_F" else ("B", "I")
                made = [Instruction(i.stage, kind, i.micro_batch) for kind in kinds]
                awaited = None if seen.intersection(made) else made[0]
            if awaited is not None and awaited not in seen:
                raise OptionError(
                    f"expected {awaited} before {i} on rank {rank} but it is not there; "
                    "put it before"
                )
            seen.add(i)


def _check_message_order(lowered: Lowered, homes: Sequence[int]) -> None:
    channels: dict[tuple[int, int], tuple[list[Instruction], list[Instruction]]] = {}
    for rank, instructions in enumerate(lowered.ranks):
        for i in instructions:
            if i.what.startswith("SEND"):
                channels.setdefault((rank, homes[_peer(i)]), ([], []))[0].append(i)
            elif i.what.startswith("RECV"):
                channels.setdefault((homes[_peer(i)], rank), ([], []))[1].append(i)
    for (source, target), (sent, received) in channels.items():
        expected = [_other_end(i) for i in sent]
        for ours, theirs in zip(expected, received, strict=False):
            if ours != theirs:
                raise OptionError(
                    f"expected rank {target} to receive from rank {source} in the order of its "
                    f"sends, {ours} next, but got {theirs}; reorder them"
                )
        if len(expected) != len(received):
            raise OptionError(
                f"expected as many receives on rank {target} as rank {source} sends to it, "
                f"{len(expected)}, but got {len(received)}; add or remove some"
            )


def _check_ends(lowered: Lowered, homes: Sequence[int]) -> None:
    """A receive is posted and does not wait; what uses it waits, and so does a send."""
    position = [0] * len(lowered.ranks)
    posted: set[Instruction] = set()
    sent: set[Instruction] = set()

    def can_run(i: Instruction) -> bool:
        if i.what.startswith("SEND"):
            return _other_end(i) in posted
        received: dict[What, What] = {"F": "RECV_F", "B": "RECV_B", "I": "RECV_B"}
        if i.what not in received:
            return True
        needed = Instruction(i.stage, received[i.what], i.micro_batch)
        return needed not in posted or _other_end(needed) in sent

    moved = True
    while moved:
        moved = False
        for rank, instructions in enumerate(lowered.ranks):
            while position[rank] < len(instructions) and can_run(instructions[position[rank]]):
                i = instructions[position[rank]]
                if i.what.startswith("RECV"):
                    posted.add(i)
                elif i.what.startswith("SEND"):
                    sent.add(i)
                position[rank] += 1
                moved = True
    stuck = [
        f"rank {rank} at {instructions[p]}"
        for rank, (instructions, p) in enumerate(zip(lowered.ranks, position, strict=True))
        if p < len(instructions)
    ]
    if stuck:
        raise OptionError(
            f"expected instructions that end but got a deadlock: {', '.join(stuck)} wait(s) for "
            "something that never comes; reorder these instructions"
        )
