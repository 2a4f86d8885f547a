"""Pointwise ops: any dim that is not broadcast splits; addends pass only where linear."""

from __future__ import annotations

import pytest
import torch
from drawn import few, offered, ranks, shapes
from hypothesis import example, given
from hypothesis import strategies as st
from rule_harness import I, T, integers, make_op, prove

from autoshard.ir import TensorType
from autoshard.placement.rules import elementwise

B = torch.bool
NUMBERS = {"clamp": (-0.5, 0.5), "clamp_min": (0.1,), "clamp_max": (0.1,), "threshold": (0.1, 0.2)}
IN_UNIT = {"asin", "acos", "atanh", "erfinv", "logit"}
POSITIVE = {"log", "log2", "log10", "log1p", "sqrt", "rsqrt", "lgamma", "digamma"}
TRUE = {"logical_not", "isnan", "isinf", "isfinite", "signbit"}


@pytest.mark.parametrize("name", (*elementwise._SMOOTH_FUNCTIONS, *elementwise._FUNCTIONS))
@few
@example(shape=(4, 8), n=4)
@given(shape=shapes(), n=ranks)
def test_functions(name: str, shape: tuple[int, ...], n: int) -> None:
    kind = I(*shape) if name == "bitwise_not" else T(*shape)
    op = make_op(f"aten.{name}.default", [kind, *NUMBERS.get(name, ())])

    def make(rng: torch.Generator) -> list[torch.Tensor]:
        unit = torch.rand(shape, generator=rng, dtype=torch.float64)
        return [unit * 0.9 + (0.05 if name in IN_UNIT else 0.5)]

    prove(op, n, make_inputs=make if name in IN_UNIT | POSITIVE | {"acosh"} else None)


@st.composite
def broadcast_pairs(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes that broadcast; either may lack leading dims or have ones."""
    whole = draw(shapes(1, 3))
    pair = []
    for _ in range(2):
        kept = [s if draw(st.booleans()) or s == 1 else 1 for s in whole]
        pair.append(tuple(kept[draw(st.integers(0, len(kept))) :]))
    return pair[0], pair[1]


BINARY = [
    "add.Tensor", "sub.Tensor", "rsub.Tensor", "mul.Tensor", "div.Tensor", "pow.Tensor_Tensor",
    "maximum.default", "minimum.default", "max.other", "min.other", "fmax.default", "fmin.default",
    "atan2.default", "hypot.default", "logaddexp.default", "xlogy.Tensor", "remainder.Tensor",
    "fmod.Tensor", "eq.Tensor", "ne.Tensor", "lt.Tensor", "le.Tensor", "gt.Tensor", "ge.Tensor",
    "isclose.default",
]  # fmt: skip


@pytest.mark.parametrize("name", BINARY)
@few
@given(pair=broadcast_pairs(), n=ranks)
def test_of_two(name: str, pair: tuple[tuple[int, ...], ...], n: int) -> None:
    op = make_op(f"aten.{name}", [T(*pair[0]), T(*pair[1])])

    def positive(rng: torch.Generator) -> list[torch.Tensor]:
        return [torch.rand(s, generator=rng, dtype=torch.float64) + 0.5 for s in pair]

    prove(op, n, make_inputs=positive)


@pytest.mark.parametrize("name", BINARY)
def test_of_two_offers_splits(name: str) -> None:
    """The same ops where something splits for certain."""
    op = make_op(f"aten.{name}", [T(4, 8), T(8)])
    assert "S(0), V -> S(0)" in offered(op, 4)
    prove(
        op, 4, make_inputs=lambda rng: [torch.rand(4, 8).double() + 1, torch.rand(8).double() + 1]
    )


NUMBER = [
    ("add.Tensor", 2.0), ("add.Scalar", 2.0), ("sub.Scalar", 2.0), ("rsub.Scalar", 2.0),
    ("mul.Scalar", 2.0), ("mul.Tensor", 3), ("div.Scalar", 2.0), ("div.Tensor", 2.0),
    ("pow.Tensor_Scalar", 2), ("remainder.Scalar", 2.0), ("fmod.Scalar", 2.0),
    *((f"{c}.Scalar", 0.0) for c in ("eq", "ne", "lt", "le", "gt", "ge")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "number"), NUMBER)
@pytest.mark.parametrize("n", [2, 4])
def test_with_a_number(name: str, number: float, n: int) -> None:
    op = make_op(f"aten.{name}", [T(2, 4, 8), number])
    prove(op, n)
    linear = name.split(".")[0] in {"mul", "div"}
    assert ("P -> P" in offered(op, n)) == linear


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("neg.default", [T(4, 8)], {}),
        ("negative.default", [T(4, 8)], {}),
        ("positive.default", [T(4, 8)], {}),
        ("pow.Scalar", [2.0, T(4, 8)], {}),
        ("remainder.Scalar_Tensor", [2.0, T(4, 8, grad=False)], {}),
        ("div.Tensor_mode", [T(4, 8), T(8)], {"rounding_mode": "floor"}),
        ("div.Scalar_mode", [T(4, 8), 0.3], {"rounding_mode": "trunc"}),
        ("round.decimals", [T(4, 8)], {"decimals": 1}),
        ("add.Tensor", [T(4, 8), T(4, 8)], {"alpha": 0.5}),
        ("sub.Tensor", [T(4, 8), T(8)], {"alpha": 2}),
        ("clamp.Tensor", [T(4, 8), T(8), T(4, 1)], {}),
        ("clamp_min.Tensor", [T(4, 8), T(8)], {}),
        ("clamp_max.Tensor", [T(4, 8), T(8)], {}),
        ("lerp.Scalar", [T(4, 8), T(4, 8), 0.3], {}),
        ("lerp.Tensor", [T(4, 8), T(8), T(4, 1)], {}),
        ("addcmul.default", [T(4, 8), T(4, 8), T(8)], {"value": 0.5}),
        ("addcdiv.default", [T(4, 8), T(4, 8), T(8)], {"value": 0.5}),
        ("glu.default", [T(4, 8, 6)], {}),
        ("glu.default", [T(4, 6, 8), 1], {}),
        ("prelu.default", [T(4, 8, 2), T(8)], {}),
        ("prelu.default", [T(4, 8, 2), T(1)], {}),
        ("gelu.default", [T(4, 8)], {"approximate": "tanh"}),
        ("to.dtype", [T(4, 8), torch.float64], {}),
        ("to.dtype_layout", [T(4, 8)], {"dtype": torch.float64}),
        ("to.device", [T(4, 8), torch.device("cpu"), torch.float64], {}),
        ("to.other", [T(4, 8), T(3, 5)], {}),
        ("type_as.default", [T(4, 8), T(2, 2, 2, 2)], {}),
        ("_to_copy.default", [T(4, 8)], {"dtype": torch.float64}),
        ("to.dtype", [T(4, 8), torch.int64], {}),
        ("to.dtype", [I(4, 8), torch.float64], {}),
    ],
)
@pytest.mark.parametrize("n", [2, 4])
def test_others(name: str, args: list[object], kwargs: dict[str, object], n: int) -> None:
    prove(make_op(f"aten.{name}", args, kwargs), n)


WHOLE_NUMBERS = ("bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__",
                 "__lshift__", "__rshift__")  # fmt: skip


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_bits(name: str) -> None:
    for args in ([I(4, 8), I(8)], [T(4, 8, dtype=B), T(4, 1, dtype=B)]):
        if "shift" not in name or args[0].dtype != B:
            prove(make_op(f"aten.{name}.Tensor", args), 4)
    op = make_op(f"aten.{name}.Scalar", [I(4, 8), 3])
    prove(op, 2, make_inputs=integers(9)(op))


@pytest.mark.parametrize(("overload", "divisor"), [("default", T(8, grad=False)), ("Scalar", 3)])
def test_floor_divide(overload: str, divisor: object) -> None:
    op = make_op(f"aten.floor_divide.{overload}", [T(4, 8, grad=False), divisor])
    prove(op, 4)


@pytest.mark.parametrize("name", ["and", "or", "xor"])
def test_logic(name: str) -> None:
    prove(make_op(f"aten.logical_{name}.default", [T(4, 8, dtype=B), T(8, dtype=B)]), 4)


def held(*shape: int) -> TensorType:
    return T(*shape, grad=False)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        *((f"{name}_.Tensor", [held(4), held(4)]) for name in ("add", "sub", "mul", "div")),
        *((f"{name}_.Scalar", [held(4), 2.0]) for name in ("add", "sub", "mul", "div", "fill")),
        ("fill_.Tensor", [held(4), held()]),
        ("copy_.default", [held(4), held(4)]),
        ("lerp_.Scalar", [held(4), held(4), 0.1]),
        ("lerp_.Tensor", [held(4), held(4), held(4)]),
        ("zero_.default", [held(4)]),
        ("clamp_.default", [held(4), 0.0]),
        ("add_.Tensor", [I(), 1]),
    ],
)
def test_buffers_are_updated_on_every_rank(name: str, args: list[object]) -> None:
    op = make_op(f"aten.{name}", args)
    (strategy,) = prove(op, 2, whole_only=True)
    assert not strategy.splits_work


def test_what_is_linear() -> None:
    """Addends pass jointly through a sum, in one factor of a product, and in a dividend."""
    pair = [T(4, 8), T(4, 8)]
    assert {s for s in offered(make_op("aten.add.Tensor", pair), 2) if "P" in s} == {"P, P -> P"}
    product = {s for s in offered(make_op("aten.mul.Tensor", pair), 2) if "P" in s}
    assert product == {"P, V -> P", "V, P -> P"}
    quotient = {s for s in offered(make_op("aten.div.Tensor", pair), 2) if "P" in s}
    assert quotient == {"P, V -> P"}
    assert "P -> P" in offered(make_op("aten.to.dtype", [T(4), torch.float64]), 2)
    assert "P -> P" not in offered(make_op("aten.to.dtype", [T(4), torch.int64]), 2)
    assert not any("P" in s for s in offered(make_op("aten.relu.default", [T(4)]), 2))


def test_a_vocabulary_that_does_not_divide() -> None:
    """Capped logits stay split: the padding is ignored later and its gradient stays zero."""
    for op in (
        make_op("aten.tanh.default", [T(3, 7)]),
        make_op("aten.div.Tensor", [T(3, 7), 30.0]),
        make_op("aten.add.Tensor", [T(3, 7), T(7)]),
        make_op("aten.to.dtype", [T(3, 7), torch.float64]),
    ):
        assert any("S(1)" in s for s in offered(op, 4))
        prove(op, 4)
    assert "S(1) -> S(1)" not in offered(make_op("aten.log.default", [T(3, 7)]), 4)


def test_one_tensor_twice() -> None:
    x = make_op("aten.relu.default", [T(4, 8)]).output
    prove(make_op("aten.mul.Tensor", [x, x]), 2)
