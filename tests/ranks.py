"""Ranks for tests: threads of this process, and a pool of real processes that is kept alive.

Threads cost milliseconds and run collectives and their backward with real values: use them for
logic. The pool talks gloo, as users' programs do: use it where FSDP2, pipelining or files between
processes are what is tested.
"""

from __future__ import annotations

import gc
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.testing._internal.distributed import multi_threaded_pg as threaded

from autoshard.runtime.mesh import Mesh, using

T = TypeVar("T")

_threads_lock = threading.RLock()
_PRELOADED = ["equivalence", "autoshard.api", "autoshard.runtime.engine"]
"""Modules that ranks are forked with: they are slow to import."""


def run_threads(
    n: int,
    function: Callable[..., T],
    *args: Any,
    axes: Mapping[str, int] | None = None,
    timeout_s: float = 60,
) -> list[T]:
    """``function(*args)`` on ``n`` thread-backed ranks at once; the results by rank.

    Each rank has a mesh with ``axes`` (by default all ranks are ``tp``); inside,
    ``mesh.current()`` and ``torch.distributed`` know the rank. All ranks share the CPU's default
    generator: draw from it only inside ``seeded``, or use a generator of your own.

    Raises:
        BaseException: the first exception of a rank, with the rank in its notes.
        TimeoutError: if ranks still wait for each other after ``timeout_s``.
    """
    sizes = {"pp": 1, "dp": 1, "tp": 1, **(axes if axes is not None else {"tp": n})}
    results: dict[int, T] = {}
    failures: list[BaseException] = []
    store = dist.HashStore()
    over = threading.Event()

    def work(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=n, store=store)
            try:
                with using(Mesh.create(sizes)):
                    results[rank] = function(*args)
            finally:
                if not over.is_set():
                    dist.destroy_process_group()
        except BaseException as error:
            if over.is_set():  # a straggler; other ranks may be running by now
                return
            if not isinstance(error, SystemExit):  # a rank that waited for the one that failed
                error.add_note(f"on rank {rank} of {n}")
                failures.append(error)
            threaded.ProcessLocalGroup.exception_handle(error)

    with _threads_lock, torch.random.fork_rng():
        torch._C._distributed_c10d._set_thread_isolation_mode(True)
        threaded._install_threaded_pg()
        try:
            threads = [threading.Thread(target=work, args=(r,), daemon=True) for r in range(n)]
            for thread in threads:
                thread.start()
            deadline = time.monotonic() + timeout_s
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            over.set()
            if failures:
                raise failures[0]
            if stuck := [r for r, thread in enumerate(threads) if thread.is_alive()]:
                threaded.ProcessLocalGroup.exception_handle(TimeoutError())  # ends their waits
                for thread in threads:
                    thread.join(0.1)
                raise TimeoutError(f"ranks {stuck} still wait after {timeout_s} s")
        finally:
            threaded.ProcessLocalGroup.reset()
            threaded._uninstall_threaded_pg()
            torch._C._distributed_c10d._set_thread_isolation_mode(False)
    return [results[rank] for rank in range(n)]


class RankError(AssertionError):
    """A process of the pool failed; the text is its traceback."""


class Pool:
    """Processes that run functions as the ranks of a gloo world; started at the first use.

    A call that a rank does not answer ends the processes; the next call starts new ones.
    """

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._tasks: list[Any] = []
        self._replies: Any = None
        self._runs = 0

    def run(
        self,
        function: Callable[..., T],
        *args: Any,
        world: int = 4,
        timeout_s: float = 240,
        killed: int | None = None,
    ) -> list[T]:
        """``function(*args)`` on ``world`` processes; the results by rank.

        ``function`` is a function of a module; arguments and results are pickled (tensors by
        value). Inside, ``torch.distributed`` is initialised; the function creates its own mesh.

        Args:
            killed: a rank whose process ends without an answer; its result is left out.

        Raises:
            RankError: with the first failing rank's traceback.
            TimeoutError: if a rank has not answered after ``timeout_s``.
        """
        if not self._processes:
            self._start()
        self._runs += 1
        for rank in range(world):
            self._tasks[rank].put((self._runs, world, timeout_s, function, args))
        answering = [rank for rank in range(world) if rank != killed]
        results: dict[int, Any] = {}
        failures: list[tuple[float, int, str]] = []
        try:
            self._collect(answering, time.monotonic() + timeout_s + 5, results, failures)
        finally:
            if len(results) + len(failures) < world:
                self.close()
        if failures:
            _, rank, text = min(failures)
            raise RankError(f"rank {rank} of {world}:\n{text}")
        return [results[rank] for rank in answering]

    def _collect(
        self,
        answering: Sequence[int],
        deadline: float,
        results: dict[int, Any],
        failures: list[tuple[float, int, str]],
    ) -> None:
        """Fill in what each rank answers; returns early if some failed and the rest is silent."""
        while len(results) + len(failures) < len(answering):
            try:
                rank, failed_at, failure, result = self._replies.get(timeout=0.5)
            except queue.Empty:
                if failures:  # the others had time to say that they failed earlier
                    return
                self._check_alive(answering, results, deadline)
                continue
            if failure:
                failures.append((failed_at, rank, failure))
            else:
                results[rank] = result

    def _check_alive(
        self, answering: Sequence[int], results: Mapping[int, Any], deadline: float
    ) -> None:
        world, missing = len(answering), [rank for rank in answering if rank not in results]
        dead = [rank for rank in missing if not self._processes[rank].is_alive()]
        if dead:
            codes = [self._processes[rank].exitcode for rank in dead]
            raise RankError(f"ranks {dead} of {world} ended with exit codes {codes}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {missing} of {world} have not answered")

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._replies = context.Queue()
        self._tasks = [context.Queue() for _ in range(self.size)]
        self._processes = [
            context.Process(
                target=_serve,
                args=(rank, self._store.port, self._tasks[rank], self._replies),
                daemon=True,
            )
            for rank in range(self.size)
        ]
        environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            for process in self._processes:
                process.start()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes = []


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _let_go_of_groups() -> None:
    """Free what a run left behind: each gloo group has threads that wake up 100 times a second."""
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()
    gc.collect()


def _serve(rank: int, port: int, tasks: Any, replies: Any) -> None:
    """One process of the pool: runs tasks until it is killed, or the process of the tests is."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    multiprocessing.set_sharing_strategy("file_system")
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    while True:
        run, world, timeout_s, function, args = tasks.get()
        timeout = timedelta(seconds=timeout_s)
        failed_at, failure, result = 0.0, "", None
        try:
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore(f"run{run}", store),
                rank=rank,
                world_size=world,
                timeout=timeout,
            )
            try:
                torch.manual_seed(0)
                result = function(*args)
            except BaseException:
                failed_at = time.monotonic()
                raise
            finally:
                dist.destroy_process_group()
                _let_go_of_groups()
        except BaseException:
            failed_at = failed_at or time.monotonic()
            failure = traceback.format_exc()
        replies.put((rank, failed_at, failure, result))
