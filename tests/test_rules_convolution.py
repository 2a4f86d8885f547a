"""Convolutions and pooling: batch and channels; groups split as wholes."""

from __future__ import annotations

import pytest
from drawn import more, offered, ranks, size
from hypothesis import given
from hypothesis import strategies as st
from rule_harness import T, make_op, prove


@more
@given(batch=size, inner=size, outer=size, bias=st.booleans(), n=ranks)
def test_conv2d(batch: int, inner: int, outer: int, bias: bool, n: int) -> None:
    args = [
        T(batch, inner, 4, 3),
        T(outer, inner, 3, 2),
        T(outer) if bias else None,
        [1, 2],
        [1, 1],
    ]
    prove(make_op("aten.conv2d.default", args), n)


def test_what_is_offered() -> None:
    op = make_op("aten.conv1d.default", [T(4, 8, 5), T(8, 8, 3), T(8)])
    assert offered(op, 4) == {
        "R, R, R -> R",
        "V, V, V -> V",
        "S(0), V, V -> S(0)",
        "S(1), S(1), P -> P",
        "V, S(0), S(0) -> S(1)",
        "P, V, P -> P",
        "V, P, P -> P",
    }


PLAIN = [
    ("conv1d.default", [T(4, 8, 5), T(4, 8, 3), T(4), [2], [1]]),
    ("conv1d.padding", [T(4, 8, 5), T(4, 8, 3), T(4), [1], "same"]),
    ("conv2d.padding", [T(4, 8, 3, 3), T(4, 8, 2, 2), None, [1], "valid"]),
    ("conv2d.default", [T(8, 3, 3), T(4, 8, 2, 2), T(4)]),  # without batch
    ("conv3d.default", [T(4, 4, 3, 3, 3), T(4, 4, 2, 2, 2), T(4)]),
    ("conv3d.padding", [T(4, 4, 3, 3, 3), T(4, 4, 1, 1, 1), T(4), [1], "same"]),
    ("conv_transpose1d.default", [T(4, 8, 5), T(8, 4, 3), T(4), [2]]),
    ("conv_transpose2d.input", [T(4, 8, 3, 3), T(8, 4, 2, 2), T(4), [2, 2]]),
    ("conv_transpose3d.input", [T(4, 4, 2, 2, 2), T(4, 4, 2, 2, 2), T(4)]),
    ("convolution.default", [T(4, 8, 5), T(4, 8, 3), T(4), [1], [0], [1], False, [0], 1]),
    ("convolution.default", [T(4, 8, 5), T(8, 4, 3), T(4), [2], [0], [1], True, [1], 1]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args"), PLAIN)
@pytest.mark.parametrize("n", [2, 4])
def test_kinds(name: str, args: list[object], n: int) -> None:
    op = make_op(f"aten.{name}", args)
    prove(op, n)
    channel = 1 if op.operands[0].type.ndim == op.operands[1].type.ndim else 0
    assert any(s.endswith(f"-> S({channel})") for s in offered(op, n))
    assert any(s.startswith(f"S({channel})") and s.endswith("-> P") for s in offered(op, n))


GROUPED = [
    ("conv2d.default", [T(4, 8, 3, 3), T(8, 1, 2, 2), T(8), [1], [0], [1], 8]),  # depthwise
    ("conv2d.default", [T(4, 8, 3, 3), T(16, 1, 2, 2), T(16), [1], [0], [1], 8]),
    ("conv1d.default", [T(4, 8, 5), T(4, 2, 3), None, [1], [0], [1], 4]),
    ("conv1d.default", [T(4, 8, 5), T(4, 4, 3), None, [1], [0], [1], 2]),
    ("conv_transpose1d.default", [T(4, 8, 5), T(8, 1, 3), T(4), [2], [0], [0], 4]),
    ("convolution.default", [T(4, 8, 5), T(8, 3, 3), T(12), [2], [0], [1], True, [1], 4]),
]


@pytest.mark.parametrize(("name", "args"), GROUPED)
@pytest.mark.parametrize("n", [2, 4])
def test_groups(name: str, args: list[object], n: int) -> None:
    op = make_op(f"aten.{name}", args)
    groups = next(a for a in reversed(args) if isinstance(a, int))
    split = {s for s in offered(op, n) if s.endswith("[groups]")}
    assert len(split) == (groups % n == 0)
    prove(op, n)


POOLS = [
    *(
        (f"{kind}_pool{d}d.default", [T(4, 8, *[4] * d), [2] * d])
        for kind in ("max", "avg", "adaptive_avg", "adaptive_max")
        for d in (1, 2, 3)
    ),
    *((f"max_pool{d}d_with_indices.default", [T(4, 8, *[4] * d), [2] * d]) for d in (1, 2, 3)),
    *((f"upsample_nearest{d}d.vec", [T(4, 8, *[2] * d), None, [2.0] * d]) for d in (1, 2, 3)),
    *(
        (f"upsample_{name}.vec", [T(4, 8, *[2] * int(name[-2])), [3] * int(name[-2]), False, None])
        for name in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")
    ),
    *((f"upsample_nearest{d}d.default", [T(4, 8, *[2] * d), [4] * d]) for d in (1, 2, 3)),
    *(
        (f"upsample_{name}.default", [T(4, 8, *[2] * int(name[-2])), [3] * int(name[-2]), True])
        for name in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")
    ),
    *(
        (f"_upsample_{name}2d_aa.{overload}", [T(4, 8, 4, 4), [2, 2], False, *rest])
        for name in ("bilinear", "bicubic")
        for overload, rest in (("vec", [None]), ("default", []))
    ),
]


@pytest.mark.parametrize(("name", "args"), POOLS)
def test_pooling(name: str, args: list[object]) -> None:
    op = make_op(f"aten.{name}", args)
    dims = {s.inputs[0].dim for s in prove(op, 4) if s.splits_work}
    assert dims == {0, 1}
    assert ("P -> P" in offered(op, 4)) == ("max" not in name)


def test_pooling_without_batch() -> None:
    prove(make_op("aten.max_pool2d.default", [T(8, 4, 4), [2, 2]]), 4)


@pytest.mark.parametrize("n", [2, 4])
def test_shuffles(n: int) -> None:
    for name, shape in (("pixel_shuffle", (4, 16, 2, 3)), ("pixel_unshuffle", (4, 4, 4, 2))):
        op = make_op(f"aten.{name}.default", [T(*shape), 2])
        assert "S(1) -> S(1)" in offered(op, n)
        prove(op, n)
    prove(make_op("aten.pixel_shuffle.default", [T(4, 8, 2, 3), 2]), n)
    prove(make_op("aten.channel_shuffle.default", [T(4, 8, 2, 3), 2]), n)


def test_patches() -> None:
    prove(make_op("aten.im2col.default", [T(4, 3, 4, 4), [2, 2], [1, 1], [0, 0], [2, 2]]), 4)
    args = [T(4, 12, 4), [4, 4], [2, 2], [1, 1], [0, 0], [2, 2]]
    prove(make_op("aten.col2im.default", args), 4)
    prove(make_op("aten.grid_sampler.default", [T(4, 3, 4, 4), T(4, 2, 2, 2), 0, 0, False]), 4)
