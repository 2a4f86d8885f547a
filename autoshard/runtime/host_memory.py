"""Keep what a training step frees for the next step, where tensors are in a CPU's memory.

The C library gives large freed blocks back to the system, which zeroes them page by page when it
hands them out again. Every step would pay for all its activations and gradients anew: a fifth of
the step of a wide model, and more when several ranks ask at once.
"""

from __future__ import annotations

import ctypes
import functools
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of the GNU C library
_LARGEST_BLOCK = 32 * 2**20
"""Blocks above this are always the system's: the library's own upper limit."""
_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@functools.cache
def keep_freed_memory() -> bool:
    """From now on freed memory stays with this process; whether that could be arranged.

    It cannot with another C library or allocator, and is not where the environment variables of the
    C library's own allocator say something else.
    """
    if any(name in os.environ for name in _CHOSEN):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_M_TRIM_THRESHOLD, -1))
