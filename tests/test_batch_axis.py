"""How the batch is split: by one walk through the program, without communication."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoshard.capture import capture
from autoshard.ir import Program
from autoshard.passes.apply_axis import apply_axis
from autoshard.placement.conversion import is_conversion
from autoshard.plan.batch_axis import BatchSplit, split_batch
from autoshard.plan.local_program import coupling

BATCH = 8


def _program(model: nn.Module, loss_fn: Any = None, **batch: Tensor) -> Program:
    return capture(model.train(), example_inputs=batch, loss_fn=loss_fn)


def _split(program: Program, n: int = 4) -> BatchSplit:
    return split_batch(program, {c.name: c.graph for c in program.classes}, n)


def _of(program: Program, split: BatchSplit, target: str) -> list[str]:
    """The strategies of all ops of one kind."""
    return [
        split.layers[layer.name].ops[op.name]
        for layer in program.classes
        for op in layer.graph.ops
        if op.target.startswith(f"aten.{target}.") or op.target == f"autoshard.{target}"
    ]


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.linear(x).squeeze(1), y)


class TestSamplesAreIndependent:
    def test_the_loss_is_a_sum_of_addends(self) -> None:
        program = _program(Regression(), x=torch.randn(BATCH, 4), y=torch.randn(BATCH))
        split = _split(program)
        assert split.coupled == ()
        outputs = split.layers[program.segments[-1].layer.name].outputs
        assert list(outputs.values()) == ["P"]

    def test_parameters_take_addends_of_gradients(self) -> None:
        program = _program(Regression(), x=torch.randn(BATCH, 4), y=torch.randn(BATCH))
        (layer,) = (c for c in program.classes if c.graph.parameters)
        assert set(_split(program).layers[layer.name].parameters.values()) == {"V"}

    def test_nothing_is_communicated(self) -> None:
        program = _program(Regression(), x=torch.randn(BATCH, 4), y=torch.randn(BATCH))
        split = _split(program)
        for layer in program.classes:
            local = apply_axis(layer.graph, split.layers[layer.name], "dp", 4)
            assert not any(is_conversion(op) for op in local.ops)

    def test_one_sample_each(self) -> None:
        program = _program(Regression(), x=torch.randn(BATCH, 4), y=torch.randn(BATCH))
        assert not _split(program, BATCH).coupled


class ClassToken(nn.Module):
    """A token without samples in front of a sequence with samples."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(1, 4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        tokens = self.token.expand(x.shape[0], -1, -1)
        x = torch.cat([tokens, x], dim=1) + self.positions
        return F.cross_entropy(self.head(x[:, 0]), y)


def test_a_class_token_is_expanded_to_each_ranks_own_samples() -> None:
    program = _program(ClassToken(), x=torch.randn(BATCH, 3, 4), y=torch.randint(0, 2, (BATCH,)))
    split = _split(program)
    assert split.coupled == ()
    assert _of(program, split, "expand") == ["V -> S(0)"]
    assert _of(program, split, "cat") == ["S(0), S(0) -> S(0)"]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(x)
        return hidden.square().mean()


def test_zeros_that_a_recurrence_starts_from_are_made_in_parts() -> None:
    program = _program(Recurrent(), x=torch.randn(BATCH, 3, 4))
    split = _split(program)
    assert split.coupled == ()
    assert _of(program, split, "zeros")
    assert {text.strip() for text in _of(program, split, "zeros")} == {"-> S(1)"}


class Transposed(nn.Module):
    """Sequence first, as nn.MultiheadAttention has it inside."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0].square().mean()


def test_samples_may_be_another_dim_in_between() -> None:
    program = _program(Transposed(), x=torch.randn(BATCH, 3, 8))
    assert _split(program).coupled == ()


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(10, 4, mode="sum")

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).square().mean()


def test_bags_of_one_size_are_split_by_bag() -> None:
    program = _program(Bags(), ids=torch.randint(0, 10, (BATCH, 3)))
    split = _split(program)
    assert split.coupled == ()
    assert _of(program, split, "embedding_bag") == ["V, S(0) -> S(0)"]


class Weighted(nn.Module):
    """The denominator is known before the first micro-batch: it depends on no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.linear(x), y)


def test_how_many_targets_count_is_had_whole() -> None:
    y = torch.tensor([0, 1, -100, -100, 2, -100, 0, 1])
    program = _program(Weighted(), x=torch.randn(BATCH, 4), y=y)
    split = _split(program)
    assert split.coupled == ()
    assert split.layers["shared"].outputs["count_targets"] == "R"
    assert _of(program, split, "div") == ["P, R -> P"]


def _coupled_by_mean(x: Tensor) -> Tensor:
    return (x - x.mean(0)).square().mean()


def _coupled_by_product(x: Tensor) -> Tensor:
    return (x @ x.T).exp().mean()


def _coupled_by_softmax(x: Tensor) -> Tensor:
    return x.softmax(0).square().mean()


def _coupled_by_sort(x: Tensor) -> Tensor:
    return x.sort(0).values[0].square().mean()


class WithLoss(nn.Module):
    def __init__(self, couple: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.couple = couple

    def forward(self, x: Tensor) -> Tensor:
        return self.couple(self.linear(x))  # type: ignore[no-any-return]


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)).exp().mean()


class TestSamplesInteract:
    @pytest.mark.parametrize(
        "couple", [_coupled_by_mean, _coupled_by_product, _coupled_by_softmax, _coupled_by_sort]
    )
    def test_the_op_and_its_line_are_named(self, couple: Any) -> None:
        split = _split(_program(WithLoss(couple), x=torch.randn(BATCH, 4)))
        assert split.layers == {}
        (text,) = split.coupled
        assert "tests/test_batch_axis.py" in text

    def test_batch_norm(self) -> None:
        (text,) = _split(_program(Normalised(), x=torch.randn(BATCH, 4))).coupled
        assert text.startswith("batch_norm in norm")

    def test_a_class_token_of_all_samples(self) -> None:
        """Who asks for parts that cannot be had does not spoil the rest."""
        program = _program(MeanToken(), x=torch.randn(BATCH, 3, 4), y=torch.randn(BATCH, 4, 4))
        split = _split(program)
        assert "test_batch_axis.py" in split.coupled[0]


class MeanToken(ClassToken):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        tokens = self.token.expand(x.shape[0], -1, -1)
        mixed = torch.cat([tokens, self.head.weight.sum() * x], dim=1)
        return (mixed.mean(0) - y).square().mean()


def test_batch_norm_on_the_batch_itself_couples() -> None:
    """The input is known before the first micro-batch; statistics over all of it are no way out."""

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.out = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.norm(x)).square().mean()

    program = capture(Normalised(), example_inputs=(torch.zeros(8, 4),))
    (where,) = coupling(program)
    assert where.startswith("batch_norm")
