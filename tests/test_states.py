"""States: text, parts and joins, local shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_harness import padded_part

from autoshard.placement.conversion import COLLECTIVES, conversion, convertible
from autoshard.placement.state import (
    P,
    R,
    S,
    State,
    V,
    divides,
    join_parts,
    local_shape,
    ranges,
    take_part,
)

QUICK = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def split_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, State, int]:
    """A tensor, a split of it and a number of ranks; sizes need not divide."""
    n = draw(st.integers(1, 5))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    dim = draw(st.integers(0, len(shape) - 1))
    blocks = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    shape[dim] = sum(blocks)
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    return tensor, S(dim, blocks), n


@pytest.mark.parametrize("text", ["R", "V", "P", "S(0)", "S(12)", "S(1;4,2,2)"])
def test_text_parses_back(text: str) -> None:
    assert str(State.parse(text)) == text


@pytest.mark.parametrize("text", ["", "Q", "S", "S()", "S(-1)", "S(a)", "S(1;x)", "S(1", "R(0)"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        State.parse(text)


def test_one_block_is_no_block() -> None:
    assert S(1, (8,)) == S(1) != S(1, (4, 4))


@QUICK
@given(split_tensors())
def test_parts_join_to_the_whole(case: tuple[torch.Tensor, State, int]) -> None:
    whole, state, n = case
    size = whole.shape[state.dim]
    bare = [take_part(whole, state, n, rank) for rank in range(n)]
    assert torch.equal(join_parts(bare, state, size), whole)
    padded = [padded_part(whole, state, n, rank) for rank in range(n)]
    assert {tuple(part.shape) for part in padded} == {local_shape(whole.shape, state, n)}
    assert torch.equal(join_parts(padded, state, size), whole)


@QUICK
@given(split_tensors())
def test_every_index_belongs_to_one_rank(case: tuple[torch.Tensor, State, int]) -> None:
    whole, state, n = case
    size = whole.shape[state.dim]
    held = [
        i for r in range(n) for begin, end in ranges(size, state, n, r) for i in range(begin, end)
    ]
    assert sorted(held) == list(range(size))


@QUICK
@given(split_tensors())
def test_sizes_that_divide_need_no_padding(case: tuple[torch.Tensor, State, int]) -> None:
    whole, state, n = case
    local = local_shape(whole.shape, state, n)[state.dim]
    assert (local * n == whole.shape[state.dim]) == divides(whole.shape, state, n)


def test_blocks_are_split_on_their_own() -> None:
    part = take_part(torch.arange(8), S(0, (4, 2, 2)), 2, 1)
    assert part.tolist() == [2, 3, 5, 7]


def test_states_that_are_not_split_leave_the_shape() -> None:
    for state in (R, V, P):
        assert local_shape((3, 5), state, 4) == (3, 5)
        assert divides((3, 5), state, 4)
        assert state.is_whole == (state != P)


STATES = [R, V, P, S(0), S(1), S(0, (4, 4))]


@pytest.mark.parametrize("source", STATES, ids=str)
@pytest.mark.parametrize("target", STATES, ids=str)
def test_there_is_a_way_but_between_splits_of_one_dim(source: State, target: State) -> None:
    same_dim = source.is_split and target.is_split and source.dim == target.dim
    assert convertible(source, target) == (source == target or not same_dim)
    if source == target:
        assert conversion(source, target) is None


@pytest.mark.parametrize("source", STATES[:5], ids=str)
@pytest.mark.parametrize("target", STATES[:5], ids=str)
def test_what_moves_backward_is_what_moves_forward_the_other_way(
    source: State, target: State
) -> None:
    """A gradient's state is the dual one: V and P swap, R and S stay."""
    dual = {"V": P, "P": V}
    way = conversion(source, target)
    if way is None:
        return
    of_gradient = conversion(dual.get(target.kind, target), dual.get(source.kind, source))
    assert of_gradient is not None
    communicates = {way.backward in COLLECTIVES, of_gradient.forward in COLLECTIVES}
    assert len(communicates) == 1
