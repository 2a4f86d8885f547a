"""Matrix products: contracted dims give addends, a bias is added once."""

from __future__ import annotations

import pytest
import torch
from drawn import few, more, offered, ranks, shapes, size
from hypothesis import given
from hypothesis import strategies as st
from rule_harness import PROVEN, T, make_op, prove

from autoshard.ir import Op, Value, resolve
from autoshard.placement.state import S


@more
@given(batch=shapes(0, 2), i=size, o=size, bias=st.booleans(), n=ranks)
def test_linear(batch: tuple[int, ...], i: int, o: int, bias: bool, n: int) -> None:
    prove(make_op("aten.linear.default", [T(*batch, i), T(o, i), T(o) if bias else None]), n)


def test_linear_offers_megatron() -> None:
    op = make_op("aten.linear.default", [T(4, 3, 8), T(8, 8), T(8)])
    assert offered(op, 4) == {
        "R, R, R -> R",
        "V, V, V -> V",
        "S(0), V, V -> S(0)",  # batch
        "V, S(0), S(0) -> S(2)",  # columns
        "S(2), S(1), P -> P",  # rows: the bias is an addend as well
        "P, V, P -> P",
        "V, P, P -> P",
    }
    by_keyword = make_op("aten.linear.default", [T(4, 3, 8), T(8, 8)], {"bias": T(8)})
    assert offered(by_keyword, 4) == offered(op, 4)
    prove(by_keyword, 4)


def test_vocabulary_that_does_not_divide() -> None:
    op = make_op("aten.linear.default", [T(3, 8), T(7, 8)])
    assert "V, S(0) -> S(1)" in offered(op, 4)
    prove(op, 4)
    narrow = make_op("aten.linear.default", [T(3, 7), T(8, 7)])
    assert "S(1), S(1) -> P" not in offered(narrow, 4)  # padding would be multiplied


def test_linear_blocks() -> None:
    """A fused projection splits each of its blocks."""
    op = make_op("aten.linear.default", [T(3, 8), T(12, 8), T(12)])
    hints = {(op.output.name, 1): frozenset({(4, 4, 4)})}
    assert "V, S(0;4,4,4), S(0;4,4,4) -> S(1;4,4,4)" in offered(op, 2, hints)
    prove(op, 2, hints=hints)


@pytest.mark.parametrize("bias", [(8,), (1,), (), (4, 8), (4, 1), (1, 8)])
@pytest.mark.parametrize("n", [2, 4])
def test_addmm(bias: tuple[int, ...], n: int) -> None:
    op = make_op("aten.addmm.default", [T(*bias), T(4, 8), T(8, 8)], {"beta": 0.5, "alpha": 2})
    prove(op, n)
    assert "P, S(1), S(0) -> P" in offered(op, n)


@few
@given(m=size, i=size, o=size, n=ranks)
def test_addmm_sizes(m: int, i: int, o: int, n: int) -> None:
    prove(make_op("aten.addmm.default", [T(o), T(m, i), T(i, o)]), n)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("mm", [(4, 8), (8, 4)]),
        ("bmm", [(4, 3, 8), (4, 8, 4)]),
        ("mv", [(4, 8), (8,)]),
        ("dot", [(8,), (8,)]),
        ("outer", [(4,), (8,)]),
        ("ger", [(4,), (8,)]),
        ("baddbmm", [(4, 1, 8), (4, 3, 8), (4, 8, 8)]),
        ("baddbmm", [(8,), (4, 3, 8), (4, 8, 8)]),
        ("addmv", [(4,), (4, 8), (8,)]),
        ("addr", [(4, 8), (4,), (8,)]),
    ],
)
@pytest.mark.parametrize("n", [2, 4])
def test_products(name: str, args: list[tuple[int, ...]], n: int) -> None:
    op = make_op(f"aten.{name}.default", [T(*shape) for shape in args])
    assert any(s.splits_work for s in prove(op, n))


@pytest.mark.parametrize(
    "pair",
    [
        ((8,), (8,)),
        ((4, 8), (8,)),
        ((8,), (8, 4)),
        ((4, 8), (8, 4)),
        ((2, 4, 8), (8, 4)),
        ((2, 4, 8), (8,)),
        ((8,), (2, 8, 4)),
        ((4, 4, 3, 8), (4, 4, 8, 2)),
        ((4, 1, 3, 8), (8, 8, 2)),
        ((4, 3, 8), (2, 1, 8, 7)),
    ],
)
@pytest.mark.parametrize("n", [2, 4])
def test_matmul(pair: tuple[tuple[int, ...], ...], n: int) -> None:
    found = prove(make_op("aten.matmul.default", [T(*pair[0]), T(*pair[1])]), n)
    contracted = (S(len(pair[0]) - 1), S(max(0, len(pair[1]) - 2)))
    assert contracted in {s.inputs for s in found}


@pytest.mark.parametrize(
    ("equation", "args"),
    [
        ("bqhd,bkhd->bhqk", [(4, 3, 8, 2), (4, 5, 8, 2)]),
        ("bhqk,bkhd->bqhd", [(4, 8, 3, 5), (4, 5, 8, 2)]),
        ("ij,jk", [(4, 8), (8, 4)]),
        ("ij,ij->", [(4, 8), (4, 8)]),
        ("...ij,...jk->...ik", [(4, 2, 4, 8), (2, 8, 4)]),
        ("i...,j...->ij...", [(4, 8), (8, 8)]),
        ("ii->i", [(4, 4)]),
        ("a b, b, c -> c a", [(4, 8), (8,), (4,)]),
        ("ab,ab->ab", [(4, 8), (4, 1)]),
    ],
)
@pytest.mark.parametrize("n", [2, 4])
def test_einsum(equation: str, args: list[tuple[int, ...]], n: int) -> None:
    prove(make_op("aten.einsum.default", [equation, [T(*shape) for shape in args]]), n)


def test_einsum_offers_what_the_equation_says() -> None:
    op = make_op("aten.einsum.default", ["...ij,...jk->...ik", [T(4, 4, 8), T(4, 8, 4)]])
    assert {"S(0), S(0) -> S(0)", "S(2), S(1) -> P", "V, S(2) -> S(2)"} <= offered(op, 4)


HALVES = (slice(0, 8), slice(8, 16))
OFFSETS = torch.tensor([3, 3, 8], dtype=torch.int32)


@pytest.mark.parametrize("n", [2, 4])
def test_grouped_product(n: int) -> None:
    """Weights of experts split as those of any projection."""
    pytest.importorskip("transformers.integrations.moe")
    args = [T(8, 8), T(3, 8, 4), T(3, dtype=torch.int32)]
    op = make_op("transformers.grouped_mm_fallback.default", args)
    prove(op, n, make_inputs=lambda rng: [None, None, OFFSETS])
    assert {"S(1), S(1), R -> P", "V, S(2), R -> S(1)"} <= offered(op, n)


def test_grouped_product_in_single() -> None:
    """The kernel knows no double precision, in which the harness proves, and wants aligned rows."""
    single = torch.float32
    kinds = [T(8, 16, dtype=single), T(3, 16, 24, dtype=single), T(3, dtype=torch.int32)]
    values = [Value(f"grouped{i}", kind) for i, kind in enumerate(kinds)]
    out = Value("grouped", T(8, 24, dtype=single))
    op = Op("grouped", "aten._grouped_mm.default", tuple(values), (), (out,))
    rows, columns = "S(1), S(1), R -> P", "V, S(2), R -> S(1)"
    assert {rows, columns} <= offered(op, 2)
    assert rows in offered(op, 4) and columns not in offered(op, 4)  # 6 numbers are no 16 bytes

    rng = torch.Generator().manual_seed(0)
    x, w = (torch.randn(kind.shape, generator=rng) for kind in kinds[:2])
    product = resolve(op.target)
    whole = product(x, w, OFFSETS)
    addends = [product(x[:, p].contiguous(), w[:, p].contiguous(), OFFSETS) for p in HALVES]
    torch.testing.assert_close(sum(addends), whole)
    parts = [product(x, w[:, :, p].contiguous(), OFFSETS) for p in (slice(0, 12), slice(12, 24))]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    PROVEN.add(op.target)
