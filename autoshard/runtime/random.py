"""Random numbers that depend on nothing but what they are for.

Every random op of emitted code runs inside :func:`seeded`: its numbers follow from the step's key,
the op's number in the program, and the rank's coordinates on the axes that split its output. So
they are the same again in recomputation and after a resume, the same on all ranks that hold the
same value, and different on ranks that hold different parts.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from autoshard.runtime.mesh import current

_MASK = (1 << 64) - 1

# The CPU's default generator is one per process, while thread-backed ranks and the threads that
# run backward on several devices share it.
_generator_lock = threading.RLock()


def _mix(*numbers: int) -> int:
    """A 64-bit hash of integers: the finaliser of SplitMix64 (Steele et al. 2014) as a sponge."""
    state = 0
    for number in (*numbers, len(numbers)):
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def make_key(seed: int, step: int, micro_batch: int) -> Tensor:
    """The key of one micro-batch: an int64 tensor of shape ``[1]``, on the CPU.

    Micro-batches are numbered over the local batch of one data-parallel rank. The key may be moved
    to the device that computes; it is read back from there once.
    """
    return torch.tensor([_mix(seed, step, micro_batch) >> 1], dtype=torch.int64)


def _value(key: Tensor) -> int:
    """Reading waits for the key's device, so it is done once per key."""
    version, value = key.__dict__.get("_autoshard_value", (None, 0))
    if version != key._version:
        value = key.item()
        key.__dict__["_autoshard_value"] = (key._version, value)
    return int(value)


@contextlib.contextmanager
def seeded(key: Tensor, number: int, axes: Sequence[str] = ()) -> Iterator[None]:
    """Run random ops with numbers of their own; the default generators are untouched after.

    Args:
        key: from :func:`make_key`.
        number: of the op, unique in the program.
        axes: those that split the op's output; ranks along all other axes draw the same numbers.
    """
    mesh = current()
    seed = _mix(_value(key), number, *(mesh.rank(axis) for axis in axes))
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
    with _generator_lock:
        states = [generator.get_state() for generator in generators]
        try:
            for generator in generators:
                # The CPU's Mersenne twister takes 32 bits of it.
                generator.manual_seed(seed & 0xFFFFFFFF if generator.device.type == "cpu" else seed)
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
