"""Starting the processes of a command on this machine, as ``torchrun --standalone`` does."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from autoshard.errors import AutoshardError, OptionError


class ChildError(AutoshardError):
    """A process failed and has said why; carries its exit code."""

    def __init__(self, rank: int, exit_code: int) -> None:
        super().__init__(f"rank {rank} ended with exit code {exit_code}; its error is above")
        self.exit_code = exit_code if 0 < exit_code < 128 else 1


def run(world_size: int | None, arguments: Sequence[str], max_restarts: int = 0) -> None:
    """``autoshard ARGUMENTS`` on ``world_size`` processes of this machine; returns when they end.

    Raises:
        OptionError: no number of processes was given.
        ChildError: one failed; it has the exit code of the first.
    """
    if world_size is None:
        raise OptionError("--world-size expects the number of processes to start, such as 4")
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Each process computes on one thread unless told otherwise: they share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The processes print their own errors; torch's summary of them would hide those.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "autoshard", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise ChildError(rank, failure.exitcode) from None
