"""Fits the constants of the cost models to published runs, and tests them on sources left out.

Every fold leaves out whole sources, not rows: what is said of the error on rows left out is what a
source that nobody has seen can expect. The fit starts from round guesses, has one value for all
links and most of all devices, takes a sample of each family's rows, and is made by
:mod:`benchmarks.published.fitting`; the errors are of all rows of the sources left out. Run
``python -m benchmarks.published.fit --data FILE.csv``.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from autoshard.errors import AutoshardError
from benchmarks.published.constants import CONSTANTS, Constant
from benchmarks.published.fitting import FAR_OFF, Errors, Values, fitted
from benchmarks.published.metrics import TRUSTED, Scores, scores, time_error
from benchmarks.published.predict import Outcome
from benchmarks.published.pricing import Pricing
from benchmarks.published.rows import Row, read_rows

Price = Callable[[Sequence[Row], Values], list[Outcome]]


def source_of(row: Row) -> str:
    """The source of a row: families are named after it."""
    return row.family.split("-")[0]


def family_weights(rows: Sequence[Row]) -> Errors:
    """So that every family counts alike; they sum to 1."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.family] = sizes.get(row.family, 0) + 1
    return np.array([1 / sizes[row.family] / len(sizes) for row in rows])


def log_errors(outcomes: Sequence[Outcome]) -> Errors:
    """By row; rows that could not be predicted are as far off as rows get."""
    sizes = [time_error(outcome) for outcome in outcomes]
    return np.array([FAR_OFF if error is None else math.log1p(error) for error in sizes])


@dataclass(frozen=True, slots=True)
class Fold:
    """Constants fitted without some sources, and what they say of these.

    Attributes:
        inside: of the rows that were fitted to.
        outside: of all rows of the sources left out.
    """

    sources: tuple[str, ...]
    values: Values
    inside: Scores
    outside: tuple[Outcome, ...]


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
    rows: Sequence[Row],
    per_family: int,
    folds: Sequence[tuple[str, ...]],
    price: Price,
    progress: Callable[[str], None],
) -> list[Fold]:
    """One fit per fold, from a sample of the rows of the other sources."""
    found = []
    for sources in folds:
        known = sample([row for row in rows if source_of(row) not in sources], per_family)
        left_out = [row for row in rows if source_of(row) in sources]
        label = f"without {', '.join(sources)}" if sources else "all sources"
        values = fitted(
            constants, _errors_of(known, price), family_weights(known),
            functools.partial(_tell, progress, label),
        )  # fmt: skip
        inside = scores(price(known, values))
        found.append(Fold(sources, values, inside, tuple(price(left_out, values))))
    return found


def _errors_of(rows: Sequence[Row], price: Price) -> Callable[[Values], Errors]:
    return lambda values: log_errors(price(rows, values))


def _tell(progress: Callable[[str], None], label: str, text: str) -> None:
    progress(f"{label}: {text}")


def timed(rows: Sequence[Row]) -> list[Row]:
    """Rows of decoders with a time that is trusted."""
    return [row for row in rows if row.time_s is not None and row.trust in TRUSTED and row.layers]


def sample(rows: Sequence[Row], per_family: int) -> list[Row]:
    """At most so many rows of a family, evenly spread."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row.family, []).append(row)
    found = []
    for group in families.values():
        found += group[:: max(1, math.ceil(len(group) / per_family))]
    return found


# ------------------------------------------------------------------------------------ the command


def main(arguments: list[str] | None = None) -> int:
    """Fit and report; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published.fit", description=__doc__)
    parser.add_argument("--data", required=True, type=Path, metavar="FILE.csv")
    parser.add_argument("--folds", type=int, default=5, help="of sources; 0: fit only")
    parser.add_argument("--per-family", type=int, default=8, help="rows of a family to fit to")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="every fold and its errors")
    args = parser.parse_args(arguments)
    try:
        rows = timed(read_rows(args.data))
        price = Pricing(rows, CONSTANTS, args.processes)
    except AutoshardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    folds = [(), *folds_of(rows, args.folds)]
    try:
        with Console(stderr=True).status("capturing") as status:
            found = cross_validated(
                CONSTANTS, rows, args.per_family, folds, price, status.update
            )  # fmt: skip
    finally:
        price.close()
    show(found, Console())
    if args.json:
        document = as_json(found)
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def all_outside(folds: Sequence[Fold]) -> Scores:
    """Every row by the constants that were fitted without its source."""
    return scores([outcome for fold in folds for outcome in fold.outside])


def as_json(folds: Sequence[Fold]) -> dict[str, Any]:
    """Constants and errors."""
    return {
        "left_out": all_outside(folds).as_json(),
        "folds": [
            {
                "without": fold.sources,
                "constants": fold.values,
                "fitted_on": fold.inside.as_json(),
                "left_out": scores(fold.outside).as_json(),
            }
            for fold in folds
        ],
    }


def show(folds: Sequence[Fold], console: Console) -> None:
    """The constants, and the errors of every fold."""
    everything, *others = folds
    table = Table("constant", "start", "fitted", "in folds", "meaning", title="Constants")
    for constant in CONSTANTS:
        values = [fold.values[constant.name] for fold in others]
        span = f"{min(values):.3g} .. {max(values):.3g}" if values else ""
        table.add_row(
            constant.name, f"{constant.start:.3g}", f"{everything.values[constant.name]:.3g}",
            span, constant.meaning,
        )  # fmt: skip
    console.print(table)
    table = Table("sources left out", "rows", "fitted on: median", "left out: median", "p90",
        "regret", title="Errors of step time")  # fmt: skip
    for fold in folds:
        outside = scores(fold.outside)
        table.add_row(
            ", ".join(fold.sources) or "none", str(outside.n_timed),
            _percent(fold.inside.time_median_abs_rel_err), *_errors(outside),
        )  # fmt: skip
    everywhere = all_outside(folds)
    table.add_row("each in turn", str(everywhere.n_timed), "", *_errors(everywhere))
    console.print(table)


def _errors(found: Scores) -> tuple[str, str, str]:
    return (
        _percent(found.time_median_abs_rel_err), _percent(found.time_p90_abs_rel_err),
        _percent(found.regret_mean),
    )  # fmt: skip


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


if __name__ == "__main__":
    sys.exit(main())
