"""Peak memory of tensors on a CPU, where the allocator keeps no statistics of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of this rank's parts, shared storage counted once."""
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values()
    )


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes that tensors made by ``function`` take at once on the CPU.

    The profiler reports every allocation and release; the peak is that of their running sum.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak
