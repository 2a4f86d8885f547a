"""Rewrites that make the graph what one would have written by hand; the values stay the same."""

from __future__ import annotations

import math

from autoshard import ir
from autoshard.capture.lower import Lowered
from autoshard.capture.rewrite import Replacement, Rewriter

_RESHAPE = "aten.reshape.default"


def simplified(lowered: Lowered) -> Lowered:
    """Merge reshapes, unflatten matrix products and bags, drop idle detaches."""
    return Rewriter(lowered).run(_rule)


def _rule(rewriter: Rewriter, op: ir.Op) -> Replacement | None:
    if op.target == _RESHAPE:
        return _product(rewriter, op) or _reshape(rewriter, op)
    if op.target == "aten.embedding_bag.padding_idx":
        return _bags(rewriter, op)
    if op.target == "aten.detach.default" and not op.operands[0].type.differentiable:
        return Replacement((), op.operands[0])
    return None


def _reshape(rewriter: Rewriter, op: ir.Op) -> Replacement | None:
    source = rewriter.producer(op.args[0], _RESHAPE)
    if source is None:
        return None
    (origin,) = source.operands
    if origin.type.shape == op.output.type.shape:
        return Replacement((), origin)
    new = rewriter.op_like(
        op, _RESHAPE, (origin, op.args[1]), op.output.type.shape, op.output.type.dtype
    )
    return Replacement((new,), new.output)


def _product(rewriter: Rewriter, op: ir.Op) -> Replacement | None:
    """A matrix product between two reshapes, as ``linear`` on the tensor as it was before.

    ``addmm(bias, x.reshape(-1, i), w).reshape(..., o)`` is ``linear(x, w.T, bias)``, and
    ``linear(x.reshape(-1, i), w).reshape(..., o)`` is ``linear(x, w)``: only on the unflattened
    tensor are samples and sequence dims of their own, which can be split.
    """
    found = _flat_product(rewriter, op.args[0])
    if found is None:
        return None
    flat, weight, transposed, bias = found
    lead, width = op.output.type.shape[:-1], op.output.type.shape[-1]
    outer, inner = reversed(weight.type.shape) if transposed else weight.type.shape
    flattened = rewriter.producer(flat, _RESHAPE)
    if (
        flattened is None
        or width != outer
        or (bias is not None and bias.type.shape != (outer,))
        or math.prod(lead) != math.prod(flat.type.shape[:-1])
    ):
        return None
    ops: list[ir.Op] = []
    (x,) = flattened.operands
    if x.type.shape != (*lead, inner):
        shape = (*lead, inner)
        ops.append(rewriter.op_like(op, _RESHAPE, (x, shape), shape, x.type.dtype))
        x = ops[-1].output
    if transposed:
        dtype = weight.type.dtype
        turn = rewriter.op_like(op, "aten.transpose.int", (weight, 0, 1), (outer, inner), dtype)
        ops.append(turn)
        weight = turn.output
    arguments = (x, weight) if bias is None else (x, weight, bias)
    linear = rewriter.op_like(
        op, "aten.linear.default", arguments, op.output.type.shape, op.output.type.dtype
    )
    return Replacement((*ops, linear), linear.output)


def _flat_product(
    rewriter: Rewriter, value: ir.Arg
) -> tuple[ir.Value, ir.Value, bool, ir.Value | None] | None:
    """Input, weight, whether the weight is stored input first, and bias of a matrix product."""
    if (addmm := rewriter.producer(value, "aten.addmm.default")) and not addmm.kwargs:
        bias, flat, weight = addmm.operands
        return flat, weight, True, bias
    if linear := rewriter.producer(value, "aten.linear.default"):
        flat, weight, *rest = linear.operands
        return flat, weight, False, rest[0] if rest else None
    return None


_BAG_MODES = ("sum", "mean", "max")


def _bags(rewriter: Rewriter, op: ir.Op) -> Replacement | None:
    """Bags of one size, which ``nn.EmbeddingBag`` flattens: only unflattened can they be split."""
    weight, flat, offsets, scaled, mode, sparse, weights, last, padding = op.args
    starts = rewriter.producer(offsets, "aten.arange.start_step")
    if starts is None or scaled or sparse or weights is not None or last:
        return None
    if any(rewriter.is_used(v) for v in op.outputs[1:]):
        return None
    assert isinstance(flat, ir.Value) and isinstance(mode, int)
    start, end, *step = starts.args
    shape = (op.outputs[0].type.shape[0], step[0] if step else 1)
    if start != 0 or end != flat.type.shape[0] or math.prod(shape) != end:
        return None
    ids = rewriter.op_like(op, _RESHAPE, (flat, shape), shape, flat.type.dtype)
    bags, result = _reshape(rewriter, ids) or Replacement((ids,), ids.output), op.outputs[0].type
    new = rewriter.op_like(
        op, "autoshard.embedding_bag", (weight, bags.value, _BAG_MODES[mode], padding),
        result.shape, result.dtype,
    )  # fmt: skip
    return Replacement((*bags.ops, new), new.output)
