"""Each rewrite on small graphs: what it inserts, shares, drops and refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from plans import greedy, make_plan
from torch import Tensor, nn

from autoshard.capture import capture, run_graph
from autoshard.errors import InternalError, OptionError
from autoshard.ir import Graph, Op, Program, TensorType, Value
from autoshard.passes import stage_graphs
from autoshard.passes.apply_axis import apply_axis
from autoshard.passes.base import whole
from autoshard.passes.cast import cast_program
from autoshard.passes.clean_up import clean
from autoshard.plan.plan import Assignment, Recompute
from autoshard.verify import verify


def value(name: str, *shape: int, gradient: bool = True) -> Value:
    return Value(name, TensorType(shape, torch.float64, differentiable=gradient))


def linear(x: Value, w: Value, out: str) -> Op:
    y = value(out, *x.type.shape[:-1], w.type.shape[0])
    return Op(out, "aten.linear.default", (x, w), (), (y,))


@pytest.fixture(autouse=True)
def _full_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOSHARD_VERIFY", "2")


@pytest.fixture
def two_uses() -> Graph:
    """``x`` feeds two linears."""
    x, a, b = value("x", 4, 8), value("a", 6, 8), value("b", 6, 8)
    first, second = linear(x, a, "y"), linear(x, b, "z")
    return Graph((x,), (a, b), (first, second), (first.output, second.output))


COLUMN = "V, S(0) -> S(1)"


def column(graph: Graph, x: str = "R", **outputs: str) -> Assignment:
    return Assignment(
        ops={op.name: COLUMN for op in graph.ops},
        inputs={"x": x},
        parameters={"a": "S(0)", "b": "S(0)"},
        outputs=outputs or {"y": "S(1)", "z": "S(1)"},
    )


def test_a_conversion_is_made_once_and_shared(two_uses: Graph) -> None:
    local = apply_axis(two_uses, column(two_uses), "tp", 2)
    targets = [op.target for op in local.ops]
    assert targets == ["autoshard.all_reduce_gradient", *["aten.linear.default"] * 2]
    assert local.ops[1].operands[0] == local.ops[2].operands[0] == local.ops[0].output
    assert [p.type.shape for p in local.parameters] == [(3, 8), (3, 8)]
    assert [v.type.shape for v in local.outputs] == [(4, 3), (4, 3)]


def test_a_converted_output_keeps_its_name(two_uses: Graph) -> None:
    local = apply_axis(two_uses, column(two_uses, y="V", z="S(1)"), "tp", 2)
    verify(local, "test", {"tp": 2})
    assert [v.name for v in local.outputs] == ["y", "z"]
    gather = local.producers()["y"]
    assert gather.target == "autoshard.all_gather"
    assert gather.args[1:] == (1, 6) and gather.keywords == {"axis": "tp"}


def test_unknown_strategies_and_states_are_refused(two_uses: Graph) -> None:
    wrong = replace(column(two_uses), ops={"y": "S(7) -> S(9)", "z": COLUMN})
    with pytest.raises(InternalError, match=r"op y .* has no strategy"):
        apply_axis(two_uses, wrong, "tp", 2)
    with pytest.raises(InternalError, match="no state for %x"):
        apply_axis(two_uses, replace(column(two_uses), inputs={}), "tp", 2)
    with pytest.raises(InternalError, match="no strategy for op z"):
        apply_axis(two_uses, replace(column(two_uses), ops={"y": COLUMN}), "tp", 2)


def test_two_splits_of_one_dim_go_through_the_whole() -> None:
    x = value("x", 4, 12)
    y = value("y", 4, 12)
    graph = Graph((x,), (), (Op("y", "aten.relu.default", (x,), (), (y,)),), (y,))
    assignment = Assignment(
        ops={"y": "S(1) -> S(1)"}, inputs={"x": "S(1;4,8)"}, parameters={}, outputs={"y": "S(1)"}
    )
    local = apply_axis(graph, assignment, "tp", 2)
    assert [op.target.split(".")[1] for op in local.ops] == ["all_gather", "split_varying", "relu"]
    assert local.ops[0].args[1:] == (1, 12, (4, 8))


def test_clean_up_keeps_the_function_and_what_is_random() -> None:
    x = value("x", 4, 4)

    def op(name: str, target: str, *args: object) -> Op:
        return Op(name, f"aten.{target}", args, (), (value(name, 4, 4),))

    a, b = op("a", "relu.default", x), op("b", "relu.default", x)
    c = op("c", "dropout.default", a.output, 0.5, True)
    d = op("d", "dropout.default", b.output, 0.5, True)
    e = op("e", "mul.Tensor", c.output, d.output)
    dead = op("dead", "exp.default", x)
    ones = (op("one", "mul.Tensor", e.output, 1), op("one_", "mul.Tensor", e.output, 1.0))
    last = op("last", "add.Tensor", ones[0].output, ones[1].output)
    graph = Graph((x,), (), (a, b, c, d, e, dead, *ones, last), (last.output,))
    cleaned = clean(graph)
    verify(cleaned, "clean")
    assert [o.name for o in cleaned.ops] == ["a", "c", "d", "e", "one", "one_", "last"]
    env = {"x": torch.randn(4, 4, dtype=torch.float64)}
    torch.manual_seed(1)
    expected = run_graph(graph, env)
    torch.manual_seed(1)
    assert torch.equal(run_graph(cleaned, env)[0], expected[0])


class Model(nn.Module):
    """Two equal layers, and a skip from the first part to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(4)
        )
        self.head = nn.Linear(8, 16)

    def forward(self, ids: Tensor) -> Tensor:
        skip = x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x + skip)


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), batch["labels"].flatten())


@pytest.fixture(scope="module")
def program() -> Program:
    ids = torch.randint(0, 16, (8, 6))
    return capture(Model(), example_inputs={"ids": ids, "labels": ids}, loss_fn=loss_fn)


def test_values_pass_through_the_stages_in_between(program: Program) -> None:
    graphs = stage_graphs(program, make_plan(program, pp=3))
    first, second, third = graphs.stages
    assert first.sends == second.receives and second.sends == third.receives
    (skip,) = set(second.receives) & set(second.sends)
    taken = {c.bindings[v.name] for c in second.calls for v in graphs.layers[c.layer].graph.inputs}
    assert skip not in taken and set(second.receives) - {skip} <= taken
    made = {n for c in second.calls for n in c.bindings.values()}
    assert set(second.sends) - {skip} <= made
    assert first.receives == () and third.sends == (program.loss,)


def test_targets_are_counted_once_per_step_on_the_last_stage(program: Program) -> None:
    graphs = stage_graphs(program, make_plan(program, pp=2, dp=2, micro_batches=2))
    first, last = graphs.stages
    assert first.prologue is None and last.prologue is not None
    targets = [op.target for op in last.prologue.ops]
    assert "autoshard.count_targets" in targets and "autoshard.all_reduce" in targets
    assert [v.name for v in last.prologue.inputs] == [whole("labels")]
    assert all(op.keywords.get("axis") != "micro" for op in last.prologue.ops)


def test_kept_ops_must_exist(program: Program) -> None:
    plan = make_plan(program, recompute=Recompute(mode="selective", keep=("nothing",)))
    with pytest.raises(InternalError, match="has no ops"):
        stage_graphs(program, plan)


def test_disagreeing_neighbours_are_found(program: Program) -> None:
    plan = make_plan(program, tp=2)
    layer = next(c.name for c in program.classes if c.kind == "layer")
    tensor = plan.layers[layer]["tp"]
    moved = replace(tensor, outputs=dict.fromkeys(tensor.outputs, "S(1)"))
    layers = {**plan.layers, layer: {**plan.layers[layer], "tp": moved}}
    with pytest.raises(InternalError, match=r"hands on %\S+ as S\(1\) but .* expects R"):
        stage_graphs(program, replace(plan, layers=layers))


def test_every_pass_can_be_looked_at(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOSHARD_DUMP", str(tmp_path))
    stage_graphs(program, make_plan(program, dp=2))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0] == "00_split_stages.txt" and names[-1].endswith("clean_up.txt")
    assert "aten.linear.default" in (tmp_path / names[-1]).read_text()


def test_mixed_precision_is_that_of_autocast() -> None:
    torch.manual_seed(0)
    model = Model()
    ids = torch.randint(0, 16, (8, 6))
    batch = {"ids": ids, "labels": ids}
    program = capture(model, example_inputs=batch, loss_fn=loss_fn)
    cast = cast_program(program, "bf16")
    for c in cast.classes:
        verify(c.graph, c.name)
        linears = [op for op in c.graph.ops if op.target == "aten.linear.default"]
        assert all(v.type.dtype == torch.bfloat16 for op in linears for v in op.operands)
        assert all(p.type.dtype == torch.float32 for p in c.graph.parameters)
    from autoshard.capture import execute

    loss = execute(cast, model, batch)
    loss.backward()
    ours = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_fn(model(ids), batch)
    expected.backward()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-3, atol=1e-3)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=2e-2, atol=2e-3, msg=name)


def test_unknown_precision(program: Program) -> None:
    with pytest.raises(OptionError, match="expected a precision among bf16 but got 'fp4'"):
        cast_program(program, "fp4")


def test_greedy_assignments_are_legal_for_any_degree(program: Program) -> None:
    for c in program.classes:
        for n in (2, 4):
            local = apply_axis(c.graph, greedy(c.graph, n, {"*weight": 0}), "tp", n)
            verify(local, c.name, {"tp": n})
