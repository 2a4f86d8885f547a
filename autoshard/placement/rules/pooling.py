"""Pooling and resampling: every sample and channel by itself, space stays whole."""

from __future__ import annotations

from collections.abc import Iterator

from autoshard.ir import Op
from autoshard.placement.named import LETTERS, fresh_letters
from autoshard.placement.registry import rule, strategies_for
from autoshard.placement.state import S
from autoshard.placement.strategy import Hints, Signature, Strategy, strategies_of


def _spatial(op: Op, dims: int, linear: bool) -> Signature:
    """The last ``dims`` dims are space, of another size in the output."""
    fresh = fresh_letters()
    outer = LETTERS[: op.operands[0].type.ndim - dims]
    before, after = ("".join(next(fresh) for _ in range(dims)) for _ in range(2))
    return Signature(
        (outer + before,),
        tuple(outer + after for _ in op.outputs),
        frozenset(before + after),
        linear=((0,),) if linear else (),
    )


def _num_dims(op: Op) -> int:
    """From the name: ``avg_pool2d`` works on 2 dims."""
    return next(int(d) for d in "123" if f"{d}d" in op.target)


@rule(
    *(f"aten.{kind}max_pool{d}d.default" for kind in ("", "adaptive_") for d in (1, 2, 3)),
    *(f"aten.max_pool{d}d_with_indices.default" for d in (1, 2, 3)),
)
def maximum(op: Op) -> Signature:
    return _spatial(op, _num_dims(op), linear=False)


_RESAMPLINGS = (
    "nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d", "trilinear3d",
    "_bilinear2d_aa", "_bicubic2d_aa",
)  # fmt: skip


@rule(
    *(f"aten.{kind}avg_pool{d}d.default" for kind in ("", "adaptive_") for d in (1, 2, 3)),
    *(
        f"aten.{'_upsample' if name.startswith('_') else 'upsample_'}{name}.{overload}"
        for name in _RESAMPLINGS
        for overload in ("vec", "default")
    ),
)
def average(op: Op) -> Signature:
    return _spatial(op, _num_dims(op), linear=True)


@rule("aten.im2col.default", "aten.col2im.default", "aten.grid_sampler.default")
def per_sample(op: Op) -> Signature:
    """Only the batch splits; patches of channels are laid out side by side."""
    fresh = fresh_letters()
    inputs = ["n" + "".join(next(fresh) for _ in v.type.shape[1:]) for v in op.operands]
    output = "n" + "".join(next(fresh) for _ in op.output.type.shape[1:])
    fixed = frozenset("".join((*inputs, output))) - {"n"}
    return Signature(tuple(inputs), (output,), fixed, linear=((0,),))


@rule("aten.pixel_shuffle.default", "aten.pixel_unshuffle.default", "aten.channel_shuffle.default")
def shuffle(op: Op) -> Signature:
    return _spatial(op, 3, linear=True)


@strategies_for("aten.pixel_shuffle.default", "aten.pixel_unshuffle.default")
def shuffle_strategies(op: Op, n: int, hints: Hints) -> Iterator[Strategy]:
    """Channels come in blocks of one channel of the larger picture each."""
    yield from strategies_of(shuffle(op), op, n, hints)
    channel = op.output.type.ndim - 3
    fewer = min(v.type.shape[channel] for v in (*op.operands, op.output))
    if fewer % n == 0:
        yield Strategy((S(channel),), (S(channel),))
