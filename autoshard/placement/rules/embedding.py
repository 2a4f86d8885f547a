"""Embedding tables: split by features, by ids, or by vocabulary (Megatron's way)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from autoshard.ir import Op
from autoshard.placement.named import LETTERS, arguments, named_signature
from autoshard.placement.registry import localises, rule, strategies_for
from autoshard.placement.state import R, S, V
from autoshard.placement.strategy import Hints, Signature, Strategy, uniform

VOCAB_PARALLEL = "vocab_parallel"


@rule("aten.embedding.default")
def embedding(op: Op) -> Signature:
    """The vocabulary ``V`` is summed away; its padding is never looked up.

    With gradients scaled by frequency all ids must be seen together.
    """
    bound = arguments(op)
    ids = LETTERS[: bound["indices"].type.ndim]
    return named_signature(
        op,
        {"weight": "VE", "indices": ids},
        ids + "E",
        fixed="V" + ids if bound["scale_grad_by_freq"] else "",
        linear=[("weight",)],
        padded="V",
        implementations={"V": VOCAB_PARALLEL},
    )


@localises("aten.embedding.default")
def _vocab_parallel(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
    if strategy.implementation != VOCAB_PARALLEL:
        return local
    bound = arguments(local)
    keywords = {  # keywords, so that the operands keep their order
        "weight": bound["weight"],
        "ids": bound["indices"],
        "padding_idx": bound["padding_idx"],
        "axis": axis,
        "size": arguments(op)["weight"].type.shape[0],
    }
    target = "autoshard.vocab_parallel_embedding"
    return replace(local, target=target, args=(), kwargs=tuple(keywords.items()))


@rule("autoshard.vocab_parallel_embedding")
def vocab_parallel_embedding(op: Op) -> Signature:
    """On a further axis the vocabulary stays as it is."""
    ids = LETTERS[: arguments(op)["ids"].type.ndim]
    return named_signature(
        op, {"ids": ids, "weight": "VE"}, ids + "E", fixed="V", linear=[("weight",)]
    )


@rule("aten.one_hot.default")
def one_hot(op: Op) -> Signature | None:
    """The number of classes must be given: found from the ids it would differ between ranks."""
    if arguments(op)["num_classes"] < 0:
        return None
    ids = LETTERS[: op.operands[0].type.ndim]
    return Signature((ids,), (ids + "Z",), frozenset("Z"))


@rule("autoshard.embedding_bag")
def regular_bags(op: Op) -> Signature:
    """Bags of one size; the ids of a bag may be spread over ranks where a bag is a sum."""
    bound = arguments(op)
    return named_signature(
        op,
        {"weight": "VE", "ids": "bl"},
        "bE",
        fixed="V" if bound["mode"] == "sum" else "Vl",
        linear=[("weight",)] if bound["mode"] != "max" else [],
    )


@strategies_for("aten.embedding_bag.padding_idx", "aten.embedding_bag.default")
def bags(op: Op, n: int, hints: Hints) -> Iterator[Strategy]:
    """Bags of any size: only features split, for where a bag begins depends on values.

    The other outputs describe the bags and are whole, unless a maximum chooses per feature.
    """
    yield uniform(op, R)
    yield uniform(op, V)
    mode_max = 2
    features = op.operands[0].type.shape[1]
    if arguments(op)["mode"] != mode_max and features % n == 0 and len(op.operands) == 3:
        yield Strategy((S(1), R, R), (S(1), R, R, R))
