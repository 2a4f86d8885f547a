"""Recomputation: same gradients, fewer bytes, kept ops and side effects exactly once."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from ranks import Pool, run_threads
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from autoshard.errors import InternalError
from autoshard.runtime import ops
from autoshard.runtime.mesh import Mesh, current, set_current, using
from autoshard.runtime.parameters import (
    Container,
    Layer,
    Parameter,
    Split,
    attach,
    declared,
    load_parameters,
    local,
    whole,
)
from autoshard.runtime.random import make_key, seeded
from autoshard.runtime.recompute import keep, recompute, recomputing

F64 = torch.float64


@pytest.fixture(autouse=True)
def _alone() -> Any:
    with using(Mesh({"tp": 1})):
        yield


class Kernels(TorchDispatchMode):
    """Counts the kernels that really run, and knows which of their results are still allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._results: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.counts[func.overloadpacket.__name__] += 1
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._results[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def allocated_bytes(self, *others: Tensor) -> int:
        """Of results, but for the storages of ``others``."""
        known = {other.untyped_storage()._cdata for other in others}
        return sum(
            size
            for key, (reference, size) in self._results.items()
            if key not in known and not reference.expired()
        )


def layer(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    h = F.gelu(x @ w)
    with keep():
        h = h @ v
    h = torch.tanh(h)
    with keep():
        h = F.layer_norm(h, h.shape[-1:], b)
    return torch.sigmoid(h)


def tensors(n: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((8, n), (n, 4 * n), (4 * n, n), (n,))
    return [torch.randn(s, dtype=F64, generator=generator).div_(3).requires_grad_() for s in shapes]


def run(call: Callable[..., Tensor]) -> tuple[list[Tensor], Counter[str]]:
    arguments = tensors()
    with Kernels() as kernels:
        call(*arguments).square().sum().backward()
    return [a.grad for a in arguments if a.grad is not None], kernels.counts


def test_kept_ops_run_once_and_gradients_are_the_same() -> None:
    plain, counts = run(layer)
    full, full_counts = run(lambda *a: recompute(layer, *a))
    some, some_counts = run(lambda *a: recompute(layer, *a, keep=True))
    for other in (full, some):
        assert len(other) == len(plain)
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    assert counts["mm"] == 6  # two in forward, four in backward
    assert full_counts["mm"] == 8
    assert some_counts["mm"] == 7
    assert full_counts["native_layer_norm"] == 2
    assert some_counts["native_layer_norm"] == 1
    assert full_counts["tanh"] == some_counts["tanh"] == 2
    assert full_counts["gelu"] == some_counts["gelu"] == 2
    assert full_counts["sigmoid"] == 2


def test_recomputation_stops_when_backward_has_what_it_needs() -> None:
    def ends_in_a_sum(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(x @ w).sum()

    _, counts = run(lambda *a: recompute(ends_in_a_sum, *a))
    assert counts["tanh"] == 2
    assert counts["sum"] == 2  # of the layer and of `run`; not a third time


def held_bytes(call: Callable[..., Tensor]) -> int:
    """Bytes that forward leaves allocated, but for its arguments and its result."""
    arguments = tensors()
    with Kernels() as kernels:
        out = call(*arguments)
    return kernels.allocated_bytes(*arguments, out)


def test_bytes_held_between_forward_and_backward() -> None:
    row = 8 * 16 * 8  # bytes of an activation [8, 16] of float64
    statistics = 2 * 8 * 8  # mean and deviation of the layer norm
    # x @ w and its gelu are four rows each; tanh saves its result, sigmoid too (that is `out`)
    assert held_bytes(layer) == 4 * row + 4 * row + row + statistics
    assert held_bytes(lambda *a: recompute(layer, *a)) == 0
    assert held_bytes(lambda *a: recompute(layer, *a, keep=True)) == 2 * row + statistics


def test_nothing_is_held_afterwards() -> None:
    references: list[Any] = []

    def watched(*arguments: Tensor) -> Tensor:
        with keep():
            h = arguments[0] @ arguments[1]
        references.append(StorageWeakRef(h.untyped_storage()))
        return torch.tanh(h)

    gc.disable()  # no cycle may be needed to free it
    try:
        out = recompute(watched, *tensors(), keep=True)
        assert not references[0].expired()
        out.sum().backward()
        del out
        assert all(reference.expired() for reference in references)
        references.clear()
        out = recompute(watched, *tensors(), keep=True)
        del out  # without a backward
        assert references[0].expired()
    finally:
        gc.enable()


def test_several_micro_batches_in_flight() -> None:
    weights = tensors()[1:]
    batches = [torch.randn(8, 16, dtype=F64) for _ in range(4)]
    for batch in batches:
        layer(batch, *weights).square().sum().backward()
    expected = [w.grad.clone() for w in weights if w.grad is not None]
    for w in weights:
        w.grad = None
    outputs = [recompute(layer, batch, *weights, keep=True) for batch in batches[:3]]
    outputs[0].square().sum().backward()
    outputs.append(recompute(layer, batches[3], *weights, keep=True))
    for out in outputs[1:]:
        out.square().sum().backward()
    for w, grad in zip(weights, expected, strict=True):
        assert torch.equal(w.grad, grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("kept", [False, True])
def test_backward_in_two_parts(kept: bool) -> None:
    """Zero-bubble schedules ask for the input's gradient first and for the weights' later."""
    expected, _ = run(layer)
    arguments = tensors()
    out = recompute(layer, *arguments, keep=kept).square().sum()
    first = torch.autograd.grad(out, arguments[:1], retain_graph=True)
    rest = torch.autograd.grad(out, arguments[1:])
    assert all(torch.equal(a, b) for a, b in zip(expected, (*first, *rest), strict=True))


def test_without_gradients_nothing_is_recorded() -> None:
    with torch.no_grad():
        arguments = tensors()
        assert torch.equal(recompute(layer, *arguments, keep=True), layer(*arguments))


def test_nested() -> None:
    def outer(*arguments: Tensor) -> Tensor:
        with keep():
            h = arguments[0] * 2
        return recompute(layer, h, *arguments[1:], keep=True).exp()

    def plain(*arguments: Tensor) -> Tensor:
        return layer(arguments[0] * 2, *arguments[1:]).exp()

    expected, _ = run(plain)
    found, _ = run(lambda *a: recompute(outer, *a, keep=True))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_kept_result_that_is_overwritten() -> None:
    def overwrites(x: Tensor, w: Tensor) -> Tensor:
        with keep():
            h = x @ w
        return h.add_(1).tanh()

    x, w = tensors()[:2]
    out = recompute(overwrites, x, w, keep=True)
    with pytest.raises(InternalError, match="was overwritten after keep"):
        out.sum().backward()


def test_another_op_the_second_time() -> None:
    def changes(x: Tensor, w: Tensor) -> Tensor:
        with keep():
            h = (x @ w).sin() if recomputing() else (x @ w).cos()
        return h.tanh()

    x, w = tensors()[:2]
    out = recompute(changes, x, w, keep=True)
    with pytest.raises(InternalError, match=r"aten.sin.default inside keep\(\).*aten.cos"):
        out.sum().backward()


# -- side effects and randomness ------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
def test_dropout(inside: bool) -> None:
    key = make_key(0, 1, 2)

    def drops(x: Tensor, w: Tensor) -> Tensor:
        h = x @ w
        if inside:
            with keep(), seeded(key, 4):
                h = F.dropout(h, 0.5)
        else:
            with seeded(key, 4):
                h = F.dropout(h, 0.5)
        return h.tanh()

    def gradients(call: Callable[..., Tensor]) -> tuple[list[Tensor], Counter[str], Tensor]:
        torch.manual_seed(3)
        x, w = tensors()[:2]
        with Kernels() as kernels:
            out = call(x, w)
            torch.rand(3)  # what others draw in between does not matter
            out.square().sum().backward()
        return [x.grad, w.grad], kernels.counts, torch.rand(2)  # type: ignore[list-item]

    plain, counts, rest = gradients(drops)
    again, again_counts, again_rest = gradients(lambda *a: recompute(drops, *a, keep=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert torch.equal(rest, again_rest)
    assert (plain[0] != 0).any()
    draws = [name for name in counts if "bernoulli" in name or "dropout" in name]
    assert draws
    for name in draws:
        if "backward" not in name:
            assert again_counts[name] == counts[name] * (1 if inside else 2)


def normalised(kept: bool) -> tuple[Tensor, Tensor, Tensor, int]:
    x = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    x = x.chunk(current().size("dp"))[current().rank("dp")].clone().requires_grad_()
    mean, var = torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)

    def norm(x: Tensor) -> Tensor:
        h = x.sin()
        if kept:
            with keep():
                h = ops.batch_norm(h, None, None, mean, var, True, 0.1, 1e-5, axes=("dp",))
                h = h * 2  # after the update of the statistics
        else:
            h = ops.batch_norm(h, None, None, mean, var, True, 0.1, 1e-5, axes=("dp",)) * 2
        return h.tanh()

    with Kernels() as kernels:
        recompute(norm, x, keep=True).square().sum().backward()
    assert x.grad is not None
    return x.grad, mean, var, kernels.counts["all_gather_into_tensor"]


@pytest.mark.parametrize("kept", [False, True])
def test_batch_norm_updates_its_statistics_once(kept: bool) -> None:
    x = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mean, var = torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)
    (F.batch_norm(x.sin(), mean, var, None, None, True) * 2).tanh().square().sum().backward()
    assert x.grad is not None
    for rank, result in enumerate(run_threads(2, normalised, kept, axes={"dp": 2})):
        grad, new_mean, new_var, gathers = result
        torch.testing.assert_close(grad, x.grad.chunk(2)[rank], rtol=0, atol=1e-12)
        torch.testing.assert_close(new_mean, mean, rtol=0, atol=1e-14)
        torch.testing.assert_close(new_var, var, rtol=0, atol=1e-14)
        assert gathers == (1 if kept else 2)


def parallel_block(kept: bool) -> tuple[Tensor, Tensor, Counter[str]]:
    """Megatron's block, with the all-gather or the reduce-scatter inside ``keep``."""
    n, rank = current().size("tp"), current().rank("tp")
    x, w, v, _ = (t.detach() for t in tensors())
    part = x.chunk(n)[rank].clone().requires_grad_()
    mine = [w.chunk(n, 1)[rank].clone().requires_grad_(), v.chunk(n)[rank].clone().requires_grad_()]

    def block(part: Tensor) -> Tensor:
        if kept:
            with keep():
                full = ops.all_gather(part, 0, 8, axis="tp")
        else:
            full = ops.all_gather(part, 0, 8, axis="tp")
        h = F.gelu(full @ mine[0]) @ mine[1]
        if kept:
            with keep():
                out = ops.reduce_scatter(h, 0, axis="tp")
        else:
            out = ops.reduce_scatter(h, 0, axis="tp")
        return out.tanh().sin()

    with Kernels() as kernels:
        recompute(block, part, keep=True).square().sum().backward()
    assert part.grad is not None and mine[0].grad is not None
    return part.grad, mine[0].grad, kernels.counts


@pytest.mark.parametrize("kept", [False, True])
def test_collectives(kept: bool) -> None:
    x, w, v, _ = tensors()
    (F.gelu(x @ w) @ v).tanh().sin().square().sum().backward()
    assert x.grad is not None and w.grad is not None
    for rank, (dx, dw, counts) in enumerate(run_threads(2, parallel_block, kept)):
        torch.testing.assert_close(dx, x.grad.chunk(2)[rank], rtol=0, atol=1e-12)
        torch.testing.assert_close(dw, w.grad.chunk(2, 1)[rank], rtol=0, atol=1e-12)
        # one each in forward, one each in backward, one each in recomputation unless kept
        extra = 0 if kept else 1
        assert counts["all_gather_into_tensor"] == 2 + extra
        assert counts["reduce_scatter_tensor"] == 2 + extra


def test_backward_on_a_thread_without_a_mesh() -> None:
    def block(x: Tensor, w: Tensor) -> Tensor:
        assert current().size("tp") == 1
        return torch.tanh(x @ w).sin()

    x, w = tensors()[:2]
    out = recompute(block, x, w)
    set_current(None)  # as on the thread of a device
    out.sum().backward()
    assert x.grad is not None


# -- with FSDP2 -----------------------------------------------------------------------------------


class Mlp(Layer):
    PARAMETERS: ClassVar = {
        "up.weight": Parameter((16, 64), F64, split=Split(1)),
        "down.weight": Parameter((64, 16), F64, split=Split(0)),
    }

    def forward(self, x: Tensor, key: Tensor) -> Tensor:
        h = ops.all_reduce_gradient(x, axis="tp")
        with keep():
            h = h @ local(self.up.weight)
        with seeded(key, 1, axes=("tp",)):
            h = F.dropout(F.gelu(h), 0.5)
        h = h @ local(self.down.weight)
        with keep():
            h = ops.all_reduce(h, axis="tp")
        return x + torch.tanh(h)


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.path = Container()
        for i in range(2):
            attach(self.path, Mlp(), str(i))
        self.mode = "none"

    def forward(self, x: Tensor, key: Tensor) -> Tensor:
        for layer in (self.path[0], self.path[1]):
            if self.mode == "none":
                x = layer(x, key)
            else:
                x = recompute(layer, x, key, keep=self.mode == "some")
        return x.square().sum()


def train(reshard: bool) -> None:
    with using(Mesh.create({"pp": 1, "dp": 2, "tp": 2})):
        gradients = {}
        for mode in ("none", "full", "some"):
            stage = Stage()
            mesh = current().device_mesh
            assert mesh is not None
            for module in (stage.path[0], stage.path[1], stage):
                fully_shard(module, mesh=mesh["dp"], reshard_after_forward=reshard)
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.set_gradient_divide_factor(1.0)
            generator = torch.Generator().manual_seed(1)
            source = {
                name: torch.randn(d.shape, dtype=F64, generator=generator) / 4
                for name, d, _ in declared(stage)
            }
            load_parameters(stage, source)
            stage.mode = mode
            x = torch.randn(8, 16, dtype=F64, generator=generator).chunk(2)[current().rank("dp")]
            for micro_batch, part in enumerate(x.chunk(2)):
                stage(part, make_key(0, 0, micro_batch)).backward()
            gradients[mode] = {name: whole(t.grad, d) for name, d, t in declared(stage)}  # type: ignore[arg-type]
        for mode in ("full", "some"):
            for name, grad in gradients["none"].items():
                assert grad.any()
                torch.testing.assert_close(gradients[mode][name], grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reshard", [False, True])
def test_under_fsdp(reshard: bool, ranks: Pool) -> None:
    ranks.run(train, reshard)
