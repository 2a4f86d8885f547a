"""The proof must fail for every kind of wrong rule, and pass for the right one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from rule_harness import I, RuleError, T, integers, make_op, prove
from thread_ranks import run_on_threads

from autoshard.ir import Op, TensorType
from autoshard.placement import registry
from autoshard.placement.conversion import conversion
from autoshard.placement.state import P, R, S, State, V
from autoshard.placement.strategy import Hints, Strategy, signature, strategies_of
from autoshard.runtime.collectives import all_reduce

Plant = Callable[[str, Callable[[Op], Iterable[Strategy]]], None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Replace the rule of a target by a list of strategies, without any localiser."""

    def plant_rule(target: str, strategies: Callable[[Op], Iterable[Strategy]]) -> None:
        registry._load()

        def rule(op: Op, n: int, hints: Hints) -> Iterable[Strategy]:
            return strategies(op)

        monkeypatch.setitem(registry._strategies, target, rule)
        monkeypatch.delitem(registry._localisers, target, raising=False)

    return plant_rule


def only(inputs: Iterable[State], outputs: Iterable[State]) -> Callable[[Op], list[Strategy]]:
    return lambda op: [Strategy(tuple(inputs), tuple(outputs))]


LINEAR = ("aten.linear.default", [T(2, 3, 8), T(6, 8), T(6)])
LINEAR_WRONG = [
    ("output of a column split is whole", (V, S(0), S(0)), V),
    ("output of a column split is split elsewhere", (V, S(0), S(0)), S(1)),
    ("input of a column split gets addends", (R, S(0), S(0)), S(2)),
    ("weight under a split batch gets addends", (S(0), R, R), S(0)),
    ("bias is left whole under a column split", (V, S(0), V), S(2)),
    ("bias of a row split is added n times", (S(2), S(1), V), P),
    ("output of a row split is a sum, not whole", (S(2), S(1), P), R),
    ("gradients of replicated operands are whole", (V, V, V), R),
    ("a bias is no place for an addend alone", (V, V, P), P),
    ("replicated output of varying operands", (R, R, R), V),
]


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(
    ("inputs", "output"),
    [
        ((R, R, R), R),
        ((V, V, V), V),
        ((S(0), V, V), S(0)),
        ((S(2), S(1), P), P),
        ((P, V, P), P),
        ((V, P, P), P),
        ((V, S(0), S(0)), S(2)),
    ],
)
def test_right_strategies_pass(
    plant: Plant, n: int, inputs: tuple[State, ...], output: State
) -> None:
    plant(LINEAR[0], only(inputs, [output]))
    op = make_op(LINEAR[0], [T(4, 3, 8), T(8, 8), T(8)])
    assert len(prove(op, n)) == 1


@pytest.mark.parametrize(("why", "inputs", "output"), LINEAR_WRONG)
def test_wrong_states_are_caught(
    plant: Plant, why: str, inputs: tuple[State, ...], output: State
) -> None:
    plant(LINEAR[0], only(inputs, [output]))
    with pytest.raises(RuleError):
        prove(make_op(*LINEAR), 2)


@pytest.mark.parametrize(
    ("target", "args", "text"),
    [
        ("aten.linear.default", [T(2, 4, 8), T(8, 8)], "bsi,io->bso"),  # wrong letters
        ("aten.softmax.int", [T(4, 8), -1], "ab->ab"),  # the normalised dim is not fixed
        ("aten.transpose.int", [T(4, 4), 0, 1], "ab->ab"),
        ("aten.amax.default", [T(4, 8), [1]], "ab->a"),  # a maximum is not a sum
    ],
)
def test_wrong_signatures_are_caught(
    plant: Plant, target: str, args: list[object], text: str
) -> None:
    plant(target, lambda op: strategies_of(signature(text), op, 2, {}))
    with pytest.raises(RuleError):
        prove(make_op(target, args), 2)


def test_wrong_linearity_is_caught(plant: Plant) -> None:
    sig = signature("ab->ab", linear=[(0,)])
    plant("aten.relu.default", lambda op: strategies_of(sig, op, 2, {}))
    with pytest.raises(RuleError, match="P -> P"):
        prove(make_op("aten.relu.default", [T(4, 4)]), 2)


def test_padding_may_hold_anything_but_gets_no_gradient(plant: Plant) -> None:
    padded = signature("ab->ab", padded="ab")
    plant("aten.exp.default", lambda op: strategies_of(padded, op, 2, {}))
    assert len(prove(make_op("aten.exp.default", [T(3, 5)]), 2)) == 4
    summed = signature("ab->a", padded="b")
    plant("aten.sum.dim_IntList", lambda op: strategies_of(summed, op, 2, {}))
    with pytest.raises(RuleError, match=r"S\(1\)"):
        prove(make_op("aten.sum.dim_IntList", [T(2, 5), [1]]), 2)


def test_missing_localisation_is_caught(plant: Plant) -> None:
    plant("aten.view.default", only([S(0)], [S(0)]))
    with pytest.raises(RuleError, match="under"):
        prove(make_op("aten.view.default", [T(4, 6), [4, 2, 3]]), 2)


def test_a_varying_value_needs_a_gradient(plant: Plant) -> None:
    plant("aten.embedding.default", only([V, V], [V]))
    op = make_op("aten.embedding.default", [T(5, 4), I(2, 3)])
    with pytest.raises(RuleError, match="no gradient"):
        prove(op, 2, make_inputs=integers(5)(op))


def test_mutated_operands_are_compared(plant: Plant) -> None:
    stats = T(4, grad=False)
    op = make_op(
        "aten.batch_norm.default", [T(4, 4, 3), T(4), T(4), stats, stats, True, 0.1, 1e-5, False]
    )
    channels = (S(1), S(0), S(0), S(0), S(0))
    plant("aten.batch_norm.default", only(channels, [S(1)]))
    prove(op, 2)
    whole = lambda op: [Strategy((S(0), V, V, R, R), (S(0),))]  # noqa: E731  statistics of a part
    plant("aten.batch_norm.default", whole)
    with pytest.raises(RuleError):
        prove(op, 2)


def test_wrong_running_statistics_alone_are_caught(plant: Plant) -> None:
    op = make_op("aten.add_.Tensor", [T(4, grad=False), T(4, grad=False)])
    plant("aten.add_.Tensor", only([R, S(0)], [R]))
    with pytest.raises(RuleError):
        prove(op, 2)
    plant("aten.add_.Tensor", only([S(0), S(0)], [S(0)]))
    assert prove(op, 2)


def test_blocks_are_told_apart(plant: Plant) -> None:
    op = make_op("aten.relu.default", [T(12)])
    plant("aten.relu.default", only([S(0, (8, 4))], [S(0, (8, 4))]))
    assert prove(op, 4)
    plant("aten.relu.default", only([S(0, (8, 4))], [S(0)]))
    with pytest.raises(RuleError):
        prove(op, 4)


PAIRS = [
    (a, b) for a in (R, V, S(0), S(1, (4, 8)), P) for b in (R, V, S(0), S(1, (4, 8)), P) if a != b
]


def _convert(source: State, target: State, function: str) -> registry.LocaliseRule:
    """``clone`` written locally as a conversion."""

    def localise(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
        shape = op.output.type.shape
        literals: tuple[object, ...] = ()
        if source.is_split and target.is_split:
            sizes = (shape[source.dim], source.blocks, target.blocks)
            literals = (source.dim, target.dim, *sizes)
        elif source.is_split:
            literals = (source.dim, shape[source.dim], source.blocks)
        elif target.is_split:
            literals = (target.dim, target.blocks)
        target_name = f"autoshard.{function}"
        return replace(
            local, target=target_name, args=(local.args[0], *literals), kwargs=(("axis", axis),)
        )

    return localise


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_conversions_on_thread_ranks(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, source: State, target: State
) -> None:
    """Every collective does, forward and backward, what the states on both sides promise."""
    plant("aten.clone.default", only([source], [target]))
    way = conversion(source, target)
    assert way is not None
    rule = _convert(source, target, way.function)
    monkeypatch.setitem(registry._localisers, "aten.clone.default", rule)
    prove(make_op("aten.clone.default", [T(8, 12)]), 4)


@pytest.mark.parametrize(
    ("source", "target", "function"),
    [
        (P, V, "all_reduce"),  # leaves addends of the gradient apart
        (P, R, "all_reduce_both"),  # n times the gradient
        (R, V, "share_gradient"),
        (S(0), V, "all_gather_replicated"),
        (S(0), R, "all_gather"),
    ],
)
def test_wrong_collectives_are_caught(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, source: State, target: State, function: str
) -> None:
    plant("aten.clone.default", only([source], [target]))
    rule = _convert(source, target, function)
    monkeypatch.setitem(registry._localisers, "aten.clone.default", rule)
    with pytest.raises(RuleError):
        prove(make_op("aten.clone.default", [T(8, 12)]), 2)


def test_a_rank_that_fails_does_not_hang_the_others() -> None:
    def work(rank: int) -> torch.Tensor:
        if rank == 1:
            raise ValueError("rank 1 is gone")
        return all_reduce(torch.ones(2), axis="tp")

    with pytest.raises(ValueError, match="rank 1 is gone"):
        run_on_threads(2, "tp", work)
    assert run_on_threads(2, "tp", lambda rank: rank) == [0, 1]


def test_op_types_are_found_by_running() -> None:
    op = make_op("aten.linear.default", [T(2, 3, 8), T(6, 8), None])
    assert op.output.type == TensorType((2, 3, 6), torch.float64, True, parametric=True)
    assert [v.type.shape for v in op.operands] == [(2, 3, 8), (6, 8)]
