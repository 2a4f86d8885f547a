"""Random ops: split where their output is split, each rank drawing its own numbers there.

Emitted code seeds every random op by step, op and the rank's coordinate on the axes that split
its output; where the output is whole or partial all ranks draw the same numbers. So addends pass
through dropout: for a given mask it is linear.
"""

from __future__ import annotations

from autoshard.ir import Op
from autoshard.placement.named import LETTERS, with_arguments
from autoshard.placement.registry import localises, rule
from autoshard.placement.strategy import Signature, Strategy


@rule("aten.dropout.default", "aten.native_dropout.default")
def dropout(op: Op) -> Signature:
    letters = LETTERS[: op.output.type.ndim]
    return Signature((letters,), tuple(letters for _ in op.outputs), linear=((0,),))


@rule("aten.alpha_dropout.default", "aten.rrelu.default")
def affine_dropout(op: Op) -> Signature:
    letters = LETTERS[: op.output.type.ndim]
    return Signature((letters,), (letters,))


@rule("aten.feature_dropout.default", "aten.feature_alpha_dropout.default")
def feature_dropout(op: Op) -> Signature:
    """One number for each channel of each sample: the other dims share it, so they stay whole."""
    letters = LETTERS[: op.output.type.ndim]
    linear = ((0,),) if "alpha" not in op.target else ()
    return Signature((letters,), (letters,), frozenset(letters[2:]), linear)


@rule(
    "aten.bernoulli.default", "aten.bernoulli.p", "aten.rand_like.default",
    "aten.randn_like.default", "aten.randint_like.default", "aten.randint_like.low_dtype",
)  # fmt: skip
def drawn_like(op: Op) -> Signature:
    """Numbers in the shape of a tensor; no gradient flows from them."""
    letters = LETTERS[: op.output.type.ndim]
    return Signature((letters,), (letters,))


_OF_SIZE = (
    "aten.rand.default", "aten.randn.default", "aten.randint.default", "aten.randint.low",
    "aten.normal.float_float",
)  # fmt: skip


@rule(*_OF_SIZE)
def drawn(op: Op) -> Signature:
    return Signature((), (LETTERS[: op.output.type.ndim],))


@localises(*_OF_SIZE)
def _local_size(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
    return with_arguments(local, size=local.output.type.shape)


@rule("aten.randperm.default", "aten.multinomial.default")
def drawn_whole(op: Op) -> None:
    """A permutation or a sample without replacement is one draw."""
    return None
