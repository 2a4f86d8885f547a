"""Shapes for the proofs of sharding rules, and what the proofs are asked to offer."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from autoshard.ir import Op
from autoshard.placement import registry
from autoshard.placement.strategy import Hints

few = settings(
    max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
"""Settings of the proofs: few examples, the same in every run."""

more = settings(few, max_examples=12)
"""Settings for the ops that most of a model's time goes to."""

ranks = st.sampled_from([2, 4])
size = st.sampled_from([1, 2, 3, 4, 5, 8])
"""One dim: smaller than the ranks, divisible, and not."""
even = st.sampled_from([4, 8])
"""One dim that 2 and 4 ranks divide."""


def shapes(least: int = 1, most: int = 3) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(size, min_size=least, max_size=most).map(tuple)


def offered(op: Op, n: int, hints: Hints | None = None) -> set[str]:
    """The texts of all strategies."""
    return {str(s) for s in registry.strategies(op, n, hints)}
