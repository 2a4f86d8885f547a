"""Every conversion, forward and backward, against the definition of the states it connects."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
from ranks import Pool, RankError, run_threads
from torch import Tensor

from autoshard.errors import InternalError, LaunchError
from autoshard.placement.conversion import conversion
from autoshard.placement.state import P, R, S, State, V, local_size, take_part
from autoshard.runtime import collectives
from autoshard.runtime.mesh import Mesh, current, set_current, using

NAN = float("nan")


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def padded_part(whole: Tensor, state: State, n: int, rank: int, fill: float) -> Tensor:
    """The part of ``rank``, every block filled up to the same size on all ranks."""
    parts = []
    start = 0
    for block in state.blocks or (whole.shape[state.dim],):
        piece = take_part(whole.narrow(state.dim, start, block), S(state.dim), n, rank)
        missing = local_size(block, n) - piece.shape[state.dim]
        shape = list(piece.shape)
        shape[state.dim] = missing
        parts += [piece, piece.new_full(shape, fill)]
        start += block
    return torch.cat(parts, state.dim)


def addend(whole: Tensor, n: int, rank: int, seed: int) -> Tensor:
    """One of ``n`` random tensors whose sum is ``whole``."""
    others = [random(tuple(whole.shape), seed + r) for r in range(1, n)]
    return others[rank - 1] if rank else whole - sum(others)


def local_value(whole: Tensor, state: State, n: int, rank: int, fill: float) -> Tensor:
    if state.is_split:
        return padded_part(whole, state, n, rank, fill)
    return addend(whole, n, rank, 100) if state.kind == "P" else whole.clone()


def local_gradient(whole: Tensor, state: State, n: int, rank: int, fill: float) -> Tensor:
    if state.is_split:
        return padded_part(whole, state, n, rank, fill)
    return addend(whole, n, rank, 200) if state.kind == "V" else whole.clone()


def convert(x: Tensor, source: State, target: State, size: int) -> Tensor:
    """Call the function that the table names, with the arguments that the brief of ops gives."""
    found = conversion(source, target)
    assert found is not None
    function = getattr(collectives, found.function)
    if source.is_split and target.is_split:
        args: tuple[Any, ...] = (source.dim, target.dim, size, source.blocks, target.blocks)
    elif source.is_split:
        args = (source.dim, size, source.blocks)
    elif target.is_split:
        args = (target.dim, target.blocks)
    else:
        args = ()
    return function(x, *args, axis="tp")


def run_conversion(
    shape: tuple[int, ...], source: State, target: State
) -> tuple[Tensor, Tensor, bool]:
    """On one rank: output, gradient of the input, whether the output is contiguous."""
    n, rank = current().size("tp"), current().rank("tp")
    value, gradient = random(shape, 1), random(shape, 2)
    size = shape[source.dim] if source.is_split else 0
    x = local_value(value, source, n, rank, NAN).requires_grad_()
    y = convert(x, source, target, size)
    y.backward(local_gradient(gradient, target, n, rank, NAN))
    assert x.grad is not None
    return y.detach(), x.grad, y.is_contiguous()


def check(results: list[Tensor], whole: Tensor, state: State, is_sum: bool) -> None:
    n = len(results)
    if is_sum:
        torch.testing.assert_close(sum(results), whole, rtol=0, atol=1e-13)
        return
    for rank, result in enumerate(results):
        expected = padded_part(whole, state, n, rank, 0.0) if state.is_split else whole
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-13)


CASES = [
    ((4, 6), 0, ()),
    ((3, 8, 2), 1, ()),
    ((2, 3, 7), 2, ()),  # uneven
    ((5, 2), 0, ()),  # uneven; on 4 ranks the last one holds padding only
    ((12, 3), 0, (8, 4)),
    ((2, 16, 3), 1, (8, 4, 4)),
    ((2, 11), 1, (5, 6)),  # uneven blocks
]  # fmt: skip
PAIRS = ["RV", "RS", "RP", "VR", "VS", "VP", "SR", "SV", "SP", "PR", "PV", "PS"]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("pair", PAIRS)
def test_conversion(pair: str, n: int) -> None:
    for shape, dim, blocks in CASES if "S" in pair else CASES[:1]:
        source, target = (S(dim, blocks) if kind == "S" else State(kind) for kind in pair)
        results = run_threads(n, run_conversion, shape, source, target)
        outputs, gradients, contiguous = (list(x) for x in zip(*results, strict=True))
        check(outputs, random(shape, 1), target, is_sum=target == P)
        check(gradients, random(shape, 2), source, is_sum=source == V)
        assert all(contiguous)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("source", "target"),
    [(S(0), S(1)), (S(2), S(0)), (S(1, (4, 8)), S(2)), (S(0), S(1, (8, 4))), (S(2), S(1, (5, 7)))],
)
def test_all_to_all(source: State, target: State, n: int) -> None:
    shape = (6, 12, 5)
    results = run_threads(n, run_conversion, shape, source, target)
    outputs, gradients, contiguous = (list(x) for x in zip(*results, strict=True))
    check(outputs, random(shape, 1), target, is_sum=False)
    check(gradients, random(shape, 2), source, is_sum=False)
    assert all(contiguous)


def test_one_function_per_entry_of_the_table() -> None:
    table = {conversion(a, b).function for a, b in _pairs()}  # type: ignore[union-attr]
    assert table == {
        "all_reduce_gradient", "split", "share", "share_gradient", "split_varying",
        "share_varying", "all_gather_replicated", "all_gather", "all_to_all", "pad", "all_reduce",
        "all_reduce_both", "reduce_scatter",
    }  # fmt: skip


def _pairs() -> list[tuple[State, State]]:
    states = (R, V, P, S(0))
    return [(a, b) for a in states for b in states if a != b] + [(S(0), S(1))]


def gather_ids(kind: torch.dtype) -> list[Tensor]:
    rank = current().rank("tp")
    whole = torch.arange(10).remainder(3).to(kind).reshape(5, 2)
    part = collectives.split(whole, 0, axis="tp")
    gathered = collectives.all_gather_replicated(part, 0, 5, axis="tp")
    summed = collectives.all_reduce(collectives.pad(part, 0, 5, axis="tp"), axis="tp")
    shared = collectives.all_reduce(collectives.share(whole, axis="tp"), axis="tp")
    moved = collectives.all_to_all(part, 0, 1, 5, axis="tp")
    back = collectives.all_to_all(moved, 1, 0, 2, axis="tp")
    scattered = collectives.reduce_scatter(collectives.share(whole, axis="tp"), 0, axis="tp")
    assert torch.equal(back, part), rank
    assert torch.equal(scattered, part), rank
    return [whole, gathered, summed, shared]


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.bool, torch.uint8])
def test_integers_and_bools(kind: torch.dtype, ranks: Pool) -> None:
    for results in (run_threads(2, gather_ids, kind), ranks.run(_on_pool, gather_ids, kind)):
        for whole, *others in results:
            for other in others:
                assert other.dtype == kind
                assert torch.equal(other, whole)


def _on_pool(function: Any, *args: Any) -> Any:
    with using(Mesh.create({"pp": 1, "dp": 1, "tp": torch.distributed.get_world_size()})):
        return function(*args)


@pytest.mark.parametrize("pair", ["SV", "SS", "PS", "PV", "RV", "RS"])
def test_on_gloo(pair: str, ranks: Pool) -> None:
    shape = (2, 11, 4)
    source = S(1, (5, 6)) if pair[0] == "S" else State(pair[0])  # type: ignore[arg-type]
    target = State(pair[1]) if pair[1] != "S" else S(2) if pair == "SS" else S(1, (5, 6))  # type: ignore[arg-type]
    results = ranks.run(_on_pool, run_conversion, shape, source, target)
    outputs, gradients, _ = (list(x) for x in zip(*results, strict=True))
    check(outputs, random(shape, 1), target, is_sum=target == P)
    check(gradients, random(shape, 2), source, is_sum=source == V)


def half_precision(dtype: torch.dtype) -> Tensor:
    x = torch.full((4, 3), float(current().rank("tp") + 1), dtype=dtype, requires_grad=True)
    y = collectives.all_reduce(x, axis="tp") + collectives.all_gather(
        collectives.reduce_scatter(x, 0, axis="tp"), 0, 4, axis="tp"
    )
    y.sum().backward()
    return y.detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_gloo(dtype: torch.dtype, ranks: Pool) -> None:
    for y in ranks.run(_on_pool, half_precision, dtype):
        assert torch.equal(y, torch.full((4, 3), 20.0, dtype=dtype))


def sequence_parallel(x: Tensor, w: Tensor) -> Tensor:
    h = collectives.all_gather(x, 1, 6, axis="tp") @ w
    h = collectives.reduce_scatter(h, 1, axis="tp")
    return collectives.all_reduce(collectives.all_reduce_gradient(h, axis="tp"), axis="tp")


def compiled_and_eager() -> list[tuple[Tensor, Tensor, Tensor]]:
    found = []
    for function in (
        sequence_parallel,
        torch.compile(sequence_parallel, backend="aot_eager", fullgraph=True),
    ):
        x = random((2, 3), current().rank("tp")).requires_grad_()
        w = random((6, 4), 9).requires_grad_()
        y = function(x, w)
        y.square().sum().backward()
        assert x.grad is not None and w.grad is not None
        found.append((y.detach(), x.grad, w.grad))
    return found


def test_under_compile(ranks: Pool) -> None:
    for eager, compiled in ranks.run(_on_pool, compiled_and_eager, world=2):
        for a, b in zip(eager, compiled, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def own_part_storage() -> tuple[int, int]:
    whole = torch.zeros(8, 16)
    part = collectives.split(whole, 0, axis="tp")
    return part.untyped_storage().nbytes(), part.numel() * 4


def test_a_part_does_not_keep_the_whole_alive() -> None:
    for storage, needed in run_threads(4, own_part_storage):
        assert storage == needed


def nested_axes() -> tuple[int, int, Tensor]:
    mesh = current()
    x = torch.tensor([10.0 * mesh.rank("dp") + mesh.rank("tp")])
    total = collectives.all_reduce(x, axis="tp")
    assert mesh.size("pp") == 1
    return mesh.rank("dp"), mesh.rank("tp"), collectives.all_gather(total, 0, 2, axis="dp")


def test_axes_are_outermost_first() -> None:
    results = run_threads(4, nested_axes, axes={"dp": 2, "tp": 2})
    assert [(dp, tp) for dp, tp, _ in results] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for _, _, gathered in results:
        assert gathered.tolist() == [1.0, 21.0]


def test_axis_of_one_rank_needs_no_group() -> None:
    with using(Mesh({"tp": 1})):
        x = torch.ones(3, 2, requires_grad=True)
        y = collectives.all_to_all(collectives.split(x, 1, axis="tp"), 1, 0, 2, axis="tp")
        y = collectives.all_reduce_both(collectives.share(y, axis="other"), axis="tp")
        assert torch.equal(y, x)


def test_no_mesh_is_an_internal_error() -> None:
    set_current(None)
    with pytest.raises(InternalError, match="no mesh on this thread"):
        collectives.all_reduce(torch.ones(1), axis="tp")
    with pytest.raises(LaunchError, match="torchrun"):
        Mesh.create({"tp": 2})


def wrong_world() -> None:
    Mesh.create({"dp": 3, "tp": 2})


def test_wrong_number_of_ranks() -> None:
    with pytest.raises(LaunchError, match="expected 6 ranks for the mesh dp=3 x tp=2 but got 2"):
        run_threads(2, wrong_world)


def fails_on_one_rank() -> None:
    if current().rank("tp") == 1:
        raise ValueError("the first error")
    collectives.all_reduce(torch.ones(1), axis="tp")


def test_first_error_of_a_rank_is_shown(ranks: Pool) -> None:
    with pytest.raises(ValueError, match="the first error"):
        run_threads(3, fails_on_one_rank)
    before = ranks.run(_on_pool, process_id, world=2)
    with pytest.raises(RankError, match="the first error"):
        ranks.run(_on_pool, fails_on_one_rank, world=2, timeout_s=20)
    assert ranks.run(_on_pool, process_id, world=2) == before


def process_id() -> int:
    collectives.all_reduce(torch.ones(1), axis="tp")
    return os.getpid()


def dies_on_one_rank() -> None:
    if current().rank("tp") == 1:
        os._exit(7)


def test_a_pool_that_lost_a_rank_starts_again() -> None:
    pool = Pool(2)
    try:
        with pytest.raises(RankError, match=r"ranks \[1\] of 2 ended with exit codes \[7\]"):
            pool.run(_on_pool, dies_on_one_rank, world=2, timeout_s=60)
        assert len(set(pool.run(_on_pool, process_id, world=2))) == 2
    finally:
        pool.close()


def waits_for_a_rank() -> None:
    if current().rank("tp") == 0:
        time.sleep(3)
    else:
        torch.distributed.barrier()


def test_threads_that_never_end() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] still wait"):
        run_threads(2, waits_for_a_rank, timeout_s=0.3)


def group_timeouts() -> list[float]:
    from datetime import timedelta

    mesh = Mesh.create({"dp": 2, "tp": 2}, timeout=timedelta(seconds=7))
    device = torch.device("cpu")
    return [mesh.group(a)._get_backend(device).options._timeout.total_seconds() for a in mesh.axes]


def test_groups_have_the_timeout(ranks: Pool) -> None:
    for timeouts in ranks.run(group_timeouts):
        assert timeouts == [7, 7]
