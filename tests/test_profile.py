"""The profiler: what it measures, how it fails, what it keeps, and the machine's cluster file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_threads

from autoshard.cluster import COLLECTIVE_KINDS, Cluster, Tier, find, link
from autoshard.cost_models.collective import collective_s
from autoshard.cost_models.compute import OpCost, op_cost
from autoshard.cost_models.costs import AnalyticCosts, MeasuredCosts, op_key
from autoshard.errors import AutoshardError
from autoshard.ir import Graph, Op, TensorType, Value
from autoshard.profile import machine, profiler
from autoshard.profile.cache import Cache, cache_folder, key_of
from autoshard.profile.companions import companions
from autoshard.profile.in_order import SAME_LAYERS, OpTimes, measure_in_order
from autoshard.profile.inputs import index_bounds, tensors_for
from autoshard.profile.links import LinkFit, fit, measure_links, tier_from
from autoshard.profile.measure import Failure, Measurement, measure_graph
from autoshard.profile.profiler import profile_layer, profile_ops
from autoshard.profile.timing import environment, rank_threads, summarise, threads, time_calls

CPU = torch.device("cpu")


def _value(name: str, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Value:
    return Value(name, TensorType(shape, dtype, grad and dtype.is_floating_point, True, grad))


def _linear(name: str = "y", size: int = 128) -> Op:
    x, w, y = _value("x", 256, size), _value("w", size, size), _value(name, 256, size)
    return Op(name, "aten.linear.default", (x, w), (), (y,))


def _layer() -> Graph:
    first = _linear("h")
    out = _value("y", 256, 128)
    second = Op("y", "aten.sigmoid.default", (first.output,), (), (out,))
    return Graph((first.args[0],), (first.args[1],), (first, second), (out,))


def _alone(op: Op) -> Graph:
    """A graph of this op only, all its operands being inputs."""
    return Graph(tuple({v.name: v for v in op.operands}.values()), (), (op,), op.outputs)


def _broken() -> Op:
    """Shapes that do not fit: fails when it runs."""
    x, y = _value("x", 4, 5), _value("y", 4, 4)
    return Op("y", "aten.mm.default", (x, x), (), (y,))


def test_a_layer_is_measured_both_ways() -> None:
    found = measure_graph(_layer(), repeats=3)
    assert isinstance(found, Measurement)
    assert found.forward_s > 0
    assert found.backward is not None and found.backward_s > 0
    assert found.forward.repeats == 3
    assert found.saved_bytes == 2 * 256 * 128 * 4  # the input and the sigmoid's result


def test_more_work_takes_longer() -> None:
    small, large = (measure_graph(_alone(_linear(size=s)), repeats=5) for s in (64, 1024))
    assert isinstance(small, Measurement) and isinstance(large, Measurement)
    assert large.forward.best_s > 10 * small.forward.best_s


def test_nothing_to_differentiate_has_no_backward() -> None:
    x, y = _value("x", 8, grad=False), _value("y", 8, grad=False)
    found = measure_graph(_alone(Op("y", "aten.exp.default", (x,), (), (y,))), repeats=3)
    assert isinstance(found, Measurement)
    assert found.backward is None


def test_a_failed_measurement_says_why() -> None:
    found = measure_graph(_alone(_broken()))
    assert isinstance(found, Failure)
    assert "cannot be multiplied" in found.reason


def test_a_graph_beyond_memory_is_not_tried() -> None:
    huge = _value("x", 2**24, 2**24)
    op = Op("y", "aten.exp.default", (huge,), (), (_value("y", 2**24, 2**24),))
    found = measure_graph(_alone(op))
    assert isinstance(found, Failure)
    assert "bytes but" in found.reason


def test_indices_are_in_range() -> None:
    """Through a view, and the tightest of two uses."""
    ids = _value("ids", 4, 8, dtype=torch.int64)
    flat = _value("flat", 32, dtype=torch.int64)
    wide, narrow = _value("wide", 50, 4), _value("narrow", 10, 4)
    ops = (
        Op("flat", "aten.view.default", (ids, (32,)), (), (flat,)),
        Op("a", "aten.embedding.default", (wide, flat), (), (_value("a", 32, 4),)),
        Op("b", "aten.embedding.default", (narrow, ids), (), (_value("b", 4, 8, 4),)),
    )
    graph = Graph((ids,), (wide, narrow), ops, (ops[1].output, ops[2].output))
    assert index_bounds(graph) == {"ids": 10, "flat": 50}
    assert int(tensors_for(graph, CPU)["ids"].max()) < 10
    assert isinstance(measure_graph(graph, repeats=3), Measurement)


def test_timings() -> None:
    found = summarise([3.0, 1.0, 2.0, 100.0, 2.0])
    assert (found.median_s, found.best_s, found.repeats) == (2.0, 1.0, 5)
    calls: list[int] = []
    time_calls(lambda: calls.append(1), device=CPU, warm_up=2, repeats=4)
    assert len(calls) == 6


# The cache ---------------------------------------------------------------------------------------


def test_keys_hold_everything_that_matters() -> None:
    base = environment(CPU)
    keys = {key_of("op", "a", base), key_of("op", "b", base), key_of("layer", "a", base)}
    keys |= {key_of("op", "a", {**base, name: "other"}) for name in base}
    assert len(keys) == 3 + len(base)
    assert {"torch", "threads", "device"} <= set(base)


def test_op_keys_leave_out_names_only() -> None:
    op = _linear()
    renamed = op.map(lambda v: replace(v, name=v.name + "2"))
    assert op_key(op) == op_key(renamed)
    x, y = _value("x", 8, 8), _value("y", 8, 8)
    other = _value("z", 8, 8)
    variants = [
        Op("y", "aten.mul.Tensor", (x, x), (), (y,)),
        Op("y", "aten.mul.Tensor", (x, other), (), (y,)),
        Op("y", "aten.mul.Tensor", (x, 2), (), (y,)), Op("y", "aten.mul.Tensor", (x, 3), (), (y,)),
        Op("y", "aten.add.Tensor", (x, x), (), (y,)),
        Op("y", "aten.add.Tensor", (x, x), (("alpha", 2),), (y,)),
        Op("y", "aten.mul.Tensor", (x, _value("z", 8, 8, grad=False)), (), (y,)),
        Op("y", "aten.mul.Tensor", (x, _value("z", 8, 8, dtype=torch.bfloat16)), (), (y,)),
    ]  # fmt: skip
    assert len({op_key(v) for v in variants}) == len(variants)


def test_the_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOSHARD_CACHE_DIR", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    Cache().put("k", {"x": 1})
    assert Cache().get("k") == {"x": 1}
    assert (tmp_path / "here" / "measurements.jsonl").exists()


def test_a_damaged_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    cache = Cache(path)
    cache.put("a", {"x": 1})
    cache.put("b", {"x": 2})
    text = path.read_bytes()
    path.write_bytes(text[: len(text) - 5])  # killed while it wrote
    again = Cache(path)
    assert (again.get("a"), again.get("b"), len(again)) == ({"x": 1}, None, 1)


def test_layers_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "c.jsonl")
    first = profile_layer(_layer(), cache=cache, repeats=3)

    def never(*args: object, **options: object) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(profiler, "measure_graph", never)
    assert profile_layer(_layer(), cache=Cache(tmp_path / "c.jsonl")) == first


def test_failures_are_reported_and_not_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c.jsonl")
    found = profile_ops([[_alone(_broken()), _alone(_linear())]], cache=cache)
    assert list(found.failures) == [op_key(_broken())]
    assert "cannot be multiplied" in found.failures[op_key(_broken())]
    assert list(found.table) == [op_key(_linear())]
    assert len(cache) == 1
    layer = Graph((_broken().args[0],), (), (_broken(),), _broken().outputs)
    assert isinstance(profile_layer(layer, cache=cache), Failure)
    assert len(cache) == 1


# Ops in the order of a step ----------------------------------------------------------------------


def test_ops_are_measured_in_their_place() -> None:
    """Forward and backward of every op, of at most so many equal layers."""
    graph = _layer()
    found = measure_in_order([graph] * 10, device=CPU, warm_up=0, repeats=2, least_s=0.0)
    assert set(found) == {op_key(op) for op in graph.ops}
    for times in found.values():
        assert isinstance(times, OpTimes) and times.backward is not None
        assert times.forward.repeats == times.backward.repeats == 2 * SAME_LAYERS


def test_gradients_and_updates_are_those_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each op's backward gets what the one after it made, as plain autograd has it."""
    graph = _layer()
    tensors = tensors_for(graph, CPU)
    given: list[torch.Tensor] = []
    original = torch.autograd.grad

    def watched(outputs: Any, inputs: Any, gradients: Any, **options: Any) -> Any:
        given.extend(gradients)
        return original(outputs, inputs, gradients, **options)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    measure_in_order([graph], device=CPU, warm_up=0, repeats=1, least_s=0.0)
    hidden = torch.nn.functional.linear(tensors["x"], tensors["w"])
    (wanted,) = original(torch.sigmoid(hidden).sum(), hidden)
    torch.testing.assert_close(given, [torch.ones_like(hidden), wanted])


def test_what_cannot_run_alone_is_made_up() -> None:
    """An op that fails, or that needs other ranks, does not keep the rest from being measured."""
    broken, last = _broken(), _linear("z")
    reduced = _value("r", 256, 128)
    reduce = Op("r", "autoshard.all_reduce", (last.args[0],), (("axis", "tp"),), (reduced,))
    after = Op("z", last.target, (reduced, last.args[1]), (), last.outputs)
    graph = Graph((*broken.operands[:1], last.operands[0]), last.operands[1:],
                  (broken, reduce, after), after.outputs)  # fmt: skip
    renamed = graph.renamed({"x": "x"})
    found = measure_in_order([renamed], device=CPU, warm_up=0, repeats=1, least_s=0.0)
    assert isinstance(found[op_key(broken)], Failure)
    assert isinstance(found[op_key(after)], OpTimes)
    assert op_key(reduce) not in found


def test_layers_beyond_memory_are_failures() -> None:
    op = Op("y", "aten.exp.default", (_value("x", 2**24, 2**24),), (), (_value("y", 2**24, 2**24),))
    found = measure_in_order([_alone(op)])
    assert "bytes but" in str(found[op_key(op)])


def test_companions_compute_until_the_measurement_ends() -> None:
    with companions(2, [[_layer()]]):
        assert len(_companions()) == 2
    assert not _companions()


def _companions() -> list[str]:
    command = ["ps", "-o", "args", "--no-headers", "--ppid", str(os.getpid())]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if "autoshard.profile.companions" in line]


def test_companions_that_cannot_begin_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    words = "expected to start a process that computes while ops are measured, but it ended"
    with pytest.raises(AutoshardError, match=words), companions(1, [[_layer()]]):
        pass


@pytest.mark.parametrize(
    ("variables", "world_size", "number"),
    [({}, 1, 2), ({}, 8, 1), ({"OMP_NUM_THREADS": "2"}, 8, 2), ({"LOCAL_WORLD_SIZE": "4"}, 8, 2)],
)
def test_ranks_compute_with_the_threads_that_torchrun_gives_them(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], world_size: int, number: int
) -> None:
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    with threads(2):
        assert rank_threads(world_size) == number
    assert torch.get_num_threads() == before


# Measured costs ----------------------------------------------------------------------------------


def test_measured_costs_come_first() -> None:
    cluster = find("cpu")
    known, unknown = _linear(), _linear(size=64)
    measured = OpCost(1.0, 2.0, 10.0, 20.0, "measured")
    costs = MeasuredCosts(cluster, {op_key(known): measured})
    assert costs.origin == {"measured": 0.0, "analytic": 1.0}
    assert costs.op(known) is measured
    assert costs.origin == {"measured": 1.0, "analytic": 0.0}
    assert costs.op(unknown) == AnalyticCosts(cluster).op(unknown)
    share = 3 / (3 + op_cost(unknown, cluster.device).total_s)
    assert costs.origin["measured"] == pytest.approx(share)


def test_ops_that_need_other_ranks_or_do_nothing_are_not_measured(tmp_path: Path) -> None:
    x = _value("x", 8, 8)
    reduce = Op("r", "autoshard.all_reduce", (x,), (("axis", "tp"),), (x,))
    view = Op("v", "aten.view.default", (x, (64,)), (), (_value("v", 64),))
    steps = [[Graph((x,), (), (reduce, view), view.outputs)]]
    found = profile_ops(steps, cache=Cache(tmp_path / "c"))
    assert not found.table and not found.failures


def test_measured_ops_add_up_to_about_the_layer(tmp_path: Path) -> None:
    graph = _layer()
    cache = Cache(tmp_path / "c.jsonl")
    whole = profile_layer(graph, cache=cache, repeats=9)
    table = profile_ops([[graph]], cache=cache).table
    costs = MeasuredCosts(find("cpu"), table)
    total = sum(costs.op(o).total_s for o in graph.ops)
    assert costs.origin["measured"] == 1.0
    assert isinstance(whole, Measurement)
    assert 0.2 < total / (whole.forward_s + whole.backward_s) < 5  # other programs run, too


# Links -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", COLLECTIVE_KINDS)
@pytest.mark.parametrize("n", [2, 4])
def test_the_fit_inverts_the_cost_model(kind: Any, n: int) -> None:
    tier = Tier(name="t", size=0, bytes_per_s=3e9, latency_s=2e-5)
    on = link(replace(find("cpu"), tiers=(tier,)), n)
    # Sizes at which the model takes rings and pairwise exchange, which the fit supposes.
    samples = {size: collective_s(kind, size, on) for size in (10**7, 10**8, 10**9)}
    found = fit(kind, n, samples)
    assert found.bytes_per_s == pytest.approx(3e9, rel=1e-6)
    assert found.latency_s == pytest.approx(2e-5, rel=1e-3)
    assert found.error < 1e-6


def test_fits_are_never_negative() -> None:
    falling = fit("send", 2, {1000: 2e-3, 10**6: 1e-3})
    assert falling.latency_s >= 0 and falling.bytes_per_s > 0
    through_zero = fit("send", 2, {1000: 1e-6, 10**6: 2e-3})
    assert through_zero.latency_s >= 0 and through_zero.bytes_per_s > 0


def test_a_tier_takes_a_failed_kind_to_be_slow() -> None:
    def made(kind: str, rate: float) -> LinkFit:
        latency_s = 1e-5 if kind == "send" else 3e-5
        return LinkFit(kind=kind, latency_s=latency_s, bytes_per_s=rate, error=0.0, samples={})

    fits = {
        "send": made("send", 4e9), "all_reduce": made("all_reduce", 1e9),
        "all_to_all": Failure(reason="no"),
    }  # fmt: skip
    tier = tier_from("t", 0, fits)
    assert isinstance(tier, Tier)
    assert tier.bytes_per_s == 4e9
    assert tier.latency_s == pytest.approx(2e-5)
    assert tier.latency_factor == pytest.approx({"send": 0.5, "all_reduce": 1.5})
    assert tier.efficiency["all_reduce"] == tier.efficiency["all_to_all"] == 0.25
    nothing = tier_from("t", 0, {"send": Failure(reason="broken wire")})
    assert nothing == Failure(reason="broken wire")


def _links() -> dict[str, LinkFit | Failure]:
    return measure_links(sizes=(4096, 262144), window_s=0.01, device=CPU)


def test_links_of_real_processes(ranks: Any) -> None:
    found = ranks.run(_links, world=2)[0]
    assert set(found) == set(COLLECTIVE_KINDS)
    for kind, made in found.items():
        assert isinstance(made, LinkFit), f"{kind}: {made}"
        assert made.bytes_per_s > 1e6
        assert set(made.samples) == {4096, 262144}
    assert isinstance(tier_from("loopback", 0, found), Tier)


def test_a_rank_alone_has_no_links() -> None:
    found = run_threads(1, _links)[0]
    assert all(isinstance(f, Failure) for f in found.values())


def _jitter() -> float:
    return machine.measure_jitter(machine.together, rounds=20)


def test_jitter_is_the_same_on_all_ranks(ranks: Any) -> None:
    first, second = ranks.run(_jitter, world=2)
    assert first == second >= 0


# The machine -------------------------------------------------------------------------------------


def _small_device(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda clock: original(clock, matrix=128, stream_bytes=2**20)


def test_a_cluster_file_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "measure_device", _small_device(machine.measure_device))
    path = tmp_path / "clusters" / "here.json"
    written = machine.write_cluster(path, name="here")
    assert Cluster.load(path) == written == find(path)
    assert "not measured" in written.source
    assert json.loads(path.read_text())["schema_version"] == 1
    device = written.device
    if device.kind == "cpu":
        assert 1e8 < device.flops_per_s["f32"] < 1e13
        assert 1e8 < device.bytes_per_s < 1e12
    assert 1e-8 < device.launch_s < 1e-2


def test_links_that_all_fail_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    failed: dict[str, Failure] = {k: Failure(reason="no route") for k in COLLECTIVE_KINDS}
    monkeypatch.setattr(machine, "measure_links", lambda group: failed)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(machine.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(machine.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(machine.dist, "new_group", lambda ranks: None)
    with pytest.raises(AutoshardError, match="every collective failed: no route"):
        machine._measured_tiers()
