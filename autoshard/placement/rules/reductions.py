"""Reductions, softmax and scans: a sum over a split dim gives addends, other reduced dims stay."""

from __future__ import annotations

from dataclasses import replace

from autoshard.ir import Op
from autoshard.placement.named import LETTERS, arguments, fresh_letters
from autoshard.placement.registry import localises, rule
from autoshard.placement.strategy import Signature, Strategy


def reduced_dims(op: Op) -> tuple[int, ...]:
    """The dims that are reduced, from ``dim`` or ``dims``; none given means all of them."""
    bound = arguments(op)
    count = op.operands[0].type.ndim
    dims = bound.get("dim", bound.get("dims"))
    if dims is None or dims == ():
        return tuple(range(count))
    return tuple(d % count for d in (dims if isinstance(dims, tuple) else (dims,)) if count)


def reduction(op: Op, *, splits: bool, linear: bool = False, implementation: str = "") -> Signature:
    """The signature of an op that reduces some dims and maps every output in the same way.

    Args:
        op: the call; its first operand is reduced, all outputs have the same dims.
        splits: a reduced dim may be split, and then gives addends.
        linear: the op is linear.
        implementation: how the op is written when a reduced dim is split.
    """
    letters = LETTERS[: op.operands[0].type.ndim]
    dims = reduced_dims(op)
    reduced = "".join(letters[d] for d in dims)
    fresh = fresh_letters()
    output = "".join(next(fresh) if c in reduced else c for c in letters)
    ones = frozenset(output) - frozenset(letters)
    if not arguments(op).get("keepdim", False):
        output = "".join(c for c in letters if c not in reduced)
    return Signature(
        (letters,),
        tuple(output for _ in op.outputs),
        fixed=ones if splits else ones | frozenset(reduced),
        linear=((0,),) if linear else (),
        implementations=dict.fromkeys(reduced, implementation),
    )


@rule("aten.sum.default", "aten.sum.dim_IntList")
def add_up(op: Op) -> Signature:
    return reduction(op, splits=True, linear=True)


@rule("aten.mean.default", "aten.mean.dim")
def mean(op: Op) -> Signature:
    cast = arguments(op)["dtype"]
    splits = cast is None or cast == op.operands[0].type.dtype
    return reduction(op, splits=splits, linear=True, implementation="partial")


@localises("aten.mean.default", "aten.mean.dim")
def _partial_mean(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
    if strategy.implementation != "partial":
        return local
    keepdim = arguments(op).get("keepdim", False)
    args = (local.operands[0], reduced_dims(op), keepdim, n)
    return replace(local, target="autoshard.partial_mean", args=args, kwargs=())


@rule("autoshard.partial_mean")
def mean_addend(op: Op) -> Signature:
    return reduction(op, splits=True, linear=True, implementation="partial")


@localises("autoshard.partial_mean")
def _more_partial_mean(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
    if strategy.implementation != "partial":
        return local
    x, dims, keepdim, parts = local.args
    return replace(local, args=(x, dims, keepdim, parts * n))


@rule(
    "aten.amax.default", "aten.amin.default", "aten.max.default", "aten.min.default",
    "aten.max.dim", "aten.min.dim", "aten.argmax.default", "aten.argmin.default",
    "aten.logsumexp.default", "aten.std.default", "aten.std.dim", "aten.std.correction",
    "aten.var.default", "aten.var.dim", "aten.var.correction", "aten.var_mean.correction",
    "aten.std_mean.correction", "aten.norm.Scalar", "aten.norm.ScalarOpt_dim",
    "aten.linalg_vector_norm.default", "aten.prod.default", "aten.prod.dim_int",
    "aten.all.default", "aten.all.dim", "aten.any.default", "aten.any.dim", "aten.median.dim",
    "aten.count_nonzero.default", "aten.count_nonzero.dim_IntList",
)  # fmt: skip
def reduce_whole_dims(op: Op) -> Signature:
    return reduction(op, splits=False)


def _along_a_dim(op: Op, linear: bool = False) -> Signature:
    """One dim is worked on as a whole; an output that is shorter there differs in that dim only."""
    letters = LETTERS[: op.operands[0].type.ndim]
    dim = arguments(op)["dim"] % max(1, len(letters))
    whole = letters[dim : dim + 1]
    outputs = tuple(
        letters
        if v.type.shape == op.operands[0].type.shape
        else letters[:dim] + "Z" + letters[dim + 1 :]
        for v in op.outputs
    )
    return Signature((letters,), outputs, frozenset(whole + "Z"), ((0,),) if linear else ())


@rule(
    "aten.softmax.int", "aten._softmax.default", "aten.log_softmax.int",
    "aten._log_softmax.default", "aten.cumprod.default", "aten.logcumsumexp.default",
    "aten.topk.default", "aten.sort.default", "aten.sort.stable", "aten.argsort.default",
    "aten.argsort.stable", "aten.cummax.default",
)  # fmt: skip
def along_a_dim(op: Op) -> Signature:
    return _along_a_dim(op)


@rule("aten.cumsum.default")
def running_sum(op: Op) -> Signature:
    return _along_a_dim(op, linear=True)


@rule("aten.cosine_similarity.default")
def cosine_similarity(op: Op) -> Signature | None:
    """Of vectors along a dim; only for operands of one shape."""
    first, second = (v.type.shape for v in op.operands)
    if first != second:
        return None
    letters = LETTERS[: len(first)]
    dim = arguments(op)["dim"] % len(letters)
    return Signature(
        (letters, letters), (letters[:dim] + letters[dim + 1 :],), frozenset(letters[dim])
    )


@rule("aten.histc.default")
def histogram(op: Op) -> Signature:
    """Counts over all elements are sums; without given bounds the bins would follow the data."""
    letters = LETTERS[: op.operands[0].type.ndim]
    bound = arguments(op)
    data_dependent = bound["min"] == bound["max"] == 0
    fixed = frozenset("Z" + letters if data_dependent else "Z")
    return Signature((letters,), ("Z",), fixed)
