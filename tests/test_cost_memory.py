"""Saved activations against real eager execution; state bytes against real optimizers and FSDP."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import zoo
from ranks import run_threads
from torch import Tensor

from autoshard.capture import capture, run_graph
from autoshard.cost_models.memory import SavedActivations, regathered, saved_values, workspace_bytes
from autoshard.cost_models.state import (
    OPTIMIZER_STATES,
    StateBytes,
    shard_bytes,
    state_bytes,
)
from autoshard.errors import OptionError
from autoshard.ir import Graph, LayerClass, Op, TensorType, Value
from autoshard.profile.inputs import tensors_for
from autoshard.runtime.optimizer import NAMED

CPU = torch.device("cpu")
MODELS = ("gpt2", "llama", "t5", "mixtral", "encoder", "resnet", "vgg_bn", "unet")


@functools.cache
def classes(name: str) -> tuple[LayerClass, ...]:
    model, batch, loss_fn = zoo.build(name, torch.float32)
    return capture(model, example_inputs=batch, loss_fn=loss_fn).classes


def block(name: str) -> Graph:
    """The distinct layer with the most ops."""
    return max((c.graph for c in classes(name)), key=lambda g: len(g.ops))


def really_saved(graph: Graph, env: dict[str, Tensor]) -> int:
    """Bytes of unique storages that eager autograd packs, parameters aside."""
    parameters = {env[p.name].untyped_storage().data_ptr() for p in graph.parameters}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run_graph(graph, env)
    return sum(found.values())


@pytest.mark.parametrize("name", MODELS)
def test_saved_bytes_are_those_of_eager_execution(name: str) -> None:
    checked = 0
    for layer in classes(name):
        expected = really_saved(layer.graph, tensors_for(layer.graph, CPU))
        assert saved_values(layer.graph).total_bytes == expected, layer.name
        checked += expected > 0
    assert checked >= 2


def test_recurrent_cells_keep_about_what_the_fused_kernel_does() -> None:
    """oneDNN's workspace is its own business: near, not equal."""
    layer = next(c.graph for c in classes("lstm") if any("lstm" in o.target for o in c.graph.ops))
    expected = really_saved(layer, tensors_for(layer, CPU))
    assert saved_values(layer).total_bytes == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_attention_kernels_of_both_devices_save_the_same(name: str) -> None:
    """Without dropout; the log-sum-exp has the compute dtype on neither."""
    graph = block(name)
    on_cpu, on_gpu = (saved_values(graph, device_kind=k).total_bytes for k in ("cpu", "cuda"))
    assert on_gpu == on_cpu


def _graph(*ops: Op, inputs: tuple[Value, ...], parameters: tuple[Value, ...] = ()) -> Graph:
    return Graph(inputs, parameters, ops, ops[-1].outputs)


def _value(name: str, *shape: int, grad: bool = True) -> Value:
    return Value(name, TensorType(shape, torch.float32, grad, True, grad))


def _op(target: str, out: Value, *args: object) -> Op:
    return Op(out.name, f"aten.{target}", args, (), (out,))


def _small() -> tuple[Graph, SavedActivations]:
    """y = relu((x @ w) viewed): the view and its base are one storage."""
    x, w = _value("x", 4, 6), _value("w", 6, 8)
    h, v, y = _value("h", 4, 8), _value("v", 8, 4), _value("y", 8, 4)
    graph = _graph(
        _op("mm.default", h, x, w), _op("view.default", v, h, (8, 4)), _op("sigmoid.default", y, v),
        inputs=(x,), parameters=(w,),
    )  # fmt: skip
    return graph, saved_values(graph)


def test_each_storage_belongs_to_its_first_value() -> None:
    _, saved = _small()
    assert set(saved.values) == {"x", "y"}
    assert saved.values["x"].layer_input
    assert not saved.values["y"].layer_input
    assert saved.values["x"].savers == ("h",)
    assert saved.values["x"].num_bytes == 4 * 6 * 4
    assert saved.owners["v"] == "h"
    assert saved.needs == {"h": ("x",), "y": ("y",)}
    assert saved.extra_bytes == {}
    assert saved.total_bytes == (24 + 32) * 4
    assert saved.input_bytes == 24 * 4


def test_an_op_names_the_view_that_it_saves() -> None:
    x = _value("x", 4, 6)
    v, y = _value("v", 6, 4), _value("y", 6, 4)
    graph = _graph(
        _op("view.default", v, x, (6, 4)), _op("pow.Tensor_Scalar", y, v, 2), inputs=(x,)
    )
    saved = saved_values(graph)
    assert saved.needs == {"y": ("v",)}
    assert saved.values["x"].savers == ("y",)


def test_parts_of_one_storage_are_told_apart() -> None:
    graph = block("gpt2")
    saved = saved_values(graph)
    attention = next(o.name for o in graph.ops if "scaled_dot_product" in o.target)
    assert len(saved.needs[attention]) == 4  # q, k, v and the result
    assert len({saved.owners[n] for n in saved.needs[attention]}) == 2


def test_nothing_is_saved_without_gradients() -> None:
    x, y = _value("x", 4, grad=False), _value("y", 4, grad=False)
    assert saved_values(_graph(_op("exp.default", y, x), inputs=(x,))).total_bytes == 0


def test_dropout_keeps_a_byte_on_a_gpu_and_the_noise_on_a_cpu() -> None:
    x, y = _value("x", 100), _value("y", 100)
    graph = _graph(_op("dropout.default", y, x, 0.5, True), inputs=(x,))
    assert saved_values(graph, device_kind="cuda").extra_bytes == {"y": 100}
    assert saved_values(graph).extra_bytes == {"y": 400}
    assert saved_values(graph).total_bytes == really_saved(graph, tensors_for(graph, CPU))


def test_local_bytes_scale_with_the_local_numel() -> None:
    graph, saved = _small()
    half = {"x": (4, 6), "w": (6, 4), "h": (4, 4), "v": (4, 4), "y": (4, 4)}

    def shrink(v: Value) -> Value:
        return replace(v, type=v.type.with_shape(half[v.name]))

    local = Graph(
        tuple(map(shrink, graph.inputs)), tuple(map(shrink, graph.parameters)),
        tuple(replace(o.map(shrink), outputs=tuple(map(shrink, o.outputs))) for o in graph.ops),
        tuple(map(shrink, graph.outputs)),
    )  # fmt: skip
    assert saved.local_bytes(graph, graph) == saved.total_bytes
    assert saved.local_bytes(graph, local) == (24 + 16) * 4


_AXIS = (("axis", "tp"),)


def _runtime_op(target: str, out: Value, *args: object, **kwargs: object) -> Graph:
    made = Op(out.name, f"autoshard.{target}", args, (*_AXIS, *kwargs.items()), (out,))
    values = {v.name: v for v in made.operands}
    parameters = tuple(v for v in values.values() if v.name == "w")
    inputs = tuple(v for v in values.values() if v.name != "w")
    return Graph(inputs, parameters, (made,), made.outputs)


_X = _value("x", 8, 6)
_IDS = Value("ids", TensorType((8,), torch.int64, False, True))
_RUNTIME = {
    "all_reduce_gradient": _runtime_op("all_reduce_gradient", _value("y", 8, 6), _X),
    "all_reduce": _runtime_op("all_reduce", _value("y", 8, 6), _X),
    "split": _runtime_op("split", _value("y", 4, 6), _X, 0),
    "all_gather": _runtime_op("all_gather", _value("y", 16, 6), _X, 0, 16),
    "reduce_scatter": _runtime_op("reduce_scatter", _value("y", 4, 6), _X, 0),
    "all_to_all": _runtime_op("all_to_all", _value("y", 16, 3), _X, 0, 1, 16),
    "embedding": _runtime_op(
        "vocab_parallel_embedding", _value("y", 8, 6), _IDS, _value("w", 5, 6), size=9
    ),
    "cross_entropy": _runtime_op(
        "vocab_parallel_cross_entropy", _value("y"), _value("logits", 8, 5), _IDS, size=9
    ),
}


@pytest.mark.parametrize("name", _RUNTIME)
def test_ops_of_the_runtime_save_on_ranks_what_is_said_without_ranks(name: str) -> None:
    graph = _RUNTIME[name]

    def on_rank() -> int:
        return really_saved(graph, tensors_for(graph, CPU))

    assert run_threads(2, on_rank) == [saved_values(graph).total_bytes] * 2


def test_ids_of_a_split_embedding_are_saved_in_whatever_order_they_come() -> None:
    first = _RUNTIME["embedding"]
    ids, weight = first.ops[0].args
    turned = replace(first, ops=(replace(first.ops[0], args=(weight, ids)),))
    assert saved_values(turned).total_bytes == saved_values(first).total_bytes


def test_parts_are_kept_of_what_is_gathered_again() -> None:
    """Two products read a gathered value: its part is saved once, and itself not at all."""
    x, whole, w = _value("x", 8, 6), _value("whole", 16, 6), _value("w", 6, 4)
    gather = Op("gather", "autoshard.all_gather", (x, 0, 16), _AXIS, (whole,))
    products = [_op("mm.default", _value(name, 16, 4), whole, w) for name in ("y", "z")]
    graph = _graph(gather, *products, inputs=(x,), parameters=(w,))
    saved = saved_values(graph)
    assert saved.total_bytes == 16 * 6 * 4
    kept = regathered(graph, saved)
    assert (kept.total_bytes, set(kept.values)) == (8 * 6 * 4, {"x"})
    assert kept.values["x"].savers == tuple(op.name for op in products)
    assert all(kept.needs[op.name] == ("x",) for op in products)


def test_workspace_holds_the_gradients_of_the_widest_place() -> None:
    """Backward of sigmoid: gradients of its result and of its operand, which a view hands on."""
    graph, saved = _small()
    assert workspace_bytes(graph, saved) == 2 * 32 * 4
    for name in ("gpt2", "llama", "resnet"):
        layer = block(name)
        widest = max(v.type.nbytes for o in layer.ops for v in o.outputs)
        assert widest <= workspace_bytes(layer, saved_values(layer)) < 12 * widest


def test_gradients_are_freed_on_the_way_back() -> None:
    """A long chain of products and sums needs two gradients at a time, however long it is."""
    first = _value("x0", 8, 8)
    weights, ops, last = [], [], first
    for i in range(20):
        w, h, y = _value(f"w{i}", 8, 8), _value(f"h{i}", 8, 8), _value(f"x{i + 1}", 8, 8)
        ops += [_op("mm.default", h, last, w), _op("neg.default", y, h)]
        weights.append(w)
        last = y
    graph = _graph(*ops, inputs=(first,), parameters=tuple(weights))
    assert workspace_bytes(graph, saved_values(graph)) == 2 * 64 * 4


# State ------------------------------------------------------------------------------------------

SHAPES = ((10, 4), (7,), (3, 5, 2), ())


def _types() -> list[TensorType]:
    return [TensorType(s, torch.float32, True) for s in SHAPES]


@pytest.mark.parametrize("name", NAMED)
def test_optimizer_states_are_those_that_torch_keeps(name: str) -> None:
    parameters = [torch.nn.Parameter(torch.ones(s)) for s in SHAPES]
    optimizer = NAMED[name](parameters)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
    held = sum(
        t.nbytes
        for state in optimizer.state.values()
        for key, t in state.items()
        if isinstance(t, Tensor) and key not in ("step", "mu_product")
    )
    expected = state_bytes(_types(), data_parallel="ddp", dp=1, optimizer=name)
    assert expected.optimizer == held
    assert name in OPTIMIZER_STATES


def test_shards_round_rows_up_as_fsdp_does() -> None:
    assert shard_bytes(_types(), 1) == sum(t.nbytes for t in _types())
    assert shard_bytes(_types(), 4) == 4 * (3 * 4 + 2 * 1 + 1 * 10 + 1)
    assert shard_bytes([TensorType((2, 8), torch.bfloat16)], 8) == 2 * 8


@pytest.mark.parametrize(
    ("mode", "micro_batches", "expected"),
    [
        ("ddp", 4, StateBytes(parameters=800, gradients=800, optimizer=1600, transient=0)),
        ("zero1", 4, StateBytes(parameters=1000, gradients=1000, optimizer=400, transient=0)),
        ("zero1", 1, StateBytes(parameters=1000, gradients=200, optimizer=400, transient=160)),
        ("zero2", 4, StateBytes(parameters=1000, gradients=200, optimizer=400, transient=160)),
        ("zero3", 4, StateBytes(parameters=200, gradients=200, optimizer=400, transient=320)),
    ],
)
def test_modes(mode: str, micro_batches: int, expected: StateBytes) -> None:
    types = [TensorType((20, 10), torch.float32)]
    found = state_bytes(
        types, data_parallel=mode, dp=4, optimizer="adamw", unit_bytes=80,
        num_micro_batches=micro_batches,
    )  # fmt: skip
    assert found == expected


def test_later_stages_hold_less() -> None:
    types = [TensorType((4096, 4096), torch.float32)] * 8

    def total(mode: str) -> int:
        return state_bytes(
            types, data_parallel=mode, dp=8, optimizer="adamw", unit_bytes=types[0].nbytes,
            num_micro_batches=4,
        ).total  # fmt: skip

    totals = [total(m) for m in ("ddp", "zero1", "zero2", "zero3")]
    assert totals == sorted(totals, reverse=True)


def test_bad_modes() -> None:
    with pytest.raises(OptionError, match=r"data_parallel expects one of ddp, .* but got 'zero4'"):
        state_bytes(_types(), data_parallel="zero4", dp=2, optimizer="adam")
    with pytest.raises(OptionError, match="dp expects a positive number of ranks but got 0"):
        state_bytes(_types(), data_parallel="ddp", dp=0, optimizer="adam")
