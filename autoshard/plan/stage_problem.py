"""What cutting a program into pipeline stages depends on: plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Slot = tuple[int, int]
"""A run and an entry of its menu, by position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One segment of a run under one entry of its recompute menu, per micro-batch.

    Attributes:
        backward_s: recomputation included.
        saved_bytes: from forward to backward, for each micro-batch in flight.
        workspace_bytes: transient; of all segments in a stage the largest counts, once.
        recomputes: in backward, so that a backward is not split in two: both would have to.
    """

    forward_s: float
    backward_s: float
    saved_bytes: float = 0.0
    workspace_bytes: float = 0.0
    recomputes: bool = False

    @property
    def seconds(self) -> float:
        return self.forward_s + self.backward_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Equal segments in a row.

    Attributes:
        parameter_bytes: weights, gradients and optimizer state of one segment, ties aside.
        has_parameters: a stage must have at least one segment that does.
        step_s: what one segment adds to the work after the last backward (gradient reduction that
            nothing hides, optimizer).
        send_s: to hand on what passes a cut after any segment of the run, one way.
    """

    count: int
    menu: tuple[Choice, ...]
    parameter_bytes: float = 0.0
    has_parameters: bool = True
    step_s: float = 0.0
    send_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """Parameters that several runs share: every stage that has one of them holds a copy."""

    runs: tuple[int, ...]
    parameter_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProblem:
    """Runs in order, and the pipeline that they are cut for.

    Attributes:
        memory_bytes: what one device can hold.
        stage_bytes: what every stage holds besides (shared values, communication buffers).
    """

    runs: tuple[Run, ...]
    num_stages: int
    num_micro_batches: int
    memory_bytes: float
    schedule: Literal["none", "gpipe", "1f1b"] = "1f1b"
    ties: tuple[Tie, ...] = ()
    stage_bytes: float = 0.0

    def in_flight(self, stage: int) -> int:
        """Micro-batches whose activations a stage holds at once."""
        if self.num_stages == 1 and self.schedule != "gpipe":
            return 1
        if self.schedule == "gpipe":
            return self.num_micro_batches
        return min(self.num_micro_batches, self.num_stages - stage)
