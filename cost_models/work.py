"""What an op does, counted from its types: products, bytes moved and kernels, both ways.

Nothing here knows a device. Matrix products are counted exactly; everything else streams its
operands and results once per kernel. Ops that nobody listed count as one such kernel each way.
"""

from __future__ import annotations

import functools

from autoshard.cost_models.products import (
    NOTHING,
    PRODUCTS,
    Counter,
    Operands,
    Way,
    Work,
    attention,
    dtype_of,
    total_bytes,
)
from autoshard.ir import Graph, Op, Value
from autoshard.placement.conversion import Conversion, conversion
from autoshard.placement.state import P, R, S, V

_VIEWS = (
    "view", "_unsafe_view", "reshape", "view_as", "reshape_as", "transpose", "permute", "t",
    "numpy_T", "mT", "movedim", "unsqueeze", "squeeze", "flatten", "unflatten", "detach", "alias",
    "lift_fresh_copy", "as_strided", "getitem", "ravel", "swapaxes", "view_as_real",
    "view_as_complex", "real", "imag",
)  # fmt: skip
_PART_VIEWS = ("slice", "select", "narrow", "diagonal", "unfold")
_SPLITS = ("split", "split_with_sizes", "chunk", "unbind", "tensor_split")
_PASS_GRADIENT = ("add", "add_", "clone", "contiguous")
_LINEAR = (
    "sub", "rsub", "neg", "cat", "stack", "pad", "constant_pad_nd", "to", "_to_copy", "type_as",
    "sum", "repeat", "repeat_interleave", "roll", "flip", "tril", "triu", "upsample_nearest2d",
    "upsample_bilinear2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "pixel_shuffle", "lerp",
)  # fmt: skip
_GATHERS = ("embedding", "index", "index_select", "gather", "take", "take_along_dim",
    "embedding_bag",
)  # fmt: skip
_PASSES = {"sort": 8, "argsort": 8, "topk": 4, "multinomial": 4, "cumsum": 2, "histc": 2}


def work_of(op: Op) -> Work:
    """The work of one op on the types that it has (local ones on a localised op)."""
    return _counter(op.target)(op, op.operands)


@functools.cache
def _counter(target: str) -> Counter:
    namespace, name = target.split(".")[:2]
    if namespace == "autoshard" and name in CONVERSIONS:
        return _conversion
    if name.startswith("_scaled_dot_product"):
        return attention
    return _COUNTERS.get(name, _streaming)


def _view(op: Op, operands: Operands) -> Work:
    return Work(NOTHING, NOTHING, op.output.type.dtype)


def _wanted(op: Op, operands: Operands) -> list[Value]:
    """Operands that backward computes a gradient of."""
    if not any(v.type.differentiable for v in op.outputs):
        return []
    return [v for v in operands if v.type.differentiable]


def _part_view(op: Op, operands: Operands) -> Work:
    """Free forward; backward writes zeros of the whole and copies the part's gradient in."""
    moved = sum(v.type.nbytes for v in _wanted(op, operands))
    y = total_bytes(op.outputs)
    backward = Way((), 0.0, moved + 2.0 * y, 2) if moved else NOTHING
    return Work(NOTHING, backward, dtype_of(op, operands))


def _split(op: Op, operands: Operands) -> Work:
    """Free forward; backward joins the parts' gradients."""
    moved = sum(v.type.nbytes for v in _wanted(op, operands))
    return Work(NOTHING, Way((), 0.0, 2.0 * moved, 1) if moved else NOTHING, dtype_of(op, operands))


def _expand(op: Op, operands: Operands) -> Work:
    """Free forward; backward sums over the expanded dims, if there are any."""
    moved = sum(v.type.nbytes for v in _wanted(op, operands))
    y = total_bytes(op.outputs)
    grew = moved and y > moved
    return Work(NOTHING, Way((), 0.0, moved + y, 1) if grew else NOTHING, dtype_of(op, operands))


def _pass_gradient(op: Op, operands: Operands) -> Work:
    """Sums and copies: the gradient is handed on; only a broadcast operand's must be summed."""
    y = total_bytes(op.outputs)
    moved, kernels = 0.0, 0
    for v in _wanted(op, operands):
        if v.type.numel < op.outputs[0].type.numel:
            moved += y + v.type.nbytes
            kernels += 1
    forward = Way((), 0.0, total_bytes(operands) + y, 1)
    return Work(forward, Way((), 0.0, moved, kernels), dtype_of(op, operands))


def _linear_stream(op: Op, operands: Operands) -> Work:
    y = total_bytes(op.outputs)
    wanted = _wanted(op, operands)
    moved = sum(v.type.nbytes for v in wanted)
    forward = Way((), 0.0, total_bytes(operands) + y, 1)
    backward = Way((), 0.0, moved + y, 1) if wanted else NOTHING
    return Work(forward, backward, dtype_of(op, operands))


def _gather(op: Op, operands: Operands) -> Work:
    """Reads what it returns; backward fills the whole source's gradient and scatters into it."""
    y = total_bytes(op.outputs)
    indices = sum(v.type.nbytes for v in operands if not v.type.dtype.is_floating_point)
    moved = sum(v.type.nbytes for v in _wanted(op, operands))
    backward = Way((), 0.0, moved + 3.0 * y + indices, 2) if moved else NOTHING
    return Work(Way((), 0.0, 2.0 * y + indices, 1), backward, dtype_of(op, operands))


def _streaming(op: Op, operands: Operands) -> Work:
    """One kernel over operands and results; backward: one per differentiable operand.

    Each reads the output's gradient and the largest saved operand and writes its own gradient.
    """
    name = op.target.split(".")[1]
    y = total_bytes(op.outputs)
    sizes = [v.type.nbytes for v in operands]
    wanted = _wanted(op, operands)
    largest = max(sizes, default=0)
    moved = sum(y + largest + v.type.nbytes for v in wanted)
    passes = _PASSES.get(name, 1)
    return Work(
        Way((), 0.0, passes * (sum(sizes) + y), passes), Way((), 0.0, moved, len(wanted)),
        dtype_of(op, operands),
    )  # fmt: skip


def _mean(op: Op, operands: Operands) -> Work:
    """Backward scales the small gradient; expanding it is a view."""
    y = total_bytes(op.outputs)
    forward = Way((), 0.0, total_bytes(operands) + y, 1)
    backward = Way((), 0.0, 2.0 * y, 1) if _wanted(op, operands) else NOTHING
    return Work(forward, backward, dtype_of(op, operands))


def _norm(op: Op, operands: Operands) -> Work:
    """Layer, group and batch norm: batch statistics take a second pass; weights a second kernel."""
    x, y = operands[0].type.nbytes, op.outputs[0].type.nbytes
    passes = 2 if "batch_norm" in op.target else 1
    wanted = _wanted(op, operands)
    moved = (2.0 * x + y) * passes + (x + y if len(wanted) > 1 else 0)
    backward = Way((), 0.0, moved, min(2, len(wanted))) if wanted else NOTHING
    return Work(Way((), 0.0, passes * x + y, passes), backward, dtype_of(op, operands))


def _cross_entropy(op: Op, operands: Operands) -> Work:
    """Log-softmax and a gather; backward fills a sparse gradient, then goes through the softmax."""
    logits = operands[0].type.nbytes
    backward = Way((), 0.0, 4.0 * logits, 3) if _wanted(op, operands) else NOTHING
    return Work(Way((), 0.0, 2.0 * logits, 2), backward, dtype_of(op, operands))


def _vocab_parallel_cross_entropy(op: Op, operands: Operands) -> Work:
    """Maximum, exponential, sum, each a pass over the local logits; backward scales the softmax."""
    logits = operands[0].type.nbytes
    backward = Way((), 0.0, 3.0 * logits, 2) if _wanted(op, operands) else NOTHING
    return Work(Way((), 0.0, 6.0 * logits, 5), backward, dtype_of(op, operands))


def _dropout(op: Op, operands: Operands) -> Work:
    """A mask of one byte per element is written and read again."""
    x, numel = operands[0].type.nbytes, operands[0].type.numel
    p, train = op.args[1] if len(op.args) > 1 else 0.5, op.args[2] if len(op.args) > 2 else True
    if not p or train is False:
        return Work(NOTHING, NOTHING, op.output.type.dtype)
    way = Way((), 0.0, 2.0 * x + numel, 1)
    return Work(way, way if _wanted(op, operands) else NOTHING, dtype_of(op, operands))


_STATES = (R, V, P, S(0), S(1))
CONVERSIONS: dict[str, Conversion] = {
    step.function: step
    for source in _STATES
    for target in _STATES
    if (step := conversion(source, target)) is not None
}
"""The runtime's conversions by function name."""


def _conversion(op: Op, operands: Operands) -> Work:
    """What a conversion does on the rank itself; the collective costs are not in here."""
    source, target = operands[0].type.nbytes, op.outputs[0].type.nbytes
    known = CONVERSIONS[op.target.split(".")[1]]
    wanted = operands[0].type.differentiable
    return Work(
        motion_way(known.forward, source, target),
        motion_way(known.backward, target, source) if wanted else NOTHING, dtype_of(op, operands),
    )  # fmt: skip


def motion_way(motion: str, source_bytes: float, target_bytes: float) -> Way:
    """The local motions of :mod:`autoshard.placement.conversion`; collectives count as nothing."""
    if motion == "slice":
        return Way((), 0.0, 2.0 * target_bytes, 1)
    if motion == "pad":
        return Way((), 0.0, source_bytes + 2.0 * target_bytes, 2)
    if motion == "scale":
        return Way((), 0.0, source_bytes + target_bytes, 1)
    return NOTHING


_COUNTERS: dict[str, Counter] = {
    **PRODUCTS,
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(_PART_VIEWS, _part_view),
    **dict.fromkeys(_SPLITS, _split),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(_PASS_GRADIENT, _pass_gradient),
    **dict.fromkeys(_LINEAR, _linear_stream),
    **dict.fromkeys(_GATHERS, _gather),
    **dict.fromkeys(("mean", "partial_mean"), _mean),
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm", "batch_norm"), _norm),
    **dict.fromkeys(("native_layer_norm", "native_batch_norm", "instance_norm"), _norm),
    "dropout": _dropout,
    "cross_entropy_loss": _cross_entropy,
    "vocab_parallel_cross_entropy": _vocab_parallel_cross_entropy,
    "vocab_parallel_embedding": _gather,
}


def is_product(op: Op) -> bool:
    """Its cost is in matrix products, attention or recurrent cells."""
    return _counter(op.target) in PRODUCTS.values()


def launches(graph: Graph) -> tuple[int, int]:
    """Kernels of forward and of backward."""
    works = [work_of(op) for op in graph.ops]
    return sum(w.forward.kernels for w in works), sum(w.backward.kernels for w in works)


_ALONE = ("cross_entropy_loss", "vocab_parallel_cross_entropy", "batch_norm", "native_batch_norm")
"""Kernels of several passes, which nothing is fused with."""
_REDUCES_OR_MAPS = (_streaming, _linear_stream, _pass_gradient, _norm, _dropout, _mean)


def is_elementwise(op: Op) -> bool:
    """It streams through its operands once, so neighbours of its kind can share its kernel."""
    name = op.target.split(".")[1]
    if name in _ALONE or name in _PASSES or op.target.startswith("autoshard."):
        return False
    return _counter(op.target) in _REDUCES_OR_MAPS
