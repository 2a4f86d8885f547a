"""What to keep under recompute: against every subset, and against PyTorch's own checkpointing."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from autoshard.cost_models.memory import SavedActivations, SavedValue, saved_values
from autoshard.errors import OptionError
from autoshard.ir import Graph, Op, TensorType, Value
from autoshard.plan.recompute import (
    LayerCosts,
    best_within,
    freed_bytes,
    pinned_menu,
    recompute_menu,
    repeated_ops,
)


def value(name: str, *shape: int) -> Value:
    return Value(name, TensorType(shape, torch.float32, True, True, False))


def random_layer(seed: int) -> LayerCosts:
    """Ops on random earlier values; some results are views, some ops save things of their own."""
    rng = random.Random(seed)
    x, mask, w = value("x", rng.randint(1, 20)), value("mask", 5), value("w", 7)
    known, owners = [x, mask, w], {"x": "x", "mask": "mask", "w": "w"}
    ops, needs, extra, seconds = [], {}, {}, {}
    for i in range(rng.randint(3, 9)):
        operands = rng.sample(known, rng.randint(1, 2))
        if rng.random() < 0.2 and ops:
            source = ops[-1].outputs[0]
            operands, target = [source], "autoshard.all_reduce"
        else:
            target = "test.op.default"
        outputs = [value(f"v{i}_{j}", rng.randint(1, 20)) for j in range(rng.choice([1, 1, 1, 2]))]
        made = Op(f"op{i}", target, tuple(operands), (), tuple(outputs))
        ops.append(made)
        view = target == "test.op.default" and rng.random() < 0.25
        for v in outputs:
            owners[v.name] = owners[operands[0].name] if view else v.name
        needs[made.name] = tuple(
            v.name for v in (*operands, *outputs) if v.name != "w" and rng.random() < 0.35
        )
        if rng.random() < 0.2:
            extra[made.name] = rng.randint(1, 40)
        seconds[made.name] = float(rng.choice([0, *range(1, 12)]))
        known.extend(outputs)
    graph = Graph((x, mask), (w,), tuple(ops), (known[-1],))
    values = {}
    for name in dict.fromkeys(owners[n] for names in needs.values() for n in names):
        savers = tuple(o for o, names in needs.items() if any(owners[n] == name for n in names))
        if name != "w":
            given = name in {"x", "mask"}
            size = graph.values[name].type.nbytes
            values[name] = SavedValue(num_bytes=size, savers=savers, layer_input=given)
    saved = SavedActivations(values=values, extra_bytes=extra, needs=needs, owners=owners)
    shared = frozenset({"mask"}) if rng.random() < 0.5 else frozenset[str]()
    return LayerCosts(graph=graph, forward_s=seconds, saved=saved, shared_inputs=shared)


def every_choice(layer: LayerCosts):
    """``(seconds, bytes)`` of recomputing with each set of kept ops, from the rules in words."""
    heads = [o for o in layer.graph.ops if o.target != "autoshard.all_reduce"]
    last = -1
    for i, o in enumerate(layer.graph.ops):
        if layer.saved.needs[o.name] or o.name in layer.saved.extra_bytes:
            last = i
    for size in range(len(heads) + 1):
        for subset in itertools.combinations(heads, size):
            kept = {o.name for o in subset}
            for o in layer.graph.ops:
                if o.target == "autoshard.all_reduce":
                    (source,) = o.operands
                    if any(source in p.outputs and p.name in kept for p in layer.graph.ops):
                        kept.add(o.name)
            seconds = 0.0
            for i, o in enumerate(layer.graph.ops[: last + 1]):
                gives = o.name in layer.saved.extra_bytes or any(
                    v.name in layer.saved.needs[o.name] for v in o.outputs
                )
                if o.name not in kept and (i < last or gives):
                    seconds += layer.forward_s[o.name]
            memory = {n: 4 * layer.graph.values[n].type.numel for n in ("x", "mask")}
            for o in layer.graph.ops:
                if o.name in kept:
                    for v in o.outputs:
                        owner = layer.saved.owners[v.name]
                        memory[owner] = 4 * layer.graph.values[owner].type.numel
            for free in (*layer.shared_inputs, "w"):
                memory.pop(free, None)
            extra = sum(b for name, b in layer.saved.extra_bytes.items() if name in kept)
            yield seconds, sum(memory.values()) + extra


def unwrapped_bytes(layer: LayerCosts) -> int:
    values = layer.saved.values
    total = sum(v.num_bytes for name, v in values.items() if name not in layer.shared_inputs)
    return total + sum(layer.saved.extra_bytes.values())


@pytest.mark.parametrize("block", range(5))
def test_equals_every_subset(block):
    selective = 0
    for seed in range(50 * block, 50 * block + 50):
        layer = random_layer(seed)
        choices = list(every_choice(layer))
        plain = unwrapped_bytes(layer)
        rng = random.Random(seed)
        for _ in range(3):
            budget = rng.randint(0, max(size for _, size in choices))
            best = min((s for s, size in choices if size <= budget), default=None)
            entry = best_within(layer, budget)
            if plain <= budget:
                assert (entry.mode, entry.extra_backward_s) == ("none", 0.0)
            elif best is None:
                assert entry is None
            else:
                selective += entry.mode == "selective"
                assert entry.extra_backward_s == pytest.approx(best), seed
                assert entry.saved_bytes <= budget
                assert (best, entry.saved_bytes) in {(s, b) for s, b in choices} or any(
                    s == pytest.approx(best) and b == entry.saved_bytes for s, b in choices
                )
    assert selective > 10


@pytest.mark.parametrize("seed", range(60))
def test_menu_is_a_front_with_none_and_full(seed):
    layer = random_layer(seed)
    menu = recompute_menu(layer, 5)
    assert menu[0].mode == "none" and menu[-1].mode == "full" and len(menu) <= 5
    assert menu[0].saved_bytes == unwrapped_bytes(layer)
    middle = menu[1:]
    assert [e.saved_bytes for e in middle] == sorted((e.saved_bytes for e in middle), reverse=True)
    assert [e.extra_backward_s for e in menu] == sorted(e.extra_backward_s for e in menu)
    for entry in menu[1:-1]:
        assert entry.mode == "selective" and entry.keep
        assert menu[-1].saved_bytes < entry.saved_bytes < menu[0].saved_bytes
        again = best_within(layer, entry.saved_bytes)
        assert again.extra_backward_s == pytest.approx(entry.extra_backward_s)


@pytest.mark.parametrize("seed", range(60))
def test_no_choice_is_below_what_freeing_takes_at_least(seed):
    layer = random_layer(seed)
    saved, pieces = freed_bytes(layer)
    assert saved == unwrapped_bytes(layer)
    prices = [seconds / freed for freed, seconds in pieces]
    assert prices == sorted(prices)
    corners = list(itertools.accumulate(pieces, lambda a, b: (a[0] + b[0], a[1] + b[1])))
    touched = 0
    for seconds, size in every_choice(layer):
        freed = np.interp(max(0.0, saved - size), *zip((0.0, 0.0), *corners, strict=True))
        assert seconds >= freed - 1e-5 * abs(freed), size
        touched += seconds <= freed * (1 + 1e-5)
    assert touched or not pieces


def test_what_recompute_brings_back_is_what_is_not_held():
    x, h, g, y = (value(n, s) for n, s in (("x", 10), ("h", 20), ("g", 30), ("y", 40)))
    ops = tuple(
        Op(f"o{i}", "test.op.default", (a,), (), (b,))
        for i, (a, b) in enumerate(itertools.pairwise((x, h, g, y)))
    )
    graph = Graph((x,), (), ops, (y,))
    saved = SavedActivations(
        values={
            "x": SavedValue(num_bytes=40, savers=("o0",), layer_input=True),
            "h": SavedValue(num_bytes=80, savers=("o1",), layer_input=False),
            "g": SavedValue(num_bytes=120, savers=("o2",), layer_input=False),
        },
        extra_bytes={"o1": 7},
        needs={"o0": ("x",), "o1": ("h",), "o2": ("g",)},
        owners={n: n for n in "xhgy"},
    )
    layer = LayerCosts(graph=graph, forward_s={"o0": 5.0, "o1": 1.0, "o2": 9.0}, saved=saved)
    none, *_, full = recompute_menu(layer, 3)
    # ``o2`` saves only what it reads, so it does not run again.
    assert repeated_ops(graph, saved) == ("o0", "o1")
    assert (none.saved_bytes, none.peak_recompute_bytes) == (247, 0)
    assert (full.saved_bytes, full.extra_backward_s, full.peak_recompute_bytes) == (40, 6.0, 207)
    kept = best_within(layer, 130)
    assert (kept.keep, kept.saved_bytes, kept.extra_backward_s) == (("o0",), 120, 1.0)
    assert kept.peak_recompute_bytes == 127
    assert best_within(layer, 39) is None


def test_menu_needs_two_points():
    with pytest.raises(OptionError, match="at least 2 but got 1"):
        recompute_menu(random_layer(0), 1)


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("last", ["none", "add", "softmax", "tanh_of_view"])
def test_repeated_ops_are_those_that_checkpoint_runs_again(last):
    x, w, u = value("x", 4, 8), value("w", 8, 8), value("u", 8, 8)
    h, g, y, z = (value(n, 4, 8) for n in "hgyz")
    ops = [
        Op("first", "aten.linear.default", (x, w), (), (h,)),
        Op("act", "aten.silu.default", (h,), (), (g,)),
        Op("second", "aten.linear.default", (g, u), (), (y,)),
    ]
    if last == "add":
        ops.append(Op("third", "aten.add.Tensor", (x, y), (), (z,)))
    elif last == "softmax":
        ops.append(Op("third", "aten.softmax.int", (y, -1), (), (z,)))
    elif last == "tanh_of_view":
        v = value("v", 8, 4)
        ops.append(Op("view", "aten.view.default", (y, (8, 4)), (), (v,)))
        ops.append(Op("third", "aten.tanh.default", (v,), (), (value("z", 8, 4),)))
    graph = Graph((x,), (w, u), tuple(ops), ops[-1].outputs)
    expected = repeated_ops(graph, saved_values(graph))

    weights = [torch.randn(8, 8, requires_grad=True) for _ in range(2)]

    def layer(t):
        y = torch.nn.functional.linear(t, weights[0])
        y = torch.nn.functional.linear(torch.nn.functional.silu(y), weights[1])
        if last == "add":
            return t + y
        if last == "softmax":
            return torch.softmax(y, -1)
        return torch.tanh(y.view(8, 4)) if last == "tanh_of_view" else y

    third = {"add": "add", "softmax": "_softmax", "tanh_of_view": "tanh"}.get(last, "")
    kernels = {"first": "mm", "act": "silu", "second": "mm", "third": third}
    out = checkpoint(layer, torch.randn(4, 8, requires_grad=True), use_reentrant=False)
    with _Log() as log:
        out.backward(torch.ones_like(out))
    wanted = [kernels[name] for name in expected if name in kernels]
    # Backward itself: two products per linear, and the sum of the gradients of ``x``.
    own = {"mm": 4, "add": 1 if last == "add" else 0}
    for kernel in ("mm", "silu", "_softmax", "tanh", "add"):
        seen = sum(name.startswith(f"aten.{kernel}.") for name in log.seen)
        assert seen - own.get(kernel, 0) == wanted.count(kernel), kernel


def test_a_region_keeps_what_comes_in_and_what_others_save_of_it() -> None:
    """``a -> [b -> c] -> d`` with the middle recomputed: ``a`` stays for it, ``c`` for ``d``."""
    x, a, b, c, d = (value(name, size) for name, size in zip("xabcd", range(1, 6), strict=True))
    chain = ((x, a), (a, b), (b, c), (c, d))
    ops = tuple(Op(f"to_{y.name}", "test.op.default", (v,), (), (y,)) for v, y in chain)
    saved = SavedActivations(
        values={
            "b": SavedValue(num_bytes=12, savers=("to_b", "to_c"), layer_input=False),
            "c": SavedValue(num_bytes=16, savers=("to_d",), layer_input=False),
        },
        extra_bytes={"to_a": 100, "to_c": 1000}, needs={"to_c": ("b",), "to_d": ("c",)},
        owners={name: name for name in "xabcd"},
    )  # fmt: skip
    seconds = {op.name: 2.0**i for i, op in enumerate(ops)}
    layer = LayerCosts(graph=Graph((x,), (), ops, (d,)), forward_s=seconds, saved=saved)
    none, region = pinned_menu(layer, lambda op: op.name in ("to_b", "to_c"), regions=True)
    assert none.saved_bytes == 12 + 16 + 100 + 1000
    assert region.saved_bytes == a.type.nbytes + 16 + 100
    assert region.extra_backward_s == 2.0 + 4.0
    assert region.peak_recompute_bytes == none.saved_bytes - region.saved_bytes
