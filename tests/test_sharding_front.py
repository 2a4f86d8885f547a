"""Shardings by micro-batches and price of memory: what is reused is what solving would give."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from test_sharding_program import random_problem

from autoshard.plan.sharding import evaluate
from autoshard.plan.sharding_front import Shardings

QUERIES = [(m, price) for m in (1, 2, 3, 5, 8, 40) for price in (0.0, 0.05, 0.5, 5.0)]


def unlimited(seed: int):
    return replace(random_problem(seed), budgets={}, num_micro_batches=1)


def paid(problem, sharding, num_micro_batches: int, price: float) -> float:
    """What a sharding costs, by the evaluation that knows nothing of the program."""
    spread = replace(problem, num_micro_batches=num_micro_batches)
    cost = evaluate(spread, sharding.assignments)
    return cost.seconds + price * cost.total_bytes


@pytest.mark.parametrize("seed", range(60))
def test_reuse_gives_what_solving_gives(seed):
    problem = unlimited(seed)
    known = Shardings(problem)
    queries = random.Random(seed).sample(QUERIES, len(QUERIES))
    for m, price in queries:
        found, fresh = known.at(m, price), Shardings(problem).at(m, price)
        assert (found is None) == (fresh is None)
        if found is not None:
            best = paid(problem, fresh, m, price)
            assert paid(problem, found, m, price) == pytest.approx(best, rel=3e-6, abs=1e-6)
            assert found.seconds == pytest.approx(paid(problem, found, m, 0.0), rel=3e-6, abs=1e-6)


def test_what_lies_between_equal_ends_needs_no_solve():
    skipped = 0
    for seed in range(30):
        shardings = Shardings(unlimited(seed))
        ends = [shardings.at(m) for m in (2, 200)]
        if ends[0] is None or ends[0].key != ends[1].key:
            continue
        before = shardings.num_solved
        assert [shardings.at(m).key for m in range(3, 200, 20)] == [ends[0].key] * 10
        assert shardings.num_solved == before
        skipped += 1
    assert skipped > 5


@pytest.mark.parametrize("seed", range(20))
def test_no_sharding_beats_the_least(seed):
    shardings = Shardings(unlimited(seed))
    least = shardings.least_s()
    for m in (1, 4, 1000):
        found = shardings.at(m)
        assert (found is None) == (least == float("inf"))
        assert found is None or found.seconds >= least * (1 - 1e-9)
    assert shardings.num_solved <= 4
