"""Paths through the positions where stages begin: an arc is the segments of one stage.

An arc has a price by the micro-batches that its stage has in flight, and depends on which segments
there are only through its content (:mod:`autoshard.plan.stage_mixes`). Equal segments in a row have
one content per length, so there are hardly more contents than segments. Arcs are kept in bands, by
their end and their length: where a stage can be no longer than a share of the program, a pass over
all stages costs what one over the whole program does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from autoshard.plan.solver import INFINITY, Floats
from autoshard.plan.stage_mixes import Content, Mixes
from autoshard.plan.stage_problem import StageProblem

Price = Callable[[Content, Floats], Floats]
"""From a content and numbers of micro-batches in flight to prices; infinite: no arc."""


@dataclass(slots=True)
class Paths:
    """Ways from position 0 to the last in one arc per stage.

    Attributes:
        prices: ``[level, end, length - 1]``, infinite where there is no arc.
        tail_s: ``[end, length - 1]``, the work after the last backward.
        send_s: ``[end]``, both ways.
        level: of each stage; stages with as many micro-batches in flight share one.
    """

    prices: Floats
    tail_s: Floats
    send_s: Floats
    level: Sequence[int]

    @staticmethod
    def of(problem: StageProblem, mixes: Mixes, price: Price, *, stop_early: bool = True) -> Paths:
        """All arcs.

        Args:
            stop_early: contents that do not fit or are too slow, and all larger ones, are of no
                use.
        """
        flights = [problem.in_flight(stage) for stage in range(problem.num_stages)]
        levels, level = np.unique(flights, return_inverse=True)
        in_flight = levels.astype(np.float64)
        priced = [
            (ends, length, content, price(content, in_flight))
            for ends, length, content in _arcs(
                problem, mixes, in_flight[:1] if stop_early else None
            )
        ]
        priced = [arc for arc in priced if np.isfinite(arc[3]).any()]
        size = mixes.num_segments + 1, max((length for _, length, _, _ in priced), default=1)
        prices, tail_s = np.full((len(levels), *size), INFINITY), np.zeros(size)
        for ends, length, content, found in priced:
            prices[:, ends, length - 1] = found[:, None]
            tail_s[ends, length - 1] = mixes.step_s(content)
        sends = [2 * problem.runs[r].send_s for r in mixes.run_of]
        return Paths(prices, tail_s, np.array([0.0, *sends[:-1], 0.0]), level.tolist())

    def shortest(self, pace_s: float, tail_s: float) -> list[int] | None:
        """Cuts of the path of least prices and sends in sum whose arcs keep within both limits."""
        best = self._none()
        best[0] = 0.0
        came: list[npt.NDArray[np.int64]] = []
        for prices in self._within(pace_s, tail_s):
            total = self._before(best) + prices
            came.append(total.argmin(axis=1))
            best = np.take_along_axis(total, came[-1][:, None], axis=1)[:, 0] + self.send_s
        if best[-1] == INFINITY:
            return None
        cuts = [len(best) - 1]
        for lengths in reversed(came):
            cuts.append(cuts[-1] - 1 - int(lengths[cuts[-1]]))
        return cuts[::-1]

    def least_pace(self, tail_s: float) -> float:
        """The least limit on prices under which there is a path; infinite if there is none."""
        return self._bottleneck(list(self._within(INFINITY, tail_s)))

    def least_tail(self) -> float:
        """The least limit on what follows the last backward under which there is a path."""
        return self._bottleneck(
            [np.where(np.isfinite(self.prices[k]), self.tail_s, INFINITY) for k in self.level]
        )

    def parts(self, cuts: Sequence[int]) -> tuple[float, float, float]:
        """Sum of prices and sends, highest price, longest tail."""
        prices = self.along(cuts)
        total = sum(prices) + sum(float(self.send_s[end]) for end in cuts[1:])
        tails = [float(self.tail_s[b, b - a - 1]) for a, b in pairwise(cuts)]
        return total, max(prices), max(tails)

    def along(self, cuts: Sequence[int]) -> list[float]:
        """The price of each stage."""
        arcs = zip(self.level, pairwise(cuts), strict=True)
        return [float(self.prices[k, b, b - a - 1]) for k, (a, b) in arcs]

    def _none(self) -> Floats:
        return np.full(len(self.send_s), INFINITY)

    def _before(self, best: Floats) -> Floats:
        """``[end, length - 1]``: what holds where such an arc begins."""
        width = self.prices.shape[2]
        padded = np.concatenate([np.full(width, INFINITY), best[:-1]])
        return np.lib.stride_tricks.sliding_window_view(padded, width)[:, ::-1]

    def _within(self, pace_s: float, tail_s: float) -> Sequence[Floats]:
        """Per stage the prices of the arcs that keep within both limits."""
        excess = (self.tail_s > tail_s) | (self.prices > pace_s)
        within = np.where(excess, INFINITY, self.prices)
        return [within[k] for k in self.level]

    def _bottleneck(self, stages: Sequence[Floats]) -> float:
        """The least maximum that a path can have of these."""
        best = self._none()
        best[0] = -INFINITY
        for own in stages:
            best = np.maximum(self._before(best), own).min(axis=1)
        return float(best[-1])


def _arcs(
    problem: StageProblem, mixes: Mixes, least_flight: Floats | None
) -> list[tuple[slice, int, Content]]:
    """Ends, length and content of all arcs; equal contents together.

    Args:
        least_flight: leave out what does not fit under so few, or is too slow; ``None``: nothing.
    """
    found: list[tuple[slice, int, Content]] = []
    num, num_stages = mixes.num_segments, problem.num_stages
    most = num - num_stages + 1  # every other stage needs a segment, too

    def take(start: int, length: int, count: int = 1) -> bool:
        """Whether so many contents in a row, which are equal, are of use."""
        content = mixes.content(start, start + length)
        if least_flight is not None:
            too_slow = mixes.least_s(content) > mixes.limit_s
            if too_slow or not mixes.fits(content, least_flight)[0]:
                return False
        ends = _on_a_path(num_stages, num, start, length, count)
        found.extend((own, length, content) for own in ends)
        return True

    first = 0
    for run in problem.runs:
        after, longest = first + run.count, 0
        while longest < min(run.count, most) and take(first, longest + 1, run.count - longest):
            longest += 1
        for start in range(after - longest, after):
            for end in range(after + 1, min(num, start + most) + 1):
                if not take(start, end - start):
                    break
        first = after
    return found


def _on_a_path(
    num_stages: int, num_segments: int, start: int, length: int, count: int
) -> Iterator[slice]:
    """The ends that a stage of this length can have, of ``count`` in a row: of few stages, each is
    at an end of the program."""
    first, last = start + length, start + length + count - 1
    if num_stages > 2:
        yield slice(first, last + 1)
    elif num_stages == 2:
        if start == 0:
            yield slice(first, first + 1)
        if last == num_segments and length < num_segments:
            yield slice(last, last + 1)
    elif length == num_segments:
        yield slice(first, first + 1)
