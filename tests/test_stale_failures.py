"""Ranks that are killed or hang in a stale or replicated pipeline, or as asynchronous workers."""

from __future__ import annotations

import os
import re
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
import stale_runs as runs
import torch.distributed as dist
from ranks import Pool
from stale_runs import Setup

from autoshard.runtime.asynchronous import Worker
from autoshard.runtime.replica_wire import Place

TIMEOUT_S = 1.5
LOST = 1
CASES: dict[str, dict[str, Any]] = {
    "pipedream": {"schedule": "pipedream", "replicas": (1, 1, 1, 1)},
    "pipedream, 3-1": {"schedule": "pipedream", "replicas": (3, 1)},
    "2bw": {"schedule": "pipedream-2bw", "micro_batch_size": 3, "replicas": (1, 1, 1, 1)},
    "3-1, flushed": {"replicas": (3, 1), "micro_batch_size": 2},
    "asp": {"data_parallel": "asp"},
    "ssp": {"data_parallel": "ssp", "staleness": 1},
}


def interrupted(given: Setup, trouble: str) -> tuple[str, float]:
    """What training ends with, and after how long, if a rank stops in its fourth forward.

    Others may wait for it then (``killed``), or find it gone when they want to send (``gone``).
    """
    made = runs.parallel(given)
    timeout = timedelta(seconds=TIMEOUT_S)
    workers = given.plan.data_parallel in ("asp", "ssp")
    made.__dict__["_place"] = (
        Worker.create(given.plan.ssp_bound, timeout)
        if workers
        else Place.create(given.plan.rules, timeout)
    )
    calls = 0

    def stop(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls != 4:
            return
        if dist.get_rank() != LOST:
            time.sleep(TIMEOUT_S / 3)
        elif trouble == "hangs":
            time.sleep(2 * TIMEOUT_S)
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == LOST or trouble == "gone":
        made.engine.module.register_forward_pre_hook(stop)
    start = time.monotonic()
    try:
        for batch in runs.batches(given.model, 8):
            made.step(made.local_batch(batch))
        made.drain()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "", time.monotonic() - start


@pytest.mark.parametrize(
    ("case", "trouble"),
    [(case, trouble) for trouble in ("hangs", "killed", "gone") for case in CASES],
)
def test_the_others_end_with_a_clear_error(case: str, trouble: str, ranks: Pool) -> None:
    given = runs.setup("chain", **CASES[case])
    results = ranks.run(interrupted, given, trouble, killed=None if trouble == "hangs" else LOST)
    if trouble == "hangs":
        del results[LOST]
    expected = r"TransferError: stage \d on rank \d waited in vain for "
    if given.plan.data_parallel in ("asp", "ssp"):
        expected = r"LaunchError: .*(worker|rank|workers) .*see (its|their) output"
    for message, seconds in results:
        assert seconds < 3 * TIMEOUT_S, results
        assert re.match(expected, message), results
