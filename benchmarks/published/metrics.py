"""How far predictions are from measurements: error, ranking, memory, out-of-memory.

Time is judged on rows with status ok and trust A or B. A rank group's rows are ranked by device
seconds per token, which is their step time where all have the same devices and batch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from benchmarks.published.predict import Outcome, Prediction
from benchmarks.published.rows import Row

TRUSTED = ("A", "B")


@dataclass(frozen=True, slots=True)
class Ranking:
    """How well the layouts of one rank group are ordered.

    Attributes:
        regret: measured time of the layout that was predicted to be the fastest, over the fastest
            measured, minus one.
        tau: Kendall's tau-b of both orders; ``None`` if one of them has ties only.
    """

    group: str
    num_rows: int
    regret: float
    tau: float | None


@dataclass(frozen=True, slots=True)
class Confusion:
    """Rows that fit (``ok``) or did not (``oom``), by whether they were predicted to fit."""

    fits_fits: int = 0
    fits_oom: int = 0
    oom_fits: int = 0
    oom_oom: int = 0

    @property
    def accuracy(self) -> float | None:
        """Share of rows predicted right."""
        total = self.fits_fits + self.fits_oom + self.oom_fits + self.oom_oom
        return (self.fits_fits + self.oom_oom) / total if total else None

    @property
    def recall(self) -> float | None:
        """Share of the rows out of memory that were predicted so."""
        total = self.oom_fits + self.oom_oom
        return self.oom_oom / total if total else None


@dataclass(frozen=True, slots=True)
class Scores:
    """All figures of a set of rows; ``None`` where no row says anything.

    Attributes:
        n: rows that were predicted.
        n_skipped: rows that were not.
        n_timed: rows that the errors of time are over.
        time_median_rel_err: signed: below 0, predictions are too fast.
    """

    n: int
    n_skipped: int
    n_timed: int
    time_median_rel_err: float | None
    time_median_abs_rel_err: float | None
    time_p90_abs_rel_err: float | None
    rankings: tuple[Ranking, ...]
    confusion: Confusion
    memory_median_abs_rel_err: float | None

    @property
    def regret_mean(self) -> float | None:
        return _mean(r.regret for r in self.rankings)

    @property
    def regret_max(self) -> float | None:
        return max((r.regret for r in self.rankings), default=None)

    @property
    def kendall_tau_mean(self) -> float | None:
        return _mean(r.tau for r in self.rankings if r.tau is not None)

    def as_json(self) -> dict[str, float | int | None]:
        """The fields that are published."""
        return {
            "n": self.n,
            "n_skipped": self.n_skipped,
            "time_median_abs_rel_err": self.time_median_abs_rel_err,
            "time_p90_abs_rel_err": self.time_p90_abs_rel_err,
            "regret_mean": self.regret_mean,
            "regret_max": self.regret_max,
            "kendall_tau_mean": self.kendall_tau_mean,
            "oom_accuracy": self.confusion.accuracy,
            "oom_recall": self.confusion.recall,
            "memory_median_abs_rel_err": self.memory_median_abs_rel_err,
        }


def scores(outcomes: Sequence[Outcome]) -> Scores:
    """The figures of these rows."""
    errors = [error for o in outcomes if (error := time_error(o)) is not None]
    sizes = [abs(error) for error in errors]
    memory = [abs(error) for o in outcomes if (error := memory_error(o)) is not None]
    predicted = sum(isinstance(o.result, Prediction) for o in outcomes)
    return Scores(
        n=predicted,
        n_skipped=len(outcomes) - predicted,
        n_timed=len(errors),
        time_median_rel_err=statistics.median(errors) if errors else None,
        time_median_abs_rel_err=statistics.median(sizes) if errors else None,
        time_p90_abs_rel_err=quantile(sizes, 0.9) if errors else None,
        rankings=rankings(outcomes),
        confusion=confusion(outcomes),
        memory_median_abs_rel_err=statistics.median(memory) if memory else None,
    )


def by_family(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes by family, in the order in which families appear."""
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.row.family, []).append(outcome)
    return found


def time_error(outcome: Outcome) -> float | None:
    """Predicted over measured step time, minus one; ``None`` for rows that are not judged."""
    measured_s = outcome.row.time_s
    if measured_s is None or outcome.row.trust not in TRUSTED:
        return None
    result = outcome.result
    return result.time_s / measured_s - 1 if isinstance(result, Prediction) else None


def memory_error(outcome: Outcome) -> float | None:
    """Predicted over measured peak memory, minus one."""
    result = outcome.result
    if outcome.row.memory_gb is None or not isinstance(result, Prediction):
        return None
    measured = outcome.row.memory_gb * result.memory_unit_bytes
    return result.reported_bytes / measured - 1


def rankings(outcomes: Iterable[Outcome]) -> tuple[Ranking, ...]:
    """Of every rank group with at least two rows that were measured and predicted."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for outcome in outcomes:
        row, result = outcome.row, outcome.result
        if row.rank_group and time_error(outcome) is not None and isinstance(result, Prediction):
            assert row.time_s is not None
            work = row.gpus / (_tokens(row) or 1)
            pair = (row.time_s * work, result.time_s * work)
            groups.setdefault(row.rank_group, []).append(pair)
    return tuple(_ranking(name, pairs) for name, pairs in groups.items() if len(pairs) > 1)


def _tokens(row: Row) -> int:
    return (row.global_batch or 0) * (row.seq or 0)


def _ranking(group: str, pairs: Sequence[tuple[float, float]]) -> Ranking:
    best = min(measured for measured, _ in pairs)
    fastest = min(predicted for _, predicted in pairs)
    # Of layouts that are predicted to be equal none is preferred: their mean is what one can expect
    picked = [m for m, predicted in pairs if predicted <= fastest * (1 + 1e-9)]
    return Ranking(group, len(pairs), statistics.fmean(picked) / best - 1, kendall_tau(pairs))


def kendall_tau(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Tau-b of two orders (Kendall 1945): 1 for equal ones, -1 for opposite ones."""
    agree = ties_left = ties_right = 0
    for (a, x), (b, y) in combinations(pairs, 2):
        left, right = (a > b) - (a < b), (x > y) - (x < y)
        agree += left * right
        ties_left += left == 0
        ties_right += right == 0
    total = math.comb(len(pairs), 2)
    scale = math.sqrt((total - ties_left) * (total - ties_right))
    return agree / scale if scale else None


def confusion(outcomes: Iterable[Outcome]) -> Confusion:
    """Of rows that are known to fit or not to fit."""
    counts = {"ok": [0, 0], "oom": [0, 0]}
    for outcome in outcomes:
        if outcome.row.status in counts and isinstance(outcome.result, Prediction):
            counts[outcome.row.status][not outcome.result.fits] += 1
    return Confusion(*counts["ok"], *counts["oom"])


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share lies, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.fmean(found) if found else None
