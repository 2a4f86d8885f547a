"""Work that is arithmetic: matrix products, convolutions, attention and recurrent cells.

Products are counted exactly. Backward of ``left @ right`` is one more product of equal size for
each operand that needs a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from autoshard.ir import Op, Value
from autoshard.placement.named import arguments


class Product(NamedTuple):
    """``batch`` products of an ``m x k`` with a ``k x n`` matrix."""

    batch: int
    m: int
    n: int
    k: int

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.m * self.n * self.k


class Way(NamedTuple):
    """Forward or backward of one op.

    Attributes:
        products: matrix products; ``flops`` adds to theirs what is done in no matrix product
            of a fixed form (attention, recurrent cells).
        bytes: read and written, by products too.
        kernels: how many are launched.
        apart: bytes read and written by kernels of their own, before and after the arithmetic.
    """

    products: tuple[Product, ...] = ()
    flops: float = 0.0
    bytes: float = 0.0
    kernels: int = 0
    apart: float = 0.0


class Work(NamedTuple):
    """An op's work; ``unit`` says which of the device's rates its flops run at.

    Attributes:
        transformed: both ways with fewer multiplications and more traffic, which a GPU may take
            where it multiplies on vector units; ``None`` if there are none.
    """

    forward: Way
    backward: Way
    dtype: torch.dtype
    unit: str = "matmul"
    transformed: tuple[Way, Way] | None = None


NOTHING = Way()
_WINOGRAD_TILE, _WINOGRAD_POINTS = 4, 36
"""Outputs along a side of a tile, and points that a tile of 6 x 6 inputs is transformed to."""
Operands = tuple[Value, ...]
Counter = Callable[[Op, Operands], Work]


def total_bytes(values: Iterable[Value]) -> int:
    total = 0
    for value in values:
        total += value.type.nbytes
    return total


def dtype_of(op: Op, operands: Operands) -> torch.dtype:
    for value in operands:
        if value.type.dtype.is_floating_point:
            return value.type.dtype
    return op.outputs[0].type.dtype if op.outputs else torch.float32


def _product_work(op: Op, product: Product, left: Value, right: Value, bias: Value | None) -> Work:
    """``left @ right (+ bias)``: each differentiable operand is one more product of equal size."""
    b, m, n, k = product
    a, w, y = left.type.nbytes, right.type.nbytes, total_bytes(op.outputs)
    products: list[Product] = []
    moved = 0.0
    kernels = 0
    if left.type.differentiable:
        products.append(Product(b, m, k, n))
        moved += y + w + a
    if right.type.differentiable:
        products.append(Product(b, k, n, m))
        moved += y + a + w
    kernels = len(products)
    if bias is not None and bias.type.differentiable:
        moved += y + bias.type.nbytes
        kernels += 1
    return Work(
        Way((product,), 0.0, a + w + y, 1), Way(tuple(products), 0.0, moved, kernels),
        dtype_of(op, (left, right)),
    )  # fmt: skip


def _linear(op: Op, operands: Operands) -> Work:
    x, w = op.args[0], op.args[1]
    bias = op.args[2] if len(op.args) > 2 else op.keywords.get("bias")
    k = x.type.shape[-1]
    n = w.type.shape[0] if w.type.ndim == 2 else 1
    return _product_work(op, Product(1, x.type.numel // max(k, 1), n, k), x, w, bias)


def _matmul(op: Op, operands: Operands) -> Work:
    return _general_matmul(op, op.args[0], op.args[1], None)


def _addmm(op: Op, operands: Operands) -> Work:
    return _general_matmul(op, op.args[1], op.args[2], op.args[0])


def _general_matmul(op: Op, a: Value, b: Value, bias: Value | None) -> Work:
    k = a.type.shape[-1]
    m = a.type.shape[-2] if a.type.ndim > 1 else 1
    n = b.type.shape[-1] if b.type.ndim > 1 else 1
    out = op.outputs[0].type.numel
    batch = max(1, out // max(m * n, 1))
    if b.type.ndim <= 2:  # one right-hand side: the batch is rows of one product
        m, batch = m * batch, 1
    return _product_work(op, Product(batch, m, n, k), a, b, bias)


def _einsum(op: Op, operands: Operands) -> Work:
    """Two operands are one batched product: of shared and kept, left, right, and summed letters."""
    equation: str = op.args[0]
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(operands) != 2 or "." in equation:
        flops = _einsum_flops(op, terms, operands)
        moved = total_bytes(operands) + total_bytes(op.outputs)
        count = sum(v.type.differentiable for v in operands)
        return Work(
            Way((), flops, moved, max(1, len(operands) - 1)),
            Way((), flops * count, moved * count, count), dtype_of(op, operands),
        )  # fmt: skip
    sizes = dict(
        zip("".join(terms), (*operands[0].type.shape, *operands[1].type.shape), strict=True)
    )
    left, right, kept = set(terms[0]), set(terms[1]), set(output)

    def extent(letters: set[str]) -> int:
        return math.prod(sizes[c] for c in letters)

    shared = left & right
    product = Product(
        extent(shared & kept), extent(left - right), extent(right - left), extent(shared - kept)
    )
    return _product_work(op, product, operands[0], operands[1], None)


def _einsum_flops(op: Op, terms: list[str], operands: Operands) -> float:
    """Contracted pairwise from the left, as torch does without an optimised path."""
    if any("." in t for t in terms):
        widest = max(v.type.numel for v in operands)
        return 2.0 * widest * max(1, op.outputs[0].type.shape[-1])
    sizes = {
        c: s
        for t, v in zip(terms, operands, strict=True)
        for c, s in zip(t, v.type.shape, strict=True)
    }
    output = set(op.args[0].partition("->")[2].strip())
    flops, current = 0.0, set(terms[0])
    for index, term in enumerate(terms[1:], start=1):
        current |= set(term)
        flops += 2.0 * math.prod(sizes[c] for c in current)
        later = output.union(*terms[index + 1 :]) if index + 1 < len(terms) else output
        current &= later
    return flops


def _convolution(op: Op, operands: Operands) -> Work:
    """As the implicit matrix product ``[batch * positions, channels_in * window] x [.., out]``."""
    x, w = op.args[0], op.args[1]
    bias = op.args[2] if len(op.args) > 2 and isinstance(op.args[2], Value) else None
    out = op.outputs[0].type
    out_channels, in_channels, *window = w.type.shape
    if "conv_transpose" in op.target or (op.target.startswith("aten.convolution") and op.args[6]):
        rows = x.type.numel // max(out_channels, 1)
        product = Product(1, rows, in_channels * math.prod(window), out_channels)
    else:
        rows = out.numel // max(out_channels, 1)
        product = Product(1, rows, out_channels, in_channels * math.prod(window))
    direct = _product_work(op, product, x, w, bias)
    return direct._replace(transformed=_winograd(op, x, w, direct))


def _winograd(op: Op, x: Value, w: Value, direct: Work) -> tuple[Way, Way] | None:
    """A 3 x 3 convolution of stride 1 in float32 by minimal filtering, ``F(4 x 4, 3 x 3)``.

    Tiles of inputs and filters are transformed, multiplied point by point, which is 36 products of
    ``tiles x channels_in`` with ``channels_in x channels_out``, and transformed back: 2.25
    multiplications per output and pair of channels instead of 9 (Lavin & Gray 2016, "Fast
    algorithms for convolutional neural networks", section 4). Gradients of inputs and of weights
    are of the same form. cuDNN transforms in kernels of their own (``WINOGRAD_NONFUSED``), so
    what passes between them goes through memory.
    """
    if not op.target.startswith("aten.conv2d.") or w.type.dtype != torch.float32:
        return None
    bound = arguments(op)
    steps = {1}.union(*(_numbers(bound[name]) for name in ("stride", "dilation", "groups")))
    if w.type.shape[2:] != (3, 3) or steps != {1}:
        return None
    y = op.outputs[0].type
    out_channels, in_channels = w.type.shape[:2]
    tiles = y.numel // max(math.prod(y.shape[-3:]), 1)
    tiles *= math.prod(-(-side // _WINOGRAD_TILE) for side in y.shape[-2:])
    product = Product(_WINOGRAD_POINTS, tiles, out_channels, in_channels)
    values = tiles * (in_channels + out_channels) + in_channels * out_channels
    points = float(_WINOGRAD_POINTS * w.type.dtype.itemsize * values)
    plain = x.type.nbytes + w.type.nbytes + y.nbytes
    forward = Way((product,), 0.0, points, 4, points + plain)
    number = len(direct.backward.products)
    of_bias = direct.backward.bytes - number * direct.forward.bytes
    backward = Way(
        (product,) * number, 0.0, number * points, direct.backward.kernels + 3 * number,
        number * (points + plain) + of_bias,
    )  # fmt: skip
    return forward, backward if number else direct.backward


def _numbers(argument: object) -> set[object]:
    return set(argument) if isinstance(argument, (tuple, list)) else {argument}


def _grouped_mm(op: Op, operands: Operands) -> Work:
    """Rows are dealt to experts: every row meets one ``k x n`` matrix of a stack of them."""
    rows, weights = op.args[0], op.args[1]
    m, k = rows.type.numel // rows.type.shape[-1], rows.type.shape[-1]
    return _product_work(op, Product(1, m, weights.type.shape[-1], k), rows, weights, None)


def _sparse_experts(op: Op, operands: Operands) -> Work:
    """Two grouped products, tokens dealt evenly to experts, between a gather and a weighted sum.

    Kernels of their own copy tokens into the order of experts, run the activation, and weigh and
    add up what comes back; tokens that travelled are sorted once more on arrival, and back.
    """
    x, _, chosen, up, down = op.operands
    number, width, hidden = up.type.shape[0], down.type.shape[2], x.type.shape[-1]
    inner, size = up.type.shape[1], x.type.dtype.itemsize
    rows = max(1, round(expert_rows(op) / number))
    products = (Product(number, rows, inner, hidden), Product(number, rows, hidden, width))
    tokens = number * rows
    streamed = float(
        up.type.nbytes + down.type.nbytes + tokens * size * (2 * hidden + inner + width)
    )
    sorts = 2 if op.keywords.get("way") == "exchange" else 0
    apart = float(tokens * size * (inner + width + 2 * sorts * hidden))
    apart += chosen.type.numel * size * 5.0 * hidden + 2 * x.type.nbytes
    forward = Way(products, 0.0, streamed, 6 + sorts, apart)
    if not x.type.differentiable and not up.type.differentiable:
        return Work(forward, NOTHING, x.type.dtype)
    back = tuple(
        each for b, m, n, k in products for each in (Product(b, m, k, n), Product(b, k, n, m))
    )
    return Work(forward, Way(back, 0.0, 2 * streamed, 10 + sorts, 1.5 * apart), x.type.dtype)


def expert_rows(op: Op) -> float:
    """Rows that the experts of a rank work on, if a router deals them evenly.

    With all tokens and some of the experts, a rank's share of them; where tokens travel, as many
    come as go; where what comes is gathered over an axis, those of all its ranks.
    """
    rows = float(op.operands[2].type.numel)
    if op.keywords.get("way") == "own":
        rows *= op.operands[3].type.shape[0] / op.keywords["num_experts"]
    return rows * float(op.keywords.get("gathered_ranks", 1))


def attention(op: Op, operands: Operands) -> Work:
    """One fused kernel each way, as FlashAttention-2 (Dao 2023).

    A causal kernel visits only the lower triangle (by blocks of 128); backward recomputes the
    scores and makes four more products: 2.5 times the forward's flops (section 4.1 there).
    """
    q, k, v = op.args[:3]
    causal = op.keywords.get("is_causal", op.args[5] if len(op.args) > 5 else False)
    rows, columns = q.type.shape[-2], k.type.shape[-2]
    visited = rows * columns
    if op.target == "autoshard.row_attention":  # a rank's share of the triangle, if they are alike
        visited = min(visited, rows * (columns + 128) // 2)
    elif causal:
        square = min(rows, columns)
        visited -= max(0, square * (square - 128)) // 2 + max(0, columns - rows) * rows
    heads = q.type.numel // max(rows * q.type.shape[-1], 1)
    flops = 2.0 * heads * visited * (q.type.shape[-1] + v.type.shape[-1])
    moved = total_bytes(operands) + total_bytes(op.outputs[:1])
    wanted = any(x.type.differentiable for x in (q, k, v))
    backward = Way((), 2.5 * flops, 2.0 * moved, 2) if wanted else NOTHING
    return Work(Way((), flops, moved, 1), backward, dtype_of(op, operands), "attention")


def _recurrent(op: Op, operands: Operands) -> Work:
    """Every row meets every weight matrix once; the steps of a layer follow one another."""
    x = operands[0].type
    weights = [v for v in operands[1:] if v.type.ndim == 2 and v.type.parametric]
    if not weights:
        weights = [v for v in operands[1:] if v.type.ndim == 2]
    rows = x.numel // max(x.shape[-1], 1)
    flops = 2.0 * rows * sum(v.type.numel for v in weights)
    steps = max(x.shape[0], x.shape[1]) if x.ndim == 3 else x.shape[0]
    kernels = 3 * steps * max(1, len(weights) // 2)
    moved = total_bytes(operands) + total_bytes(op.outputs)
    wanted = any(v.type.differentiable for v in operands)
    backward = Way((), 2 * flops, 2.0 * moved, 2 * kernels) if wanted else NOTHING
    return Work(Way((), flops, moved, kernels), backward, dtype_of(op, operands))


PRODUCTS: dict[str, Counter] = {
    **dict.fromkeys(("mm", "bmm", "matmul", "mv", "dot", "__matmul__"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm", "addmv", "addbmm"), _addmm),
    **dict.fromkeys(("_grouped_mm", "grouped_mm_fallback", "grouped_mm"), _grouped_mm),
    **{
        f"conv{t}{d}d": _convolution for t in ("", "_transpose") for d in (1, 2, 3)
    },
    "conv_transpose2d": _convolution, "convolution": _convolution,
    "linear": _linear, "einsum": _einsum,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    "scaled_dot_product_attention": attention, "grouped_attention": attention,
    "row_attention": attention, "sparse_experts": _sparse_experts,
}  # fmt: skip
"""How to count an op by its name, without overload."""
