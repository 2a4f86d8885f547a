"""Random ops: types by the harness, numbers with nothing dropped, one mask for all addends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from drawn import few, offered, ranks, shapes
from hypothesis import given
from rule_harness import T, make_op, prove

from autoshard.ir import resolve


@pytest.mark.parametrize("name", ["dropout", "native_dropout", "alpha_dropout"])
@few
@given(shape=shapes(), n=ranks)
def test_nothing_dropped(name: str, shape: tuple[int, ...], n: int) -> None:
    prove(make_op(f"aten.{name}.default", [T(*shape), 0.0, True]), n)
    prove(make_op(f"aten.{name}.default", [T(*shape), 0.5, False]), n)


@pytest.mark.parametrize("name", ["feature_dropout", "feature_alpha_dropout"])
@pytest.mark.parametrize("n", [2, 4])
def test_channels_drop_as_a_whole(name: str, n: int) -> None:
    op = make_op(f"aten.{name}.default", [T(4, 8, 4, 4), 0.0, True])
    dims = {s.inputs[0].dim for s in prove(op, n) if s.splits_work}
    assert dims == {0, 1}


def test_rrelu() -> None:
    prove(make_op("aten.rrelu.default", [T(4, 8), 0.25, 0.25, True]), 4)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("bernoulli.default", {}),
        ("bernoulli.p", {"p": 0.5}),
        ("rand_like.default", {}),
        ("randn_like.default", {}),
        ("randint_like.default", {"high": 5}),
        ("randint_like.low_dtype", {"low": 2, "high": 5}),
    ],
)
def test_drawn_like_a_tensor(name: str, kwargs: dict[str, object]) -> None:
    op = make_op("aten.rand_like.default", [T(4, 8, grad=False)])
    op = replace(op, target=f"aten.{name}", kwargs=tuple(kwargs.items()))
    make = lambda rng: [torch.rand(4, 8, generator=rng, dtype=torch.float64)]  # noqa: E731
    found = prove(op, 4, make_inputs=make, values=False)
    assert {"S(0) -> S(0)", "S(1) -> S(1)"} <= {str(s) for s in found}


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("rand.default", [(4, 8)]),
        ("randn.default", [(4, 8)]),
        ("randint.default", [5, (4, 8)]),
        ("randint.low", [2, 5, (4, 8)]),
        ("normal.float_float", [0.0, 1.0, (4, 8)]),
    ],
)
@pytest.mark.parametrize("n", [2, 4])
def test_sizes_are_local(name: str, args: list[object], n: int) -> None:
    """The harness runs the local op, whose size literal must be that of the part."""
    op = make_op(f"aten.{name}", args, {} if "randint" in name else {"dtype": torch.float64})
    found = prove(op, n, values=False)
    assert {str(s) for s in found} == {" -> R", " -> S(0)", " -> S(1)"}


def test_one_draw_stays_whole() -> None:
    (whole,) = prove(make_op("aten.randperm.default", [8]), 4, values=False, whole_only=True)
    assert str(whole) == " -> R"
    like = make_op("aten.argsort.default", [T(4, 3, grad=False)])
    op = replace(like, target="aten.multinomial.default", args=(*like.args, 3))
    make = lambda rng: [torch.rand(4, 3, generator=rng, dtype=torch.float64)]  # noqa: E731
    (whole,) = prove(op, 4, make_inputs=make, values=False, whole_only=True)
    assert str(whole) == "R -> R"


@pytest.mark.parametrize("name", ["dropout", "native_dropout", "feature_dropout", "alpha_dropout"])
def test_addends_pass_where_one_mask_is_linear(name: str) -> None:
    """Under one seed the dropped addends sum to the dropped sum, else ``P`` is not offered."""
    op = make_op(f"aten.{name}.default", [T(4, 8), 0.5, True])
    function = resolve(op.target)
    rng = torch.Generator().manual_seed(1)
    addends = torch.randn(3, 4, 8, generator=rng, dtype=torch.float64)

    def dropped(x: torch.Tensor) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            result = function(x, 0.5, True)
        first: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return first

    linear = torch.allclose(sum(dropped(a) for a in addends), dropped(addends.sum(0)))
    assert linear == ("P -> P" in offered(op, 2) or "P -> P, P" in offered(op, 2))
    assert linear == (name != "alpha_dropout")
