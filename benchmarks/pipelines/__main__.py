"""Every pipeline schedule on 4 processes of this machine: predicted, measured, and against torch.

A small decoder is cut into 4 stages, or 8 chunks, and trained under every schedule with 1 to 32
micro-batches, all schedules taking turns. Printed are

* for each number of micro-batches, the simulated and the measured seconds of a step, and how well
  they agree in the order of schedules (Spearman's rank correlation). The simulation has the seconds
  of each part of the model, measured in one process by itself, those of a processor for each end of
  a transfer, measured on a pipeline of stages that do nothing, and how much slower ranks are that
  compute at the same time on the cores of this machine;
* what a step takes relative to torch's own classes, used by hand on the same stages with the same
  optimizer: the median ratio over rounds in which both ran one after the other, in seconds, and in
  seconds of processors over all ranks, which other programs on the machine disturb less.

Run ``python -m benchmarks.pipelines`` (``--quick`` for fewer numbers of micro-batches).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from autoshard.capture import capture
from autoshard.schedules import SCHEDULES, by_name
from benchmarks.pipelines.model import NAMES, RANKS, batch, model, plan_of
from benchmarks.pipelines.runs import measure
from benchmarks.pipelines.shared_cores import Machine, Part, on_shared_cores, parts, stage_parts

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # processes that are started once and run functions

import ranks  # noqa: E402

from benchmarks.pipelines.machine import this_machine  # noqa: E402


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank."""

    def placed(values: Sequence[float]) -> list[float]:
        return [
            sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2
            for value in values
        ]

    a, b = placed(one), placed(other)
    try:
        return statistics.correlation(a, b)
    except statistics.StatisticsError:  # all are equal: there is no order
        return float("nan")


def main() -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.pipelines")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=7, help="turns of every schedule")
    parser.add_argument("--quick", action="store_true", help="4 and 16 micro-batches, 3 rounds")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    args = parser.parse_args()
    counts = [4, 16] if args.quick else args.micro_batches
    rounds = min(args.rounds, 3) if args.quick else args.rounds
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    known = parts()
    pool = ranks.Pool(RANKS)
    results = {}
    try:
        machine = this_machine(pool)
        for m in counts:
            program = capture(model(), example_inputs=batch(m), model_name="decoder")
            plans = {name: plan_of(program, name) for name in NAMES}
            per_rank = pool.run(measure, m, plans, program, rounds, timeout_s=900)
            results[m] = _row(m, known, machine, per_rank)
            if not args.json:
                _show(m, results[m], cores)
    finally:
        pool.close()
    ratios, used = (
        [r for row in results.values() for r in row[kind].values()]
        for kind in ("to_torch", "processors_to_torch")
    )
    correlations = [row["correlation"] for row in results.values()]
    summary = {
        "mean_correlation": statistics.mean(correlations),
        "median_to_torch": statistics.median(ratios),
        "median_processors_to_torch": statistics.median(used),
    }
    if args.json:
        print(json.dumps({"summary": summary, "micro_batches": results}, indent=1))
    else:
        print(
            f"rank correlation of predicted and measured order: "
            f"{', '.join(f'{c:.2f}' for c in correlations)}, mean "
            f"{summary['mean_correlation']:.2f}; step time to torch's own classes, median: "
            f"{summary['median_to_torch']:.3f}, of processor seconds "
            f"{summary['median_processors_to_torch']:.3f}"
        )
    return 0


def _row(
    m: int, known: Mapping[str, Part], machine: Machine, per_rank: Sequence[Any]
) -> dict[str, Any]:
    rounds, losses = per_rank[0]
    far = {name: loss for name, loss in losses.items() if abs(loss - losses["naive"]) > 1e-4}
    if far:
        raise AssertionError(f"these steps did something else: {far}, not {losses['naive']}")
    seconds = {name: [wall for wall, _ in own] for name, own in rounds.items()}
    processors = {
        name: [sum(found[name][k][1] for found, _ in per_rank) for k in range(len(own))]
        for name, own in rounds.items()
    }
    predicted = {}
    for name in NAMES:
        schedule = by_name(name, RANKS, m, SCHEDULES[name].least_virtual)
        stages = stage_parts(known, schedule.num_stages)
        predicted[name] = on_shared_cores(schedule, stages, machine)
    measured = {name: min(seconds[name]) for name in NAMES}
    order = [predicted[n] for n in NAMES], [measured[n] for n in NAMES]
    return {
        "predicted_s": predicted,
        "measured_s": measured,
        "to_torch": _to_torch(seconds),
        "processors_to_torch": _to_torch(processors),
        "correlation": spearman(*order),
    }


def _to_torch(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median ratio of each schedule to torch's own of the same round."""
    found = {}
    for name in NAMES:
        if f"torch {name}" in seconds:
            pairs = zip(seconds[name], seconds[f"torch {name}"], strict=True)
            found[name] = statistics.median(ours / theirs for ours, theirs in pairs)
    return found


def _show(m: int, row: Mapping[str, Any], cores: int) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{m} micro-batches, {RANKS} processes on {cores} cores; rank correlation "
    table = Table(title=f"{title}{row['correlation']:.2f}", title_justify="left")
    for column in ("schedule", "predicted ms", "measured ms", "to torch's own", "processors"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for name in sorted(NAMES, key=lambda n: float(row["measured_s"][n])):
        ratios = [row[kind].get(name) for kind in ("to_torch", "processors_to_torch")]
        table.add_row(
            name, f"{1e3 * row['predicted_s'][name]:.1f}", f"{1e3 * row['measured_s'][name]:.1f}",
            *("" if ratio is None else f"{ratio:.3f}" for ratio in ratios),
        )  # fmt: skip
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
