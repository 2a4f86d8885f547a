"""The verifier names the pass and the op that break a graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autoshard.errors import InternalError
from autoshard.ir import Graph, Op, TensorType, Value
from autoshard.verify import verify


def value(name: str, *shape: int) -> Value:
    return Value(name, TensorType(shape, torch.float32, differentiable=True))


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Graph:
    monkeypatch.setenv("AUTOSHARD_VERIFY", "2")
    x, w = value("x", 4, 8), value("w", 6, 8)
    y, z = value("y", 4, 6), value("z", 2, 12)
    ops = (
        Op("y", "aten.linear.default", (x, w), (), (y,)),
        Op("z", "aten.view.default", (y, (2, 12)), (), (z,)),
    )
    return Graph((x,), (w,), ops, (z,))


def test_a_legal_graph_passes(graph: Graph) -> None:
    verify(graph, "pass: layer")


def test_a_literal_that_is_not_local(graph: Graph) -> None:
    wrong = replace(graph.ops[1], args=(graph.ops[0].output, (3, 8)))
    with pytest.raises(InternalError, match=r"pass: layer: op z returns f32\[3, 8\] but declares"):
        verify(replace(graph, ops=(graph.ops[0], wrong)), "pass: layer")


def test_a_call_that_pytorch_refuses(graph: Graph) -> None:
    wrong = replace(graph.ops[1], args=(graph.ops[0].output, (5, 5)))
    with pytest.raises(InternalError, match="op z fails"):
        verify(replace(graph, ops=(graph.ops[0], wrong)), "pass")


def test_use_before_definition(graph: Graph) -> None:
    with pytest.raises(InternalError, match="%y, which is not defined"):
        verify(replace(graph, ops=graph.ops[::-1]), "pass")


def test_an_operand_of_another_type(graph: Graph) -> None:
    wrong = graph.ops[1].map(lambda v: value(v.name, 4, 3))
    with pytest.raises(InternalError, match=r"y: f32\[4, 3\], which is defined as f32\[4, 6\]"):
        verify(replace(graph, ops=(graph.ops[0], wrong)), "pass")


def test_names_are_unique(graph: Graph) -> None:
    twice = replace(graph.ops[1], name="y")
    with pytest.raises(InternalError, match="two ops are named y"):
        verify(replace(graph, ops=(graph.ops[0], twice)), "pass")
    with pytest.raises(InternalError, match="defines %y again"):
        again = replace(graph.ops[0], name="other")
        verify(replace(graph, ops=(*graph.ops, again)), "pass")


def test_outputs_exist(graph: Graph) -> None:
    with pytest.raises(InternalError, match="outputs take %q"):
        verify(replace(graph, outputs=(value("q", 1),)), "pass")


def conversion(*args: object, out: Value, axis: str | None = "tp") -> Graph:
    x = value("x", 4, 8)
    kwargs = (("axis", axis),) if axis else ()
    name, *literals = args
    op = Op("c", f"autoshard.{name}", (x, *literals), kwargs, (out,))
    return Graph((x,), (), (op,), (out,))


def test_conversions_name_an_axis(graph: Graph) -> None:
    with pytest.raises(InternalError, match="names no axis"):
        verify(conversion("all_reduce", out=value("c", 4, 8), axis=None), "pass")


@pytest.mark.parametrize(
    ("args", "right"),
    [
        (("all_reduce",), (4, 8)),
        (("split", 1), (4, 4)),
        (("reduce_scatter", 0), (2, 8)),
        (("all_gather", 1, 16), (4, 16)),
        (("all_gather", 1, 15), (4, 15)),
        (("all_to_all", 0, 1, 8), (8, 4)),
    ],
)
def test_shapes_of_conversions(graph: Graph, args: tuple, right: tuple[int, ...]) -> None:
    verify(conversion(*args, out=value("c", *right)), "pass", {"tp": 2})
    with pytest.raises(InternalError, match="op c returns"):
        verify(conversion(*args, out=value("c", 3, 3)), "pass", {"tp": 2})


def test_levels(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(graph.ops[1], args=(graph.ops[0].output, (3, 8)))
    misdeclared = replace(graph, ops=(graph.ops[0], wrong))
    monkeypatch.setenv("AUTOSHARD_VERIFY", "1")
    verify(misdeclared, "pass")
    with pytest.raises(InternalError):
        verify(replace(graph, ops=graph.ops[::-1]), "pass")
    monkeypatch.setenv("AUTOSHARD_VERIFY", "0")
    verify(replace(graph, ops=graph.ops[::-1]), "pass")
