"""Lower precision as ops: the casts that ``torch.autocast`` would make, written into the program.

Applied before planning, so that costs and memory see them. Parameters and what passes between
segments keep their dtype; matrix products, convolutions and attention run in bfloat16 on casts;
statistics of norms, softmax, losses and other sums that rounding hurts run in the full dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autoshard.errors import InternalError, OptionError
from autoshard.ir import Graph, LayerClass, Op, Program, Value, resolve

LOW = {"bf16": torch.bfloat16}

_LOW_OPS = frozenset(
    {
        "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "einsum", "conv1d",
        "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
        "scaled_dot_product_attention", "_grouped_mm", "sparse_experts",
    }
)  # fmt: skip
_FULL_OPS = frozenset(
    {
        "layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "softmax",
        "log_softmax", "cross_entropy_loss", "nll_loss", "nll_loss_nd", "mse_loss", "l1_loss",
        "smooth_l1_loss", "huber_loss", "kl_div", "binary_cross_entropy",
        "binary_cross_entropy_with_logits", "cosine_similarity", "cosine_embedding_loss", "pow",
        "exp", "expm1", "log", "log2", "log10", "log1p", "rsqrt", "reciprocal", "sum", "prod",
        "cumsum", "cumprod", "norm", "linalg_vector_norm", "logsumexp", "softplus", "erfinv",
        "lstm", "gru", "rnn_tanh",
    }
)  # fmt: skip
"""As in PyTorch's documentation of autocast; recurrent ops stay in the full dtype as well."""


def cast_program(program: Program, precision: str) -> Program:
    """The program in mixed precision.

    Args:
        precision: ``"bf16"``. Parameters must be float32 or float64, and stay so.

    Returns:
        The same segments, each class with casts. The fingerprint stays: a plan names the precision.

    Raises:
        OptionError: for an unknown precision.
    """
    if precision not in LOW:
        raise OptionError(
            f"expected a precision among {', '.join(LOW)} but got {precision!r}; "
            "leave it out to train in the dtype of the parameters"
        )
    classes = {
        c.name: LayerClass(c.name, c.kind, cast_graph(c.graph, LOW[precision]))
        for c in program.classes
    }
    return replace(
        program,
        segments=tuple(replace(s, layer=classes[s.layer.name]) for s in program.segments),
    )


def cast_graph(graph: Graph, low: torch.dtype) -> Graph:
    """One graph with casts; inputs, parameters and outputs keep their dtypes."""
    return _Casting(graph, low).run()


@dataclass
class _Casting:
    """The walk over one graph; ``values`` has every value as it is now."""

    graph: Graph
    low: torch.dtype
    values: dict[str, Value] = field(default_factory=dict)
    casts: dict[tuple[str, torch.dtype], Value] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)

    def run(self) -> Graph:
        self.values = {v.name: v for v in (*self.graph.inputs, *self.graph.parameters)}
        for op in self.graph.ops:
            self._op(op)
        outputs, swaps = [], {}
        for value in self.graph.outputs:
            now = self._as(self.values[value.name], value.type.dtype, "")
            if now.name != value.name:  # the output keeps its name: segments are wired by it
                swaps[now.name], swaps[value.name] = value.name, now.name
            outputs.append(now)
        graph = replace(self.graph, ops=tuple(self.ops), outputs=tuple(outputs))
        return graph.renamed(swaps) if swaps else graph

    def _op(self, op: Op) -> None:
        kind = op.target.split(".")[1]
        op = op.map(lambda v: self.values[v.name])
        if kind in _LOW_OPS:
            op = self._with_operands(op, self.low)
        elif kind in _FULL_OPS:
            op = self._with_full_operands(op)
        dtypes = _dtypes(op)
        if dtypes is None:  # an op that does not mix dtypes by itself
            op = self._with_full_operands(op)
            dtypes = _dtypes(op)
        if dtypes is None or len(dtypes) != len(op.outputs):
            raise InternalError(f"cast: op {op.name} fails: {op}")
        outputs = tuple(
            replace(v, type=replace(v.type, dtype=dtype))
            for v, dtype in zip(op.outputs, dtypes, strict=True)
        )
        self.ops.append(replace(op, outputs=outputs))
        self.values.update((v.name, v) for v in outputs)

    def _with_full_operands(self, op: Op) -> Op:
        """Operands that were lowered are cast back to what they were captured as."""
        full = {v.name: v.type.dtype for v in self.graph.values.values()}
        return op.map(lambda v: self._as(v, full.get(v.name, v.type.dtype), op.module))

    def _with_operands(self, op: Op, dtype: torch.dtype) -> Op:
        def lowered(value: Value) -> Value:
            return self._as(value, dtype if value.type.dtype.is_floating_point else None, op.module)

        return op.map(lowered)

    def _as(self, value: Value, dtype: torch.dtype | None, module: str) -> Value:
        if dtype is None or value.type.dtype == dtype:
            return value
        key = (value.name, dtype)
        if key not in self.casts:
            short = str(dtype).removeprefix("torch.")
            name = f"{value.name.replace('.', '_')}_{short}"
            out = Value(_unused(name, self.values), replace(value.type, dtype=dtype))
            self.casts[key] = self.values[out.name] = out
            self.ops.append(
                Op(out.name, "aten.to.dtype", (value, dtype), (), (out,), module=module)
            )
        return self.casts[key]


def _unused(name: str, taken: Iterable[str]) -> str:
    found, count = name, 2
    while found in taken:
        found, count = f"{name}_{count}", count + 1
    return found


def _dtypes(op: Op) -> list[torch.dtype] | None:
    """The dtypes that PyTorch returns; ``None`` if it refuses the operands."""
    with FakeTensorMode(), torch.no_grad():
        tensors = op.map(lambda v: torch.empty(v.type.shape, dtype=v.type.dtype))
        try:
            result = resolve(op.target)(*tensors.args, **dict(tensors.kwargs))
        except (RuntimeError, TypeError, ValueError):
            return None
    results = result if isinstance(result, (tuple, list)) else (result,)
    return [t.dtype for t in results]
