"""Every strategy of shape, slicing, indexing and constructor ops, proven by execution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_harness import I, T, integers, make_op, prove

from autoshard.ir import Op, values_in
from autoshard.placement import registry
from autoshard.placement.rules.shapes import groups
from autoshard.placement.strategy import Hints, Strategy

QUICK = settings(max_examples=25, deadline=None, derandomize=True)
BOOL = torch.bool


def mask(*shape: int) -> Any:
    return T(*shape, dtype=BOOL)


def texts(found: tuple[Strategy, ...]) -> set[str]:
    return {str(s) for s in found}


def proven(target: str, args: list[Any], n: int, hints: Hints | None = None, **kwargs: Any) -> Op:
    op = make_op(target, args, kwargs)
    prove(op, n, hints=hints, make_inputs=integers(2)(op))
    return op


CASES: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("aten.view.default", [T(4, 6, 8), [4, 6, 2, 4]], {}),
    ("aten.view.default", [T(4, 6, 8), [24, -1]], {}),
    ("aten.view.default", [T(), [1, 1]], {}),
    ("aten.view.default", [T(0, 4), [4, 0]], {}),
    ("aten.view_copy.default", [T(4, 8), [8, 4]], {}),
    ("aten.reshape.default", [T(4, 6, 24), [4, 6, 3, 4, -1]], {}),
    ("aten.reshape.default", [I(8, 4), [32]], {}),
    ("aten._unsafe_view.default", [T(4, 2, 8), [8, 8]], {}),
    ("aten.view_as.default", [T(4, 16), T(4, 4, 4)], {}),
    ("aten.reshape_as.default", [T(4, 16), T(16, 4, grad=False)], {}),
    ("aten.flatten.using_ints", [T(4, 8, 4), 1], {}),
    ("aten.flatten.using_ints", [T(4, 8, 4), -3, -2], {}),
    ("aten.ravel.default", [T(4, 8)], {}),
    ("aten.unflatten.int", [T(4, 24), -1, [3, -1]], {}),
    ("aten.unflatten.int", [T(24, 5), 0, [3, 8]], {}),
    ("aten.transpose.int", [T(4, 8, 3), -1, 0], {}),
    ("aten.swapaxes.default", [T(4, 8), 0, 1], {}),
    ("aten.swapdims.default", [T(4, 8, 2), 1, 2], {}),
    ("aten.t.default", [T(4, 8)], {}),
    ("aten.t.default", [T(4)], {}),
    ("aten.numpy_T.default", [T(4, 8)], {}),
    ("aten.mT.default", [T(2, 4, 8)], {}),
    ("aten.adjoint.default", [T(2, 4, 8)], {}),
    ("aten.permute.default", [T(4, 8, 5), [2, -3, 1]], {}),
    ("aten.movedim.int", [T(4, 8, 5), -1, 0], {}),
    ("aten.movedim.intlist", [T(4, 8, 5), [0, 1], [-1, 0]], {}),
    ("aten.moveaxis.int", [T(4, 8, 5), 0, 2], {}),
    ("aten.moveaxis.intlist", [T(4, 8, 5), [0], [-2]], {}),
    ("aten.squeeze.default", [T(4, 1, 2, 1)], {}),
    ("aten.squeeze.dim", [T(4, 1, 2), -2], {}),
    ("aten.squeeze.dim", [T(4, 2), 1], {}),
    ("aten.squeeze.dims", [T(1, 4, 1), [0, -1, 1]], {}),
    ("aten.unsqueeze.default", [T(4, 8), -1], {}),
    ("aten.unsqueeze.default", [T(4, 8), 1], {}),
    ("aten.expand.default", [T(4, 1, 8), [2, -1, 8, -1]], {}),
    ("aten.expand.default", [T(4, 1), [4, 8]], {"implicit": True}),
    ("aten.expand_copy.default", [T(8), [4, 8]], {}),
    ("aten.expand_as.default", [T(1, 8), T(4, 8)], {}),
    ("aten.broadcast_to.default", [T(8, 1), [4, 8, 4]], {}),
    ("aten.broadcast_tensors.default", [[T(4, 1), T(8)]], {}),
    ("aten.meshgrid.default", [[T(4), T(8)]], {}),
    ("aten.meshgrid.indexing", [[T(4), T(8), T(2)]], {"indexing": "xy"}),
    ("aten.repeat.default", [T(4, 1, 8), [4, 1, 8, 2]], {}),
    ("aten.tile.default", [T(4, 8), [4]], {}),
    ("aten.tile.default", [T(4), [4, 2]], {}),
    ("aten.repeat_interleave.self_int", [T(4, 8), 3, -1], {}),
    ("aten.repeat_interleave.self_int", [T(4, 8), 2], {"dim": 0, "output_size": 8}),
    ("aten.contiguous.default", [T(4, 5)], {}),
    ("aten.clone.default", [T(4, 5)], {"memory_format": torch.contiguous_format}),
    ("aten.alias.default", [T(4, 5)], {}),
    ("aten.detach.default", [T(4, 5)], {}),
    ("aten.lift_fresh_copy.default", [I(4, 5)], {}),
    ("aten.slice.Tensor", [T(4, 8), 1, 4], {}),
    ("aten.slice.Tensor", [T(4, 8), -1, 0, 4], {}),
    ("aten.slice.Tensor", [T(4, 8), 0, 0, 9223372036854775807], {}),
    ("aten.slice.Tensor", [T(4, 16), 1, 1, None, 2], {}),
    ("aten.slice.Tensor", [T(4, 16), 1, 4, None, 2], {}),
    ("aten.slice.Tensor", [T(16, 4), 0, 0, 12, 2], {}),
    ("aten.slice.Tensor", [T(8, 6), 0, -5, -2], {}),
    ("aten.slice.Tensor", [T(8, 6), 0, 6, 2], {}),
    ("aten.slice.Tensor", [T(8, 6)], {"end": 4}),
    ("aten.narrow.default", [T(4, 12), -1, 4, 4], {}),
    ("aten.narrow.default", [T(4, 12), 1, -4, 4], {}),
    ("aten.select.int", [T(3, 4, 8), 0, -1], {}),
    ("aten.select.int", [T(4, 8), -1, 2], {}),
    ("aten.unbind.int", [T(3, 4, 8)], {}),
    ("aten.unbind.int", [T(4, 8, 2), -1], {}),
    ("aten.split.Tensor", [T(4, 12), 4, -1], {}),
    ("aten.split.Tensor", [T(4, 10), 4, 1], {}),
    ("aten.split.sizes", [T(4, 16), [8, 4, 4], 1], {}),
    ("aten.split_with_sizes.default", [T(4, 16), [8, 4, 4], -1], {}),
    ("aten.unsafe_split.Tensor", [T(4, 8), 4], {"dim": 1}),
    ("aten.unsafe_split_with_sizes.default", [T(8, 2), [4, 4]], {}),
    ("aten.chunk.default", [T(4, 12), 3, -1], {}),
    ("aten.chunk.default", [T(4, 10), 4, -1], {}),
    ("aten.unsafe_chunk.default", [T(4, 8), 2, 1], {}),
    ("aten.tensor_split.sections", [T(4, 8), 2, 1], {}),
    ("aten.tensor_split.sections", [T(4, 7), 3, 1], {}),
    ("aten.tensor_split.indices", [T(4, 12), [4, 8], 1], {}),
    ("aten.flip.default", [T(4, 8), [-1]], {}),
    ("aten.roll.default", [T(4, 8, 4), [1, -2], [1, -1]], {}),
    ("aten.roll.default", [T(4, 8), [3]], {}),
    ("aten.pad.default", [T(4, 8), [0, 1]], {}),
    ("aten.pad.default", [T(4, 8), [1, -2, 0, 0], "constant", 2.0], {}),
    ("aten.pad.default", [T(2, 4, 8), [1, 2], "reflect"], {}),
    ("aten.pad.default", [I(4, 8), [0, 1], "constant", -100.0], {}),
    ("aten.constant_pad_nd.default", [T(4, 8, 4), [0, 0, 1, 0]], {}),
    ("aten.constant_pad_nd.default", [T(4, 4), [1, 0], 1.0], {}),
    ("aten.unfold.default", [T(4, 8), -1, 3, 2], {}),
    ("aten.diagonal.default", [T(4, 8, 8), 0, 1, 2], {}),
    ("aten.diagonal.default", [T(8, 4, 8), 1, 0, -1], {}),
    ("aten.tril.default", [T(4, 8, 8)], {}),
    ("aten.triu.default", [T(4, 4), 1], {}),
    ("aten.cat.default", [[T(4, 8), T(4, 4)], -1], {}),
    ("aten.cat.default", [[T(4, 8), T(2, 8)]], {}),
    ("aten.cat.default", [[T(4, 5), T(4, 5, grad=False)], 1], {}),
    ("aten.cat.default", [[T(0), T(4, 8)]], {}),
    ("aten.concat.default", [[T(4, 4), T(4, 4)], 1], {}),
    ("aten.concatenate.default", [[T(4, 4), T(4, 4)], -2], {}),
    ("aten.stack.default", [[T(4, 8), T(4, 8)], -1], {}),
    ("aten.stack.default", [[T(4), T(4), T(4, grad=False)], 0], {}),
    ("aten.where.self", [mask(4, 1, 8), T(4, 8, 8), T(8)], {}),
    ("aten.where.self", [mask(4, 8), T(4, 8), T(grad=False)], {}),
    ("aten.where.ScalarOther", [mask(4, 8), T(4, 8), 0.0], {}),
    ("aten.where.ScalarOther", [mask(4, 8), T(4, 8), -1.0], {}),
    ("aten.where.ScalarSelf", [mask(4, 1), 0, T(4, 8)], {}),
    ("aten.masked_fill.Scalar", [T(4, 8), mask(1, 8), 0.0], {}),
    ("aten.masked_fill.Scalar", [T(4, 8), mask(4, 8), float("-inf")], {}),
    ("aten.masked_fill.Tensor", [T(4, 8), mask(8), T()], {}),
    ("aten.slice_scatter.default", [T(4, 8), T(4, 4), 1, -4], {}),
    ("aten.select_scatter.default", [T(4, 8), T(4), 1, 2], {}),
    ("aten.index_select.default", [T(4, 2, 8), 1, I(4)], {}),
    ("aten.index_select.default", [T(4, 2), -1, I()], {}),
    ("aten.gather.default", [T(4, 2, 8), 1, I(4, 4, 8)], {}),
    ("aten.gather.default", [T(8, 2), -1, I(4, 4)], {}),
    ("aten.scatter.src", [T(4, 2, 8), 1, I(4, 1, 8), T(4, 1, 8)], {}),
    ("aten.scatter.value", [T(4, 8), 1, I(4, 4), 0.0], {}),
    ("aten.scatter.value", [T(4, 8), 1, I(4, 4), 2.0], {}),
    ("aten.scatter.reduce", [T(4, 8, grad=False), 1, I(4, 4), T(4, 4, grad=False)],
     {"reduce": "add"}),
    ("aten.scatter_add.default", [T(4, 2), -1, I(4, 8), T(4, 8)], {}),
    ("aten.scatter_add.default", [T(4, 8), 0, I(4, 4), T(8, 8, grad=False)], {}),
    ("aten.scatter_add.default", [T(2, 8), 0, I(4, 4), T(4, 8, grad=False)], {}),
    ("aten.scatter_reduce.two", [T(4, 8), 1, I(4, 4), T(4, 4), "amax"], {}),
    ("aten.index_add.default", [T(2, 8), 0, I(8), T(8, 8)], {}),
    ("aten.index_add.default", [T(8, 2, grad=False), -1, I(4), T(8, 4)], {"alpha": 2}),
    ("aten.index_copy.default", [T(4, 8), 1, I(1), T(4, 1)], {}),
    ("aten.index_fill.int_Scalar", [T(4, 8), 1, I(2), 0], {}),
    ("aten.index_fill.int_Scalar", [T(4, 8), 1, I(2), 3.0], {}),
    ("aten.index.Tensor", [T(2, 8), [I(4)]], {}),
    ("aten.index.Tensor", [T(4, 2, 8), [None, I(4, 8)]], {}),
    ("aten.index.Tensor", [T(2, 4, 2), [I(4, 1), None, I(8)]], {}),
    ("aten.index.Tensor", [T(2, 2, 8), [I(4, 1), I(1, 8)]], {}),
    ("aten.index.Tensor", [I(4, 8), [I(4)]], {}),
    ("aten.index.Tensor", [T(4, 2, 8, 2), [None, I(4), None, I(4)]], {}),
    ("aten.index_put.default", [T(2, 8), [I(4)], T(4, 8), True], {}),
    ("aten.index_put.default", [T(4, 2), [None, I(8)], T(4, 8), True], {}),
    ("aten.index_put.default", [T(4, 8), [I(1)], T(8)], {}),
    ("aten.index_put.default", [T(2, 8), [I(4)], T(1), True], {}),
    ("aten.index_put.default", [T(4, 8), [mask(4, 8)], T()], {}),
    ("aten.index_put.default", [T(4, 8), [mask(4)], T(1, grad=False)], {}),
    ("aten._index_put_impl.default", [T(2, 8), [I(4)], T(4, 1), True], {}),
    ("aten.bucketize.Tensor", [T(4, 8), T(3, grad=False)], {}),
    ("aten.searchsorted.Tensor", [T(4, 3, grad=False), T(4, 8)], {}),
    ("aten.searchsorted.Tensor", [T(3, grad=False), T(4, 8)], {"right": True}),
    ("aten.zeros.default", [[4, 5]], {}),
    ("aten.ones.default", [[8]], {"dtype": torch.float64}),
    ("aten.full.default", [[4, 8], 2.5], {}),
    ("aten.full.default", [[], 2.5], {}),
    ("aten.zeros_like.default", [T(4, 5)], {}),
    ("aten.ones_like.default", [I(4, 8)], {}),
    ("aten.full_like.default", [T(4, 8), 3], {"dtype": torch.int64}),
    ("aten.new_zeros.default", [T(4, 8), [8, 5]], {}),
    ("aten.new_ones.default", [I(4), [4, 2]], {}),
    ("aten.new_full.default", [T(4, 8), [], 1.5], {}),
]  # fmt: skip

UNSET: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("aten.empty.memory_format", [[4, 8]], {}),
    ("aten.empty_like.default", [T(4, 8)], {}),
    ("aten.new_empty.default", [T(4), [8]], {}),
]

REPLICATED: list[tuple[str, list[Any]]] = [
    ("aten.arange.default", [8]),
    ("aten.arange.start", [2, 8]),
    ("aten.arange.start_step", [0, 8, 2]),
    ("aten.linspace.default", [0, 1, 8]),
    ("aten.eye.default", [4]),
    ("aten.eye.m", [4, 8]),
    ("aten.scalar_tensor.default", [2.0]),
    ("aten.tril_indices.default", [4, 4]),
    ("aten.triu_indices.default", [4, 4]),
]


def name_of(case: Any) -> str | None:
    return case.removeprefix("aten.") if isinstance(case, str) else ""


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(("target", "args", "kwargs"), CASES, ids=name_of)
def test_rule(target: str, args: list[Any], kwargs: dict[str, Any], n: int) -> None:
    op = proven(target, args, n, **kwargs)
    assert registry.has_rule(op)


@pytest.mark.parametrize(("target", "args", "kwargs"), UNSET, ids=name_of)
def test_memory_that_is_not_set_has_the_local_shape(
    target: str, args: list[Any], kwargs: dict[str, Any]
) -> None:
    op = make_op(target, args, kwargs)
    assert any(s.outputs[0].is_split for s in prove(op, 4, values=False))


@pytest.mark.parametrize(("target", "args"), REPLICATED, ids=name_of)
def test_ranges_are_made_whole(target: str, args: list[Any]) -> None:
    assert len(prove(make_op(target, args), 2, whole_only=True)) == 1


# --------------------------------------------------------------------------- drawn shapes

SIZES = st.sampled_from([1, 2, 3, 4, 5, 6, 8])
RANKS = st.sampled_from([2, 4])


@st.composite
def factorings(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes with equal numbers of elements, dims of size 1 here and there."""
    factors = draw(st.lists(st.sampled_from([2, 2, 3, 4]), min_size=1, max_size=5))

    def group() -> list[int]:
        shape = [1]
        for factor in factors:
            if draw(st.booleans()):
                shape.append(1)
            shape[-1] *= factor
        return shape if draw(st.booleans()) else [size for size in shape if size > 1]

    return group(), group()


@QUICK
@given(factorings(), RANKS, st.booleans())
def test_view(shapes: tuple[list[int], list[int]], n: int, unknown: bool) -> None:
    source, target = shapes
    out = [-1, *target[1:]] if unknown else target
    proven("aten.view.default", [T(*source), out], n)


@QUICK
@given(factorings(), st.data())
def test_view_with_hints(shapes: tuple[list[int], list[int]], data: st.DataObject) -> None:
    source, target = shapes
    op = make_op("aten.reshape.default", [T(*source), target])
    dim = data.draw(st.integers(0, len(target) - 1))
    blocks = data.draw(st.lists(st.sampled_from([2, 4, 6]), min_size=2, max_size=3))
    source_dim = data.draw(st.integers(0, len(source) - 1))
    count = data.draw(st.integers(2, 4))
    even = (source[source_dim] // count,) * count
    hints = {
        (op.output.name, dim): frozenset([tuple(blocks)]),
        (op.operands[0].name, source_dim): frozenset([even]),
    }
    prove(op, 2, hints=hints)


@QUICK
@given(factorings())
def test_groups_have_equal_numbers_of_elements(shapes: tuple[list[int], list[int]]) -> None:
    source, target = shapes
    found = groups(source, target)
    assert [d for g in found for d in g.source] == list(range(len(source)))
    assert [d for g in found for d in g.target] == list(range(len(target)))
    for g in found:
        sizes = [torch.Size(s[d] for d in dims).numel() for s, dims in
                 ((source, g.source), (target, g.target))]  # fmt: skip
        assert sizes[0] == sizes[1]


@QUICK
@given(st.lists(SIZES, min_size=1, max_size=4), st.data(), RANKS)
def test_permutations(shape: list[int], data: st.DataObject, n: int) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    signs = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    dims = [d - len(shape) if s else d for d, s in zip(order, signs, strict=True)]
    proven("aten.permute.default", [T(*shape), dims], n)
    proven("aten.squeeze.default", [T(*shape)], n)
    proven("aten.unsqueeze.default", [T(*shape), dims[0]], n)
    proven("aten.movedim.intlist", [T(*shape), [dims[0]], [dims[-1]]], n)


@QUICK
@given(st.lists(SIZES, min_size=1, max_size=3), st.data(), RANKS)
def test_expand_and_repeat(shape: list[int], data: st.DataObject, n: int) -> None:
    new = data.draw(st.lists(SIZES, max_size=2))
    sizes = [data.draw(SIZES) if size == 1 else data.draw(st.sampled_from([size, -1]))
             for size in shape]  # fmt: skip
    proven("aten.expand.default", [T(*shape), [*new, *sizes]], n)
    repeats = data.draw(
        st.lists(st.sampled_from([1, 2, 4]), min_size=len(shape), max_size=len(shape))
    )
    proven("aten.repeat.default", [T(*shape), [*new, *repeats]], n)


@QUICK
@given(st.data(), RANKS)
def test_slices(data: st.DataObject, n: int) -> None:
    size = data.draw(st.sampled_from([4, 6, 8, 12, 16]))
    dim = data.draw(st.sampled_from([0, 1, -1]))
    shape = [4, 5, 3]
    shape[dim] = size
    bound = st.one_of(st.none(), st.integers(-size, size))
    start, end, step = data.draw(bound), data.draw(bound), data.draw(st.sampled_from([1, 1, 2]))
    op = make_op("aten.slice.Tensor", [T(*shape), dim, start, end, step])
    if op.output.type.numel == 0:
        return
    halves = frozenset([(size // 2, size - size // 2), (4, size - 4)])
    prove(op, n, hints={(op.operands[0].name, dim % 3): halves})


@QUICK
@given(st.data(), RANKS)
def test_splits_and_concatenations(data: st.DataObject, n: int) -> None:
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=4))
    dim = data.draw(st.sampled_from([0, 1, -1]))
    shape = [4, 5, 3]
    shape[dim] = sum(sizes)
    found = proven("aten.split_with_sizes.default", [T(*shape), sizes, dim], n)
    finer = {(o.name, dim % 3): frozenset([(4, 4)]) for o in found.outputs}
    prove(found, n, hints=finer)
    chunks = data.draw(st.integers(1, 5))
    proven("aten.chunk.default", [T(*shape), chunks, dim], n)
    proven("aten.tensor_split.sections", [T(*shape), min(chunks, shape[dim]), dim], n)
    parts = [T(*shape[: dim % 3], size, *shape[dim % 3 + 1 :]) for size in sizes]
    joined = make_op("aten.cat.default", [parts, dim])
    halves = {(v.name, dim % 3): frozenset([(4, 4)]) for v in joined.operands}
    prove(joined, n, hints={**halves, (joined.output.name, dim % 3): frozenset([tuple(sizes)])})


@QUICK
@given(st.data(), RANKS)
def test_indexing(data: st.DataObject, n: int) -> None:
    ndim = data.draw(st.integers(1, 3))
    shape = data.draw(st.lists(st.sampled_from([2, 4, 5]), min_size=ndim, max_size=ndim))
    index_shapes = st.sampled_from([(), (4,), (3, 4), (1, 4), (3, 1)])
    chosen = [data.draw(st.one_of(st.none(), index_shapes)) for _ in range(ndim)]
    if all(c is None for c in chosen):
        chosen[0] = (4,)
    op = proven("aten.index.Tensor", [T(*shape), [c if c is None else I(*c) for c in chosen]], n)
    values = list(op.output.type.shape)
    proven(
        "aten.index_put.default",
        [T(*shape), [c if c is None else I(*c) for c in chosen], T(*values), True],
        n,
    )


# --------------------------------------------------------------------------- what must be found


@pytest.mark.parametrize(
    ("target", "args", "expected"),
    [
        # heads out of a projection, and back
        ("aten.view.default", [T(2, 4, 16), [2, 4, 4, 4]], "S(2) -> S(2)"),
        ("aten.reshape.default", [T(2, 4, 4, 4), [2, 4, 16]], "S(2) -> S(2)"),
        # a fused projection: a leading count of three is three blocks
        ("aten.reshape.default", [T(2, 4, 24), [2, 4, 3, 4, 2]], "S(2;8,8,8) -> S(3)"),
        # a split sequence, flattened with the batch
        ("aten.view.default", [T(2, 4, 8), [8, 8]], "S(1) -> S(0;4,4)"),
        ("aten.view.default", [T(4, 8), [4, 8]], "P -> P"),
        # a vocabulary that does not divide
        ("aten.view.default", [T(2, 4, 7), [8, 7]], "S(2) -> S(1)"),
        # queries in groups: each rank repeats the heads that it needs
        ("aten.expand.default", [T(2, 1, 4), [2, 4, 4]], "V -> S(1)"),
        ("aten.split.Tensor", [T(2, 24), 8, 1], "S(1;8,8,8) -> S(1), S(1), S(1)"),
        ("aten.split_with_sizes.default", [T(2, 16), [8, 4, 4], 1],
         "S(1;8,4,4) -> S(1), S(1), S(1)"),
        ("aten.slice.Tensor", [T(2, 16), 1, 4, 8], "S(1;4,4,8) -> S(1)"),
        ("aten.cat.default", [[T(2, 4), T(2, 8)], 1], "S(1), S(1) -> S(1;4,8)"),
        ("aten.zeros_like.default", [T(4, 8)], "P -> R"),
        ("aten.new_zeros.default", [T(4, 8), [4]], "S(1) -> S(0)"),
        ("aten.index.Tensor", [T(2, 8), [I(4)]], "V, S(0) -> S(0)"),
        ("aten.index_add.default", [T(2, 8), 0, I(4), T(4, 8)], "P, S(0), S(0) -> P"),
        ("aten.where.ScalarOther", [mask(4, 1), T(4, 8), 0], "R, P -> P"),
    ],
)  # fmt: skip
def test_strategy_is_offered(target: str, args: list[Any], expected: str) -> None:
    assert expected in texts(registry.strategies(make_op(target, args), 2))


@pytest.mark.parametrize(
    ("target", "args", "refused"),
    [
        ("aten.masked_fill.Scalar", [T(4, 8), mask(4, 8), 1.0], "P"),
        ("aten.pad.default", [T(4, 8), [1, 1], "constant", 1.0], "P"),
        ("aten.index_put.default", [T(2, 8), [I(4)], T(4, 8)], "S(0)"),
        ("aten.tril.default", [T(4, 4, 8)], "S(1)"),
    ],
)
def test_strategy_is_not_offered(target: str, args: list[Any], refused: str) -> None:
    found = registry.strategies(make_op(target, args), 2)
    assert all(str(s.outputs[0]) != refused for s in found)
    assert all(str(s.inputs[-1]) != refused for s in found)


def test_no_size_is_left_open() -> None:
    """After localising for any strategy, no ``-1`` is left where a size is meant."""
    for target, args, kwargs in CASES:
        name = target.split(".")[1]
        if name not in {"view", "reshape", "_unsafe_view", "expand", "unflatten", "view_copy"}:
            continue
        op = make_op(target, args, kwargs)
        for strategy in registry.strategies(op, 2):
            local = registry.localise(op, strategy, "tp", 2)
            sizes = next(a for a in reversed(local.args) if isinstance(a, tuple))
            assert not any(values_in(sizes)) and -1 not in sizes


def test_two_axes_one_after_the_other() -> None:
    """A localised op is an ordinary op: it is split again, and proven again."""
    op = make_op("aten.reshape.default", [T(4, 4, 24), [4, 4, 3, 4, -1]])
    batch = next(s for s in registry.strategies(op, 2) if str(s) == "S(0) -> S(0)")
    local = registry.localise(op, batch, "dp", 2)
    assert local.output.type.shape == (2, 4, 3, 4, 2)
    assert "S(2;8,8,8) -> S(3)" in texts(prove(local, 2))


def test_replicated_and_varying_come_first() -> None:
    op = make_op("aten.view.default", [T(2, 4, 16), [2, 4, 4, 4]])
    assert [str(s) for s in registry.strategies(op, 2)][:2] == ["R -> R", "V -> V"]
