"""Losses: split samples give addends of the sum, split classes Megatron's vocabulary parallelism.

A mean of local means is not the mean where ranks hold different numbers of targets. Capture writes
every mean as a sum over a global count, so here a mean is left whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from autoshard.ir import Op
from autoshard.placement.named import (
    LETTERS,
    arguments,
    broadcast_letters,
    named_signature,
    operand_names,
)
from autoshard.placement.registry import localises, rule, strategies_for
from autoshard.placement.state import R, S
from autoshard.placement.strategy import (
    Hints,
    Signature,
    Strategy,
    leaves_a_rank_empty,
    strategies_of,
)

VOCAB_PARALLEL = "vocab_parallel"
NONE, MEAN, SUM = range(3)
"""ATen's numbers for ``reduction``."""

_OF_CLASSES = (
    "aten.cross_entropy_loss.default", "aten.nll_loss.default", "aten.nll_loss_nd.default",
    "aten.nll_loss2d.default",
)  # fmt: skip


@rule(*_OF_CLASSES)
def class_loss(op: Op) -> Signature:
    """``[C]``, ``[N, C]`` or ``[N, C, ...]`` against classes, or probabilities of classes."""
    bound = arguments(op)
    shape, targets = bound["self"].type.shape, bound["target"].type
    letters = "C" if len(shape) == 1 else LETTERS[0] + "C" + LETTERS[1 : len(shape) - 1]
    samples = letters.replace("C", "")
    of_probabilities = targets.dtype.is_floating_point
    return named_signature(
        op,
        {"self": letters, "target": letters if of_probabilities else samples, "weight": "C"},
        samples if bound["reduction"] == NONE else "",
        fixed="C" + samples if bound["reduction"] == MEAN else "C",
    )


@strategies_for("aten.cross_entropy_loss.default")
def cross_entropy_strategies(op: Op, n: int, hints: Hints) -> Iterator[Strategy]:
    """Adds the split of the classes, which need not divide; the loss comes out whole."""
    yield from strategies_of(class_loss(op), op, n, hints)
    bound = arguments(op)
    logits, target = bound["self"].type, bound["target"].type
    by_class = logits.ndim >= 2 and not target.dtype.is_floating_point
    by_class &= bound["weight"] is None or not bound["weight"].type.differentiable
    if by_class and bound["reduction"] == SUM and not leaves_a_rank_empty(logits.shape[1], n):
        inputs = tuple(S(1) if name == "self" else R for name in operand_names(op))
        yield Strategy(inputs, (R,), VOCAB_PARALLEL)


@localises("aten.cross_entropy_loss.default")
def _vocab_parallel(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
    if strategy.implementation != VOCAB_PARALLEL:
        return local
    bound = arguments(local)
    names = ("self", "target", "weight", "ignore_index", "label_smoothing")
    return replace(
        local,
        target="autoshard.vocab_parallel_cross_entropy",
        args=tuple(bound[name] for name in names),
        kwargs=(("axis", axis), ("size", op.operands[0].type.shape[1])),
    )


@rule("autoshard.vocab_parallel_cross_entropy")
def vocab_parallel_cross_entropy(op: Op) -> Signature:
    """On a further axis only the samples split."""
    samples = LETTERS[: arguments(op)["target"].type.ndim]
    logits = samples[0] + "C" + samples[1:]
    return named_signature(op, {"logits": logits, "target": samples}, "", fixed="C")


@rule("autoshard.count_targets")
def count_targets(op: Op) -> Signature:
    samples = LETTERS[: op.operands[0].type.ndim]
    return named_signature(op, {"target": samples}, "")


_OF_ELEMENTS = (
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy",
    "binary_cross_entropy_with_logits", "kl_div", "soft_margin_loss", "poisson_nll_loss",
    "hinge_embedding_loss", "margin_ranking_loss",
)  # fmt: skip


@rule(*(f"aten.{name}.default" for name in _OF_ELEMENTS))
def elementwise_loss(op: Op) -> Signature:
    shapes = [v.type.shape for v in op.operands]
    whole = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    inputs, letters, fixed = broadcast_letters(shapes, whole)
    reduction = arguments(op)["reduction"]
    if reduction == MEAN:
        fixed |= frozenset(letters)
    return Signature(inputs, (letters if reduction == NONE else "",), fixed)


@rule("aten.cosine_embedding_loss.default", "aten.triplet_margin_loss.default")
def distance_loss(op: Op) -> Signature | None:
    """Distances of vectors along the last dim, one per sample."""
    vectors = [v for v in op.operands if v.type.ndim == 2]
    if len(vectors) < 2 or len({v.type.shape for v in vectors}) > 1:
        return None
    inputs = tuple("nD"[: v.type.ndim] for v in op.operands)
    reduction = arguments(op)["reduction"]
    fixed = "nD" if reduction == MEAN else "D"
    return Signature(inputs, ("n" if reduction == NONE else "",), frozenset(fixed))
