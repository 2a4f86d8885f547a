"""What a planner is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from autoshard.cluster import Cluster
from autoshard.ir import Program
from autoshard.options import Constraints
from autoshard.software import OWN, Software


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A program, the devices to train it on, and what the user pinned.

    Attributes:
        optimizer: a name, for the bytes of its state and the seconds of its step.
        precision: as the user gave it; the program has its casts already.
        time_limit_s: end the search then, as soon as there is a plan.
        standalone: how many batches like the program's, each on its own, make up a step.
        software: what will run the plan.
        num_samples: per step and batch of its own; that of the program, or any other where samples
            do not interact, since then costs depend on the micro-batch alone.
    """

    program: Program
    cluster: Cluster
    world_size: int
    constraints: Constraints
    optimizer: str = "adamw"
    precision: str | None = None
    strict: bool = False
    seed: int = 0
    time_limit_s: float | None = None
    standalone: int = 1
    software: Software = OWN
    num_samples: int = 0

    def __post_init__(self) -> None:
        samples = self.num_samples or self.program.batch_size
        object.__setattr__(self, "num_samples", samples)

    @property
    def memory_bytes(self) -> int:
        """What a plan may use of each device."""
        return self.constraints.memory_bytes or self.cluster.device.memory_bytes
