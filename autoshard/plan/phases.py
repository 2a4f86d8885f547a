"""How long a search spends on what."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class Phases:
    """Seconds by phase; a phase within another counts for both."""

    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, phase: str, function: Callable[[], T]) -> T:
        start = time.perf_counter()
        try:
            return function()
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
