"""The same rows priced again and again with other constants, over processes that remember them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

from benchmarks.published.constants import Constant, Priced
from benchmarks.published.fitting import Values
from benchmarks.published.machines import cluster_of
from benchmarks.published.predict import Outcome, Predictor
from benchmarks.published.rows import Row
from benchmarks.published.run import by_program

_Key = tuple[str, tuple[float, ...]]

_predictor = Predictor()


def _priced(rows: Sequence[Row], values: Values) -> list[Outcome]:
    """In a worker process, which keeps everything that no constant changes."""
    price = Priced(values)
    return [Outcome(row, _predictor.predict(row, price)) for row in rows]


@dataclass
class Pricing:
    """Outcomes of rows under any values; what was priced once is not priced again.

    Args:
        rows: all rows that will be asked for. Each process keeps to its own.
    """

    rows: Sequence[Row]
    constants: Sequence[Constant]
    processes: int = 2
    _pools: list[ProcessPoolExecutor] = field(default_factory=list)
    _home: dict[str, int] = field(default_factory=dict)
    _devices: dict[str, str] = field(default_factory=dict)
    _known: dict[_Key, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        loads = [0] * self.processes
        for group in by_program(self.rows):
            home = loads.index(min(loads))
            loads[home] += len(group)
            self._home.update((row.id, home) for row in group)
        self._devices = {row.id: cluster_of(row).device.name for row in self.rows}
        context = get_context("spawn")
        self._pools = [ProcessPoolExecutor(1, mp_context=context) for _ in loads]

    def __call__(self, rows: Sequence[Row], values: Values) -> list[Outcome]:
        keys = [self._key(row, values) for row in rows]
        missing: list[list[tuple[_Key, Row]]] = [[] for _ in self._pools]
        for key, row in zip(keys, rows, strict=True):
            if key not in self._known:
                missing[self._home[row.id]].append((key, row))
        jobs = [
            pool.submit(_priced, [row for _, row in share], values)
            for pool, share in zip(self._pools, missing, strict=True)
        ]
        for job, share in zip(jobs, missing, strict=True):
            for (key, _), outcome in zip(share, job.result(), strict=True):
                self._known[key] = outcome
        return [self._known[key] for key in keys]

    def _key(self, row: Row, values: Values) -> _Key:
        """A row, and the values of the constants that its device has."""
        device = self._devices[row.id]
        return row.id, tuple(values[c.name] for c in self.constants if c.is_of(device))

    def close(self) -> None:
        """End the processes."""
        for pool in self._pools:
            pool.shutdown()
