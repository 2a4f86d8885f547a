"""Attention: heads, batch, and queries where nothing is causal; grouped queries both ways."""

from __future__ import annotations

import pytest
from drawn import more, offered, ranks
from hypothesis import given
from hypothesis import strategies as st
from rule_harness import T, make_op, prove

from autoshard.ir import Op, TensorType
from autoshard.placement import registry

SDPA = "aten.scaled_dot_product_attention.default"


def attention(
    batch: int, heads: int, kv_heads: int, mask: TensorType | None = None, causal: bool = False,
    queries: int = 4, keys: int = 4, dim: int = 2,
) -> Op:  # fmt: skip
    return make_op(
        SDPA,
        [
            T(batch, heads, queries, dim),
            T(batch, kv_heads, keys, dim),
            T(batch, kv_heads, keys, 3),
            mask,
            0.0,
            causal,
        ],
        {"scale": 0.3, "enable_gqa": heads != kv_heads},
    )


@more
@given(
    batch=st.sampled_from([1, 3, 4]),
    heads=st.sampled_from([1, 4, 8]),
    queries=st.sampled_from([1, 4, 5]),
    causal=st.booleans(),
    n=ranks,
)
def test_one_key_head_per_head(batch: int, heads: int, queries: int, causal: bool, n: int) -> None:
    prove(attention(batch, heads, heads, causal=causal, queries=queries, keys=queries), n)


def test_what_is_offered() -> None:
    causal = attention(4, 8, 8, causal=True)
    assert {"S(0), S(0), S(0) -> S(0)", "S(1), S(1), S(1) -> S(1)", "V, V, P -> P"} <= offered(
        causal, 4
    )
    assert "S(2), V, V -> S(2)" not in offered(causal, 4)
    assert "S(2), V, V -> S(2) [causal_rows]" in offered(causal, 4)
    uneven = attention(4, 8, 8, causal=True, queries=5, keys=5)
    assert not any("causal_rows" in strategy for strategy in offered(uneven, 4))
    assert "S(2), V, V -> S(2)" in offered(attention(4, 8, 8), 4)


MASKS = [(4, 4), (1, 1, 4, 4), (4, 1, 4, 4), (1, 8, 4, 4), (4, 8, 4, 4), (4, 1, 1, 4), (1, 4)]


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kv_heads", [8, 4, 2])
def test_masks(shape: tuple[int, ...], trained: bool, kv_heads: int) -> None:
    """A mask splits along the dims that it has; a trained one (a position bias) gets gradients."""
    op = attention(4, 8, kv_heads, T(*shape, grad=trained))
    prove(op, 4)
    splits = [s.inputs[3] for s in registry.strategies(op, 4) if s.inputs[0].dim == 1]
    per_head = len(shape) == 4 and shape[1] > 1
    assert [state.is_split for state in splits] == [per_head]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "n", "way"),
    [
        (8, 4, 4, "S(1), S(1), S(1) -> S(1)"),
        (8, 4, 2, "S(1), S(1), S(1) -> S(1)"),
        (8, 2, 4, "S(1), V, V -> S(1) [gqa_wide]"),
        (4, 1, 4, "S(1), V, V -> S(1) [gqa_wide]"),
        (12, 3, 2, "S(1), V, V -> S(1) [gqa_wide]"),  # a rank's heads share some key heads
        (12, 3, 4, "S(1), V, V -> S(1) [gqa_wide]"),
        (24, 6, 4, "S(1), V, V -> S(1) [gqa_wide]"),
        (6, 3, 4, None),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_grouped_queries(heads: int, kv_heads: int, n: int, way: str | None, causal: bool) -> None:
    op = attention(1, heads, kv_heads, causal=causal)
    splits = {s for s in offered(op, n) if s.startswith("S(1)")}
    assert splits == ({way} if way else set())
    prove(op, n)


def test_without_heads_or_batch() -> None:
    prove(make_op(SDPA, [T(4, 3, 2), T(4, 5, 2), T(4, 5, 2)]), 4)
    prove(make_op(SDPA, [T(4, 2), T(5, 2), T(5, 2)]), 2)
    prove(make_op(SDPA, [T(2, 4, 4, 4, 2), T(2, 4, 4, 5, 2), T(2, 4, 4, 5, 2)]), 4)


def test_wide_heads_on_a_further_axis() -> None:
    """Batch and queries still split once the heads are; ``cp`` has one rank in this proof."""
    args = [T(4, 8, 4, 2), T(4, 2, 4, 2), T(4, 2, 4, 3), T(4, 1, 4, 4), 0.0, False]
    op = make_alone("autoshard.grouped_attention", args, {"scale": None, "axis": "cp"})
    found = prove(op, 4)
    assert {s.inputs[0].dim for s in found if s.inputs[0].is_split} == {0, 2}


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 4), (8, 2)])
def test_rows_of_queries_on_a_further_axis(heads: int, kv_heads: int) -> None:
    """Batch and heads split once the rows are; not the heads of few keys, nor rows again."""
    args = [T(4, heads, 4, 2), T(4, kv_heads, 4, 2), T(4, kv_heads, 4, 3), None, 0.0, True]
    op = make_alone("autoshard.row_attention", args, {"scale": None, "axis": "cp"})
    dims = {s.inputs[0].dim for s in prove(op, 4) if s.inputs[0].is_split}
    assert dims == ({0} if kv_heads == 2 else {0, 1})


def make_alone(target: str, args: list[object], kwargs: dict[str, object]) -> Op:
    """`make_op` for an op that asks the mesh for an axis of one rank."""
    from autoshard.runtime.mesh import Mesh, set_current

    set_current(Mesh({"cp": 1, "tp": 1}))
    return make_op(target, args, kwargs)
