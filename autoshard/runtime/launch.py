"""Start under torchrun, and end together: process groups, restarts, the first error.

``torchrun --max-restarts`` starts all processes again after a failure, in the same agent and on the
same store, where the keys of the attempt before still lie; gloo then connects to dead addresses.
So each attempt gets a prefix of its own. A rank that fails writes its traceback in the store before
it ends; a thread of every other rank waits for that, shows it, and ends its rank if need be.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from autoshard.errors import AutoshardError, LaunchError
from autoshard.runtime.host_memory import keep_freed_memory
from autoshard.runtime.mesh import DEFAULT_TIMEOUT, Mesh

_NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FIRST_ERROR = "first_error"
_SHOWN = "shown"  # how many ranks have shown it
_WATCH_INTERVAL = timedelta(hours=1)
_LINGER_S = 5.0
_GRACE_S = 10.0  # for a rank to end by itself after another has failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What torchrun tells a process.

    Attributes:
        attempt: how often torchrun has started the processes again.
        agent_store: the agent holds the store, so no rank starts one.
    """

    rank: int
    local_rank: int
    world_size: int
    address: str
    port: int
    attempt: int = 0
    agent_store: bool = False


def environment(variables: Mapping[str, str] | None = None) -> Environment | None:
    """What torchrun has set; ``None`` outside of it.

    Raises:
        LaunchError: if a variable is there but is no number.
    """
    variables = os.environ if variables is None else variables
    if any(name not in variables for name in _NEEDED):
        return None
    try:
        return Environment(
            rank=int(variables["RANK"]),
            local_rank=int(variables["LOCAL_RANK"]),
            world_size=int(variables["WORLD_SIZE"]),
            address=variables["MASTER_ADDR"],
            port=int(variables["MASTER_PORT"]),
            attempt=int(variables.get("TORCHELASTIC_RESTART_COUNT", "0")),
            agent_store=variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    except ValueError as error:
        raise LaunchError(
            f"expected numbers in {', '.join(_NEEDED)} but got something else ({error}); "
            "start the program with torchrun, which sets them"
        ) from error


def torchrun_line(world_size: int, processes_per_node: int | None = None) -> str:
    """The command that starts this program on ``world_size`` processes."""
    script = " ".join([os.path.relpath(sys.argv[0]) if sys.argv[0] else "train.py", *sys.argv[1:]])
    per_node = processes_per_node or torch.cuda.device_count() or world_size
    if world_size <= per_node:
        return f"torchrun --nproc-per-node {world_size} {script}"
    return (
        f"torchrun --nnodes {-(-world_size // per_node)} --nproc-per-node {per_node} "
        f"--rdzv-backend c10d --rdzv-endpoint HOST:29400 {script}"
    )


def require(world_size: int) -> Environment:
    """The environment of a process that is one of ``world_size`` under torchrun.

    Raises:
        LaunchError: prints the torchrun line to use.
    """
    found = environment()
    if found is None:
        raise LaunchError(
            f"expected to run under torchrun with {world_size} processes but got a single "
            f"process; start it with:\n  {torchrun_line(world_size)}"
        )
    if found.world_size != world_size:
        raise LaunchError(
            f"expected {world_size} processes but got {found.world_size}; "
            f"start it with:\n  {torchrun_line(world_size)}"
        )
    return found


@dataclass(slots=True)
class Run:
    """This process among the others."""

    environment: Environment
    device: torch.device
    store: Store
    timeout: timedelta

    def mesh(self, sizes: Mapping[str, int]) -> Mesh:
        """The mesh of all processes; every rank calls this with the same sizes."""
        return Mesh.create(sizes, device_type=self.device.type, timeout=self.timeout)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """A block that fails on all ranks if it fails on one, with the first error shown.

        Raises:
            LaunchError: on ranks that failed because another had; it shows that one's traceback.
        """
        try:
            yield
        except Exception as error:
            first = self.report(error)
            self.abort()
            if first is None or isinstance(error, AutoshardError):
                raise
            raise LaunchError(first) from error

    def report(self, error: BaseException) -> str | None:
        """Write down a failure of this rank.

        Returns:
            ``None`` if it is the first of all ranks, else what the first one wrote.
        """
        rank = self.environment.rank
        trace = "".join(traceback.format_exception(error)).rstrip()
        mine = f"rank {rank} of {self.environment.world_size} failed first:\n{trace}"
        try:
            first = self.store.compare_set(_FIRST_ERROR, "", mine).decode()
        except Exception:  # the store died with the rank that held it
            return None
        return None if first == mine else first

    def abort(self) -> None:
        """Let go of all connections, so that ranks that wait for this one fail at once."""
        with contextlib.suppress(Exception):
            dist.destroy_process_group()

    def watch(self) -> None:
        """Show the first error of another rank, and end if this one hangs on.

        A rank that waits for one that failed may wait for the whole timeout: gloo closes its
        connections only when a process ends, NCCL tells nobody. Runs on a thread of its own.
        """
        store = self.store.clone()  # type: ignore[attr-defined]  # not in the stubs
        while True:
            try:
                store.wait([_FIRST_ERROR], _WATCH_INTERVAL)
                first = store.get(_FIRST_ERROR).decode()
                break
            except dist.DistStoreError:  # nothing happened in all that time
                continue
            except Exception:  # the run is over
                return
        if first.startswith(f"rank {self.environment.rank} of "):
            return
        print(first, file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            store.add(_SHOWN, 1)
        time.sleep(_GRACE_S)
        os._exit(1)

    def linger(self) -> None:
        """Stay until the others have shown this rank's error: torchrun ends them after it."""
        others = self.environment.world_size - 1
        until = time.monotonic() + _LINGER_S
        with contextlib.suppress(Exception):
            while self.store.add(_SHOWN, 0) < others and time.monotonic() < until:
                time.sleep(0.05)


_run: Run | None = None


def under_torchrun() -> bool:
    """This process was started by torchrun."""
    return environment() is not None


def world_size() -> int:
    """The number of processes that torchrun started; 1 outside of it."""
    found = environment()
    return found.world_size if found else 1


def start(
    world_size: int, *, timeout: timedelta = DEFAULT_TIMEOUT, device_type: str | None = None
) -> torch.device:
    """Join the other processes once; later calls only check that nothing else is asked for.

    One process needs no torchrun. A process group that is already there is used as it is.

    Returns:
        The device of this rank.

    Raises:
        LaunchError: outside torchrun, for another number of processes, or if ranks do not meet.
    """
    global _run
    if _run is None and dist.is_initialized():
        return _prepared(_device(device_type, int(os.environ.get("LOCAL_RANK", "0"))))
    if _run is None:
        _run = initialise(world_size, timeout=timeout, device_type=device_type)
    if _run.environment.world_size != world_size:
        raise LaunchError(
            f"expected {world_size} processes but got {_run.environment.world_size}; "
            f"start it with:\n  {torchrun_line(world_size)}"
        )
    return _prepared(_run.device)


def _prepared(device: torch.device) -> torch.device:
    if device.type == "cpu":
        keep_freed_memory()
    return device


def device() -> torch.device:
    """The device of this rank, also as a context: ``with device(): ...`` creates tensors there."""
    if _run is not None:
        return _run.device
    return _device(None, int(os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """:meth:`Run.guarded` of the run that :func:`start` has joined; nothing without one."""
    with _run.guarded() if _run is not None else contextlib.nullcontext():
        yield


def _device(device_type: str | None, local_rank: int) -> torch.device:
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device_type, local_rank) if device_type == "cuda" else torch.device("cpu")


def initialise(
    world_size: int, *, timeout: timedelta = DEFAULT_TIMEOUT, device_type: str | None = None
) -> Run:
    """Join the process group that torchrun's environment describes: NCCL on CUDA, else gloo.

    An error that ends the program later is written down for the other ranks.

    Args:
        timeout: after which a collective fails. Also of the groups of :meth:`Run.mesh`.
        device_type: ``"cuda"`` or ``"cpu"``; by default CUDA if there is any.

    Raises:
        LaunchError: outside torchrun, for another number of processes, or if ranks do not meet.
    """
    alone = world_size == 1 and not under_torchrun()
    found = _alone() if alone else require(world_size)
    device = _device(device_type, found.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store = HashStore() if alone else _store(found, timeout)
        dist.init_process_group(
            # gloo too, for what lives on the CPU: objects of checkpoints, counts
            backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=found.rank,
            world_size=found.world_size,
            timeout=timeout,
        )
    except (RuntimeError, dist.DistError) as error:
        raise LaunchError(
            f"expected {world_size} processes to meet at {found.address}:{found.port} within "
            f"{timeout.total_seconds():.0f} s but they did not ({error}); check that all have "
            "started and that the address can be reached"
        ) from error
    run = Run(found, device, PrefixStore("errors", store), timeout)
    _report_uncaught(run)
    if not alone:
        threading.Thread(target=run.watch, name="autoshard-watch", daemon=True).start()
    return run


def _alone() -> Environment:
    return Environment(rank=0, local_rank=0, world_size=1, address="localhost", port=0)


def _store(found: Environment, timeout: timedelta) -> Store:
    base = TCPStore(
        found.address,
        found.port,
        found.world_size,
        is_master=not found.agent_store and found.rank == 0,
        timeout=timeout,
    )
    return PrefixStore(f"attempt{found.attempt}", base)


def _report_uncaught(run: Run) -> None:
    """Also errors outside :meth:`Run.guarded`, such as in the user's data, reach the others."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        first = not isinstance(error, (KeyboardInterrupt, LaunchError)) and not run.report(error)
        run.abort()
        before(kind, error, trace)
        if first:
            run.linger()

    sys.excepthook = hook


def shut_down() -> None:
    """Leave the process group; call at the end of a program."""
    global _run
    _run = None
    if dist.is_initialized():
        dist.destroy_process_group()
