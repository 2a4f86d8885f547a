"""Embedding tables: by ids, by features, and by a vocabulary that need not divide."""

from __future__ import annotations

import pytest
from drawn import more, offered, ranks, shapes, size
from hypothesis import given
from hypothesis import strategies as st
from rule_harness import I, T, integers, make_op, prove


@more
@given(
    ids=shapes(0, 2),
    vocabulary=st.sampled_from([2, 5, 7, 8, 9]),
    features=size,
    padding=st.sampled_from([-1, 0, 1]),
    n=ranks,
)
def test_embedding(
    ids: tuple[int, ...], vocabulary: int, features: int, padding: int, n: int
) -> None:
    op = make_op("aten.embedding.default", [T(vocabulary, features), I(*ids), padding])
    prove(op, n, make_inputs=integers(vocabulary)(op))


def test_what_is_offered() -> None:
    op = make_op("aten.embedding.default", [T(7, 8), I(4, 3)])
    assert offered(op, 4) == {
        "R, R -> R",
        "V, R -> V",
        "S(0), R -> P [vocab_parallel]",
        "S(1), R -> S(2)",
        "V, S(0) -> S(0)",
        "P, R -> P",
    }
    prove(op, 4, make_inputs=integers(7)(op))


def test_frequencies_count_all_ids() -> None:
    op = make_op("aten.embedding.default", [T(8, 8), I(4, 3), -1, True])
    assert offered(op, 4) == {"R, R -> R", "V, R -> V", "S(1), R -> S(2)", "P, R -> P"}
    prove(op, 4, make_inputs=integers(8)(op))


def test_on_a_further_axis() -> None:
    from autoshard.runtime.mesh import Mesh, set_current

    set_current(Mesh({"cp": 1, "tp": 1}))
    args = [I(4, 3), T(7, 8), 1]
    op = make_op("autoshard.vocab_parallel_embedding", args, {"axis": "cp", "size": 7})
    assert offered(op, 4) == {
        "R, R -> R", "R, V -> V", "S(0), V -> S(0)", "R, S(1) -> S(2)", "R, P -> P",
    }  # fmt: skip
    prove(op, 4, make_inputs=integers(7)(op))


@pytest.mark.parametrize("n", [2, 4])
def test_one_hot(n: int) -> None:
    op = make_op("aten.one_hot.default", [I(4, 3), 5])
    assert "S(0) -> S(0)" in offered(op, n)
    prove(op, n, make_inputs=integers(5)(op))
    unknown = make_op("aten.one_hot.default", [I(4, 3)])
    assert offered(unknown, n) == {"R -> R"}


BAGS = [T(8, 8), I(6), I(4)]


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("n", [2, 4])
def test_bags_of_any_size(mode: int, n: int) -> None:
    import torch

    args = [*BAGS, False, mode, False, None, False]
    for target, rest in (("padding_idx", [None]), ("default", [])):
        op = make_op(f"aten.embedding_bag.{target}", [*args, *rest])
        assert any(s.startswith("S(1)") for s in offered(op, n)) == (mode != 2)
        offsets = torch.tensor([0, 1, 1, 4])
        ids = torch.tensor([7, 1, 2, 5, 0, 5])
        prove(op, n, make_inputs=lambda rng: [None, ids, offsets], whole_only=True)  # noqa: B023


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("n", [2, 4])
def test_bags_of_one_size(mode: str, n: int) -> None:
    op = make_op("autoshard.embedding_bag", [T(7, 8), I(4, 4), mode])
    assert {"V, S(0) -> S(0)", "S(1), R -> S(1)"} <= offered(op, n)
    assert ("V, S(1) -> P" in offered(op, n)) == (mode == "sum")
    prove(op, n, make_inputs=integers(7)(op))
