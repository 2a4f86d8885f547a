"""Mean losses as sums over a count, so that they add up over ranks and micro-batches.

A mean of local means is not the mean where ranks hold different numbers of targets. A sum divided
by the *global* count is: every rank's quotient is an addend of the true loss. The count of a cross
entropy depends on the targets (``ignore_index``) and is an op of its own; other losses divide by a
number of elements, which is a literal.
"""

from __future__ import annotations

from typing import Any

import torch

from autoshard import ir
from autoshard.capture.lower import Lowered
from autoshard.capture.rewrite import Replacement, Rewriter

_MEAN, _SUM = 1, 2
_COUNTED = ("aten.cross_entropy_loss.default", "aten.nll_loss_nd.default", "aten.nll_loss.default",
            "aten.nll_loss2d.default")  # fmt: skip
_AVERAGED = (
    "aten.mse_loss.default", "aten.l1_loss.default", "aten.smooth_l1_loss.default",
    "aten.huber_loss.default", "aten.binary_cross_entropy.default",
    "aten.binary_cross_entropy_with_logits.default", "aten.kl_div.default",
    "aten.soft_margin_loss.default", "aten.margin_ranking_loss.default",
    "aten.hinge_embedding_loss.default", "aten.cosine_embedding_loss.default",
    "aten.triplet_margin_loss.default", "aten.poisson_nll_loss.default",
)  # fmt: skip


def summed(lowered: Lowered) -> Lowered:
    """Every loss with mean reduction rewritten as sum / count."""
    return Rewriter(lowered).run(_rule)


def _rule(rewriter: Rewriter, op: ir.Op) -> Replacement | None:
    if op.target not in _COUNTED and op.target not in _AVERAGED:
        return None
    bound = _bound(op)
    if bound.get("reduction", _MEAN) != _MEAN:
        return None
    kind, dtype = op.output.type, op.output.type.dtype
    args, kwargs = _call(op, {**bound, "reduction": _SUM})
    total = rewriter.op_like(op, op.target, args, (), dtype, tuple(kwargs.items()))
    ops = [total]
    divisor: Any
    if op.target in _COUNTED and not bound["target"].type.dtype.is_floating_point:
        weight = bound["weight"]
        targets = (bound["target"], weight, bound["ignore_index"])
        counted = torch.float32 if weight is None else weight.type.dtype
        count = rewriter.op_like(op, "autoshard.count_targets", targets, (), counted)
        ops.append(count)
        divisor = count.output
    elif op.target in _COUNTED:
        scores = bound["self"].type.shape
        divisor = float(bound["self"].type.numel // (scores[1] if len(scores) > 1 else scores[0]))
    else:
        divisor = float(_elements(op, bound))
    wide = dtype
    if isinstance(divisor, ir.Value):
        wide = torch.promote_types(dtype, divisor.type.dtype)
    ops.append(rewriter.op_like(op, "aten.div.Tensor", (total.output, divisor), kind.shape, wide))
    if wide != dtype:
        quotient = ops[-1].output
        ops.append(rewriter.op_like(op, "aten.to.dtype", (quotient, dtype), kind.shape, dtype))
    return Replacement(tuple(ops), ops[-1].output)


def _bound(op: ir.Op) -> dict[str, Any]:
    """All arguments by name, defaults filled in, in the order of the op's schema."""
    schema = ir.resolve(op.target)._schema  # type: ignore[attr-defined]
    given = {a.name: value for a, value in zip(schema.arguments, op.args, strict=False)}
    given.update(op.kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in schema.arguments}


def _call(op: ir.Op, bound: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call with the arguments ``bound``."""
    schema = ir.resolve(op.target)._schema  # type: ignore[attr-defined]
    named = {a.name for a in schema.arguments if a.kwarg_only}
    args = tuple(v for k, v in bound.items() if k not in named)
    return args, {k: v for k, v in bound.items() if k in named}


def _elements(op: ir.Op, bound: dict[str, Any]) -> int:
    """How many numbers the loss has before its reduction."""

    def meta(arg: Any) -> Any:
        if isinstance(arg, ir.Value):
            return torch.empty(arg.type.shape, dtype=arg.type.dtype, device="meta")
        return arg

    args, kwargs = _call(op, {**{k: meta(v) for k, v in bound.items()}, "reduction": 0})
    result: torch.Tensor = ir.resolve(op.target)(*args, **kwargs)
    return result.numel()
