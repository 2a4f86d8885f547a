"""Other processes that compute while something is measured.

Ranks that share the cores of a machine also share its caches, its memory bandwidth and its power
budget: what one of them takes while the others rest is not what it takes in training.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

import torch

from autoshard.errors import AutoshardError
from autoshard.ir import Graph

_READY = b"ready\n"


@contextmanager
def companions(number: int, steps: Sequence[Sequence[Graph]]) -> Iterator[None]:
    """While this lasts, ``number`` processes run the same steps again and again.

    Raises:
        AutoshardError: one of them could not begin.
    """
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryFile() as words:  # a pipe that nobody reads would fill and stop them
        try:
            started += (_start(steps, words) for _ in range(number))
            for process in started:
                _await(process, words)
            yield
        finally:
            for process in started:
                process.kill()
            for process in started:
                process.communicate()


def _start(steps: Sequence[Sequence[Graph]], words: IO[bytes]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "autoshard.profile.companions"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, env=_environment(),
    )  # fmt: skip
    assert process.stdin is not None
    try:
        process.stdin.write(pickle.dumps((torch.get_num_threads(), steps)))
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it died, and says why when it is awaited
    return process


def _environment() -> dict[str, str]:
    """This process's own, with every folder that it finds modules in."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return {**os.environ, "PYTHONPATH": paths}


def _await(process: subprocess.Popen[bytes], words: IO[bytes]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line == _READY:
            return
    words.seek(0)
    said = words.read().decode(errors="replace").strip().splitlines()
    raise AutoshardError(
        "expected to start a process that computes while ops are measured, but it ended"
        f"{': ' + said[-1] if said else ''}; leave costs at None to plan by computed figures"
    )


def _run() -> None:
    """The companion itself: until it is killed, or whoever started it is gone."""
    from autoshard.profile.in_order import measure_in_order
    from autoshard.runtime.host_memory import keep_freed_memory

    keep_freed_memory()  # as ranks do
    number, steps = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(number)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    ready = False
    while True:
        for step in steps:
            measure_in_order(step, warm_up=0, repeats=1, least_s=0.0)
            if not ready:
                sys.stdout.buffer.write(_READY)
                sys.stdout.flush()
                ready = True


def _end_with_parent() -> None:
    sys.stdin.buffer.read()  # ends when the parent's end of the pipe is closed
    os._exit(0)


if __name__ == "__main__":
    _run()
