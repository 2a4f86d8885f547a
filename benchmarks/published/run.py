"""All rows of a file, over a few processes, each shape's rows in one of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from benchmarks.published.layouts import Unpredictable, shape_of
from benchmarks.published.predict import Outcome, Predictor
from benchmarks.published.rows import Row
from benchmarks.published.stacks import stack_of

Progress = Callable[[int], None]


def predict_all(
    rows: Sequence[Row], *, processes: int | None = None, progress: Progress = lambda done: None
) -> list[Outcome]:
    """The outcome of every row, in order.

    Args:
        processes: ``None``: as many as there are cores.
        progress: is told how many rows are done.
    """
    groups = by_program(rows)
    processes = min(processes or len(os.sched_getaffinity(0)), len(groups))
    found: dict[str, Outcome] = {}

    def add(outcomes: Sequence[Outcome]) -> None:
        found.update((outcome.row.id, outcome) for outcome in outcomes)
        progress(len(found))

    if processes < 2:
        for group in groups:
            add(predict_group(group))
    else:
        # Not forked: threads of torch do not survive that.
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            for done in as_completed([pool.submit(predict_group, group) for group in groups]):
                add(done.result())
    return [found[row.id] for row in rows]


def by_program(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that share what depends on their model alone, most layers first."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        try:
            key: object = (shape_of(row, stack_of(row)), row.precision)
        except Unpredictable:
            key = row.family
        groups.setdefault(key, []).append(row)
    return sorted(groups.values(), key=lambda group: -(group[0].layers or 0) * len(group))


def predict_group(rows: Sequence[Row]) -> list[Outcome]:
    """The outcomes of rows of one model; what they share is forgotten afterwards."""
    import torch

    torch.set_num_threads(1)
    predictor = Predictor()
    return [Outcome(row, predictor.predict(row)) for row in rows]
