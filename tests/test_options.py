"""Constraints and plain arguments: what is refused, and that the refusal says what to do."""

from __future__ import annotations

import re
from typing import Any

import pytest

from autoshard.errors import OptionError
from autoshard.options import (
    Constraints,
    validate_numbers,
    validate_precision,
    validate_world_size,
)


def test_nothing_is_pinned_by_default() -> None:
    assert Constraints.of(None) == Constraints()
    assert Constraints().pins == {}


def test_pins_are_what_was_given() -> None:
    pins = Constraints.of({"tp": 2, "schedule": "gpipe", "sharding": {"lm_head.weight": "S(0)"}})
    assert pins.pins == {"tp": 2, "schedule": "gpipe", "sharding": {"lm_head.weight": "S(0)"}}
    assert Constraints.of(pins) is pins


def test_stages_pin_the_pipeline_degree() -> None:
    assert Constraints.of({"stages": (2, 3)}).pp == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tpp": 2}, "unknown constraint 'tpp'; did you mean 'tp'"),
        ([("tp", 2)], "expects a mapping such as .* but got list"),
        ({"tp": 0}, "tp expects a positive integer but got 0"),
        ({"tp": "2"}, "tp expects a positive integer but got '2'"),
        ({"dp": True}, "dp expects a positive integer but got True"),
        ({"micro_batch_size": -1}, "micro_batch_size expects a positive integer"),
        ({"memory_bytes": 1.5}, "memory_bytes expects a positive integer"),
        ({"schedule": "1f2b"}, "schedule expects one of none, naive, gpipe, .* but got '1f2b'"),
        ({"data_parallel": "zero4"}, "data_parallel expects one of ddp, zero1, zero2, zero3"),
        ({"recompute": "some"}, "recompute expects one of none, full, selective"),
        ({"sharding": {"w": "S"}}, r"sharding\['w'\]: expected a state"),
        ({"sharding": {"w": 0}}, r"sharding\['w'\]"),
        ({"sharding": "w=S(0)"}, "sharding expects a mapping"),
        ({"stages": "1,2"}, "stages expects a number of segments per stage"),
        ({"stages": (1, 0)}, "stages expects a number of segments per stage"),
        ({"allow_coupled_micro_batches": 1}, "expects True or False"),
    ],
)
def test_a_bad_constraint_is_refused(given: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Constraints.of(given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stages": (1, 2), "pp": 3}, "stages has 2 entries but pp is 3"),
        ({"schedule": "none", "pp": 2}, "schedule 'none' means one stage, but pp is 2"),
        ({"data_parallel": "zero3", "dp": 1}, "'zero3' spreads .* dp is pinned to 1"),
        ({"tp": 1, "sharding": {"w": "S(0)"}}, "splits over the tensor axis, but tp is pinned"),
    ],
)
def test_contradicting_pins_are_refused(given: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Constraints.of(given)


@pytest.mark.parametrize("value", [0, -4, True, 2.0, "2", None])
def test_a_bad_world_size_is_refused(value: Any) -> None:
    with pytest.raises(
        OptionError, match=f"integer of at least 1, but got {re.escape(repr(value))}"
    ):
        validate_world_size(value, Constraints())


@pytest.mark.parametrize(
    ("world_size", "pins", "words"),
    [
        (2, {"tp": 3}, "tp=3 holds 3 ranks, which does not divide world_size=2"),
        (8, {"pp": 2, "dp": 4, "tp": 2}, "holds 16 ranks, which does not divide world_size=8"),
        (8, {"pp": 2, "dp": 1, "tp": 2}, "holds 4 ranks but world_size is 8: leave one axis free"),
    ],
)
def test_a_mesh_that_does_not_fill_the_world_is_refused(
    world_size: int, pins: dict[str, Any], words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        validate_world_size(world_size, Constraints.of(pins))


def test_a_mesh_that_fits_the_world_is_accepted() -> None:
    assert validate_world_size(8, Constraints(tp=2)) == 8
    assert validate_world_size(8, Constraints(pp=2, dp=2, tp=2)) == 8


def test_precision_is_one_that_there_is() -> None:
    assert validate_precision(None) is None
    assert validate_precision("bf16") == "bf16"
    with pytest.raises(OptionError, match="one of bf16 but got 'fp8'"):
        validate_precision("fp8")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"global_batch_size": 0}, "global_batch_size expects a positive number"),
        ({"global_batch_size": "8"}, "got '8'"),
        ({"time_limit_s": 0}, "time_limit_s expects a positive number of seconds"),
        ({"time_limit_s": float("nan")}, "time_limit_s expects"),
        ({"seed": -1}, "seed expects an integer of at least 0"),
        ({"seed": 1.5}, "seed expects an integer"),
    ],
)
def test_bad_numbers_are_refused(given: dict[str, Any], words: str) -> None:
    numbers: dict[str, Any] = {"global_batch_size": None, "time_limit_s": None, "seed": 0}
    with pytest.raises(OptionError, match=words):
        validate_numbers(**{**numbers, **given})
