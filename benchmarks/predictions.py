"""Predicted against measured seconds of a step, for every layout that a person would try.

``autoshard profile`` measures this machine with as many processes as will train, the layouts of
:mod:`benchmarks.hand_tuned` are planned on that cluster, with the plan's own ops measured
(``--analytic``: by the cluster's figures alone), and all of them are trained taking turns. Prints
the relative errors, their median, and how well the predictions order the layouts.
Run ``python -m benchmarks.predictions`` (``--quick`` for fewer layouts and turns).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.hand_tuned import AUTOMATIC, MODELS, Row, compare, measured_cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One layout of one model.

    Attributes:
        error: predicted over measured seconds, less 1.
    """

    model: str
    processes: int
    name: str
    predicted_s: float
    measured_s: float
    error: float


def main() -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.predictions")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument("--rounds", type=int, default=5, help="turns of every layout")
    parser.add_argument("--quick", action="store_true", help="meshes only, 3 turns")
    parser.add_argument("--analytic", action="store_true", help="do not measure single ops")
    parser.add_argument("--json", action="store_true", help="print all layouts as JSON")
    args = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    rounds = min(args.rounds, 3) if args.quick else args.rounds
    costs = None if args.analytic else "measured"
    layouts: list[Layout] = []
    for processes in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            cluster = measured_cluster(Path(folder), processes)
            for model in args.models:
                rows = compare(
                    model, processes, cluster, Path(folder), rounds, args.quick, costs=costs
                )
                layouts += [layout_of(model, processes, row) for row in rows]
    if args.json:
        print(json.dumps({**summary(layouts), "layouts": [asdict(one) for one in layouts]}))
    else:
        show(layouts)
    return 0


def layout_of(model: str, processes: int, row: Row) -> Layout:
    """A row of :mod:`benchmarks.hand_tuned` as prediction and measurement."""
    return Layout(
        model=model, processes=processes, name=row.name, predicted_s=row.predicted_s,
        measured_s=row.measured_s, error=row.predicted_s / row.measured_s - 1,
    )  # fmt: skip


def summary(layouts: Sequence[Layout]) -> dict[str, float]:
    """Errors over all layouts, and how often the faster of two is predicted to be the faster."""
    errors = sorted(abs(one.error) for one in layouts)
    pairs = [
        (a, b)
        for a, b in itertools.combinations(layouts, 2)
        if (a.model, a.processes) == (b.model, b.processes) and a.measured_s != b.measured_s
    ]
    right = sum((a.measured_s < b.measured_s) == (a.predicted_s < b.predicted_s) for a, b in pairs)
    return {
        "layouts": len(layouts),
        "median_abs_rel_err": statistics.median(errors),
        "p90_abs_rel_err": errors[min(len(errors) - 1, round(0.9 * len(errors)))],
        "median_rel_err": statistics.median(one.error for one in layouts),
        "pairs_in_order": right / len(pairs) if pairs else 1.0,
    }


def show(layouts: Sequence[Layout]) -> None:
    """A table, worst last, and the summary."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Predicted and measured seconds of a step", title_justify="left")
    for column in ("model", "processes", "layout", "predicted ms", "measured ms", "error"):
        table.add_column(column, justify="left" if column in ("model", "layout") else "right")
    for one in sorted(layouts, key=lambda one: abs(one.error)):
        table.add_row(
            one.model, str(one.processes), one.name, f"{1e3 * one.predicted_s:.1f}",
            f"{1e3 * one.measured_s:.1f}", f"{one.error:+.0%}",
            style="bold" if one.name == AUTOMATIC else "",
        )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    facts = summary(layouts)
    console.print(
        f"{len(layouts)} layouts: median error {facts['median_abs_rel_err']:.1%}, 90th percentile "
        f"{facts['p90_abs_rel_err']:.1%}, median signed {facts['median_rel_err']:+.1%}; of two "
        f"layouts the faster is predicted to be so in {facts['pairs_in_order']:.0%} of pairs"
    )


if __name__ == "__main__":
    sys.exit(main())
