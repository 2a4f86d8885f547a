"""Losses: samples give addends, classes give the whole loss, means weigh each rank's part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from drawn import few, more, offered, ranks, shapes, size
from hypothesis import given
from hypothesis import strategies as st
from rule_harness import I, T, integers, make_op, prove

from autoshard.ir import Op, resolve
from autoshard.placement.rules.losses import MEAN, NONE, SUM

CROSS_ENTROPY = "aten.cross_entropy_loss.default"
IGNORED = 1
HELD = T(8, grad=False)


def targets(op: Op, classes: int) -> Callable[[torch.Generator], list[torch.Tensor | None]]:
    """Class numbers; one that is ignored among them, class weights that are positive."""

    def make(rng: torch.Generator) -> list[torch.Tensor | None]:
        drawn: list[torch.Tensor | None] = []
        for value in op.operands:
            if value.type.dtype == torch.int64:
                drawn.append(torch.randint(0, classes, value.type.shape, generator=rng))
            elif value.type.ndim == 1 and not value.type.differentiable:
                drawn.append(torch.rand(value.type.shape, generator=rng, dtype=torch.float64) + 0.1)
            else:
                drawn.append(None)
        return drawn

    return make


@more
@given(
    samples=size,
    classes=st.sampled_from([2, 5, 7, 8]),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.2]),
    reduction=st.sampled_from([NONE, SUM, SUM, MEAN]),
    n=ranks,
)
def test_cross_entropy(
    samples: int, classes: int, weighted: bool, smoothing: float, reduction: int, n: int
) -> None:
    weight = T(classes, grad=False) if weighted else None
    args = [T(samples, classes), I(samples), weight, reduction, IGNORED, smoothing]
    op = make_op(CROSS_ENTROPY, args)
    prove(op, n, make_inputs=targets(op, classes))


@pytest.mark.parametrize("classes", [8, 7])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("n", [2, 4])
def test_split_classes(classes: int, weighted: bool, smoothing: float, n: int) -> None:
    weight = T(classes, grad=False) if weighted else None
    op = make_op(CROSS_ENTROPY, [T(4, classes), I(4), weight, SUM, IGNORED, smoothing])
    rest = ", R" if weighted else ""
    assert {f"S(1), R{rest} -> R [vocab_parallel]", f"S(0), S(0){rest} -> P"} <= offered(op, n)
    prove(op, n, make_inputs=targets(op, classes))


def test_mean_cross_entropy_never_splits() -> None:
    """Ranks that ignore different numbers of targets must not average their averages."""
    op = make_op(CROSS_ENTROPY, [T(4, 8), I(4)])
    assert offered(op, 4) == {"R, R -> R", "V, R -> V"}


@pytest.mark.parametrize("reduction", [NONE, SUM])
def test_many_dims(reduction: int) -> None:
    op = make_op(CROSS_ENTROPY, [T(4, 8, 4, 2), I(4, 4, 2), None, reduction])
    out = {NONE: ("S(0)", "S(1)"), SUM: ("P", "P")}[reduction]
    assert {f"S(0), S(0) -> {out[0]}", f"S(2), S(1) -> {out[1]}"} <= offered(op, 4)
    prove(op, 4, make_inputs=targets(op, 8))
    if reduction == SUM:
        assert "S(1), R -> R [vocab_parallel]" in offered(op, 4)
    one = make_op(CROSS_ENTROPY, [T(8), I(), None, reduction])
    prove(one, 4, whole_only=True)


def test_probabilities() -> None:
    op = make_op(CROSS_ENTROPY, [T(4, 8), T(4, 8), None, SUM])
    assert "S(0), S(0) -> P" in offered(op, 4)
    prove(op, 4)


@pytest.mark.parametrize("name", ["nll_loss", "nll_loss_nd"])
@pytest.mark.parametrize("reduction", [NONE, SUM])
def test_nll(name: str, reduction: int) -> None:
    op = make_op(f"aten.{name}.default", [T(4, 8), I(4), T(8, grad=False), reduction, IGNORED])
    prove(op, 4, make_inputs=targets(op, 8))
    flat = make_op("aten.nll_loss2d.default", [T(4, 8, 4, 2), I(4, 4, 2), None, reduction, IGNORED])
    prove(flat, 4, make_inputs=targets(flat, 8))


def test_split_classes_on_a_further_axis() -> None:
    from autoshard.runtime.mesh import Mesh, set_current

    set_current(Mesh({"cp": 1, "tp": 1}))
    target = "autoshard.vocab_parallel_cross_entropy"
    args = [T(4, 7), I(4), None, IGNORED, 0.1]
    op = make_op(target, args, {"axis": "cp", "size": 7})
    assert offered(op, 4) == {"R, R -> R", "V, R -> V", "S(0), S(0) -> P"}
    prove(op, 4, make_inputs=integers(7)(op))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("n", [2, 4])
def test_count_targets(weighted: bool, n: int) -> None:
    weight = T(5, grad=False) if weighted else None
    op = make_op("autoshard.count_targets", [I(4, 8), weight, IGNORED])
    assert ("S(1), R -> P" if weighted else "S(1) -> P") in offered(op, n)
    if weighted:
        prove(op, n, make_inputs=targets(op, 5))
    else:  # a plain count is float32 whatever the precision
        ids = torch.randint(0, 3, (4, 8), generator=torch.Generator().manual_seed(0))
        count = resolve(op.target)
        assert sum(count(part, None, IGNORED) for part in ids.chunk(n, 1)) == count(ids, None, 1)
        assert count(ids, None, IGNORED) == (ids != IGNORED).sum()


ELEMENTWISE = {
    "mse_loss": {}, "l1_loss": {}, "smooth_l1_loss": {"beta": 0.5}, "huber_loss": {"delta": 0.5},
    "soft_margin_loss": {}, "kl_div": {"log_target": True},
    "binary_cross_entropy_with_logits": {},
}  # fmt: skip


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("reduction", [NONE, SUM])
@few
@given(shape=shapes(1, 3), n=ranks)
def test_elementwise(name: str, reduction: int, shape: tuple[int, ...], n: int) -> None:
    keywords = {"reduction": reduction, **ELEMENTWISE[name]}
    target = T(*shape, grad=name in {"mse_loss", "l1_loss"})
    prove(make_op(f"aten.{name}.default", [T(*shape), target], keywords), n)


@pytest.mark.parametrize("reduction", [NONE, SUM])
@few
@given(shape=shapes(1, 3), n=ranks)
def test_binary_cross_entropy(reduction: int, shape: tuple[int, ...], n: int) -> None:
    same_types = make_op("aten.mse_loss.default", [T(*shape)] * 2, {"reduction": reduction})
    op = replace(same_types, target="aten.binary_cross_entropy.default")

    def probabilities(rng: torch.Generator) -> list[torch.Tensor]:
        drawn = torch.rand((2, *shape), generator=rng, dtype=torch.float64)
        return list(drawn * 0.9 + 0.05)

    prove(op, n, make_inputs=probabilities)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("binary_cross_entropy_with_logits", [T(4, 8), T(4, 8), HELD, HELD, SUM]),
        ("binary_cross_entropy_with_logits", [T(4, 8), T(4, 8), T(4, 1, grad=False), None, SUM]),
        ("poisson_nll_loss", [T(4, 8), T(4, 8), True, False, 1e-8, SUM]),
        ("hinge_embedding_loss", [T(4, 8), T(4, 8, grad=False), 1.0, SUM]),
        ("margin_ranking_loss", [T(4, 8), T(4, 8), HELD, 0.1, SUM]),
        ("mse_loss", [T(4, 8), T(4, 1), SUM]),
        ("cosine_embedding_loss", [T(4, 8), T(4, 8), T(4, grad=False), 0.1, SUM]),
        ("triplet_margin_loss", [T(4, 8), T(4, 8), T(4, 8), 0.1, 2.0, 1e-6, False, NONE]),
    ],
)
@pytest.mark.parametrize("n", [2, 4])
def test_other_losses(name: str, args: list[object], n: int) -> None:
    found = prove(make_op(f"aten.{name}.default", args), n)
    assert any(s.splits_work for s in found)


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "kl_div", "cosine_embedding_loss"])
def test_means_stay_whole(name: str) -> None:
    """Capture writes them as sums; one that is left is not split."""
    labels = [T(4, grad=False)] if "cosine" in name else []
    found = prove(make_op(f"aten.{name}.default", [T(4, 8), T(4, 8), *labels]), 2)
    assert not any(s.splits_work for s in found)
