"""The lowering: writes in place, regions, losses, spellings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoshard import ir
from autoshard.capture import capture, check_against_eager

N = 4


class Model(nn.Module):
    def __init__(self, body: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("state", torch.ones(6))
        self.register_buffer("table", torch.arange(24.0).reshape(4, 6))
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, self.linear(x)).square().sum()


def _relu(self: Any, x: torch.Tensor) -> Any:
    y = x * 1.5
    return F.relu_(y) + y


def _slice(self: Any, x: torch.Tensor) -> Any:
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1] * 2
    y[:, 0] = 3
    return y + x


def _chained_views(self: Any, x: torch.Tensor) -> Any:
    y = x * 1.0
    other = y.view(N, 2, 3)
    y.view(N, 3, 2).transpose(1, 2)[:, 0, 1:].mul_(4)
    return other.sum(1).repeat(1, 2) + y


def _earlier_view(self: Any, x: torch.Tensor) -> Any:
    y = x + 1
    first = y[0]
    y.add_(1)
    return y * first


def _later_write_to_view(self: Any, x: torch.Tensor) -> Any:
    y = x + 1
    view = y.t()
    doubled = y * 2
    view.mul_(3)
    return y + doubled


def _chunks(self: Any, x: torch.Tensor) -> Any:
    y = self.table.clone()
    a, b = y.chunk(2, dim=1)
    a.mul_(2)
    b.copy_(a)
    return x * y


def _unbind(self: Any, x: torch.Tensor) -> Any:
    y = self.table.clone()
    rows = y.unbind(0)
    rows[1].zero_()
    return x * y + rows[0]


def _masked_fill(self: Any, x: torch.Tensor) -> Any:
    y = x.clone()
    y.masked_fill_(self.table > 10, -1.0)
    y[self.table > 20] = 7.0
    return y


def _index_put(self: Any, x: torch.Tensor) -> Any:
    y = x.clone()
    y[torch.tensor([0, 2])] = x[:2]
    y.index_add_(0, torch.tensor([1, 1]), x[:2])
    return y


def _copied_reshape(self: Any, x: torch.Tensor) -> Any:
    y = x + 0.5
    y.t().reshape(-1).zero_()  # a copy: y keeps its numbers
    return y


def _cast_write(self: Any, x: torch.Tensor) -> Any:
    y = torch.zeros(N, 6, dtype=torch.float64)
    y[:] = x
    z = torch.ones(N, 6)
    z.narrow(1, 2, 3).fill_(0.5)
    return y * z


def _average(self: Any, x: torch.Tensor) -> Any:
    with torch.no_grad():
        self.state.mul_(0.9).add_(x.mean(0), alpha=0.1)
    return x * self.state


def _queue(self: Any, x: torch.Tensor) -> Any:
    before = self.table.clone()
    self.table[1:3] = x.detach()[:2]
    self.table[:, 0] += 1
    return x * self.table + before


def _gradient_penalty(self: Any, x: torch.Tensor) -> Any:
    (gradient,) = torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)
    return gradient + x


def _no_grad(self: Any, x: torch.Tensor) -> Any:
    with torch.no_grad():
        scale = x.abs().mean() * self.linear.weight.norm()
    return x * scale + x.detach()


def _constants(self: Any, x: torch.Tensor) -> Any:
    return x * torch.tensor([1.0, 2, 3, 4, 5, 6]) + torch.tensor(2.5)


BODIES = [
    _relu, _slice, _chained_views, _earlier_view, _later_write_to_view, _chunks, _unbind,
    _masked_fill, _index_put, _copied_reshape, _cast_write, _average, _queue, _no_grad, _constants,
    _gradient_penalty,
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda b: b.__name__.strip("_"))
def test_writes_and_regions_keep_their_meaning(body: Callable[..., torch.Tensor]) -> None:
    model, x = Model(body), torch.randn(N, 6)
    program = capture(model, example_inputs=(x,))
    check_against_eager(program, model, (x,), steps=3, rtol=1e-6)
    buffers = {p.name for p in program.parameters.values() if p.buffer}
    for layer in program.classes:
        for op in layer.graph.ops:
            assert {v.name for v in op.mutates} <= buffers, "only buffers are written to"


def test_batch_inputs_that_forward_changes_are_not_changed_for_the_user() -> None:
    model = nn.Linear(6, 6)
    x = torch.randn(N, 6)

    def loss(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return (output * batch[0].mul_(2)).sum()

    program = capture(model, example_inputs=(x,), loss_fn=loss)
    assert not any(op.mutates for c in program.classes for op in c.graph.ops)


LOSSES: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], str]] = {
    "mse": (F.mse_loss, "float"),
    "mse_broadcast": (lambda x, y: F.mse_loss(x[:, :1], y[:1]), "float"),
    "l1": (F.l1_loss, "float"),
    "smooth_l1": (lambda x, y: F.smooth_l1_loss(x, y, beta=0.5), "float"),
    "huber": (lambda x, y: F.huber_loss(x, y, delta=0.5), "float"),
    "bce": (lambda x, y: F.binary_cross_entropy(x.sigmoid(), y.sigmoid()), "float"),
    "bce_logits": (
        lambda x, y: F.binary_cross_entropy_with_logits(
            x,
            y.sigmoid(),
            weight=torch.arange(6, dtype=x.dtype),
            pos_weight=torch.full((6,), 2.0, dtype=x.dtype),
        ),
        "float",
    ),
    "kl": (
        lambda x, y: F.kl_div(x.log_softmax(1), y.softmax(1), reduction="batchmean"), "float",
    ),
    "kl_mean": (lambda x, y: F.kl_div(x.log_softmax(1), y.softmax(1), reduction="mean"), "float"),
    "cross_entropy": (F.cross_entropy, "class"),
    "cross_entropy_options": (
        lambda x, y: F.cross_entropy(
            x, y, weight=torch.arange(1, 7, dtype=x.dtype), ignore_index=2, label_smoothing=0.1
        ),
        "class",
    ),
    "cross_entropy_smoothed": (
        lambda x, y: F.cross_entropy(x, y, ignore_index=2, label_smoothing=0.1), "class",
    ),
    "cross_entropy_probabilities": (lambda x, y: F.cross_entropy(x, y.softmax(1)), "float"),
    "cross_entropy_sum": (lambda x, y: F.cross_entropy(x, y, reduction="sum"), "class"),
    "nll": (lambda x, y: F.nll_loss(x.log_softmax(1), y, ignore_index=2), "class"),
    "hinge": (lambda x, y: F.hinge_embedding_loss(x, y.sign()), "float"),
    "poisson": (F.poisson_nll_loss, "float"),
    "triplet": (lambda x, y: F.triplet_margin_loss(x, y, y.flip(0)), "float"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mean_losses_are_sums_over_a_global_count(name: str, dtype: torch.dtype) -> None:
    loss_fn, kind = LOSSES[name]
    torch.manual_seed(0)
    model = nn.Linear(6, 6, dtype=dtype)
    y = torch.randn(N, 6, dtype=dtype) if kind == "float" else torch.tensor([1, 2, 5, 0])
    batch = {"input": torch.randn(N, 6, dtype=dtype), "y": y}

    def loss(output: torch.Tensor, b: dict[str, torch.Tensor]) -> torch.Tensor:
        return loss_fn(output, b["y"]).to(dtype)

    program = capture(model, example_inputs=batch, loss_fn=loss)
    rtol = 1e-12 if dtype is torch.float64 else 2e-2
    check_against_eager(program, model, batch, loss, rtol=rtol)
    ops = [op for c in program.classes for op in c.graph.ops]
    losses = [op for op in ops if "loss" in op.target or "entropy" in op.target]
    assert {_reduction(op) for op in losses} <= {2}, "2 is the sum"
    assert not any("mean" in op.target for op in ops) or name in ("triplet", "hinge", "poisson")
    if kind == "class" and name != "cross_entropy_sum":
        (count,) = [op for op in ops if op.target == "autoshard.count_targets"]
        (shared,) = [c for c in program.classes if c.kind == "shared"]
        assert count in shared.graph.ops


def _reduction(op: ir.Op) -> object:
    names = [a.name for a in ir.resolve(op.target)._schema.arguments]  # type: ignore[attr-defined]
    return {**dict(zip(names, op.args, strict=False)), **dict(op.kwargs)}["reduction"]


def _ops(model: nn.Module, *inputs: torch.Tensor) -> list[ir.Op]:
    program = capture(model, example_inputs=inputs)
    return [op for c in program.classes for op in c.graph.ops]


def test_one_spelling_per_meaning() -> None:
    def body(self: Any, x: torch.Tensor) -> Any:
        x = torch.unflatten(x.view(N, -1, 3).flatten(1), 1, (3, -1)).reshape(N, 6)
        x = x.contiguous().to(torch.float32).clone()[:, 0:6].expand(N, -1)
        return F.dropout(x, 0.0) + torch.zeros_like(x) + torch.full_like(x, 2.0) * 1.0

    targets = [op.target for op in _ops(Model(body), torch.randn(N, 6))]
    assert sorted(targets) == sorted([
        "aten.zeros.default", "aten.full.default", "aten.linear.default", "aten.add.Tensor",
        "aten.add.Tensor", "aten.pow.Tensor_Scalar", "aten.sum.default",
    ])  # fmt: skip


def test_no_size_is_left_open() -> None:
    def body(self: Any, x: torch.Tensor) -> Any:
        return torch.unflatten(x.view(-1, 3).repeat(1, 2), 0, (N, -1)).expand(-1, 2, 6)[:, -2:, :-1]

    ops = _ops(Model(body), torch.randn(N, 6))
    reshapes = [op for op in ops if op.target in ("aten.reshape.default", "aten.slice.Tensor")]
    assert reshapes and all(
        number >= 0
        for op in reshapes
        for arg in op.args[1:]
        for number in (arg if isinstance(arg, tuple) else (arg,))
    )


def test_flattened_products_become_linear() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 10))
            self.bias = nn.Parameter(torch.randn(10))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = torch.addmm(self.bias, x.view(-1, 6), self.weight)
            return flat.view(*x.shape[:-1], 10).square().sum()

    model, x = Conv1D(), torch.randn(N, 3, 6)
    program = capture(model, example_inputs=(x,))
    check_against_eager(program, model, (x,), rtol=1e-6)
    ops = [op for c in program.classes for op in c.graph.ops]
    assert [op.target for op in ops][:2] == ["aten.transpose.int", "aten.linear.default"]
    assert ops[1].output.type.shape == (N, 3, 10)


def test_random_ops_stay_where_they_are() -> None:
    """Two equal random calls are two draws, and neither is shared between stages."""

    def body(self: Any, x: torch.Tensor) -> Any:
        a, b = torch.rand(N, 1) < 0.5, torch.rand(N, 1) < 0.5
        return F.dropout(x * a * b, 0.25)

    model, x = Model(body), torch.randn(N, 6)
    program = capture(model, example_inputs=(x,))
    assert all(c.kind != "shared" for c in program.classes)
    targets = [op.target for c in program.classes for op in c.graph.ops]
    assert targets.count("aten.rand.default") == 2
    check_against_eager(program, model, (x,), rtol=1e-6)  # the same draws in the same order


def test_names_come_from_the_users_code() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(6, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = self.proj(x).chunk(2, dim=-1)
            gated = left * torch.sigmoid(right)
            return torch.sum(gated)

    (layer,) = capture(Gate(), example_inputs=(torch.randn(N, 6),)).classes
    names = [v.name for op in layer.graph.ops for v in op.outputs]
    assert names == ["proj", "left", "right", "sigmoid", "gated", "loss"]
    assert layer.graph.ops[0].source.endswith("test_capture_graph.py:" + _line("self.proj(x)"))


def _line(text: str) -> str:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return str(next(i for i, line in enumerate(lines, 1) if text in line))
