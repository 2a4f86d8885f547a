"""Sparse experts: the op, models with them, and experts spread over data ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import equivalence as harness
import pytest
import torch
from ranks import Pool
from sparse_model import SparseModel
from test_search import CLUSTER
from torch import Tensor

import autoshard
from autoshard.cluster import link
from autoshard.cost_models.collective import collective_s
from autoshard.emit import emit
from autoshard.errors import OptionError
from autoshard.ir import Program
from autoshard.options import Constraints
from autoshard.plan.plan import Plan
from autoshard.plan.search import find_plan


def dense(x: Tensor, scores: Tensor, chosen: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Every expert on every token, and the router's choice of the results."""
    gate, inner = torch.einsum("...h,efh->...ef", x, up).chunk(2, -1)
    results = torch.einsum("...ef,ehf->...eh", torch.nn.functional.silu(gate) * inner, down)
    picked = results.gather(-2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))
    return (scores[..., None] * picked).sum(-2)


def test_the_op_is_the_router_s_sum_over_experts() -> None:
    torch.manual_seed(0)
    sizes = ((3, 5, 6), (3, 5, 2), (4, 16, 6), (4, 6, 8))
    x, scores, up, down = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes)
    chosen = torch.randint(0, 3, (3, 5, 2))  # nobody chooses the last expert
    one = autoshard.sparse_experts(x, scores, chosen, up, down)
    other = dense(x, scores, chosen, up, down)
    torch.testing.assert_close(one, other)
    weight = torch.randn_like(one)
    for a, b in zip(
        torch.autograd.grad((one * weight).sum(), (x, scores, up, down)),
        torch.autograd.grad((other * weight).sum(), (x, scores, up, down)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_an_activation_that_there_is_not() -> None:
    x = torch.zeros(2, 6)
    with pytest.raises(OptionError, match="an activation of silu, gelu"):
        autoshard.sparse_experts(x, x[:, :2], x[:, :2].long(), torch.zeros(4, 8, 6),
                                 torch.zeros(4, 6, 8), "sin")  # fmt: skip


def sparse(dtype: torch.dtype) -> tuple[SparseModel, dict[str, Tensor], None]:
    torch.manual_seed(1)
    tokens = torch.randint(0, 32, (8, 6))
    return SparseModel().to(dtype), {"tokens": tokens, "targets": tokens.flip(1)}, None


def program() -> Program:
    return harness.program_of(sparse, torch.float64)


def plan_for(**pins: Any) -> Plan:
    return find_plan(
        program(), cluster=CLUSTER, world_size=4,
        constraints=Constraints(pp=1, tp=1, micro_batch_size=2, **pins),
    )  # fmt: skip


def test_experts_spread_over_data_ranks() -> None:
    """Their state is shared out, tokens travel, and all else stays as it was."""
    alone, spread = (plan_for(dp=4, data_parallel="ddp", ep=ep) for ep in (1, 4))
    assert spread.mesh == replace(alone.mesh, ep=4)
    experts = sum(
        info.type.nbytes for name, info in program().parameters.items() if ".experts.up" in name
        or ".experts.down" in name
    )  # fmt: skip
    saved = alone.stages[0].memory.parameters - spread.stages[0].memory.parameters
    assert saved == experts * 3 // 4
    assert alone.prediction.parts["collectives"] == 0 < spread.prediction.parts["collectives"]
    assert spread.prediction.parts["optimizer"] < alone.prediction.parts["optimizer"]


def test_all_to_alls_carry_every_choice_of_every_token() -> None:
    two, four = (plan_for(dp=4, data_parallel="ddp", ep=ep).stages[0] for ep in (2, 4))
    choices, hidden, tokens, layers = 2, 16, 2 * 6, 2
    moved = float(choices * tokens * hidden * 8)
    for stage, ep in ((two, 2), (four, 4)):
        once = collective_s("all_to_all", ep * moved, link(CLUSTER, ep))
        assert stage.communication_s == pytest.approx(4 * layers * once)


def test_replicas_of_experts_share_their_state() -> None:
    whole = plan_for(dp=4, data_parallel="zero1", ep=1).stages[0].memory
    pairs = plan_for(dp=4, data_parallel="zero1", ep=2).stages[0].memory
    assert pairs.optimizer == whole.optimizer  # a half each, over half as many ranks


@pytest.mark.parametrize(
    ("pins", "words"),
    [({"dp": 4, "ep": 3}, "expects a divisor of dp"), ({"ep": 0}, "ep expects a positive integer")],
)
def test_degrees_that_cannot_be(pins: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Constraints(**pins)


def test_a_model_without_experts() -> None:
    dense_program = harness.program_of("mlp", torch.float64)
    with pytest.raises(OptionError, match="has none that are captured as such"):
        harness.plan_of(dense_program, 4, {"dp": 4, "ep": 2})


def test_a_plan_with_spread_experts_is_not_emitted() -> None:
    with pytest.raises(OptionError, match="ranks are for predictions only"):
        emit(program(), plan_for(dp=4, ep=2))


@pytest.mark.parametrize("pins", [{"tp": 4}, {"dp": 2, "pp": 2}, {"dp": 2, "tp": 2}], ids=str)
def test_trains_to_the_numbers_of_the_plain_model(ranks: Pool, pins: dict[str, Any]) -> None:
    plan = harness.plan_of(program(), 4, pins)
    arguments = (sparse, torch.float64, program(), harness.encoded(plan), 2)
    trained = ranks.run(harness.distributed, *arguments, timeout_s=240)[0]
    found = harness.difference(trained, harness.reference(sparse, torch.float64, steps=2))
    assert found.worst <= 1e-8, found
