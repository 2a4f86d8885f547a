"""Pipelines whose stages are replicated unevenly and whose weights have versions, as data.

Stage ``s`` lies on ``replicas[s]`` ranks, which take the micro-batches in turn: micro-batch ``i``
is run, forward and backward, by replica ``i mod replicas[s]``. So a batch needs no cutting between
stages of different width: a whole micro-batch goes from the replica that made it to the one whose
turn it is.

An action is ``<stage>F<micro-batch>@<version>`` or ``<stage>B<micro-batch>@<version>``, where a
version is the number of updates that the weights have had, or ``<stage>S<version>``: the replicas
of the stage sum their gradients and step to that version. The rules of the schedules:

| schedule | flush | an update per | version of micro-batch ``i`` in stage ``s`` |
|---|---|---|---|
| ``gpipe``, ``1f1b`` | after each step | step of ``M`` micro-batches | the newest, ``i div M`` |
| ``pipedream`` | never | micro-batch of each replica | ``max(0, i div r - (w - 1))`` |
| ... with vertical sync | never | micro-batch of each replica | of the input stage's age |
| ``pipedream-2bw`` | never | step of ``M`` micro-batches | ``max(0, i div M - 1)`` |

A weight that is tied between stages belongs to the first of them, its owner, which makes its
updates from the gradients of all: the others send theirs and take the new weights. So it has one
version per micro-batch wherever it is used, the owner's. But where two micro-batches in flight on a
rank use one version of its stage, the later one takes the tied weight of the earlier: that happens
only in the first ones of a pipeline whose replicas are uneven.

Here ``r`` is the number of replicas and ``w`` the micro-batches that one of them has in flight,
``ceil(ranks from this stage on / r)``. (Narayanan et al. 2019, "PipeDream", sections 3.2 and 3.3;
Narayanan et al. 2020, "Memory-efficient pipeline-parallel DNN training", section 3.1.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from autoshard.errors import OptionError

What = Literal["F", "B", "S"]

STALE = ("pipedream", "pipedream-2bw")
"""Schedules that train with gradients of older weights."""
SCHEDULES = ("gpipe", "1f1b", *STALE)
"""Schedules that can have uneven replicas."""

_ACTION = re.compile(r"(\d+)(?:([FB])(\d+)@(\d+)|S(\d+))")


@dataclass(frozen=True, slots=True)
class Action:
    """A forward or backward of one micro-batch on a version of the weights, or an update.

    Attributes:
        micro_batch: counted from the last time that the pipeline was empty; -1 for an update.
        version: of the weights that are used, or that the update makes.
    """

    stage: int
    what: What
    micro_batch: int
    version: int

    def __str__(self) -> str:
        if self.what == "S":
            return f"{self.stage}S{self.version}"
        return f"{self.stage}{self.what}{self.micro_batch}@{self.version}"

    @staticmethod
    def parse(text: str) -> Action:
        """The inverse of ``str``.

        Raises:
            OptionError: if the text is no action.
        """
        match = _ACTION.fullmatch(text)
        if match is None:
            raise OptionError(
                f"expected an action such as 2F0@0, 0B3@1 or 1S2 but got {text!r}; write "
                "<stage><F|B><micro-batch>@<version> or <stage>S<version>"
            )
        if match[2] is None:
            return Action(int(match[1]), "S", -1, int(match[5]))
        return Action(int(match[1]), cast(What, match[2]), int(match[3]), int(match[4]))


@dataclass(frozen=True, slots=True)
class VersionedSchedule:
    """What every rank does, in order.

    Attributes:
        ranks: one list of actions per rank; the replicas of a stage are consecutive.
    """

    ranks: tuple[tuple[Action, ...], ...]

    def __str__(self) -> str:
        return "\n".join(" ".join(map(str, actions)) for actions in self.ranks)

    @staticmethod
    def parse(text: str) -> VersionedSchedule:
        """Read one line of actions per rank; ``parse(str(schedule)) == schedule``.

        Raises:
            OptionError: if a word is no action.
        """
        lines = [line.split() for line in text.splitlines() if line.strip()]
        return VersionedSchedule(tuple(tuple(map(Action.parse, words)) for words in lines))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """A schedule by name, and what it is for.

    Attributes:
        schedule: one of ``SCHEDULES``.
        replicas: ranks of every stage.
        num_micro_batches: ``M``, that a step feeds; a multiple of every number of replicas.
        vertical_sync: a micro-batch meets weights of the same age in all stages (``pipedream``).
        ties: pairs of a stage that owns a weight and a later one that uses it too.

    Raises:
        OptionError: the schedule cannot run so.
    """

    schedule: str
    replicas: tuple[int, ...]
    num_micro_batches: int
    vertical_sync: bool = False
    ties: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        m = self.num_micro_batches
        if self.schedule not in SCHEDULES:
            raise OptionError(
                f"expected a schedule that can have uneven replicas ({', '.join(SCHEDULES)}) but "
                f"got {self.schedule!r}; choose one of them"
            )
        if not self.replicas or min(self.replicas) < 1:
            raise OptionError(
                f"expected at least one replica of every stage but got {self.replicas}; give one "
                "positive number per stage"
            )
        uneven = [r for r in self.replicas if m % r]
        if m < 1 or uneven:
            raise OptionError(
                f"expected micro-batches per step that the replicas {self.replicas} of every stage "
                f"can share equally but got {m}; choose a multiple of {uneven[0] if uneven else 1}"
            )
        if self.schedule == "pipedream-2bw":
            ahead = max(r * (self.in_flight(s) - 1) for s, r in enumerate(self.replicas))
            if m < ahead:
                raise OptionError(
                    f"expected at least {ahead} micro-batches per step, so that two versions of "
                    f"the weights are enough for replicas {self.replicas}, but got {m}; choose a "
                    "smaller micro-batch, fewer stages or a larger global batch"
                )

    def tie_home(self, owner: int, rank: int, micro_batch: int) -> int:
        """The owner's rank that sums what another rank has of an update of a tied weight.

        Args:
            micro_batch: the last one that the other rank's gradient is of.
        """
        if self.schedule == "pipedream":
            return self.home(owner, micro_batch)
        index = rank - self.ranks_of(self.stage_of(rank))[0]
        return self.ranks_of(owner)[index % self.replicas[owner]]

    @property
    def stale(self) -> bool:
        """Gradients are of older weights than those that they are applied to."""
        return self.schedule in STALE

    @property
    def num_stages(self) -> int:
        return len(self.replicas)

    @property
    def num_ranks(self) -> int:
        return sum(self.replicas)

    def ranks_of(self, stage: int) -> range:
        """The ranks of a stage's replicas."""
        first = sum(self.replicas[:stage])
        return range(first, first + self.replicas[stage])

    def stage_of(self, rank: int) -> int:
        """The stage that a rank holds."""
        return next(s for s in range(self.num_stages) if rank in self.ranks_of(s))

    def home(self, stage: int, micro_batch: int) -> int:
        """The rank that runs a micro-batch in a stage, both ways."""
        return self.ranks_of(stage)[micro_batch % self.replicas[stage]]

    def in_flight(self, stage: int) -> int:
        """Micro-batches that a replica of a stage has begun and not ended, at most."""
        if self.schedule == "gpipe":
            return self.num_micro_batches // self.replicas[stage]
        ahead = -(-sum(self.replicas[stage:]) // self.replicas[stage])
        return ahead if self.stale else min(ahead, self.num_micro_batches // self.replicas[stage])

    def per_update(self, stage: int) -> int:
        """Micro-batches, over all replicas, whose gradients make one update."""
        return self.replicas[stage] if self.schedule == "pipedream" else self.num_micro_batches

    def updates_per_step(self, stage: int) -> int:
        """Updates of a stage while ``M`` micro-batches pass."""
        return self.num_micro_batches // self.per_update(stage)

    def version(self, stage: int, micro_batch: int) -> int:
        """Of the weights that a micro-batch meets in a stage, forward and backward."""
        if self.schedule == "pipedream-2bw":
            return max(0, micro_batch // self.num_micro_batches - 1)
        if not self.stale:
            return micro_batch // self.num_micro_batches
        if self.vertical_sync and stage:
            seen = self.replicas[0] * self.version(0, micro_batch)  # micro-batches, by the input
            return seen // self.replicas[stage]
        turn = micro_batch // self.replicas[stage]
        return max(0, turn - (self.in_flight(stage) - 1))

    @property
    def staleness(self) -> tuple[int, ...]:
        """Per stage the updates between the weights that a gradient is of and those it changes."""
        late = 4 * self.num_micro_batches * (1 + self.num_ranks)
        span = range(late, late + 2 * self.num_micro_batches)
        found = [
            max(i // self.per_update(s) - self.version(s, i) for i in span)
            for s in range(self.num_stages)
        ]
        for owner, other in self.ties:
            found[other] = max(found[other], found[owner])
        return tuple(found)

    @property
    def delay(self) -> int:
        """Steps until what a step feeds has left the pipeline."""
        if not self.stale:
            return 0
        ahead = max(r * (self.in_flight(s) - 1) for s, r in enumerate(self.replicas))
        return -(-ahead // self.num_micro_batches)

    # -- what a rank does -------------------------------------------------------------------------

    def step(self, rank: int, step: int) -> Iterator[Action]:
        """The actions of a rank in one step, counted from when the pipeline was last empty."""
        stage = self.stage_of(rank)
        turns = self.num_micro_batches // self.replicas[stage]
        first, ahead = step * turns, self.in_flight(stage) - 1
        for turn in range(first, first + turns):
            yield self._run(stage, rank, "F", turn)
            if turn - ahead >= (0 if self.stale else first):
                yield from self._backward(stage, rank, turn - ahead)
        if not self.stale:
            for turn in range(first + turns - ahead, first + turns):
                yield from self._backward(stage, rank, turn)

    def rest(self, rank: int, steps: int) -> Iterator[Action]:
        """What is left to do after so many steps, until the pipeline is empty."""
        stage = self.stage_of(rank)
        end = steps * self.num_micro_batches // self.replicas[stage]
        ahead = self.in_flight(stage) - 1 if self.stale else 0
        for turn in range(max(0, end - ahead), end):
            yield from self._backward(stage, rank, turn)

    def unrolled(self, steps: int) -> VersionedSchedule:
        """All ranks over so many steps, from an empty pipeline to an empty one."""
        return VersionedSchedule(
            tuple(
                tuple(
                    action
                    for part in (*(self.step(r, k) for k in range(steps)), self.rest(r, steps))
                    for action in part
                )
                for r in range(self.num_ranks)
            )
        )

    def _run(self, stage: int, rank: int, what: What, turn: int) -> Action:
        micro_batch = turn * self.replicas[stage] + rank - self.ranks_of(stage)[0]
        return Action(stage, what, micro_batch, self.version(stage, micro_batch))

    def _backward(self, stage: int, rank: int, turn: int) -> Iterator[Action]:
        yield self._run(stage, rank, "B", turn)
        per_update = self.per_update(stage) // self.replicas[stage]
        if (turn + 1) % per_update == 0:
            yield Action(stage, "S", -1, (turn + 1) // per_update)


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionedRun:
    """What a schedule does when it runs.

    Attributes:
        order: (rank, action) in an order in which they can run one after the other; an update of
            all replicas of a stage stands together, the first replica's first.
        in_flight: per rank the most micro-batches whose activations it holds at once.
        versions: per rank the most versions of the weights that it holds at once: the newest, and
            older ones that a later action uses.
    """

    order: tuple[tuple[int, Action], ...]
    in_flight: tuple[int, ...]
    versions: tuple[int, ...]


def dry_run(schedule: VersionedSchedule, rules: Rules) -> VersionedRun:
    """Run a schedule without tensors and check it.

    Checked are: micro-batches are where their turn is; backward follows forward, on the same
    version; a version that is used has been made and is not newer than the rank's; updates make one
    version after the other, on all replicas alike; no rank waits for ever.

    Raises:
        OptionError: names the first action that is wrong.
    """
    state = _DryRun(schedule, rules)
    while state.advance():
        pass
    return state.finished()


class _DryRun:
    def __init__(self, schedule: VersionedSchedule, rules: Rules) -> None:
        if len(schedule.ranks) != rules.num_ranks:
            raise OptionError(
                f"expected the actions of {rules.num_ranks} ranks but got {len(schedule.ranks)}; "
                "write one line per rank"
            )
        for rank, actions in enumerate(schedule.ranks):
            stage = rules.stage_of(rank)
            misplaced = [action for action in actions if action.stage != stage]
            if misplaced:
                raise OptionError(
                    f"expected actions of stage {stage} on rank {rank} but got {misplaced[0]}; "
                    "move it"
                )
        self._ranks, self._rules = schedule.ranks, rules
        count = rules.num_ranks
        self._next = [0] * count
        self._newest = [0] * count
        self._held: list[dict[int, int]] = [{} for _ in range(count)]
        self._peak = [0] * count
        self._versions = [1] * count
        self._done: set[tuple[int, What, int]] = set()
        self._order: list[tuple[int, Action]] = []
        self._oldest_used = [_oldest_used(actions) for actions in schedule.ranks]

    def advance(self) -> bool:
        """Run what can run; whether anything could."""
        before = len(self._order)
        for rank, actions in enumerate(self._ranks):
            while self._next[rank] < len(actions) and self._ready(rank, actions[self._next[rank]]):
                action = actions[self._next[rank]]
                together = self._peers(rank) if action.what == "S" else (rank,)
                for one in together:
                    self._check(one, action)
                    self._do(one, action)
        return len(self._order) > before

    def finished(self) -> VersionedRun:
        stuck = [
            f"rank {rank} at {actions[i]}"
            for rank, (actions, i) in enumerate(zip(self._ranks, self._next, strict=True))
            if i < len(actions)
        ]
        if stuck:
            raise OptionError(
                f"expected a schedule that ends but got a deadlock: {', '.join(stuck)} wait(s) for "
                "something that never comes; reorder these actions"
            )
        return VersionedRun(
            order=tuple(self._order), in_flight=tuple(self._peak), versions=tuple(self._versions)
        )

    def _ready(self, rank: int, action: Action) -> bool:
        stage, last = action.stage, self._rules.num_stages - 1
        if action.what == "F":
            return stage == 0 or (stage - 1, "F", action.micro_batch) in self._done
        if action.what == "B":
            return stage == last or (stage + 1, "B", action.micro_batch) in self._done
        return all(
            self._ranks[r][self._next[r] : self._next[r] + 1] == (action,)
            for r in self._peers(rank)
        )

    def _peers(self, rank: int) -> Sequence[int]:
        """The replicas of a rank's stage, itself included."""
        return self._rules.ranks_of(self._rules.stage_of(rank))

    def _check(self, rank: int, action: Action) -> None:
        rules = self._rules
        if action.what == "S":
            if action.version != self._newest[rank] + 1:
                raise OptionError(
                    f"expected rank {rank} to make version {self._newest[rank] + 1} next but got "
                    f"{action}; make one version after the other"
                )
            return
        if rules.home(action.stage, action.micro_batch) != rank:
            raise OptionError(
                f"expected {action} on rank {rules.home(action.stage, action.micro_batch)}, whose "
                f"turn it is, but got it on rank {rank}; move it"
            )
        if action.version > self._newest[rank]:
            raise OptionError(
                f"expected {action} after an update to version {action.version} but rank {rank} "
                f"has version {self._newest[rank]}; use an older version or step before"
            )
        held = self._held[rank].get(action.micro_batch)
        if action.what == "B" and held != action.version:
            used = "has not run" if held is None else f"used version {held}"
            raise OptionError(
                f"expected {action} on the version of its forward but that {used}; use the same "
                "version both ways"
            )

    def _do(self, rank: int, action: Action) -> None:
        held = self._held[rank]
        if action.what == "F":
            held[action.micro_batch] = action.version
            self._peak[rank] = max(self._peak[rank], len(held))
        elif action.what == "B":
            del held[action.micro_batch]
        else:
            self._newest[rank] = action.version
        number = action.version if action.what == "S" else action.micro_batch
        self._done.add((action.stage, action.what, number))
        self._next[rank] += 1
        oldest = self._oldest_used[rank][self._next[rank]]
        kept = self._newest[rank] - min(oldest, self._newest[rank]) + 1
        self._versions[rank] = max(self._versions[rank], kept)
        self._order.append((rank, action))


def _oldest_used(actions: Sequence[Action]) -> list[int]:
    """For each place in a list the oldest version that is used from there on."""
    found = [max((a.version for a in actions), default=0)]
    for action in reversed(actions):
        found.append(found[-1] if action.what == "S" else min(found[-1], action.version))
    return found[::-1]


def most_stale(workers: int, bound: int) -> int:
    """Updates between the weights of a gradient and those that it changes, under ``ssp``.

    Workers are at most ``bound`` minibatches ahead of the slowest (Ho et al. 2013, "More effective
    distributed ML via a stale synchronous parallel parameter server", section 3). So from when a
    worker fetches its weights until its gradient is applied, each other one goes from at most
    ``bound`` behind to at most ``bound`` ahead, and makes one update more.
    """
    return (workers - 1) * (2 * bound + 1)


def holds(rules: Rules) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Per stage the most micro-batches in flight and versions of weights of one of its replicas."""
    run = dry_run(rules.unrolled(4 + 2 * rules.delay), rules)
    first = [rules.ranks_of(stage) for stage in range(rules.num_stages)]
    return (
        tuple(max(run.in_flight[r] for r in ranks) for ranks in first),
        tuple(max(run.versions[r] for r in ranks) for ranks in first),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds of one stage.

    Attributes:
        send_s: of one micro-batch to the next stage; its gradient takes as long back. A rank of the
            narrower of the two stages sends and receives one after the other.
        update_s: of the replicas' reduction, as far as nothing hides it, and of the optimizer.
    """

    forward_s: float
    backward_s: float
    send_s: float = 0.0
    update_s: float = 0.0


def simulate(rules: Rules, stages: Sequence[StageTimes], steps: int) -> Mapping[int, float]:
    """Run a schedule on the clock.

    Returns:
        By rank when it has ended ``steps`` steps, the pipeline being empty before and after.
    """
    free = dict.fromkeys(range(rules.num_ranks), 0.0)
    done: dict[tuple[int, What, int], float] = {}
    lines: dict[tuple[int, What, int], float] = {}  # when a message of a boundary can go next

    def arrival_s(boundary: int, what: What, micro_batch: int) -> float:
        """Of what the action before this one has sent, over the boundary after a stage."""
        source = boundary if what == "F" else boundary + 1
        line = (boundary, what, micro_batch % min(rules.replicas[boundary : boundary + 2]))
        begun_s = max(done[source, what, micro_batch], lines.get(line, 0.0))
        lines[line] = begun_s + stages[boundary].send_s
        return lines[line]

    for rank, action in dry_run(rules.unrolled(steps), rules).order:
        stage, own = action.stage, stages[action.stage]
        if action.what == "S":
            replicas = rules.ranks_of(stage)
            if rank == replicas[0]:
                end_s = max(free[r] for r in replicas) + own.update_s
                free.update(dict.fromkeys(replicas, end_s))
            continue
        key, before = (stage, action.what, action.micro_batch), 0.0
        if action.what == "F" and stage:
            before = arrival_s(stage - 1, "F", action.micro_batch)
        elif action.what == "B" and stage < rules.num_stages - 1:
            before = arrival_s(stage, "B", action.micro_batch)
        lasts_s = own.forward_s if action.what == "F" else own.backward_s
        free[rank] = done[key] = max(free[rank], before) + lasts_s
    return free


def step_seconds(rules: Rules, stages: Sequence[StageTimes]) -> float:
    """Seconds of a step: between flushes, or on average where a pipeline never runs empty."""
    if not rules.stale:
        return max(simulate(rules, stages, 1).values())
    begun = 4 * (1 + rules.delay)
    few, more = (max(simulate(rules, stages, n).values()) for n in (begun, 2 * begun))
    return (more - few) / begun
