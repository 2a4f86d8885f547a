"""Scaled dot-product attention: batch and heads split plainly, queries where nothing is causal.

With fewer key/value heads than query heads (grouped-query attention, Ainslie et al. 2023) both
split together if the ranks divide the key/value heads. If not, only the query heads split, every
rank holds all keys and values, and picks the heads that its queries read (``gqa_wide``).

Causal queries may split, too, where every rank holds all keys and values and knows where its own
queries begin (``causal_rows``): context parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from autoshard.ir import Op
from autoshard.placement.named import (
    LETTERS,
    arguments,
    broadcast_letters,
    named_signature,
    operand_names,
)
from autoshard.placement.registry import localises, rule, strategies_for
from autoshard.placement.state import R, S, V
from autoshard.placement.strategy import Hints, Signature, Strategy, strategies_of

WIDE = "gqa_wide"
ROWS = "causal_rows"
_SDPA = "aten.scaled_dot_product_attention.default"
_OF_ROWS = "autoshard.row_attention"


@rule(_SDPA, _OF_ROWS, "autoshard.grouped_attention")
def attention(op: Op) -> Signature:
    """Batch, heads ``H`` (keys' ``K``), queries ``Q``, keys ``T``, dims of a head ``D``, ``E``."""
    bound = arguments(op)
    q, k = bound["query"].type.shape, bound["key"].type.shape
    batch = LETTERS[: max(0, len(q) - 3)]
    heads = "H" if len(q) > 2 else ""
    kv_heads = "K" if heads and q[-3] != k[-3] else heads
    fixed = set("TDE")
    if kv_heads == "K":
        fixed |= {"H", "K"}
    if bound["is_causal"]:
        fixed.add("Q")
    tensors = {
        "query": batch + heads + "QD",
        "key": batch + kv_heads + "TD",
        "value": batch + kv_heads + "TE",
    }
    if (mask := bound["attn_mask"]) is not None:
        scores = (*q[:-1], k[-2])
        (by_place,), out, ones = broadcast_letters([mask.type.shape], scores)
        names = dict(zip(out, batch + heads + "QT", strict=True))
        tensors["attn_mask"] = "".join(names.get(c, c) for c in by_place)
        fixed |= ones
    return named_signature(
        op, tensors, batch + heads + "QE", fixed=fixed, linear=[("value",)]
    )  # fmt: skip


@strategies_for(_SDPA, _OF_ROWS)
def attention_strategies(op: Op, n: int, hints: Hints) -> Iterator[Strategy]:
    sig = attention(op)
    yield from strategies_of(sig, op, n, hints)
    bound = arguments(op)
    query, key = bound["query"].type, bound["key"].type
    causal = bound["is_causal"] and bound["attn_mask"] is None
    if causal and op.target == _SDPA and query.shape[-2] % n == 0:
        yield _of_rows(op)
    if query.ndim < 3 or query.shape[-3] == key.shape[-3] or query.shape[-3] % n:
        return
    together = key.shape[-3] % n == 0
    if not together and op.target == _OF_ROWS:
        return
    inputs = []
    for name, value, letters in zip(operand_names(op), op.operands, sig.inputs, strict=True):
        splits = "H" in letters or (together and name in {"key", "value"})
        dim = S(value.type.ndim - 3)
        inputs.append(dim if splits else V if value.type.differentiable else R)
    output = S(op.output.type.ndim - 3)
    yield Strategy(tuple(inputs), (output,), "" if together else WIDE)


def _of_rows(op: Op) -> Strategy:
    whole = (V if value.type.differentiable else R for value in op.operands[1:])
    rows = S(op.output.type.ndim - 2)
    return Strategy((rows, *whole), (rows,), ROWS)


@localises(_SDPA)
def _localise(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
    if strategy.implementation not in (WIDE, ROWS):
        return local
    bound = arguments(local)
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    return replace(
        local,
        target=_OF_ROWS if strategy.implementation == ROWS else "autoshard.grouped_attention",
        args=tuple(bound[name] for name in names),
        kwargs=(("scale", bound["scale"]), ("axis", axis)),
    )
