"""Conversions of an outer axis as ops: other dims split, addends pass.

The outer axis has two ranks that hold the same numbers here, so each result is known; what is
proven is that the op on parts of another dim is the part of the op.
"""

from __future__ import annotations

import pytest
from drawn import offered
from rule_harness import T, make_op, prove

from autoshard.placement.rules import collectives
from autoshard.runtime.mesh import Mesh, set_current

DIMS = {
    "split": (1, ()),
    "split_varying": (1, ()),
    "all_gather_replicated": (1, 4, ()),
    "all_gather": (1, 4, ()),
    "all_to_all": (1, 0, 4, (), ()),
    "pad": (1, 4, ()),
    "reduce_scatter": (1, ()),
}


@pytest.fixture(autouse=True)
def alone() -> None:
    set_current(Mesh({"dp": 1, "tp": 1}))


@pytest.mark.parametrize("name", collectives._WITHOUT_DIM)
@pytest.mark.parametrize("n", [2, 4])
def test_on_every_element(name: str, n: int) -> None:
    op = make_op(f"autoshard.{name}", [T(4, 8)], {"axis": "dp"})
    assert {"S(0) -> S(0)", "S(1) -> S(1)", "P -> P"} <= offered(op, n)
    prove(op, n)


@pytest.mark.parametrize("name", DIMS)
@pytest.mark.parametrize("n", [2, 4])
def test_along_a_dim(name: str, n: int) -> None:
    op = make_op(f"autoshard.{name}", [T(8, 4, 8), *DIMS[name]], {"axis": "dp"})
    moved = {0, 1} if name == "all_to_all" else {1}
    dims = {s.inputs[0].dim for s in prove(op, n) if s.splits_work}
    assert dims == {0, 1, 2} - moved
    assert "P -> P" in offered(op, n)


def test_every_conversion_has_a_rule() -> None:
    from autoshard.placement.conversion import _TABLE

    functions = {c.function for c in _TABLE.values()}
    assert functions == {*collectives._WITHOUT_DIM, *collectives._WITH_DIM}
