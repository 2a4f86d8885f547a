"""Ops of mixture-of-experts layers: rows of tokens sorted by expert belong together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from autoshard.ir import Op
from autoshard.placement.named import named_signature, operand_names, where
from autoshard.placement.registry import localises, rule, strategies_for
from autoshard.placement.state import P, R, S, State, V
from autoshard.placement.strategy import Hints, Signature, Strategy, on_local_tensors
from autoshard.runtime.experts import EXCHANGE, EXPERTS, FOLDED, FOLDED_EXPERTS, GATHERED, OWN

_ALIGNMENT_BYTES = 16
"""What the grouped kernel asks of every row of its operands."""


@rule("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")
def grouped_product(op: Op) -> Signature | None:
    """``[tokens, in] @ [experts, in, out]``: offsets count all tokens of all experts.

    So tokens and experts stay whole, while each expert's weights split as those of ``linear``.
    """
    first, second, *_ = operand_names(op)
    if (op.operands[0].type.ndim, op.operands[1].type.ndim) != (2, 3):
        return None
    tensors = {first: "TI", second: "EIO", "bias": "EO"}
    groups = [[first, "bias"], [second, "bias"]]
    return named_signature(op, tensors, "TO", fixed="TE", linear=groups, addends=["bias"])


@strategies_for("aten._grouped_mm.default")
def aligned_grouped_product(op: Op, n: int, hints: Hints) -> Iterator[Strategy]:
    """Parts whose rows the kernel would refuse are left out."""

    def aligned(strategy: Strategy) -> bool:
        local = on_local_tensors(op, strategy, n)
        rows = [v.type for v in (*local.operands[:2], *local.outputs)]
        return all(t.shape[-1] * t.dtype.itemsize % _ALIGNMENT_BYTES == 0 for t in rows)

    sig = grouped_product(op)
    unsplit = Signature(("",) * len(op.operands), ("",))
    return where(sig or unsplit, op, n, hints, lambda s: not s.splits_work or aligned(s))


@strategies_for("autoshard.sparse_experts")
def experts(op: Op, n: int, hints: Hints) -> Iterator[Strategy]:
    """Tokens split plainly; each expert's width as in a tensor-parallel feed-forward layer; experts
    with all tokens on every rank (addends), or with the tokens split, which then travel."""
    x, up, down = (op.operands[i].type for i in (0, 3, 4))

    def strategy(tokens: State, up: State, down: State, out: State, way: str = "") -> Strategy:
        choices = R if tokens == V else tokens
        return Strategy((tokens, tokens, choices, up, down), (out,), way)

    yield strategy(R, R, R, R)
    if x.differentiable:
        yield strategy(V, V, V, V)
    dims = [d for d in range(x.ndim - 1) if x.shape[d] % n == 0]
    yield from (strategy(S(d), V, V, S(d)) for d in dims)
    width, spread = down.shape[2], op.keywords.get("axis") == EXPERTS
    if width % n == 0:
        blocks = (width, width) if up.shape[1] == 2 * width else ()
        yield strategy(V, S(1, blocks), S(2), P)
        if spread:
            yield from (strategy(S(d), S(1, blocks), S(2), S(d), GATHERED) for d in dims)
    if up.shape[0] % n == 0 and spread:
        yield from (strategy(S(d), S(0), S(0), S(d), FOLDED) for d in dims)
    elif up.shape[0] % n == 0 and "axis" not in op.keywords:
        yield strategy(V, S(0), S(0), P, OWN)
        yield from (strategy(S(d), S(0), S(0), S(d), EXCHANGE) for d in dims)


@localises("autoshard.sparse_experts")
def _localise_experts(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
    if not strategy.implementation:
        return local
    if strategy.implementation == GATHERED:
        return replace(local, kwargs=(*local.kwargs, ("gathered", axis), ("gathered_ranks", n)))
    if strategy.implementation == FOLDED:
        kept = tuple((k, v) for k, v in local.kwargs if k != "axis")
        return replace(local, kwargs=(*kept, ("axis", FOLDED_EXPERTS)))
    added = (
        ("way", strategy.implementation), ("num_experts", op.operands[3].type.shape[0]),
        ("axis", axis),
    )  # fmt: skip
    return replace(local, kwargs=(*local.kwargs, *added))
