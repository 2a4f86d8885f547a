"""A Llama block as a graph of ops with letter signatures, and the costs of a known machine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from autoshard.ir import Graph, Op, TensorType, Value
from autoshard.placement.conversion import conversion
from autoshard.placement.state import P, R, S, State, V, local_shape
from autoshard.placement.strategy import Strategy, signature, strategies_of
from autoshard.plan.sharding import ClassProblem

LINK_BYTES_PER_S, LATENCY_S = 250e9, 8e-6
FLOPS_PER_S, MEMORY_BYTES_PER_S = 400e12, 2.5e12


@dataclass
class Sizes:
    """Letters: b batch, t token, h hidden, f feed-forward, H heads, K key heads, D head dim."""

    b: int = 1
    t: int = 2048
    h: int = 12288
    f: int = 49152
    H: int = 96
    K: int = 96
    D: int = 128
    v: int = 32000

    @property
    def P(self) -> int:
        return self.H * self.D

    @property
    def Q(self) -> int:
        return self.K * self.D


@dataclass
class Writer:
    """Builds a graph op by op; every op's strategies follow from its letters."""

    sizes: Sizes
    n: int
    values: dict[str, Value] = field(default_factory=dict)
    letters: dict[str, str] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    parameters: list[Value] = field(default_factory=list)
    strategies: dict[str, tuple[Strategy, ...]] = field(default_factory=dict)
    seconds: dict[str, tuple[float, ...]] = field(default_factory=dict)
    saved: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def value(self, name: str, letters: str, *, differentiable: bool = True) -> str:
        shape = tuple(getattr(self.sizes, c) for c in letters if c.isalpha())
        self.values[name] = Value(name, TensorType(shape, torch.bfloat16, differentiable, True))
        self.letters[name] = letters
        return name

    def parameter(self, name: str, letters: str) -> str:
        self.parameters.append(self.values[self.value(name, letters)])
        return name

    def op(
        self, name, operands, letters, *, text=None, flops="", fixed="", linear=(), saves=None
    ) -> str:
        """``flops``: the letters whose sizes multiply to multiply-adds."""
        text = text or ",".join(self.letters[o] for o in operands) + "->" + letters
        made = self._call(name, operands, letters)
        sig = signature(text, fixed=fixed, linear=linear)
        work = 6.0 * math.prod(getattr(self.sizes, c) for c in flops) if flops else 0.0
        return self._add(made, tuple(strategies_of(sig, made, self.n, {})), work, saves)

    def view(self, name: str, operand: str, letters: str) -> str:
        """Heads split off the last dim, or merged into it: dims 0, 1 and 2 keep their place."""
        made = self._call(name, (operand,), letters)
        states = [R, V, P]
        shapes = [v.type.shape for v in (*made.operands, made.output)]
        states += [S(d) for d in range(3) if all(shape[d] % self.n == 0 for shape in shapes)]
        return self._add(made, tuple(Strategy((s,), (s,)) for s in states), 0.0, ())

    def _call(self, name: str, operands, letters: str) -> Op:
        self.value(name, letters)
        inputs = tuple(self.values[o] for o in operands)
        return Op(name, f"test.{name}", inputs, (), (self.values[name],))

    def _add(self, op: Op, strategies: tuple[Strategy, ...], work: float, saves) -> str:
        self.ops.append(op)
        self.strategies[op.name] = strategies
        self.seconds[op.name] = tuple(self._time(op, s, work) for s in strategies)
        names = tuple(v.name for v in op.operands)
        self.saved[op.name] = names if saves is None else saves
        return op.name

    def _time(self, op: Op, strategy: Strategy, work: float) -> float:
        ends = zip((*op.operands, *op.outputs), (*strategy.inputs, *strategy.outputs), strict=True)
        moved = sum(2 * math.prod(local_shape(v.type.shape, s, self.n)) for v, s in ends)
        share = work / (self.n if strategy.splits_work else 1)
        return max(share / FLOPS_PER_S, 3 * moved / MEMORY_BYTES_PER_S)

    def problem(self, name: str, count: int, inputs, outputs) -> ClassProblem:
        graph = Graph(
            tuple(self.values[i] for i in inputs), tuple(self.parameters), tuple(self.ops),
            tuple(self.values[o] for o in outputs),
        )  # fmt: skip
        return ClassProblem(
            name=name, graph=graph, count=count, strategies=self.strategies, seconds=self.seconds,
            saved=self.saved,
        )  # fmt: skip


def norm(w: Writer, name: str, x: str) -> str:
    w.parameter(f"{name}.weight", "h")
    square = w.op(f"{name}_pow", (x,), "bth")
    mean = w.op(f"{name}_mean", (square,), "bt", fixed="h", linear=[(0,)], saves=())
    scale = w.op(f"{name}_rsqrt", (mean,), "bt")
    scaled = w.op(f"{name}_mul", (x, scale), "bth", linear=[(0,), (1,)])
    return w.op(f"{name}_out", (scaled, f"{name}.weight"), "bth", linear=[(0,), (1,)])


def rotate(w: Writer, name: str, x: str, heads: str) -> str:
    shape = f"b{heads}tD"
    turned = w.op(f"{name}_turn", (x,), shape, fixed="D", linear=[(0,)], saves=())
    first = w.op(f"{name}_cos", (x, "cos"), shape, linear=[(0,)], saves=("cos",))
    second = w.op(f"{name}_sin", (turned, "sin"), shape, linear=[(0,)], saves=("sin",))
    return w.op(f"{name}_rope", (first, second), shape, linear=[(0, 1)], saves=())


def project(w: Writer, name: str, x: str, heads: str) -> str:
    """Linear, view into heads, transpose; ``P`` and ``Q`` are heads times head dim."""
    merged = {"H": "P", "K": "Q"}[heads]
    w.parameter(f"{name}.weight", f"{merged}h")
    out = f"bt{merged}"
    y = w.op(name, (x, f"{name}.weight"), out, flops=f"bth{merged}", linear=[(0,), (1,)])
    y = w.view(f"{name}_view", y, f"bt{heads}D")
    return w.op(f"{name}_t", (y,), f"b{heads}tD", linear=[(0,)], saves=())


def llama_block(n: int, sizes: Sizes | None = None, count: int = 1) -> ClassProblem:
    w = Writer(sizes or Sizes(), n)
    w.value("x", "bth")
    w.value("cos", "tD", differentiable=False)
    w.value("sin", "tD", differentiable=False)
    n1 = norm(w, "norm1", "x")
    q = rotate(w, "q_rot", project(w, "q", n1, "H"), "H")
    k = rotate(w, "k_rot", project(w, "k", n1, "K"), "K")
    v = project(w, "v", n1, "K")
    a = w.op(
        "sdpa", (q, k, v), "bHtD", text="bHtD,bHsD,bHsD->bHtD", flops="bHttD", fixed="sD",
        linear=[(2,)], saves=(q, k, v, "sdpa"),
    )  # fmt: skip
    a = w.op("a_t", (a,), "btHD", linear=[(0,)], saves=())
    a = w.view("a_view", a, "btP")
    w.parameter("o.weight", "hP")
    o = w.op("o", (a, "o.weight"), "bth", flops="bthHD", linear=[(0,), (1,)])
    r = w.op("add1", ("x", o), "bth", linear=[(0, 1)], saves=())
    n2 = norm(w, "norm2", r)
    w.parameter("gate.weight", "fh")
    w.parameter("up.weight", "fh")
    w.parameter("down.weight", "hf")
    linear = [(0,), (1,)]
    g = w.op("gate", (n2, "gate.weight"), "btf", flops="bthf", linear=linear)
    u = w.op("up", (n2, "up.weight"), "btf", flops="bthf", linear=linear)
    s = w.op("silu", (g,), "btf")
    m = w.op("mul", (s, u), "btf", linear=linear)
    d = w.op("down", (m, "down.weight"), "bth", flops="bthf", linear=linear)
    w.op("y", (r, d), "bth", linear=[(0, 1)], saves=())
    return w.problem("block", count, ("x", "cos", "sin"), ("y",))


def embedding(n: int, sizes: Sizes) -> ClassProblem:
    w = Writer(sizes, n)
    w.value("ids", "bt", differentiable=False)
    w.parameter("embed.weight", "vh")
    w.op("embed", ("ids", "embed.weight"), "bth", fixed="", linear=[(1,)], saves=("ids",))
    return w.problem("embedding", 1, ("ids",), ("embed",))


def head(n: int, sizes: Sizes) -> ClassProblem:
    w = Writer(sizes, n)
    w.value("x", "bth")
    w.value("labels", "bt", differentiable=False)
    out = norm(w, "norm", "x")
    w.parameter("head.weight", "vh")
    logits = w.op("logits", (out, "head.weight"), "btv", flops="bthv", linear=[(0,), (1,)])
    w.op("loss", (logits, "labels"), "", fixed="v")
    return w.problem("head", 1, ("x", "labels"), ("loss",))


def machine_conversion_s(n: int):
    """Ring collectives on one link, forward and backward."""

    def motion_s(kind: str, size: float) -> float:
        if kind == "none":
            return 0.0
        if kind in {"slice", "scale", "pad"}:
            return 2 * size / MEMORY_BYTES_PER_S
        rounds = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1 / n}[kind]
        return max(1, rounds) * LATENCY_S + rounds * size * (n - 1) / n / LINK_BYTES_PER_S

    def seconds(value: Value, source: State, target: State) -> float | None:
        try:
            step = conversion(source, target)
        except KeyError:
            return None
        if step is None:
            return 0.0
        backward = motion_s(step.backward, value.type.nbytes) if value.type.differentiable else 0.0
        return motion_s(step.forward, value.type.nbytes) + backward

    return seconds


def local_bytes(n: int):
    def size(value: Value, state: State) -> float:
        return value.type.dtype.itemsize * math.prod(local_shape(value.type.shape, state, n))

    return size
