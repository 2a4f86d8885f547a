"""Stages that are replicated one by one: where a chain is cut, and how many ranks each stage gets.

PipeDream's program (Narayanan et al. 2019, section 3.1), from the last segment to the first. Let
``A(i, w)`` be the least seconds per micro-batch at which segments ``i`` and on run on ``w`` ranks:

    ``A(i, w) = min over j, r of max(T(i, j, r), 2 send(j), A(j, w - r))``

where ``T(i, j, r) = (forward and backward of i..j-1 + their update per micro-batch) / r``, the
update being the reduction over ``r`` ranks, as far as nothing hides it, and the optimizer. A stage
that does not fit in memory takes infinitely long: its replicas hold ``ceil(w / r)`` micro-batches
and, without a flush, as many versions of the weights. Going backwards, ``w`` is known. Of the
micro-batch that runs, a segment needs its workspace beside what the segments before it have saved:
in backward, those after it have freed theirs.

Replicas take turns, so a message has the whole network card of its node, unless the narrower of the
two stages has several ranks there: these share it. ``send`` in the program is that of a whole card.

Segments have the least recomputation under which that has a solution, and then each stage the least
that it needs. The step is simulated (:func:`autoshard.versioned.step_seconds`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from autoshard.errors import OptionError
from autoshard.versioned import Rules, StageTimes, holds, step_seconds

Floats = npt.NDArray[np.float64]

MOST_COMPOSITIONS = 2000
"""Ways to deal ranks to a given number of stages that are tried one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One segment of the chain under one recompute entry, for one micro-batch.

    Attributes:
        weight_bytes: of its weights, of which there may be versions.
        state_bytes: weights once, gradients and optimizer state.
        send_s: to hand on what passes a cut after it, one way, over a whole network card.
        tied: weights that other segments use too: name -> seconds to send one, one way, over a
            whole network card.
        parts_ties: a cut after it has a tied weight on both sides.
    """

    forward_s: float
    backward_s: float
    saved_bytes: float = 0.0
    workspace_bytes: float = 0.0
    weight_bytes: float = 0.0
    state_bytes: float = 0.0
    send_s: float = 0.0
    tied: Mapping[str, float] = field(default_factory=dict)
    parts_ties: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicatedStage:
    """Segments ``first`` to ``end - 1`` on so many ranks.

    Attributes:
        entry: recompute entry of its segments.
        memory_bytes: of one replica.
    """

    first: int
    end: int
    replicas: int
    entry: int
    times: StageTimes
    memory_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicatedSplit:
    """An answer.

    Attributes:
        stages: none if nothing fits or there are too few segments.
        step_s: simulated.
        bottleneck_s: seconds per micro-batch of the slowest stage or send.
        missing_bytes: what the worst stage lacks if weights versions are counted exactly.
        reason: why there are no stages.
    """

    stages: tuple[ReplicatedStage, ...] = ()
    step_s: float = math.inf
    bottleneck_s: float = math.inf
    missing_bytes: float = math.inf
    reason: str = "no cut into stages with parameters goes with the pins and fits in memory"


@dataclass(slots=True, kw_only=True)
class ReplicaProblem:
    """A chain and the ranks that it is dealt to.

    Attributes:
        segments: by recompute entry, leanest last, the segments in order.
        update_s: by number of replicas, of each segment, per update.
        num_ranks: in all.
        schedule, num_micro_batches, vertical_sync: as of :class:`autoshard.versioned.Rules`.
        memory_bytes: of a device.
        stage_bytes: what every stage holds besides.
        replicas: pinned, one number per stage.
        lengths: pinned, segments of every stage.
        card_ranks: that share a network card.
    """

    segments: Sequence[Sequence[Segment]]
    update_s: Callable[[int], Sequence[float]]
    num_ranks: int
    schedule: str
    num_micro_batches: int
    vertical_sync: bool = False
    memory_bytes: float = math.inf
    stage_bytes: float = 0.0
    replicas: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    num_stages: int | None = None
    card_ranks: int = 1
    _updates: dict[int, Floats] = field(default_factory=dict)

    def best(self) -> ReplicatedSplit:
        """The split of least bottleneck, under the least recomputation that fits."""
        found = ReplicatedSplit()
        for entry in range(len(self.segments)):
            splits = [split for deal in self._deals() for split in self._splits(entry, deal)]
            best = min(
                splits, key=lambda s: (s.missing_bytes > 0, s.step_s), default=ReplicatedSplit()
            )
            if best.stages and best.missing_bytes <= 0:
                return best
            if best.missing_bytes < found.missing_bytes or not found.stages:
                found = best
        return found

    def _deals(self) -> Iterator[tuple[int, ...] | None]:
        """Replicas of every stage to try; ``None``: to be found together with the cuts."""
        stages = self.num_stages or (len(self.lengths) if self.lengths else None)
        if self.replicas is not None or stages is None:
            yield self.replicas
            return
        divisors = [r for r in range(1, self.num_ranks + 1) if self.num_micro_batches % r == 0]
        deals = (
            deal
            for deal in itertools.product(divisors, repeat=stages)
            if sum(deal) == self.num_ranks
        )
        yield from itertools.islice(deals, MOST_COMPOSITIONS)

    def _splits(self, entry: int, replicas: tuple[int, ...] | None) -> Iterator[ReplicatedSplit]:
        """The best chain, and if weights are tied the best that does not part them: moving them
        may cost more than uneven stages."""
        yield self._split(_Chain(self, entry, replicas, part_ties=True).path(), entry)
        if any(s.parts_ties for s in self.segments[entry]):
            yield self._split(_Chain(self, entry, replicas, part_ties=False).path(), entry)

    def _split(
        self, chosen: tuple[list[tuple[int, int, int]], float], entry: int
    ) -> ReplicatedSplit:
        """The stages of a path through the program."""
        path, bottleneck_s = chosen
        if not path:
            return ReplicatedSplit()
        counts = tuple(r for _, _, r in path)
        tied = [
            {n: s for segment in self.segments[entry][a:b] for n, s in segment.tied.items()}
            for a, b, _ in path
        ]
        try:
            rules = self._rules(counts, tied_pairs(tied))
        except OptionError as error:  # too few micro-batches for two versions
            return ReplicatedSplit(reason=str(error))
        in_flight, versions = holds(rules)
        stages = tuple(
            self._stage(first, end, counts[s : s + 2], entry, in_flight[s], versions[s])
            for s, (first, end, _) in enumerate(path)
        )
        stages = tuple(
            _with_ties(stage, own, tied[:s])
            for s, (stage, own) in enumerate(zip(stages, tied, strict=True))
        )
        return ReplicatedSplit(
            stages=stages, bottleneck_s=bottleneck_s,
            step_s=step_seconds(rules, [s.times for s in stages]),
            missing_bytes=max(s.memory_bytes for s in stages) - self.memory_bytes,
        )  # fmt: skip

    def _rules(self, replicas: tuple[int, ...], ties: tuple[tuple[int, int], ...]) -> Rules:
        return Rules(
            schedule=self.schedule, replicas=replicas, num_micro_batches=self.num_micro_batches,
            vertical_sync=self.vertical_sync, ties=ties,
        )  # fmt: skip

    def _stage(
        self,
        first: int,
        end: int,
        counts: Sequence[int],
        most: int,
        in_flight: int,
        versions: int,
    ) -> ReplicatedStage:
        """A stage under the first entry up to ``most`` that fits.

        Args:
            counts: replicas of it and, if there is one, of the stage after it.
        """
        replicas = counts[0]
        updates = self.updates(replicas)
        for entry in range(most + 1):
            own = self.segments[entry][first:end]
            saved = _sums([s.saved_bytes for s in own])
            memory = self.stage_bytes + (in_flight - 1) * float(saved[-1])
            memory += float(np.max(saved[1:] + [s.workspace_bytes for s in own]))
            memory += sum(s.state_bytes + (versions - 1) * s.weight_bytes for s in own)
            if memory <= self.memory_bytes:
                break
        sharing = min(*counts, self.card_ranks) if len(counts) > 1 else 0
        times = StageTimes(
            forward_s=sum(s.forward_s for s in own), backward_s=sum(s.backward_s for s in own),
            send_s=sharing * own[-1].send_s if sharing else 0.0,
            update_s=float(updates[first:end].sum()),
        )  # fmt: skip
        return ReplicatedStage(
            first=first, end=end, replicas=replicas, entry=entry, times=times, memory_bytes=memory
        )

    def updates(self, replicas: int) -> Floats:
        """Seconds of an update of each segment over so many replicas."""
        if replicas not in self._updates:
            self._updates[replicas] = np.array(self.update_s(replicas))
        return self._updates[replicas]

    def per_update(self, replicas: int) -> int:
        """Micro-batches that a replica runs between two updates."""
        return 1 if self.schedule == "pipedream" else self.num_micro_batches // replicas


class _Chain:
    """The program for one recompute entry."""

    def __init__(
        self,
        problem: ReplicaProblem,
        entry: int,
        replicas: tuple[int, ...] | None,
        *,
        part_ties: bool,
    ) -> None:
        self._problem = problem
        own = problem.segments[entry]
        self._count = len(own)
        self._seconds, self._saved, self._weights, self._state = (
            _sums(values)
            for values in (
                [s.forward_s + s.backward_s for s in own],
                [s.saved_bytes for s in own],
                [s.weight_bytes for s in own],
                [s.state_bytes for s in own],
            )
        )
        self._workspace = np.array([s.workspace_bytes for s in own])
        self._sends = np.array([2 * s.send_s for s in own[:-1]] + [0.0])
        if not part_ties:
            self._sends[[s.parts_ties for s in own]] = math.inf
        self._ends = np.ones((self._count, self._count), dtype=bool)
        self._allow_pinned()
        # Ranks that are left tell the stage, and so the replicas that were pinned for it.
        left = itertools.accumulate(reversed(replicas or ()))
        self._pinned: Mapping[int, int] = dict(zip(left, reversed(replicas or ()), strict=True))
        self._replicas = replicas

    def _allow_pinned(self) -> None:
        """Ends that stages may have by where they begin: ``[first, end - 1]``."""
        if self._problem.lengths is None:
            return
        self._ends[:] = False
        first = 0
        for length in self._problem.lengths:
            self._ends[first, first + length - 1] = True
            first += length

    def path(self) -> tuple[list[tuple[int, int, int]], float]:
        """(first, end, replicas) of the best stages, and their bottleneck."""
        count, ranks = self._count, self._problem.num_ranks
        least = np.full((count + 1, ranks + 1), math.inf)
        least[count, 0] = 0.0
        taken: dict[tuple[int, int], tuple[int, int]] = {}
        for first in reversed(range(count)):
            for left in range(1, ranks + 1):
                for r in self._choices(left):
                    stage_s = self._stage_s(first, left, r)
                    rest = np.maximum(self._sends[first:], least[first + 1 :, left - r])
                    total = np.maximum(stage_s, rest)
                    at = int(np.argmin(total))
                    if total[at] < least[first, left]:
                        least[first, left] = total[at]
                        taken[first, left] = (first + at + 1, r)
        stages, first, left = [], 0, ranks
        while (first, left) in taken:
            end, r = taken[first, left]
            stages.append((first, end, r))
            first, left = end, left - r
        return stages, float(least[0, ranks])

    def _choices(self, left: int) -> Iterator[int]:
        if self._replicas is not None:
            if left in self._pinned:
                yield self._pinned[left]
            return
        yield from (r for r in range(1, left + 1) if self._problem.num_micro_batches % r == 0)

    def _stage_s(self, first: int, left: int, r: int) -> Floats:
        """Seconds per micro-batch of a stage from ``first`` to each end."""
        problem = self._problem
        updates = _sums(problem.updates(r))
        busy = self._seconds[first + 1 :] - self._seconds[first]
        busy = busy + (updates[first + 1 :] - updates[first]) / problem.per_update(r)
        in_flight = -(-left // r)
        if problem.schedule == "gpipe":
            in_flight = problem.num_micro_batches // r
        versions = {"pipedream": in_flight, "pipedream-2bw": 2}.get(problem.schedule, 1)
        saved = self._saved[first + 1 :] - self._saved[first]
        memory = problem.stage_bytes + np.maximum.accumulate(saved + self._workspace[first:])
        memory += self._state[first + 1 :] - self._state[first]
        memory += (versions - 1) * (self._weights[first + 1 :] - self._weights[first])
        memory += (in_flight - 1) * saved
        has_weights = self._state[first + 1 :] > self._state[first]
        possible = self._ends[first, first:] & (memory <= problem.memory_bytes) & has_weights
        return np.where(possible, busy / r, math.inf)


def _with_ties(
    stage: ReplicatedStage, own: Mapping[str, float], before: Sequence[Mapping[str, float]]
) -> ReplicatedStage:
    """A stage whose updates send gradients to the owners of its weights and take these."""
    owned = {name for names in before for name in names}
    moved_s = 2 * sum(seconds for name, seconds in own.items() if name in owned)
    times = replace(stage.times, update_s=stage.times.update_s + moved_s)
    return replace(stage, times=times)


def tied_pairs(names: Sequence[Collection[str]]) -> tuple[tuple[int, int], ...]:
    """The owner of each weight that several stages use, and each other stage that does.

    Args:
        names: of the weights of each stage.
    """
    owners: dict[str, int] = {}
    pairs = {
        (owner, stage)
        for stage, own in enumerate(names)
        for name in own
        if (owner := owners.setdefault(name, stage)) != stage
    }
    return tuple(sorted(pairs))


def _sums(values: Sequence[float] | Floats) -> Floats:
    return np.concatenate([[0.0], np.cumsum(values)])
