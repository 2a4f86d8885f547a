"""Parameters at rest: which elements a rank holds, under which names, and their gradients."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Pool, run_threads
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from autoshard.errors import CheckpointError, InternalError
from autoshard.placement.state import S, take_part
from autoshard.runtime.boxes import Box, Place, Split, pieces
from autoshard.runtime.collectives import all_reduce_gradient
from autoshard.runtime.mesh import Mesh, current, using
from autoshard.runtime.parameters import (
    Container,
    Layer,
    Parameter,
    attach,
    declared,
    load_parameters,
    local,
    local_part,
    pieces_of,
    sum_partial_gradients,
    whole,
)

F64 = torch.float64


# -- boxes ----------------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], Split | None, int, int]:
    tp, dp = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    shape = draw(st.lists(st.integers(1, 13), min_size=0, max_size=3))
    if not shape or draw(st.booleans()):
        return tuple(shape), None, tp, dp
    dim = draw(st.integers(0, len(shape) - 1))
    if draw(st.booleans()):
        return tuple(shape), Split(dim), tp, dp
    blocks = tuple(tp * b for b in draw(st.lists(st.integers(1, 4), min_size=2, max_size=3)))
    shape[dim] = sum(blocks)
    return tuple(shape), Split(dim, blocks), tp, dp


@settings(max_examples=300, deadline=None)
@given(layouts())
def test_boxes_tile_the_tensor(layout: tuple[tuple[int, ...], Split | None, int, int]) -> None:
    shape, split, n_tp, n_dp = layout
    tensor = torch.arange(int(torch.tensor(shape).prod()) if shape else 1).reshape(shape)
    count = torch.zeros(shape, dtype=torch.int64)
    for tp, dp in itertools.product(range(n_tp), range(n_dp)):
        part = tensor
        if split is not None:
            part = take_part(tensor, S(split.dim, split.blocks), n_tp, tp)
        if shape:
            chunks = part.chunk(n_dp)
            part = chunks[dp] if dp < len(chunks) else part[:0]
        covered = torch.zeros(part.shape, dtype=torch.int64)
        for piece in pieces(shape, split, Place(tp, n_tp), Place(dp, n_dp)):
            assert piece.whole.sizes == piece.local.sizes
            assert min(piece.whole.sizes, default=1) > 0
            assert torch.equal(piece.whole.of(tensor), piece.local.of(part))
            piece.local.of(covered).add_(1)
            piece.whole.of(count).add_(1)
        assert (covered == 1).all()
    replicas = (1 if split else n_tp) * (1 if shape else n_dp)
    assert (count == replicas).all()


def test_a_box_is_a_view() -> None:
    tensor = torch.arange(12).reshape(3, 4)
    Box((1, 2), (2, 1)).of(tensor).zero_()
    assert tensor.tolist() == [[0, 1, 2, 3], [4, 5, 0, 7], [8, 9, 0, 11]]


# -- layers ---------------------------------------------------------------------------------------


class Block(Layer):
    """A layer with every kind of split."""

    PARAMETERS: ClassVar = {
        "norm.weight": Parameter((6,), F64, partial_gradient=("tp",)),
        "attn.qkv.weight": Parameter((6, 24), F64, split=Split(1, (8, 8, 8))),
        "attn.qkv.bias": Parameter((24,), F64, split=Split(0, (8, 8, 8))),
        "mlp.0.weight": Parameter((7, 6), F64, split=Split(0)),
        "frozen": Parameter((3,), F64, trainable=False),
        "scale": Parameter((), F64, buffer=True),
        "mask": Parameter((8, 2), torch.bool, buffer=True, persistent=False, split=Split(0)),
    }

    def forward(self, x: Tensor) -> Tensor:
        rank, n = current().rank("tp"), current().size("tp")
        x = all_reduce_gradient(x, axis="tp") * local(self.norm.weight)
        a = x @ local(self.attn.qkv.weight) + local(self.attn.qkv.bias)
        b = x @ local(self.mlp[0].weight).T
        assert b.shape[-1] == -(-7 // n), rank
        return a.square().sum() + b.square().sum() * local(self.scale)


def source() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"h.3.{name}": torch.randn(p.shape, dtype=F64, generator=generator).to(p.dtype)
        for name, p in Block.PARAMETERS.items()
    }
    tensors["embedding.weight"] = torch.randn((7, 6), dtype=F64, generator=generator)
    return tensors


class Embedding(Layer):
    PARAMETERS: ClassVar = {"table.weight": Parameter((7, 6), F64, split=Split(0))}


class Head(Layer):
    PARAMETERS: ClassVar = {"weight": Parameter((7, 6), F64, split=Split(0))}

    def value(self) -> Tensor:
        return local(self.weight)


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = [Block()]
        attach(self, self.block[0], "h.3")
        self.parts = (Embedding(), Head())
        attach(self, self.parts[0], "embed", {"table.weight": "embedding.weight"})
        attach(self, self.parts[1], "head", {"weight": "embedding.weight"})

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.cat([self.parts[1].value(), local(self.parts[0].table.weight)])
        return self.block[0](x) + rows.square().sum()


def reference(tensors: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    p = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    x = x * p["h.3.norm.weight"]
    a = x @ p["h.3.attn.qkv.weight"] + p["h.3.attn.qkv.bias"]
    b = x @ p["h.3.mlp.0.weight"].T
    loss = a.square().sum() + b.square().sum() * p["h.3.scale"]
    (loss + 2 * p["embedding.weight"].square().sum()).backward()
    return {n: t.grad for n, t in p.items() if t.grad is not None}


def batch() -> Tensor:
    return torch.randn((4, 6), dtype=F64, generator=torch.Generator().manual_seed(5))


def check_stage(wrap: bool) -> None:
    mesh = current()
    stage, tensors = Stage(), source()
    names = [name for name, _ in stage.named_parameters()]
    assert sorted(names) == sorted(n for n in tensors if not n.endswith(("scale", "mask")))
    assert {n for n in stage.state_dict()} == set(tensors) - {"h.3.mask"}
    if wrap:
        assert mesh.device_mesh is not None
        fully_shard(stage.get_submodule("h.3"), mesh=mesh.device_mesh["dp"])
        fully_shard(stage, mesh=mesh.device_mesh["dp"])
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # sums, not means
    load_parameters(stage, tensors)
    for name, declaration, tensor in declared(stage):
        assert torch.equal(whole(tensor, declaration), tensors[name]), name
        for piece in pieces_of(tensor, declaration):
            mine = piece.local.of(local_part(tensor))
            assert torch.equal(mine, piece.whole.of(tensors[name])), name
    rows = mesh.rank("dp"), mesh.size("dp")
    stage(batch().chunk(rows[1])[rows[0]]).backward()
    sum_partial_gradients(stage)
    expected = reference(tensors, batch())
    seen = set()
    for name, declaration, tensor in declared(stage):
        if not declaration.buffer and declaration.trainable:
            assert tensor.grad is not None, name
            grad = whole(tensor.grad, declaration)
            if not wrap and mesh.size("dp") > 1:  # nobody reduced over dp
                dist.all_reduce(grad, group=mesh.group("dp"))
            scale = mesh.size("dp") if name == "embedding.weight" else 1
            torch.testing.assert_close(grad, expected[name] * scale, rtol=0, atol=1e-12)
            seen.add(name)
    assert seen == {n for n in expected if n not in ("h.3.scale", "h.3.frozen")}


@pytest.mark.parametrize("n", [1, 2, 4])
def test_tensor_parallel_stage(n: int) -> None:
    run_threads(n, check_stage, False)


def test_data_and_tensor_parallel_stage() -> None:
    run_threads(4, check_stage, False, axes={"dp": 2, "tp": 2})


def with_mesh(sizes: dict[str, int], function: Any, *args: Any) -> Any:
    with using(Mesh.create(sizes)):
        return function(*args)


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_stage_under_fsdp(dp: int, ranks: Pool) -> None:
    ranks.run(with_mesh, {"pp": 1, "dp": dp, "tp": 4 // dp}, check_stage, True)


def optimizer_states() -> None:
    stage, tensors = Stage(), source()
    assert current().device_mesh is not None
    fully_shard(stage, mesh=current().device_mesh["dp"])  # type: ignore[index]
    load_parameters(stage, tensors)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=0.1)
    stage(batch()).backward()
    sum_partial_gradients(stage)
    gradients = [(t.grad, d) for _, d, t in declared(stage) if t.grad is not None]
    norm = torch.nn.utils.get_total_norm([grad for grad, _ in gradients])
    squares = {id(g): whole(g, d).square().sum() for g, d in gradients}
    assert isinstance(norm, DTensor)
    torch.testing.assert_close(norm.full_tensor(), sum(squares.values()).sqrt())  # type: ignore[union-attr]
    optimizer.step()
    for name, declaration, tensor in declared(stage):
        if state := optimizer.state.get(tensor):
            grad = whole(tensor.grad, declaration)
            average = whole(state["exp_avg"], declaration)
            torch.testing.assert_close(average, 0.1 * grad, rtol=1e-12, atol=1e-14, msg=name)
            assert whole(state["step"], declaration).item() == 1


def test_whole_optimizer_states(ranks: Pool) -> None:
    ranks.run(with_mesh, {"pp": 1, "dp": 2, "tp": 2}, optimizer_states)


def on_meta() -> None:
    with torch.device("meta"):
        stage = Stage()
    assert all(t.is_meta for _, _, t in declared(stage))
    stage.to_empty(device="cpu")
    load_parameters(stage, source())
    for name, declaration, tensor in declared(stage):
        assert isinstance(tensor, DTensor) != declaration.buffer
        assert torch.equal(whole(tensor, declaration), source()[name])


def test_created_on_meta() -> None:
    run_threads(2, on_meta)


def test_without_process_groups() -> None:
    with using(Mesh({"tp": 1})):
        check_stage(False)


def test_load_errors() -> None:
    with using(Mesh({"tp": 1})):
        stage = Stage()
        tensors = source()
        tensors["h.3.frozen"] = torch.zeros(4)
        with pytest.raises(CheckpointError, match=r"expected shape \(3,\) for 'h.3.frozen'"):
            load_parameters(stage, tensors)
        tensors = source()
        del tensors["h.3.norm.weight"]
        with pytest.raises(CheckpointError, match=r"expected a tensor for 'h.3.norm.weight'"):
            load_parameters(stage, tensors)


class OtherHead(Layer):
    PARAMETERS: ClassVar = {"weight": Parameter((7, 6), F64)}


def test_a_tied_parameter_has_one_declaration() -> None:
    with using(Mesh({"tp": 1})), pytest.raises(InternalError, match="is declared as"):
        attach(Stage(), OtherHead(), "", {"weight": "embedding.weight"})


def test_layer_takes_over_what_parts_put_below_its_path() -> None:
    with using(Mesh({"tp": 1})):
        stage = Container()
        part = OtherHead()
        attach(stage, part, "", {"weight": "h.3.extra.weight"})
        attach(stage, Block(), "h.3")
        names = [name for name, _ in stage.named_parameters()]
        assert "h.3.extra.weight" in names and "h.3.norm.weight" in names
        assert part.weight is stage.get_parameter("h.3.extra.weight")
