"""Ranks as threads of one process: collectives without launching anything.

The groups are those of PyTorch's own multi-threaded tests; functional collectives run on them
forward and backward (CPU autograd runs backward in the thread that asks for it).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

from autoshard.runtime import mesh

T = TypeVar("T")


def group_of_all() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def run_on_threads(
    n: int, axis: str, function: Callable[[int], T], timeout_s: float = 60
) -> list[T]:
    """``[function(rank) for rank in range(n)]``, all at once, on a mesh with the axis ``axis``.

    Raises:
        BaseException: the first one that a rank raised.
        TimeoutError: if a rank waits for the others for ever.
    """
    results: dict[int, T] = {}
    failures: list[BaseException] = []
    store = dist.HashStore()  # type: ignore[attr-defined]

    def work(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=n, store=store)
            mesh.set_current(mesh.Mesh({axis: n}, {axis: rank}, {axis: group_of_all()}))
            try:
                results[rank] = function(rank)
            finally:
                dist.destroy_process_group()
        except BaseException as error:
            failures.append(error)
            # wakes the ranks that wait for this one
            ProcessLocalGroup.exception_handle(error)  # type: ignore[no-untyped-call]

    torch._C._distributed_c10d._set_thread_isolation_mode(True)  # type: ignore[attr-defined]
    _install_threaded_pg()  # type: ignore[no-untyped-call]
    try:
        threads = [threading.Thread(target=work, args=(r,), daemon=True) for r in range(n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout_s)
        if failures:
            raise failures[0]
        if any(thread.is_alive() for thread in threads):
            raise TimeoutError(f"ranks still wait for each other after {timeout_s} s")
    finally:
        ProcessLocalGroup.reset()  # type: ignore[no-untyped-call]
        _uninstall_threaded_pg()  # type: ignore[no-untyped-call]
        torch._C._distributed_c10d._set_thread_isolation_mode(False)  # type: ignore[attr-defined]
    return [results[rank] for rank in range(n)]
