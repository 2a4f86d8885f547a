"""What is normalised stays whole; batch norm shares statistics or splits channels."""

from __future__ import annotations

import pytest
from drawn import few, offered, ranks, shapes, size
from hypothesis import given
from hypothesis import strategies as st
from rule_harness import T, make_op, prove

from autoshard.ir import Op, TensorType


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@few
@given(batch=shapes(1, 2), normalised=shapes(1, 2), affine=st.booleans(), n=ranks)
def test_layer_norm(
    kind: str, batch: tuple[int, ...], normalised: tuple[int, ...], affine: bool, n: int
) -> None:
    weights = [T(*normalised)] * (2 if kind == "layer_norm" else 1) if affine else []
    op = make_op(f"aten.{kind}.default", [T(*batch, *normalised), normalised, *weights])
    prove(op, n)


def test_layer_norm_offers_sequence_parallelism() -> None:
    op = make_op("aten.layer_norm.default", [T(4, 8, 8), (8,), T(8), T(8)])
    assert offered(op, 4) == {
        "R, R, R -> R", "V, V, V -> V", "S(0), V, V -> S(0)", "S(1), V, V -> S(1)",
    }  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("n", [2, 4])
def test_group_norm(groups: int, n: int) -> None:
    op = make_op("aten.group_norm.default", [T(4, 8, 3, 2), groups, T(8), T(8), 1e-5])
    assert ("S(1), S(0), S(0) -> S(1)" in offered(op, n)) == (groups % n == 0)
    hints = {(op.output.name, 1): frozenset({(4, 4)})}
    assert offered(op, n, hints) == offered(op, n)
    prove(op, n, hints=hints)
    prove(make_op("aten.group_norm.default", [T(4, 8, 3), groups]), n)


def statistics(channels: int) -> list[TensorType]:
    return [T(channels, grad=False)] * 2


def batch_norm(shape: tuple[int, ...], training: bool, tracked: bool = True) -> Op:
    c = shape[1]
    stats = statistics(c) if tracked else [None, None]
    args = [T(*shape), T(c), T(c), *stats, training, 0.1, 1e-5, False]
    return make_op("aten.batch_norm.default", args)


def positive_variance(op: Op, at: int = 4) -> object:
    """Running variances must not be negative where they are used."""
    import torch

    def make(rng: torch.Generator) -> list[torch.Tensor | None]:
        drawn: list[torch.Tensor | None] = [None] * len(op.operands)
        drawn[at] = torch.rand(op.operands[at].type.shape, generator=rng, dtype=torch.float64) + 0.5
        return drawn

    return make


@few
@given(batch=size, channels=size, space=shapes(0, 2), n=ranks)
def test_batch_norm(batch: int, channels: int, space: tuple[int, ...], n: int) -> None:
    op = batch_norm((batch + 1, channels, *space), training=True)
    prove(op, n)


def test_batch_norm_ways() -> None:
    op = batch_norm((4, 8, 4), training=True)
    channels = "S(1), S(0), S(0), S(0), S(0) -> S(1)"
    batch = "S(0), V, V, R, R -> S(0)"
    space = "S(2), V, V, R, R -> S(2)"
    assert {channels, f"{batch} [sync]", f"{space} [sync]"} <= offered(op, 4)
    evaluated = batch_norm((4, 8, 4), training=False)
    assert {channels, batch, space} <= offered(evaluated, 4)
    prove(evaluated, 4, make_inputs=positive_variance(evaluated))
    untracked = batch_norm((4, 8, 4), training=True, tracked=False)
    assert "S(0), V, V -> S(0) [sync]" in offered(untracked, 4)
    prove(untracked, 4)


def test_batch_norm_on_a_further_axis() -> None:
    """Statistics are shared over both axes; the first has one rank in this proof."""
    from autoshard.placement import registry
    from autoshard.runtime.mesh import Mesh, set_current

    set_current(Mesh({"dp": 1, "tp": 1}))
    args = [T(4, 8, 3), T(8), T(8), *statistics(8), True, 0.1, 1e-5]
    op = make_op("autoshard.batch_norm", args, {"axes": ("dp",)})
    prove(op, 4)
    (split,) = (s for s in registry.strategies(op, 4) if s.inputs[0].dim == 0)
    assert registry.localise(op, split, "tp", 4).keywords["axes"] == ("dp", "tp")


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("n", [2, 4])
def test_instance_norm(tracked: bool, n: int) -> None:
    stats = statistics(8) if tracked else [None, None]
    args = [T(4, 8, 3), T(8), T(8), *stats, True, 0.1, 1e-5, False]
    op = make_op("aten.instance_norm.default", args)
    dims = {s.inputs[0].dim for s in prove(op, n) if s.splits_work}
    assert dims == ({1} if tracked else {0, 1})
