"""Constants that make predictions agree best with measurements: least absolute deviations.

The logarithm of a predicted time is close to linear in the logarithms of the constants, so the fit
is a sequence of linear programs: each minimises the sum of absolute errors of the linearised
predictions within a trust region, which grows after a step that helped and shrinks after one that
did not (sequential linear programming; Nocedal & Wright 2006, "Numerical Optimization", sections 4
and 18). Slopes are those at the start throughout, the dear part, which all fits from there share.
Absolute errors, because a few rows are off for reasons that no constant can mend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from ortools.math_opt.python import mathopt

from benchmarks.published.constants import Constant

FAR_OFF = math.log(2)
"""Rows that are off by more than a factor of 2 count no more than that: they lack a reason."""
DIFFERENCE = math.log(1.05)
"""The step of a constant by which predictions are linearised."""
FIRST_TRUST, LAST_TRUST = 0.4, 0.02
"""How far a step may change the logarithm of a constant, at first, and when the fit ends."""
MOST_STEPS = 6
WORTH_A_STEP = 1e-3

Values = dict[str, float]
Errors = NDArray[np.float64]
"""By row, the logarithm of predicted over measured."""


def loss(errors: Errors, weights: Errors) -> float:
    """Weighted sum of the sizes of errors, none counting more than ``FAR_OFF``."""
    return float(weights @ np.minimum(np.abs(errors), FAR_OFF))


def fitted(
    constants: Sequence[Constant],
    errors_of: Callable[[Values], Errors],
    weights: Errors,
    progress: Callable[[str], None] = lambda text: None,
) -> Values:
    """Values within the constants' limits that make the loss small.

    Args:
        errors_of: the errors of the same rows under any values.
    """
    best = {c.name: c.start for c in constants}
    errors = errors_of(best)
    trust, slopes = FIRST_TRUST, _slopes(constants, best, errors, errors_of)
    for step in range(MOST_STEPS):
        trial = _step(constants, best, errors, slopes, weights, trust)
        found = errors_of(trial)
        before, after = loss(errors, weights), loss(found, weights)
        progress(f"step {step + 1}: loss {min(before, after):.4f}")
        if after >= before * (1 - WORTH_A_STEP):
            trust /= 2
            if trust < LAST_TRUST:
                break
            continue
        best, errors, trust = trial, found, min(2 * trust, FIRST_TRUST)
    return best


def _slopes(
    constants: Sequence[Constant],
    values: Values,
    errors: Errors,
    errors_of: Callable[[Values], Errors],
) -> NDArray[np.float64]:
    """Of every row's error by the logarithm of every constant, by differences."""
    columns = []
    for constant in constants:
        step = DIFFERENCE if values[constant.name] < constant.high else -DIFFERENCE
        moved = {**values, constant.name: values[constant.name] * math.exp(step)}
        columns.append((errors_of(moved) - errors) / step)
    return np.stack(columns, axis=1)


def _step(
    constants: Sequence[Constant],
    values: Values,
    errors: Errors,
    slopes: NDArray[np.float64],
    weights: Errors,
    trust: float,
) -> Values:
    """The best values within the trust region, as if errors were linear."""
    model = mathopt.Model(name="least absolute deviations")
    moves = []
    for constant in constants:
        value = values[constant.name]
        moves.append(
            model.add_variable(
                lb=max(-trust, math.log(constant.low / value)),
                ub=min(trust, math.log(constant.high / value)),
            )
        )
    sizes = []
    for row in np.flatnonzero(np.abs(errors) < FAR_OFF):
        size = model.add_variable(lb=0.0)
        linear = float(errors[row]) + mathopt.fast_sum(
            float(slope) * move for slope, move in zip(slopes[row], moves, strict=True)
        )
        model.add_linear_constraint(size >= linear)
        model.add_linear_constraint(size >= -linear)
        sizes.append(float(weights[row]) * size)
    model.minimize(mathopt.fast_sum(sizes))
    result = mathopt.solve(model, mathopt.SolverType.GLOP)
    found = result.variable_values(moves)
    return {
        constant.name: values[constant.name] * math.exp(move)
        for constant, move in zip(constants, found, strict=True)
    }
