"""Normalisations: the normalised dims stay whole, but batch norm can share its statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from autoshard.ir import Op
from autoshard.placement.named import (
    LETTERS,
    arguments,
    named_signature,
    where,
    with_arguments,
)
from autoshard.placement.registry import localises, rule, strategies_for
from autoshard.placement.state import S
from autoshard.placement.strategy import Hints, Signature, Strategy

SYNC = "sync"
_BATCH_NORMS = ("aten.batch_norm.default", "autoshard.batch_norm")


@rule("aten.layer_norm.default", "aten.rms_norm.default")
def layer_norm(op: Op) -> Signature:
    letters = LETTERS[: op.output.type.ndim]
    normalised = letters[len(letters) - len(arguments(op)["normalized_shape"]) :]
    return named_signature(
        op,
        {"input": letters, "weight": normalised, "bias": normalised},
        letters,
        fixed=normalised,
    )


def _per_channel(op: Op) -> tuple[dict[str, str], str]:
    """Letters of ``[batch, channel, ...]`` and of the tensors with one number per channel."""
    letters = LETTERS[: op.output.type.ndim]
    names = ("weight", "bias", "running_mean", "running_var")
    kept = dict.fromkeys(names, letters[1])
    name = "x" if op.target == "autoshard.batch_norm" else "input"
    return {name: letters, **kept}, letters


@rule("aten.group_norm.default")
def group_norm(op: Op) -> Signature:
    tensors, letters = _per_channel(op)
    return named_signature(op, tensors, letters, fixed=letters[2:])


@strategies_for("aten.group_norm.default")
def group_norm_strategies(op: Op, n: int, hints: Hints) -> Iterator[Strategy]:
    """Channels split by whole groups; a blockwise split would mix the groups."""
    groups = arguments(op)["num_groups"]

    def legal(strategy: Strategy) -> bool:
        state = strategy.inputs[0]
        return not (state.is_split and state.dim == 1) or (groups % n == 0 and not state.blocks)

    return where(group_norm(op), op, n, hints, legal)


@localises("aten.group_norm.default")
def _fewer_groups(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
    if strategy.inputs[0] != S(1):
        return local
    return with_arguments(local, num_groups=arguments(op)["num_groups"] // n)


@rule(*_BATCH_NORMS)
def batch_norm(op: Op) -> Signature:
    """Channels split plainly; any other split shares the statistics of the batch (``sync``)."""
    tensors, letters = _per_channel(op)
    implementations = {}
    if arguments(op)["training"]:
        implementations = dict.fromkeys(letters[:1] + letters[2:], SYNC)
    return named_signature(op, tensors, letters, implementations=implementations)


@localises(*_BATCH_NORMS)
def _sync(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
    if strategy.implementation != SYNC:
        return local
    if op.target == "autoshard.batch_norm":
        return with_arguments(local, axes=(*arguments(op)["axes"], axis))
    kwargs = (("axes", (axis,)),)
    names = (
        "input",
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "training",
        "momentum",
        "eps",
    )
    bound = arguments(local)
    args = tuple(bound[name] for name in names)
    return replace(local, target="autoshard.batch_norm", args=args, kwargs=kwargs)


@rule("aten.instance_norm.default")
def instance_norm(op: Op) -> Signature:
    """Every channel of every sample by itself, unless running statistics average the samples."""
    tensors, letters = _per_channel(op)
    bound = arguments(op)
    averaged = bound["use_input_stats"] and bound["running_mean"] is not None
    fixed = letters[2:] + (letters[0] if averaged else "")
    return named_signature(op, tensors, letters, fixed=fixed)
