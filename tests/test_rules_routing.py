"""Sparse experts: tokens, each expert's width, and experts with tokens that travel or stay."""

from __future__ import annotations

from dataclasses import replace

import pytest
from drawn import offered
from rule_harness import I, T, integers, make_op, prove

from autoshard.ir import Op
from autoshard.placement import registry
from autoshard.runtime.experts import EXCHANGE, EXPERTS, FOLDED_EXPERTS


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


def test_spread_experts_are_split_once_more() -> None:
    """Over ranks that have parts of the tokens: each expert's width, or the experts themselves."""
    whole = op_of()
    spread = replace(whole, kwargs=(*whole.kwargs, ("way", EXCHANGE), ("axis", EXPERTS)))
    assert offered(spread, 4) - offered(whole, 4) == {
        f"S({d}), S({d}), S({d}), {up}, {down} -> S({d}) [{way}]"
        for d in (0, 1)
        for up, down, way in (("S(1;8,8)", "S(2)", "gathered"), ("S(0)", "S(0)", "folded"))
    }
    ways = {s.implementation: s for s in registry.strategies(spread, 4) if s.splits_work}
    gathered = registry.localise(spread, ways["gathered"], "tp", 4).keywords
    assert (gathered["axis"], gathered["gathered"], gathered["gathered_ranks"]) == ("ep", "tp", 4)
    folded = registry.localise(spread, ways["folded"], "tp", 4)
    assert folded.keywords["axis"] == FOLDED_EXPERTS
    assert folded.operands[3].type.shape[0] == 1
