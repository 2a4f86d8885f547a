"""The array form of integer programs, and the solver behind it, against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from autoshard.errors import InternalError
from autoshard.plan.solver import INFINITY, Builder, solve


def brute_force(milp) -> float:
    ranges = [range(int(lo), int(up) + 1) for lo, up in zip(milp.lower, milp.upper, strict=True)]
    matrix = np.zeros((len(milp.row_lower), len(milp.objective)))
    matrix[milp.rows, milp.columns] = milp.coefficients
    best = INFINITY
    for point in itertools.product(*ranges):
        activity = matrix @ point
        if (activity >= milp.row_lower - 1e-9).all() and (activity <= milp.row_upper + 1e-9).all():
            best = min(best, float(milp.objective @ point))
    return best


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("unit", [1.0, 1e-6, 1e9])
@pytest.mark.parametrize("relax_first", [False, True])
def test_equals_enumeration_whatever_the_unit(seed, unit, relax_first):
    rng = np.random.default_rng(seed)
    builder = Builder()
    variables = [
        builder.variable(unit * float(rng.integers(-9, 10)), upper=float(rng.integers(1, 4)))
        for _ in range(6)
    ]
    for _ in range(4):
        picked = [int(v) for v in rng.choice(variables, 4)]
        size = 10.0 ** float(rng.integers(-6, 11))
        bound = size * float(rng.integers(-6, 12))
        coefficients = (size * rng.integers(-5, 6, 4)).tolist()
        if rng.random() < 0.5:
            builder.row(picked, coefficients, lower=bound)
        else:
            builder.row(picked, coefficients, upper=bound)
    milp = builder.build()
    solution = solve(milp, relax_first=relax_first)
    best = brute_force(milp)
    assert solution.status == ("infeasible" if best == INFINITY else "optimal")
    if solution.found:
        assert solution.objective == pytest.approx(best, rel=1e-6, abs=1e-9 * unit)
        assert solution.bound == pytest.approx(best, rel=1e-5, abs=1e-6 * unit)
        assert milp.violation(solution.values) < 1e-9


def test_same_program_same_answer():
    rng = np.random.default_rng(5)
    builder = Builder()
    variables = [builder.variable(float(c)) for c in rng.random(80)]
    for _ in range(60):
        builder.row([int(v) for v in rng.choice(variables, 5, replace=False)], lower=1.0)
    first, second = solve(builder.build()), solve(builder.build())
    assert first.objective == second.objective
    assert (first.values == second.values).all()


def test_repeated_columns_add_up_and_zeros_vanish():
    builder = Builder()
    x, y = builder.variable(1.0, upper=9.0), builder.variable(upper=9.0)
    builder.row([x, y, x, y], [1.0, 1.0, 1.0, -1.0], lower=5.0)
    milp = builder.build()
    assert milp.columns.tolist() == [x]
    assert milp.coefficients.tolist() == [2.0]
    assert solve(milp).objective == 3.0


def test_continuous_variables_stay_continuous():
    builder = Builder()
    x = builder.variable(1.0, integer=False)
    builder.row([x], 4.0, lower=1.0)
    assert solve(builder.build()).values[x] == pytest.approx(0.25)


def test_without_variables_the_rows_decide():
    assert solve(Builder().build()).status == "optimal"
    builder = Builder()
    builder.row([], lower=1.0)
    assert solve(builder.build()).status == "infeasible"


def test_fixed_variable_and_new_objective():
    builder = Builder()
    x, y = builder.variable(1.0), builder.variable(5.0)
    builder.row([x, y], lower=1.0)
    builder.fix(x, 0.0)
    assert solve(builder.build()).objective == 5.0
    builder.set_costs({x: 1.0})
    assert solve(builder.build()).objective == 0.0


def test_time_limit_gives_what_is_known():
    rng = np.random.default_rng(0)
    builder = Builder()
    variables = [builder.variable(float(c)) for c in rng.random(500)]
    for _ in range(400):
        builder.row([int(v) for v in rng.choice(variables, 5, replace=False)], lower=1.0)
    solution = solve(builder.build(), time_limit_s=0.3, gap=0.0)
    assert solution.status in {"feasible", "unknown"}
    if solution.found:
        assert 0.0 < solution.bound < solution.objective
        assert 0.0 < solution.gap < 1.0


def test_unbounded_is_a_bug_of_the_caller():
    builder = Builder()
    builder.variable(-1.0, upper=INFINITY, integer=False)
    with pytest.raises(InternalError):
        solve(builder.build())
