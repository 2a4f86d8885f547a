"""Fits of the cost models' constants, on errors that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.published.constants import Constant
from benchmarks.published.fitting import FAR_OFF, Errors, Values, fitted, loss

CONSTANTS = (
    Constant(name="rate", start=0.6, low=0.4, high=0.9),
    Constant(name="latency", start=1e-5, low=1e-6, high=1e-4),
)
SIZES = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]) * 1e-5
WEIGHTS = np.full(len(SIZES), 1 / len(SIZES))


def seconds(values: Values) -> Errors:
    return SIZES / values["rate"] + values["latency"]


@pytest.mark.parametrize("truth", [(0.75, 2e-5), (0.5, 3e-6), (0.9, 1e-5)])
def test_finds_what_the_measurements_were_made_with(truth: tuple[float, float]) -> None:
    measured = seconds(dict(zip(("rate", "latency"), truth, strict=True)))

    def errors(values: Values) -> Errors:
        found: Errors = np.log(seconds(values) / measured)
        return found

    found = fitted(CONSTANTS, errors, WEIGHTS)
    start = loss(errors({c.name: c.start for c in CONSTANTS}), WEIGHTS)
    assert loss(errors(found), WEIGHTS) < 0.15 * start
    assert found["rate"] == pytest.approx(truth[0], rel=0.05)
    assert all(c.low <= found[c.name] <= c.high for c in CONSTANTS)


def test_a_row_that_is_far_off_moves_nothing() -> None:
    measured = seconds({"rate": 0.75, "latency": 1e-5})
    wrong = measured * np.array([1, 1, 1, 1, 1, 0.1])

    def fit(against: Errors) -> Values:
        return fitted(CONSTANTS, lambda v: np.log(seconds(v) / against), WEIGHTS)

    assert fit(wrong)["rate"] == pytest.approx(fit(measured)["rate"], rel=0.03)
    assert loss(np.array([10.0]), np.array([1.0])) == FAR_OFF == pytest.approx(math.log(2))
