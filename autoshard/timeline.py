"""What ranks do when, predicted or measured alike, as data.

A timeline is a list of spans on lanes. The prediction (:mod:`autoshard.plan.timeline`) has a lane
per pipeline rank, a measurement (:mod:`autoshard.runtime.recorder`) one per process.
:mod:`autoshard.report.trace` and :mod:`autoshard.report.chart` show both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

SpanKind = Literal["F", "B", "I", "W", "send", "reduce", "step"]

NAMES: dict[SpanKind, str] = {
    "F": "forward", "B": "backward", "I": "backward of inputs", "W": "backward of weights",
    "send": "send", "reduce": "reduce gradients", "step": "optimizer step",
}  # fmt: skip
"""What each kind of span is called."""

KINDS: tuple[SpanKind, ...] = get_args(SpanKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One thing that a rank does.

    Attributes:
        lane: index of the rank.
        start_s, end_s: since the beginning of the step.
        stage, micro_batch: what it is about, where it is about one.
    """

    lane: int
    kind: SpanKind
    start_s: float
    end_s: float
    stage: int | None = None
    micro_batch: int | None = None

    @property
    def label(self) -> str:
        """``2F0`` for actions of a schedule, as it prints them; else the kind."""
        if self.kind in ("F", "B", "I", "W"):
            return f"{self.stage}{self.kind}{self.micro_batch}"
        about = "" if self.stage is None else f" {self.stage}"
        about += "" if self.micro_batch is None else f".{self.micro_batch}"
        return f"{self.kind}{about}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One training step.

    Attributes:
        name: ``predicted`` or ``measured``.
        lanes: the name of each rank.
    """

    name: str
    lanes: tuple[str, ...]
    spans: tuple[Span, ...]

    @property
    def step_s(self) -> float:
        """Until the last rank is done."""
        return max((span.end_s for span in self.spans), default=0.0)
