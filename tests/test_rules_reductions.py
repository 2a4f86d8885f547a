"""Reductions: sums and means over a split dim give addends, all others keep the dim whole."""

from __future__ import annotations

import pytest
import torch
from drawn import few, offered, ranks, shapes
from hypothesis import given
from hypothesis import strategies as st
from rule_harness import I, T, make_op, prove


@pytest.mark.parametrize("name", ["sum", "mean"])
@few
@given(shape=shapes(1, 3), keepdim=st.booleans(), n=ranks, data=st.data())
def test_sum_and_mean(
    name: str, shape: tuple[int, ...], keepdim: bool, n: int, data: st.DataObject
) -> None:
    dims = data.draw(st.sets(st.integers(0, len(shape) - 1)))
    overload = "sum.dim_IntList" if name == "sum" else "mean.dim"
    signed = [d - len(shape) if d % 2 else d for d in sorted(dims)]
    prove(make_op(f"aten.{overload}", [T(*shape), signed, keepdim]), n)
    prove(make_op(f"aten.{name}.default", [T(*shape)]), n)


def test_mean_offers_addends() -> None:
    op = make_op("aten.mean.dim", [T(3, 8), [-1], True])
    assert offered(op, 4) == {"R -> R", "V -> V", "S(1) -> P [partial]", "P -> P"}
    total = make_op("aten.sum.default", [T(4, 8)])
    assert {"S(0) -> P", "S(1) -> P", "P -> P"} <= offered(total, 4)
    cast = make_op("aten.mean.dim", [T(4, 8), [1]], {"dtype": torch.float32})
    assert "S(1) -> P [partial]" not in offered(cast, 4)
    assert "S(0) -> S(0)" in offered(cast, 4)


def test_mean_on_two_axes() -> None:
    """The addend of an addend is divided by the ranks of both axes."""
    op = make_op("autoshard.partial_mean", [T(4, 8, 3), (0, 1), False, 3])
    prove(op, 2)
    assert {"S(0) -> P [partial]", "S(1) -> P [partial]"} <= offered(op, 4)


def test_sum_of_numbers_without_gradient() -> None:
    prove(make_op("aten.sum.dim_IntList", [I(4, 8), [1]]), 4)
    prove(make_op("aten.sum.default", [T(4, 8, dtype=torch.bool)]), 4)


REDUCTIONS = [
    ("amax.default", [[1]]), ("amin.default", [[-2], True]), ("logsumexp.default", [[1], True]),
    ("std.dim", [[1]]), ("std.correction", [[1]]), ("var.dim", [[1]]), ("var.correction", [[1]]),
    ("var_mean.correction", [[1]]), ("std_mean.correction", [[1]]),
    ("max.dim", [1]), ("min.dim", [1, True]), ("median.dim", [1]), ("prod.dim_int", [1]),
    ("norm.ScalarOpt_dim", [2, [1]]), ("linalg_vector_norm.default", [2, [1], True]),
    ("argmax.default", [1]), ("argmin.default", [1, True]),
    ("count_nonzero.dim_IntList", [[1]]),
    ("all.dim", [1]), ("any.dim", [1, True]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args"), REDUCTIONS)
@pytest.mark.parametrize("n", [2, 4])
def test_others_keep_the_dim_whole(name: str, args: list[object], n: int) -> None:
    kind = T(4, 8, 3, dtype=torch.bool) if name[:3] in {"all", "any"} else T(4, 8, 3)
    op = make_op(f"aten.{name}", [kind, *args])
    found = prove(op, n)
    assert {s.inputs[0].dim for s in found if s.splits_work} == {0}


FULL = ["max", "min", "std", "var", "prod", "argmax", "argmin", "count_nonzero", "all", "any"]


@pytest.mark.parametrize("name", [*(f"{name}.default" for name in FULL), "norm.Scalar"])
def test_full_reductions_are_whole(name: str) -> None:
    kind = T(4, 8, dtype=torch.bool) if name[:3] in {"all", "any"} else T(4, 8)
    found = prove(make_op(f"aten.{name}", [kind]), 2, whole_only=True)
    assert not any(s.splits_work for s in found)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("softmax.int", [1]), ("log_softmax.int", [-2]), ("_softmax.default", [1, False]),
        ("_log_softmax.default", [1, False]), ("cumsum.default", [1]), ("cumprod.default", [1]),
        ("logcumsumexp.default", [1]), ("cummax.default", [1]), ("topk.default", [2, 1]),
        ("sort.default", [1]), ("argsort.default", [1]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("n", [2, 4])
def test_along_a_dim(name: str, args: list[object], n: int) -> None:
    found = prove(make_op(f"aten.{name}", [T(4, 8, 3), *args]), n)
    assert {s.inputs[0].dim for s in found if s.splits_work} == {0}


def test_stable_sorts() -> None:
    prove(make_op("aten.sort.stable", [T(4, 8)], {"stable": True, "dim": 1}), 4)
    prove(make_op("aten.argsort.stable", [T(4, 8)], {"stable": True, "dim": 1}), 4)


def test_cosine_similarity() -> None:
    prove(make_op("aten.cosine_similarity.default", [T(4, 8), T(4, 8), 1]), 4)


def test_histogram() -> None:
    op = make_op("aten.histc.default", [T(8, grad=False), 4, -1, 1])
    assert "S(0) -> P" in offered(op, 4)
    prove(op, 4)
    by_data = make_op("aten.histc.default", [T(8, grad=False), 4])
    assert offered(by_data, 4) == {"R -> R"}
