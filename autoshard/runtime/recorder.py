"""Writes down what this process does when, while a recorder is active.

The runtime calls :func:`span` around what it does; that costs nothing worth mentioning unless
:func:`recording` is on. On a GPU each span then waits for the device, so that work is where it
happened; overlap of compute and communication is lost in such a step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from autoshard.timeline import Span, SpanKind, Timeline


class Recorder:
    """The spans of one process; ``rank`` is its lane."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank = rank
        self._device = device
        self._zero_s = 0.0
        self.spans: list[Span] = []

    def start(self) -> None:
        """Set the clock to zero, on all processes at once as near as a barrier can tell."""
        self._wait()
        if dist.is_initialized():
            dist.barrier()
        self._zero_s = time.perf_counter()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @contextlib.contextmanager
    def span(self, kind: SpanKind, stage: int | None, micro_batch: int | None) -> Iterator[None]:
        self._wait()
        start = time.perf_counter() - self._zero_s
        yield
        self._wait()
        self.spans.append(
            Span(
                lane=self._rank, kind=kind, start_s=start,
                end_s=time.perf_counter() - self._zero_s, stage=stage, micro_batch=micro_batch,
            )
        )  # fmt: skip


_active: Recorder | None = None
_NOTHING = contextlib.nullcontext()


def span(
    kind: SpanKind, stage: int | None = None, micro_batch: int | None = None
) -> contextlib.AbstractContextManager[None]:
    """Around something that a timeline should show."""
    if _active is None:
        return _NOTHING
    return _active.span(kind, stage, micro_batch)


@contextlib.contextmanager
def recording(device: torch.device) -> Iterator[Recorder]:
    """Record what happens inside; every process of the group enters it alike."""
    global _active
    before = _active
    rank = dist.get_rank() if dist.is_initialized() else 0
    _active = recorder = Recorder(rank, device)
    try:
        recorder.start()
        yield recorder
    finally:
        _active = before


def gathered(recorder: Recorder, lane: str) -> Timeline:
    """The spans of all processes, on every process.

    Args:
        lane: what this process is called.
    """
    mine = (lane, recorder.spans)
    parts = [mine]
    if dist.is_initialized():
        parts = [mine] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
    return Timeline(
        name="measured",
        lanes=tuple(name for name, _ in parts),
        spans=tuple(span for _, spans in parts for span in spans),
    )
