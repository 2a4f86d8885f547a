"""Keeping a C library's prints out of the program's own output."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_stdout() -> Iterator[None]:
    """What C code prints to standard output inside is dropped.

    HiGHS has prints of its own in rare branches that no option turns off, and standard output may
    be a pipe that someone parses.
    """
    try:
        sys.stdout.flush()
        saved = os.dup(1)
    except (OSError, ValueError, AttributeError):  # there is no standard output to protect
        yield
        return
    flush = ctypes.CDLL(None).fflush
    flush(None)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    try:
        yield
    finally:
        flush(None)  # C buffers what goes to a pipe; it must not come out after this
        os.dup2(saved, 1)
        os.close(saved)
