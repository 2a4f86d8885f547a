"""Which recompute entries the segments of one stage should have: a knapsack per content.

A *content* is what a stage consists of: numbers of segments by run. A *mix* gives each of them an
entry of its run's menu; it takes so many seconds, saves so many bytes per micro-batch in flight
and needs so large a workspace. For each content the mixes that no other beats in all three are
built up segment by segment (Nemhauser and Ullmann 1969); equal segments in any order are one mix.
How many micro-batches are in flight, and so which of the mixes is the fastest that fits, is asked
afterwards, so that stages share the work.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from autoshard.plan.solver import INFINITY, Floats
from autoshard.plan.stage_problem import Choice, Slot, StageProblem

Content = tuple[tuple[int, int], ...]
"""Runs with their numbers of segments, in order."""


@dataclass(frozen=True, slots=True)
class Mix:
    """The mix of one stage."""

    counts: dict[Slot, int]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Front:
    """Mixes of one content, by ascending seconds; ``counts`` is ``[mix, slot]``."""

    seconds: Floats
    saved_bytes: Floats
    workspace_bytes: Floats
    counts: npt.NDArray[np.int32]
    slots: tuple[Slot, ...]

    def selection(self, rows: npt.NDArray[np.int64]) -> _Front:
        return _Front(
            self.seconds[rows],
            self.saved_bytes[rows],
            self.workspace_bytes[rows],
            self.counts[rows],
            self.slots,
        )


@dataclass(slots=True)
class Mixes:
    """Answers about the contents of a problem, each computed once.

    Attributes:
        run_of: the run of every segment.
        most: the number of mixes that are kept of a content.
        limit_s: slower mixes are of no interest.
        thinned: contents that had more mixes, of which an even selection was kept:
            the fastest mix that fits may be among the lost ones.
    """

    problem: StageProblem
    most: int
    limit_s: float = INFINITY
    run_of: list[int] = field(init=False)
    thinned: set[Content] = field(default_factory=set)
    _offset: list[int] = field(init=False)
    _fronts: dict[Content, _Front] = field(default_factory=dict)
    _fixed: dict[Content, float] = field(default_factory=dict)
    _leanest: dict[Content, tuple[Floats, Floats]] = field(default_factory=dict)
    _fastest_entry: list[tuple[int, Choice]] = field(init=False)

    def __post_init__(self) -> None:
        self.run_of, self._offset = [], []
        for r, run in enumerate(self.problem.runs):
            self._offset.append(len(self.run_of))
            self.run_of += [r] * run.count
        self._fastest_entry = [
            min(enumerate(run.menu), key=lambda pair: (_key(pair[1]), pair[0]))
            for run in self.problem.runs
        ]

    @property
    def num_segments(self) -> int:
        return len(self.run_of)

    def content(self, start: int, end: int) -> Content:
        """Of the segments ``start <= i < end``."""
        first, last = self.run_of[start], self.run_of[end - 1]
        if first == last:
            return ((first, end - start),)
        head = self._offset[first + 1] - start
        middle = ((r, self.problem.runs[r].count) for r in range(first + 1, last))
        return ((first, head), *middle, (last, end - self._offset[last]))

    def has_parameters(self, content: Content) -> bool:
        return any(self.problem.runs[r].has_parameters for r, _ in content)

    def step_s(self, content: Content) -> float:
        """The work after the last backward."""
        return sum(k * self.problem.runs[r].step_s for r, k in content)

    def least_s(self, content: Content) -> float:
        """Seconds of the fastest entries, whatever memory they take."""
        return sum(k * self._fastest_entry[r][1].seconds for r, k in content)

    def least_bytes(self, content: Content, in_flight: Floats) -> Floats:
        """The least memory that any mix of the content takes, by micro-batches in flight."""
        if content not in self._leanest:
            self._leanest[content] = self._leanest_of(content)
        saved, workspace = self._leanest[content]
        least: Floats = (np.outer(in_flight, saved) + workspace).min(axis=1, initial=INFINITY)
        return self._fixed_bytes(content) + least

    def _leanest_of(self, content: Content) -> tuple[Floats, Floats]:
        """Pairs of the least bytes saved and the largest workspace that come with each other."""
        menus = [(k, self.problem.runs[r].menu) for r, k in content]
        pairs = []
        for limit in {c.workspace_bytes for _, menu in menus for c in menu}:
            saved = 0.0
            for k, menu in menus:
                fitting = (c.saved_bytes for c in menu if c.workspace_bytes <= limit)
                saved += k * min(fitting, default=INFINITY)
            if saved < INFINITY:
                pairs.append((saved, limit))
        found = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        return found[:, 0], found[:, 1]

    def fits(self, content: Content, in_flight: Floats) -> npt.NDArray[np.bool_]:
        """Whether any mix fits, by micro-batches in flight."""
        return self.least_bytes(content, in_flight) <= self.problem.memory_bytes

    def seconds(self, content: Content, in_flight: Floats) -> Floats:
        """Of the fastest mix that fits, by micro-batches in flight.

        Infinite where none fits, or if the content has no parameters.
        """
        found = np.full(len(in_flight), INFINITY)
        if not self.has_parameters(content) or self.least_s(content) > self.limit_s:
            return found
        fitting = self.fits(content, in_flight)
        room = self.problem.memory_bytes - self._fixed_bytes(content)
        _, seconds, saved, workspace = self._all_fastest(content)
        simple = fitting & (in_flight * saved + workspace <= room)
        found[simple] = seconds
        if (rest := np.flatnonzero(fitting & ~simple)).size:
            front = self._front(content)
            if len(front.seconds):
                sizes = np.outer(in_flight[rest], front.saved_bytes) + front.workspace_bytes
                possible = sizes <= room
                first = front.seconds[possible.argmax(axis=1)]
                found[rest] = np.where(possible.any(axis=1), first, INFINITY)
        return found

    def fastest(self, content: Content, in_flight: int) -> Mix | None:
        """The fastest mix that fits; ``None`` if none does."""
        flight = np.array([float(in_flight)])
        if self.least_s(content) > self.limit_s or not self.fits(content, flight)[0]:
            return None
        room = self.problem.memory_bytes - self._fixed_bytes(content)
        fastest, seconds, saved, workspace = self._all_fastest(content)
        if in_flight * saved + workspace <= room:
            return Mix(fastest, seconds)
        front = self._front(content)
        bytes_ = in_flight * front.saved_bytes + front.workspace_bytes
        fitting = np.flatnonzero(bytes_ <= room)
        if not len(fitting):
            return None
        row = fitting[0]
        counts = {s: int(k) for s, k in zip(front.slots, front.counts[row], strict=True) if k}
        return Mix(counts, float(front.seconds[row]))

    def _all_fastest(self, content: Content) -> tuple[dict[Slot, int], float, float, float]:
        """Every segment under its run's fastest entry: seconds, bytes saved, workspace."""
        counts: dict[Slot, int] = {}
        saved = seconds = workspace = 0.0
        for r, k in content:
            e, choice = self._fastest_entry[r]
            counts[r, e] = k
            saved += k * choice.saved_bytes
            seconds += k * choice.seconds
            workspace = max(workspace, choice.workspace_bytes)
        return counts, seconds, saved, workspace

    def _fixed_bytes(self, content: Content) -> float:
        """Parameters, ties and what every stage holds."""
        if content not in self._fixed:
            present = {r for r, _ in content}
            self._fixed[content] = (
                self.problem.stage_bytes
                + sum(k * self.problem.runs[r].parameter_bytes for r, k in content)
                + sum(t.parameter_bytes for t in self.problem.ties if present & set(t.runs))
            )
        return self._fixed[content]

    def _front(self, content: Content) -> _Front:
        if content in self._fronts:
            return self._fronts[content]
        *before, (run, number) = content
        if before:
            parts = tuple(before), ((run, number),)
            front = self._sum(*(self._front(part) for part in parts))
            self._inherit(content, *parts)
        elif number == 1:
            front = self._single(run)
        else:
            # Built in ascending order, so that a run of any length needs no deep recursion.
            for k in range(2, number):
                self._front(((run, k),))
            shorter = ((run, number - 1),)
            front = self._sum(self._front(shorter), self._single(run))
            self._inherit(content, shorter)
        if len(front.seconds) > self.most:
            self.thinned.add(content)
            front = front.selection(_spread(front, self.most))
        self._fronts[content] = front
        return front

    def _inherit(self, content: Content, *parts: Content) -> None:
        if any(part in self.thinned for part in parts):
            self.thinned.add(content)

    def _single(self, run: int) -> _Front:
        menu = self.problem.runs[run].menu
        front = _Front(
            np.array([c.seconds for c in menu]),
            np.array([c.saved_bytes for c in menu], dtype=np.float64),
            np.array([c.workspace_bytes for c in menu], dtype=np.float64),
            np.eye(len(menu), dtype=np.int32),
            tuple((run, e) for e in range(len(menu))),
        )
        best = self._undominated(front.seconds, front.saved_bytes, front.workspace_bytes)
        return front.selection(best)

    def _sum(self, a: _Front, b: _Front) -> _Front:
        """Every mix of ``a`` with every mix of ``b``, as far as they are worth having."""
        left = np.repeat(np.arange(len(a.seconds)), len(b.seconds))
        right = np.tile(np.arange(len(b.seconds)), len(a.seconds))
        seconds = a.seconds[left] + b.seconds[right]
        saved = a.saved_bytes[left] + b.saved_bytes[right]
        workspace = np.maximum(a.workspace_bytes[left], b.workspace_bytes[right])
        best = self._undominated(seconds, saved, workspace)
        counts_a, counts_b = a.counts[left[best]], b.counts[right[best]]
        same = a.slots == b.slots
        return _Front(
            seconds[best],
            saved[best],
            workspace[best],
            counts_a + counts_b if same else np.hstack([counts_a, counts_b]),
            a.slots if same else a.slots + b.slots,
        )

    def _undominated(
        self, seconds: Floats, saved: Floats, workspace: Floats
    ) -> npt.NDArray[np.int64]:
        """Mixes that can fit and that no other beats in seconds, bytes and workspace."""
        least_flight = self.problem.in_flight(self.problem.num_stages - 1)
        size = least_flight * saved + workspace
        possible = (size <= self.problem.memory_bytes) & (seconds <= self.limit_s)
        fitting = np.flatnonzero(possible)
        order = fitting[np.lexsort((workspace[fitting], saved[fitting], seconds[fitting]))]
        saved, workspace = saved[order], workspace[order]
        keep = np.zeros(len(order), dtype=np.bool_)
        for level in np.unique(workspace):
            among = np.flatnonzero(workspace <= level)
            before = np.concatenate([[INFINITY], np.minimum.accumulate(saved[among])[:-1]])
            # Sums in another order differ in their last digits: that is no difference.
            better = saved[among] < before * (1 - 1e-12)
            keep[among[better & (workspace[among] == level)]] = True
        return order[keep]


def _spread(front: _Front, number: int) -> npt.NDArray[np.int64]:
    """An even selection, with the mix that saves least for each workspace.

    Those decide whether a content fits at all, which therefore stays exact.
    """
    even = np.linspace(0, len(front.seconds) - 1, number).astype(np.int64)
    order = np.lexsort((front.saved_bytes, front.workspace_bytes))
    _, first = np.unique(front.workspace_bytes[order], return_index=True)
    return np.union1d(even, order[first])


def _key(choice: Choice) -> tuple[float, float, float]:
    return choice.seconds, choice.saved_bytes, choice.workspace_bytes
