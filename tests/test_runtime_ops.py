"""Special ops on ranks against the plain op on one, in float64; random numbers by key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import Pool, run_threads
from torch import Tensor

from autoshard.placement.state import S, take_part
from autoshard.runtime import collectives, ops
from autoshard.runtime.mesh import Mesh, current, using
from autoshard.runtime.random import make_key, seeded

F64 = torch.float64


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def close(result: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=atol)


def my_rows(whole: Tensor, dim: int = 0, axis: str = "tp") -> Tensor:
    """This rank's padded part; garbage in the padding."""
    n, rank = current().size(axis), current().rank(axis)
    width = -(-whole.shape[dim] // n)
    part = take_part(whole, S(dim), n, rank)
    shape = list(part.shape)
    shape[dim] = width - part.shape[dim]
    return torch.cat([part, part.new_full(shape, 7.0)], dim)


# -- means and counts -----------------------------------------------------------------------------


def mean_of_parts(dims: Any, keepdim: bool, split_dim: int) -> tuple[Tensor, Tensor]:
    n = current().size("tp")
    x = take_part(random((4, 8, 3), 0), S(split_dim), n, current().rank("tp")).requires_grad_()
    y = ops.partial_mean(x, dims, keepdim, n)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    return collectives.all_reduce(y.detach(), axis="tp"), x.grad


@pytest.mark.parametrize(
    ("dims", "keepdim", "split_dim"),
    [(None, False, 1), ((), True, 0), ((0, 1), False, 1), (1, True, 1), ([-2], False, 1)],
)
def test_partial_mean(dims: Any, keepdim: bool, split_dim: int) -> None:
    x = random((4, 8, 3), 0).requires_grad_()
    over = dims if dims else (0, 1, 2)
    y = x.mean(over, keepdim)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    for rank, (result, grad) in enumerate(run_threads(4, mean_of_parts, dims, keepdim, split_dim)):
        close(result, y.detach())
        close(grad, take_part(x.grad, S(split_dim), 4, rank))


def counted(target: Tensor, weight: Tensor | None) -> Tensor:
    part = take_part(target, S(0), current().size("dp"), current().rank("dp"))
    return collectives.all_reduce(ops.count_targets(part, weight, 1), axis="dp")


def test_count_targets_on_ranks_with_different_counts() -> None:
    target = torch.tensor([[1, 1, 1], [0, 2, 1], [3, 0, 0], [1, 2, 2]])
    for result in run_threads(4, counted, target, None, axes={"dp": 4}):
        assert result.item() == 7 and result.dtype == torch.float32 and result.ndim == 0
    weight = random((4,), 1).abs()
    for result in run_threads(2, counted, target, weight, axes={"dp": 2}):
        close(result, weight[target[target != 1]].sum())
    assert ops.count_targets(torch.tensor([-100, 5])).item() == 1


# -- vocabulary -----------------------------------------------------------------------------------


def embed(size: int, padding_idx: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    weight = my_rows(random((size, 3), 0)).requires_grad_()
    y = ops.vocab_parallel_embedding(ids, weight, padding_idx, axis="tp", size=size)
    whole = collectives.all_reduce(y, axis="tp")
    (whole * random(tuple(whole.shape), 2)).sum().backward()
    assert weight.grad is not None
    return whole.detach(), weight.grad


@pytest.mark.parametrize("padding_idx", [-1, 0, 9])
@pytest.mark.parametrize(("size", "n"), [(12, 4), (11, 4), (10, 3), (9, 4), (11, 1)])
def test_vocab_parallel_embedding(size: int, n: int, padding_idx: int) -> None:
    ids = torch.randint(0, size, (5, 6))
    ids[0, :3] = torch.tensor([0, size - 1, min(9, size - 1)])
    padding = padding_idx if padding_idx < size else -1
    weight = random((size, 3), 0).requires_grad_()
    y = F.embedding(ids, weight, padding if padding >= 0 else None)
    (y * random(tuple(y.shape), 2)).sum().backward()
    assert weight.grad is not None
    width = -(-size // n)
    for rank, (whole, grad) in enumerate(run_threads(n, embed, size, padding, ids)):
        close(whole, y.detach())
        expected = take_part(weight.grad, S(0), n, rank)
        close(grad[: len(expected)], expected)
        assert grad.shape[0] == width and not grad[len(expected) :].any()


@pytest.mark.parametrize("bad", [-1, 11, 12])
def test_ids_outside_the_vocabulary(bad: int) -> None:
    with pytest.raises(RuntimeError):
        run_threads(4, embed, 11, -1, torch.tensor([[0, bad]]))
    with pytest.raises(RuntimeError):
        run_threads(4, entropy, 11, torch.tensor([0, bad]), (2, 11), None, 0.0, F64)


def entropy(
    size: int,
    target: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    smoothing: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    logits = my_rows(random(shape, 0) * 5, 1).to(dtype).requires_grad_()
    loss = ops.vocab_parallel_cross_entropy(
        logits, target, weight, 3, smoothing, axis="tp", size=size
    )
    (loss * 0.7).backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def plain_entropy(
    target: Tensor, shape: tuple[int, ...], weight: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    logits = (random(shape, 0) * 5).requires_grad_()
    loss = F.cross_entropy(
        logits, target, weight, ignore_index=3, reduction="sum", label_smoothing=smoothing
    )
    (loss * 0.7).backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


@pytest.mark.parametrize("extra", [(), (2, 3)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("size", "n"), [(12, 4), (11, 4), (9, 4), (10, 3), (11, 1)])
def test_vocab_parallel_cross_entropy(
    size: int, n: int, weighted: bool, smoothing: float, extra: tuple[int, ...]
) -> None:
    shape = (7, size, *extra)
    target = torch.randint(0, size, (7, *extra))
    target.view(-1)[:3] = torch.tensor([3, 0, size - 1])
    weight = random((size,), 4).abs() if weighted else None
    loss, grad = plain_entropy(target, shape, weight, smoothing)
    arguments = (size, target, shape, weight, smoothing, F64)
    for rank, (result, mine) in enumerate(run_threads(n, entropy, *arguments)):
        close(result, loss)
        expected = take_part(grad, S(1), n, rank)
        close(mine[:, : expected.shape[1]], expected)
        assert not mine[:, expected.shape[1] :].any()


def test_vocab_parallel_cross_entropy_in_half_precision() -> None:
    target = torch.tensor([3, 0, 10, 5])
    loss, grad = plain_entropy(target, (4, 11), None, 0.0)
    arguments = (11, target, (4, 11), None, 0.0, torch.bfloat16)
    for rank, (result, mine) in enumerate(run_threads(2, entropy, *arguments)):
        assert result.dtype == mine.dtype == torch.bfloat16
        expected = take_part(grad, S(1), 2, rank)
        close(mine[:, : expected.shape[1]].to(F64), expected, atol=0.02)
        torch.testing.assert_close(result.to(F64), loss, rtol=0.01, atol=0)


def test_all_targets_ignored() -> None:
    target = torch.full((4,), 3)
    for loss, grad in run_threads(2, entropy, 11, target, (4, 11), None, 0.1, F64):
        assert loss.item() == 0
        assert not grad.any()


def saved_bytes() -> int:
    logits = my_rows(random((64, 32), 0), 1).requires_grad_()
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ops.vocab_parallel_cross_entropy(
            logits, torch.zeros(64, dtype=torch.int64), axis="tp", size=32
        )
    return sum(saved.values()) - logits.nbytes


def test_cross_entropy_saves_no_second_logits() -> None:
    for extra in run_threads(2, saved_bytes):
        assert extra < 64 * 40  # a few numbers per row, where the logits have 128 bytes


# -- batch norm -----------------------------------------------------------------------------------


def normalise(
    shape: tuple[int, ...], affine: bool, axes: tuple[str, ...], training: bool
) -> list[Tensor | None]:
    x = random(shape, 0) * 3 + 100
    for axis, dim in zip(axes, (0, 2), strict=False):
        x = take_part(x, S(dim), current().size(axis), current().rank(axis))
    x = x.clone().requires_grad_()
    weight, bias, mean, var = norm_parameters(shape[1], affine)
    y = ops.batch_norm(x, weight, bias, mean, var, training, 0.1, 1e-5, axes=axes)
    for axis, dim in reversed(list(zip(axes, (0, 2), strict=False))):
        y = collectives.all_gather_replicated(y, dim, shape[dim], axis=axis)
        # the gradient of the whole is the same on every rank, so each takes its part of it
    (y * random(shape, 5)).sum().backward()
    return [
        y.detach(), x.grad, mean, var,
        weight.grad if weight is not None else None, bias.grad if bias is not None else None,
    ]  # fmt: skip


def norm_parameters(
    channels: int, affine: bool
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    weight = random((channels,), 1).requires_grad_() if affine else None
    bias = random((channels,), 2).requires_grad_() if affine else None
    return weight, bias, random((channels,), 3), random((channels,), 4).abs()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((8, 3), {"dp": 4}),
        ((4, 3, 6, 2), {"dp": 2, "tp": 2}),
        ((4, 3, 6), {"dp": 2, "tp": 3}),
        ((6, 2, 4), {"dp": 1}),
    ],
)
def test_batch_norm(
    shape: tuple[int, ...], sizes: dict[str, int], affine: bool, training: bool
) -> None:
    x = (random(shape, 0) * 3 + 100).requires_grad_()
    weight, bias, mean, var = norm_parameters(shape[1], affine)
    y = F.batch_norm(x, mean, var, weight, bias, training, 0.1, 1e-5)
    (y * random(shape, 5)).sum().backward()
    axes = tuple(sizes) if len(shape) > 2 else ("dp",)
    n = sizes["dp"] * sizes.get("tp", 1)
    results = run_threads(n, normalise, shape, affine, axes, training, axes=sizes)
    assert x.grad is not None
    for rank, (out, grad, new_mean, new_var, _, _) in enumerate(results):
        close(out, y.detach(), 1e-11)  # the mean is 100: two digits are lost in any order of sums
        close(new_mean, mean, 1e-12)
        close(new_var, var, 1e-11)
        part = take_part(x.grad, S(0), sizes["dp"], rank // sizes.get("tp", 1))
        if "tp" in axes:
            part = take_part(part, S(2), sizes["tp"], rank % sizes["tp"])
        close(grad, part, 1e-11)
    if affine:
        assert weight is not None and weight.grad is not None
        assert bias is not None and bias.grad is not None
        close(sum(r[4] for r in results), weight.grad, 1e-10)
        close(sum(r[5] for r in results), bias.grad)


def test_batch_norm_without_running_statistics() -> None:
    with using(Mesh({"tp": 1})):
        x = random((6, 2, 4), 0)
        y = ops.batch_norm(x, None, None, None, None, False, 0.1, 1e-5)
        close(y, F.batch_norm(x, None, None, None, None, True, 0.1, 1e-5))


# -- random numbers -------------------------------------------------------------------------------


def draw(axes: tuple[str, ...]) -> list[Tensor]:
    drawn = []
    for number in (1, 2, 1):
        for micro_batch in (0, 1):
            with seeded(make_key(0, 5, micro_batch), number, axes=axes):
                drawn.append(torch.rand(100))
    return drawn


def test_same_numbers_where_replicated_different_where_split() -> None:
    results = run_threads(4, draw, ("dp",), axes={"dp": 2, "tp": 2})
    for drawn in results:
        assert torch.equal(drawn[0], drawn[4]) and torch.equal(drawn[1], drawn[5])
    same = lambda a, b: torch.equal(results[a][0], results[b][0])  # noqa: E731
    assert same(0, 1) and same(2, 3) and not same(0, 2)
    different = [d for rank in (0, 2) for d in results[rank][:4]]
    assert len({tuple(d.tolist()) for d in different}) == 8


def test_the_default_generator_is_untouched() -> None:
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    with using(Mesh({"tp": 1})):
        draw(())
        with pytest.raises(ValueError), seeded(make_key(0, 0, 0), 1):
            raise ValueError
    assert torch.equal(torch.rand(4), expected)


def test_numbers_of_different_keys_are_independent() -> None:
    """Dropout masks over steps, micro-batches and ops: right mean, no correlation."""
    masks = []
    with using(Mesh({"tp": 1})):
        for seed, step, micro_batch, number in torch.cartesian_prod(
            *[torch.arange(n) for n in (2, 4, 4, 8)]
        ).tolist():
            with seeded(make_key(seed, step, micro_batch), number):
                masks.append((F.dropout(torch.ones(1000), 0.25) > 0).double())
    rows = torch.stack(masks)
    n, m = rows.shape
    # mean of n*m Bernoulli variables; 5 standard deviations
    assert abs(rows.mean().item() - 0.75) < 5 * (0.75 * 0.25 / (n * m)) ** 0.5
    correlation = torch.corrcoef(rows) - torch.eye(n)
    # the largest of n(n-1)/2 = 32640 normal variables of deviation 1/sqrt(m) is about 4.2 of them
    assert correlation.abs().max() < 6 / m**0.5
    assert abs(correlation.sum().item() / (n * (n - 1))) < 5 / (m * n * (n - 1) / 2) ** 0.5


def test_a_key_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    item = Tensor.item
    monkeypatch.setattr(Tensor, "item", lambda self: reads.append(1) or item(self))
    key, drawn = make_key(0, 0, 0), []
    with using(Mesh({"tp": 1})):
        for change in (0, 0, 1):
            if change:
                key.add_(change)
            with seeded(key, 1):
                drawn.append(torch.rand(3))
    assert len(reads) == 2
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_keys_differ() -> None:
    keys = {make_key(s, t, m).item() for s in range(8) for t in range(16) for m in range(16)}
    assert len(keys) == 8 * 16 * 16
    key = make_key(0, 0, 0)
    assert key.dtype == torch.int64 and key.shape == (1,) and min(keys) >= 0


def on_gloo() -> tuple[Tensor, Tensor]:
    with using(Mesh.create({"pp": 1, "dp": 2, "tp": 2})):
        loss, _ = entropy(11, torch.tensor([3, 0, 10, 5]), (4, 11), None, 0.1, F64)
        y = normalise((4, 3, 6, 2), True, ("dp", "tp"), True)[0]
        assert y is not None
        return loss, y


def test_on_gloo(ranks: Pool) -> None:
    loss, _ = plain_entropy(torch.tensor([3, 0, 10, 5]), (4, 11), None, 0.1)
    weight, bias, _, _ = norm_parameters(3, True)
    x = random((4, 3, 6, 2), 0) * 3 + 100
    y = F.batch_norm(x, None, None, weight, bias, True)
    for result, normal in ranks.run(on_gloo):
        close(result, loss)
        close(normal, y, 1e-11)
