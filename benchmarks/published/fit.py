"""Fits the constants of the cost models to published runs, and tests them on sources left out.

Every fold leaves out whole sources, not rows: what is said of the error on rows left out is what a
source that nobody has seen can expect. Constants are found one at a time by trying steps that get
smaller (a compass search, Kolda, Lewis & Torczon 2003), which needs no gradient and stays within
what is physically possible. Run ``python -m benchmarks.published.fit --data FILE.csv``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.table import Table

from autoshard.errors import AutoshardError
from benchmarks.published.constants import CONSTANTS, Constant, Priced, value_of
from benchmarks.published.machines import cluster_of
from benchmarks.published.metrics import Scores, scores, time_error
from benchmarks.published.predict import Outcome, Predictor
from benchmarks.published.rows import Row, read_rows
from benchmarks.published.run import by_program

FIRST_STEP, LAST_STEP = 0.2, 0.02
"""Relative steps of the search."""
FAR_OFF = math.log(2)
"""Rows that are off by more than a factor of 2 count no more than that: they lack a reason."""

Values = dict[str, float]


def source_of(row: Row) -> str:
    """The source of a row: families are named after it."""
    return row.family.split("-")[0]


def loss(outcomes: Sequence[Outcome]) -> float:
    """Mean size of the logarithm of predicted over measured, every family counting alike."""
    families: dict[str, list[float]] = {}
    for outcome in outcomes:
        error = time_error(outcome)
        if error is not None:
            size = min(FAR_OFF, abs(math.log1p(error)))
            families.setdefault(outcome.row.family, []).append(size)
    return statistics.fmean(map(statistics.fmean, families.values())) if families else 0.0


# ------------------------------------------------------------------------------------ pricing

_predictor = Predictor()


def _priced(rows: Sequence[Row], values: Values) -> list[Outcome]:
    """In a worker process, which remembers everything that no constant changes."""
    price = Priced(values)
    return [Outcome(row, _predictor.predict(row, price)) for row in rows]


@dataclass
class Pricing:
    """Prices the same rows again and again, in processes of which each keeps to its own rows."""

    rows: Sequence[Row]
    processes: int = 2
    _pools: list[ProcessPoolExecutor] = field(default_factory=list)
    _shares: list[list[Row]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._shares = [[] for _ in range(self.processes)]
        for group in by_program(self.rows):
            min(self._shares, key=len).extend(group)
        context = get_context("spawn")
        self._pools = [ProcessPoolExecutor(1, mp_context=context) for _ in self._shares]

    def __call__(self, values: Values) -> list[Outcome]:
        jobs = [
            pool.submit(_priced, share, values)
            for pool, share in zip(self._pools, self._shares, strict=True)
        ]
        return [outcome for job in jobs for outcome in job.result()]

    def close(self) -> None:
        """End the processes."""
        for pool in self._pools:
            pool.shutdown()


# ------------------------------------------------------------------------------------ fitting


def fitted(
    constants: Sequence[Constant],
    start: Mapping[str, float],
    loss_of: Callable[[Values], float],
    progress: Callable[[str], None] = lambda text: None,
) -> Values:
    """Values within the limits that no step of ``LAST_STEP`` of one of them makes better."""
    best = dict(start)
    least = loss_of(best)
    step = FIRST_STEP
    while step >= LAST_STEP:
        before = least
        for constant in constants:
            for factor in (1 + step, 1 / (1 + step)):
                value = min(constant.high, max(constant.low, best[constant.name] * factor))
                trial = {**best, constant.name: value}
                if value != best[constant.name] and (found := loss_of(trial)) < least:
                    best, least = trial, found
                    break
            progress(f"step {step:.2f}, {constant.name}: loss {least:.4f}")
        if least > before * (1 - 1e-3):
            step /= 2
    return best


def starting_values(constants: Sequence[Constant], rows: Sequence[Row]) -> Values:
    """What the presets say, the median over the rows."""
    found = {}
    for constant in constants:
        chip, _, path = constant.name.rpartition(":")
        figures = [
            value_of(cluster_of(row), path.split("."))
            for row in rows
            if cluster_of(row).device.name.startswith(chip)
        ]
        found[constant.name] = statistics.median(figures)
    return found


@dataclass(frozen=True, slots=True)
class Fold:
    """Constants fitted without some sources, and what they say of these."""

    sources: tuple[str, ...]
    values: Values
    inside: Scores
    outside: Scores


def folds_of(rows: Sequence[Row], number: int) -> list[tuple[str, ...]]:
    """Sources dealt into folds of about equally many rows, largest first."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[source_of(row)] = sizes.get(source_of(row), 0) + 1
    folds: list[list[str]] = [[] for _ in range(min(number, len(sizes)))]
    for source in sorted(sizes, key=lambda s: (-sizes[s], s)):
        min(folds, key=lambda fold: sum(sizes[s] for s in fold)).append(source)
    return [tuple(fold) for fold in folds]


def cross_validated(
    constants: Sequence[Constant],
    start: Values,
    rows: Sequence[Row],
    price: Callable[[Values], list[Outcome]],
    number: int,
    progress: Callable[[str], None],
) -> list[Fold]:
    """One fit per fold. What was priced once is not priced again."""
    known: dict[tuple[tuple[str, float], ...], list[Outcome]] = {}

    def priced(values: Values) -> list[Outcome]:
        key = tuple(sorted(values.items()))
        if key not in known:
            known[key] = price(values)
        return known[key]

    found = []
    for sources in [(), *folds_of(rows, number)]:
        within = _parts(priced, sources)
        label = f"without {', '.join(sources)}" if sources else "all sources"
        values = fitted(
            constants, start, lambda v, within=within: loss(within(v)[0]),
            lambda text, label=label: progress(f"{label}: {text}"),
        )  # fmt: skip
        inside, outside = within(values)
        found.append(Fold(sources, values, scores(inside), scores(outside)))
    return found


def _parts(
    priced: Callable[[Values], list[Outcome]], sources: Sequence[str]
) -> Callable[[Values], tuple[list[Outcome], list[Outcome]]]:
    def parts(values: Values) -> tuple[list[Outcome], list[Outcome]]:
        outcomes = priced(values)
        left_out = [o for o in outcomes if source_of(o.row) in sources]
        return [o for o in outcomes if source_of(o.row) not in sources], left_out

    return parts


# ------------------------------------------------------------------------------------ the command


def main(arguments: list[str] | None = None) -> int:
    """Fit and report; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published.fit", description=__doc__)
    parser.add_argument("--data", required=True, type=Path, metavar="FILE.csv")
    parser.add_argument("--folds", type=int, default=5, help="of sources; 0: fit only")
    parser.add_argument("--per-family", type=int, default=8, help="rows of a family, evenly spread")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="the constants of every fold")
    args = parser.parse_args(arguments)
    try:
        rows = sample(read_rows(args.data), args.per_family)
        start = starting_values(CONSTANTS, rows)
    except AutoshardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    price = Pricing(rows, args.processes)
    try:
        with Console(stderr=True).status("capturing") as status:
            folds = cross_validated(CONSTANTS, start, rows, price, args.folds, status.update)
    finally:
        price.close()
    show(start, folds, Console())
    if args.json:
        document = [{"without": fold.sources, "constants": fold.values} for fold in folds]
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def sample(rows: Sequence[Row], per_family: int) -> list[Row]:
    """Timed rows of trust A or B on known machines, at most so many of a family."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        if row.time_s is not None and row.trust in ("A", "B") and row.layers:
            families.setdefault(row.family, []).append(row)
    found = []
    for group in families.values():
        stride = max(1, math.ceil(len(group) / per_family))
        found += group[::stride]
    return found


def show(start: Values, folds: Sequence[Fold], console: Console) -> None:
    """The constants, and the errors of every fold."""
    everything, *others = folds
    table = Table("constant", "before", "fitted", "in folds", "meaning", title="Constants")
    for constant in CONSTANTS:
        values = [fold.values[constant.name] for fold in others]
        span = f"{min(values):.3g} .. {max(values):.3g}" if values else ""
        table.add_row(
            constant.name, f"{start[constant.name]:.3g}", f"{everything.values[constant.name]:.3g}",
            span, constant.meaning,
        )  # fmt: skip
    console.print(table)
    table = Table("sources left out", "rows", "fitted on: median", "left out: median", "p90",
        "regret", title="Errors of step time")  # fmt: skip
    for fold in folds:
        outside = fold.outside
        table.add_row(
            ", ".join(fold.sources) or "none", str(outside.n_timed),
            _percent(fold.inside.time_median_abs_rel_err),
            _percent(outside.time_median_abs_rel_err), _percent(outside.time_p90_abs_rel_err),
            _percent(outside.regret_mean),
        )  # fmt: skip
    console.print(table)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


if __name__ == "__main__":
    sys.exit(main())
