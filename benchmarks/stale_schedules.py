"""Train models with older weights and uneven replicas, against one process with every version.

``python -m benchmarks.stale_schedules`` writes docs/stale-schedules.md. The plain model is no
measure of these schedules: they change what training computes. So one process keeps every version
of every stage's weights, and takes each micro-batch's gradient at the versions that the papers
say. Nothing stops at a failure; the exit code is 1 if there was one.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the zoo, the references and the ranks

import asynchronous_runs as workers  # noqa: E402
import ranks  # noqa: E402
import stale_runs as runs  # noqa: E402

from autoshard.errors import AutoshardError  # noqa: E402

MODELS = ("gpt2", "llama", "t5", "unet", "resnet")
"""Ties, casts, skips over stages, many of them, and statistics of batches."""
STEPS = 3
TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The outcome of one run.

    Attributes:
        difference: the largest of all losses and of all weights at the end.
        staleness: per stage, in updates.
    """

    model: str
    schedule: str
    difference: float = math.inf
    staleness: tuple[int, ...] = ()
    refused: str = ""

    @property
    def good(self) -> bool:
        return bool(self.refused) or self.difference <= TOLERANCE

    def __str__(self) -> str:
        if self.refused:
            return "refused"
        return f"{self.difference:.0e}" if self.good else f"**{self.difference:.0e}**"


def pipelined(pool: ranks.Pool, model: str, schedule: str) -> Cell:
    """A schedule of ``stale_runs.CASES``."""
    pins, rule = runs.CASES[schedule]
    given = runs.setup(model, **pins)
    found, left, state = pool.run(runs.trained, given, STEPS, runs.adam)[0]
    expected = runs.reference(given, rule, runs.adam)
    batches = runs.batches(model, STEPS)
    losses = [expected.step(batch, given.plan.num_micro_batches) for batch in batches]
    known = [loss for loss in (*found, *left) if not math.isnan(loss)]
    weights = {name: w for stage in expected.masters for name, w in stage.items()}
    return Cell(
        model=model, schedule=schedule, staleness=given.plan.rules.staleness,
        difference=max(largest(known, losses), furthest(state, weights)),
    )  # fmt: skip


def asynchronous(bound: int | None) -> Callable[[ranks.Pool, str, str], Cell]:
    """Workers whose updates come in a given order, so that one process can make the same."""

    def run(pool: ranks.Pool, model: str, schedule: str) -> Cell:
        given = runs.setup(model, **workers.pins_of(bound))
        order = workers.rotating_rounds
        results = pool.run(workers.trained, given, runs.adam, order, bound)
        losses, weights = workers.in_order(given, order, runs.adam)
        apart = [largest(results[w][0], losses[w]) for w in range(workers.WORKERS)]
        return Cell(
            model=model, schedule=schedule,
            difference=max(*apart, furthest(results[0][1], weights)),
        )  # fmt: skip

    return run


WAYS: Mapping[str, Callable[[ranks.Pool, str, str], Cell]] = {
    **dict.fromkeys(runs.CASES, pipelined),
    "asp": asynchronous(None),
    "ssp": asynchronous(1),
}


def largest(found: Sequence[float], expected: Sequence[float]) -> float:
    """Difference of two lists of the same length; infinite if it is not."""
    if len(found) != len(expected):
        return math.inf
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


def furthest(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The largest difference of an element of what is expected."""
    return max(float((found[name] - w).detach().abs().max()) for name, w in expected.items())


def page(cells: Mapping[tuple[str, str], Cell]) -> str:
    """docs/stale-schedules.md."""
    lines = [f"| model | {' | '.join(WAYS)} |", "|---" * (len(WAYS) + 1) + "|"]
    for model in dict.fromkeys(model for model, _ in cells):
        shown = [str(cells[model, way]) if (model, way) in cells else "" for way in WAYS]
        lines.append(f"| {model} | {' | '.join(shown)} |")
    ages = {c.schedule: c.staleness for c in cells.values() if c.staleness}
    refused = [f"* {c.model}, {c.schedule}: {c.refused}" for c in cells.values() if c.refused]
    listed = [f"* {name}: {', '.join(map(str, age))}" for name, age in ages.items()]
    return "\n".join(
        [_INTRODUCTION, *lines, "", *(["Refused:", "", *refused, ""] if refused else []),
         "Staleness per stage, in updates of that stage (a tied weight's is its owner's):", "",
         *listed, ""]
    )  # fmt: skip


_INTRODUCTION = f"""\
# Older weights and uneven replicas

`python -m benchmarks.stale_schedules` writes this page. Small models in float64 are trained for
{STEPS} Adam steps on 4 processes (gloo, CPU), and by one process that keeps every version of every
stage's weights and takes each micro-batch's gradient at the versions that the papers say
([PipeDream](https://doi.org/10.1145/3341301.3359646), weight stashing and vertical sync;
[PipeDream-2BW](https://proceedings.mlr.press/v139/narayanan21a.html)). Asynchronous workers (`asp`,
`ssp` with a bound of 1) make their updates in an order that is given, so that one process can make
the same. Numbers such as 2-1-1 are the replicas of each stage. A cell is the largest difference of
any loss, and of any weight at the end; it must be at most {TOLERANCE:.0e}.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stale_schedules")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "stale-schedules.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cells: dict[tuple[str, str], Cell] = {}
    pool = ranks.Pool(4)
    try:
        for model in options.models:
            for name, way in WAYS.items():
                try:
                    cell = way(pool, model, name)
                except AutoshardError as error:
                    cell = Cell(model=model, schedule=name, refused=" ".join(str(error).split()))
                except (ranks.RankError, TimeoutError) as error:
                    cell = Cell(model=model, schedule=name)
                    print(error, file=sys.stderr)
                cells[model, name] = cell
                print(f"{model}, {name}: {cell} {cell.refused}", flush=True)
            options.out.write_text(page(cells))
    finally:
        pool.close()
    return 0 if all(cell.good for cell in cells.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
