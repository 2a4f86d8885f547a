"""What else the search solved: the runner-up plans, and the front of time against memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from autoshard.plan.plan import Alternative
from autoshard.plan.staged_plan import StagedPlan

NUM_RUNNERS_UP = 8
"""Runner-up plans that a plan remembers."""


def alternative(staged: StagedPlan) -> Alternative:
    """A solved configuration with what it is predicted to take."""
    configuration = staged.configuration
    modes = Counter(entry.mode for stage in staged.stages for _, entry in stage)
    return Alternative(
        mesh=configuration.mesh, schedule=configuration.schedule,
        virtual_stages=configuration.virtual_stages,
        micro_batch_size=configuration.micro_batch_size, data_parallel=staged.data_parallel,
        recompute=dict(sorted(modes.items())), step_s=staged.predicted_s,
        peak_bytes=staged.peak_bytes,
    )  # fmt: skip


def runners_up(chosen: Alternative, solved: Iterable[Alternative]) -> tuple[Alternative, ...]:
    """The fastest of each mesh and schedule other than the chosen ones, fastest first."""
    found = {chosen.kind: chosen}
    for other in sorted(solved, key=time_first):
        found.setdefault(other.kind, other)
    del found[chosen.kind]
    return tuple(found.values())[:NUM_RUNNERS_UP]


def front(solved: Sequence[Alternative]) -> tuple[Alternative, ...]:
    """Those that no other one beats in time or memory without losing in the other.

    Fastest first, so by falling memory.
    """
    kept: list[Alternative] = []
    for candidate in sorted(solved, key=time_first):
        if not kept or candidate.peak_bytes < kept[-1].peak_bytes:
            kept.append(candidate)
    return tuple(kept)


def time_first(alternative: Alternative) -> tuple[float, int]:
    """What alternatives are ordered by."""
    return alternative.step_s, alternative.peak_bytes
