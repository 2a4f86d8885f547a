"""Sparse experts: tokens, each expert's width, and experts with tokens that travel or stay."""

from __future__ import annotations

import pytest
from drawn import offered
from rule_harness import I, T, integers, make_op, prove

from autoshard.ir import Op


def op_of(
    tokens: tuple[int, ...] = (4, 4), experts: int = 4, width: int = 8, *, gated: bool = True
) -> Op:
    up = T(experts, 2 * width if gated else width, 6)
    arguments = [T(*tokens, 6), T(*tokens, 2), I(*tokens, 2), up, T(experts, 6, width), "silu"]
    return make_op("autoshard.sparse_experts", arguments)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens", [(4,), (4, 4), (3, 4)])
def test_rule(tokens: tuple[int, ...], gated: bool, n: int) -> None:
    op = op_of(tokens, gated=gated)
    prove(op, n, make_inputs=integers(4)(op))


def test_what_is_offered() -> None:
    assert offered(op_of(), 4) == {
        "R, R, R, R, R -> R",
        "V, V, R, V, V -> V",
        "S(0), S(0), S(0), V, V -> S(0)",
        "S(1), S(1), S(1), V, V -> S(1)",
        "V, V, R, S(1;8,8), S(2) -> P",
        "V, V, R, S(0), S(0) -> P [own]",
        "S(0), S(0), S(0), S(0), S(0) -> S(0) [exchange]",
        "S(1), S(1), S(1), S(0), S(0) -> S(1) [exchange]",
    }
