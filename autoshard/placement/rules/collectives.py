"""The conversions of an outer axis as ops: the dims that they do not move split as they like.

Every conversion is linear, forward and backward, so addends of another axis pass through.
"""

from __future__ import annotations

from autoshard.ir import Op
from autoshard.placement.named import LETTERS, arguments
from autoshard.placement.registry import rule
from autoshard.placement.strategy import Signature

_WITHOUT_DIM = (
    "all_reduce_gradient", "share", "share_gradient", "share_varying", "all_reduce",
    "all_reduce_both",
)  # fmt: skip
_WITH_DIM = (
    "split", "split_varying", "all_gather_replicated", "all_gather", "all_to_all", "pad",
    "reduce_scatter",
)  # fmt: skip


@rule(*(f"autoshard.{name}" for name in _WITHOUT_DIM))
def on_every_element(op: Op) -> Signature:
    letters = LETTERS[: op.output.type.ndim]
    return Signature((letters,), (letters,), linear=((0,),))


@rule(*(f"autoshard.{name}" for name in _WITH_DIM))
def along_dims(op: Op) -> Signature:
    """Dims named in the arguments change their size and stay as they are on further axes."""
    bound = arguments(op)
    letters = LETTERS[: op.output.type.ndim]
    moved = {bound[name] for name in ("dim", "source_dim", "target_dim") if name in bound}
    output = "".join(c.upper() if i in moved else c for i, c in enumerate(letters))
    fixed = frozenset(c for i, c in enumerate(letters + output) if i % len(letters) in moved)
    return Signature((letters,), (output,), fixed, linear=((0,),))
