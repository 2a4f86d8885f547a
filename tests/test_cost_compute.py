"""Work and seconds of ops, against torch's own flop counter and by hand."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from autoshard.cluster import Device, find
from autoshard.cost_models.compute import (
    OpCost,
    alignment_efficiency,
    depth_efficiency,
    fan_out_s,
    op_cost,
    peak_flops,
    stream_s,
    tile_efficiency,
    work_cost,
)
from autoshard.cost_models.float8 import in_float8
from autoshard.cost_models.products import Product
from autoshard.cost_models.work import is_product, work_of
from autoshard.ir import Arg, Op, TensorType, Value

BF16 = torch.bfloat16


def value(name: str, *shape: int, dtype: torch.dtype = BF16, grad: bool = True) -> Value:
    return Value(name, TensorType(shape, dtype, grad, True, True))


def op(target: str, out: Value | tuple[Value, ...], *args: Arg, **kwargs: Arg) -> Op:
    outputs = out if isinstance(out, tuple) else (out,)
    return Op("op", f"aten.{target}", args, tuple(kwargs.items()), outputs)


def _linear(rows: int, k: int, n: int, *, bias: bool = False, grad_x: bool = True) -> Op:
    args = [value("x", rows, k, grad=grad_x), value("w", n, k)]
    return op("linear.default", value("y", rows, n), *args, *([value("b", n)] if bias else []))


CASES: dict[str, tuple[Op, Callable[..., Tensor]]] = {
    "linear": (_linear(6, 8, 10), F.linear),
    "linear_bias": (_linear(6, 8, 10, bias=True), F.linear),
    "linear_first_layer": (_linear(6, 8, 10, grad_x=False), F.linear),
    "linear_3d": (
        op("linear.default", value("y", 2, 3, 10), value("x", 2, 3, 8), value("w", 10, 8)),
        F.linear,
    ),
    "mm": (op("mm.default", value("y", 4, 6), value("a", 4, 5), value("b", 5, 6)), torch.mm),
    "addmm": (
        op("addmm.default", value("y", 4, 6), value("c", 6), value("a", 4, 5), value("b", 5, 6)),
        torch.addmm,
    ),
    "bmm": (
        op("bmm.default", value("y", 3, 4, 6), value("a", 3, 4, 5), value("b", 3, 5, 6)),
        torch.bmm,
    ),
    "matmul_4d": (
        op(
            "matmul.default", value("y", 2, 3, 4, 6), value("a", 2, 3, 4, 5),
            value("b", 2, 3, 5, 6),
        ),
        torch.matmul,
    ),
    "matmul_one_right": (
        op("matmul.default", value("y", 2, 4, 6), value("a", 2, 4, 5), value("b", 5, 6)),
        torch.matmul,
    ),
    "einsum": (
        op(
            "einsum.default", value("y", 2, 3, 7), "bij,bjk->bik",
            (value("a", 2, 3, 5), value("b", 2, 5, 7)),
        ),
        lambda equation, operands: torch.einsum(equation, *operands),
    ),
    "conv2d": (
        op(
            "conv2d.default", value("y", 2, 6, 8, 8), value("x", 2, 4, 8, 8),
            value("w", 6, 4, 3, 3), None, (1, 1), (1, 1),
        ),
        F.conv2d,
    ),
    "conv_transpose2d": (
        op(
            "conv_transpose2d.input", value("y", 2, 3, 16, 16), value("x", 2, 4, 8, 8),
            value("w", 4, 3, 2, 2), None, (2, 2),
        ),
        F.conv_transpose2d,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    case, function = CASES[name]
    made: dict[str, Tensor] = {}

    def tensor(v: Value) -> Tensor:
        made[v.name] = torch.randn(v.type.shape).requires_grad_(v.type.differentiable)
        return made[v.name]

    bound = case.map(tensor)
    with FlopCounterMode(display=False) as forward:
        result = function(*bound.args, **bound.keywords)
    assert tuple(result.shape) == case.output.type.shape
    with FlopCounterMode(display=False) as backward:
        result.sum().backward()
    cost = op_cost(case, find("h100").device)
    assert cost.forward_flops == forward.get_total_flops()
    assert cost.backward_flops == backward.get_total_flops()
    assert is_product(case)


def test_attention_is_two_products_forward_and_five_backward() -> None:
    q = value("q", 2, 4, 16, 8)
    cost = op_cost(op("scaled_dot_product_attention.default", q, q, q, q), find("h100").device)
    tensor = torch.randn(2, 4, 16, 8)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        F.scaled_dot_product_attention(tensor, tensor, tensor)
    assert cost.forward_flops == counted.get_total_flops()
    assert cost.backward_flops == 2.5 * cost.forward_flops


def test_grouped_convolution_meets_only_its_group() -> None:
    x, w = value("x", 2, 4, 8, 8), value("w", 6, 2, 3, 3)
    made = op(
        "conv2d.default", value("y", 2, 6, 4, 4), x, w, None, (2, 2), (1, 1), (1, 1), 2
    )  # fmt: skip
    cost = op_cost(made, find("h100").device)
    assert cost.forward_flops == 2 * (2 * 6 * 4 * 4) * (2 * 3 * 3)
    assert cost.backward_flops == 2 * cost.forward_flops


@pytest.mark.parametrize(
    ("channels_in", "channels_out", "side", "forward_ms", "backward_ms"),
    [
        (128, 128, 112, 22.06, 53.38), (128, 256, 56, 10.81, 18.34), (256, 256, 56, 17.46, 27.02),
        (256, 512, 28, 9.25, 14.57), (512, 512, 28, 11.78, 28.67), (512, 512, 14, 4.07, 7.40),
    ],
)  # fmt: skip
def test_small_filters_in_float32_take_fewer_multiplications(
    channels_in: int, channels_out: int, side: int, forward_ms: float, backward_ms: float
) -> None:
    """VGG16's convolutions, 128 samples on a V100, as PipeDream's published profile has them: up to
    2.5 times the rate that the device multiplies and adds at."""
    shape, dtype = (128, channels_out, side, side), torch.float32
    x = value("x", 128, channels_in, side, side, dtype=dtype)
    w = value("w", channels_out, channels_in, 3, 3, dtype=dtype)
    y = value("y", *shape, dtype=dtype)
    device = find("v100-16").device
    cost = op_cost(op("conv2d.default", y, x, w, None, (1, 1), (1, 1)), device)
    assert 0.6 < 1e3 * cost.forward_s / forward_ms < 1.4
    assert 0.6 < 1e3 * cost.backward_s / backward_ms < 1.4
    direct_s = cost.forward_flops / device.flops_per_s["f32"]
    assert cost.forward_s < direct_s
    strided = op("conv2d.default", y, x, w, None, (2, 2), (1, 1))
    assert op_cost(strided, device).forward_s > direct_s


def test_causal_attention_is_half_for_long_sequences() -> None:
    def flops(rows: int, causal: bool) -> float:
        q = value("q", 1, 2, rows, 64)
        target = "scaled_dot_product_attention.default"
        made = op(target, q, q, q, q, None, 0.0, causal)
        return op_cost(made, find("h100").device).forward_flops

    assert flops(64, True) == flops(64, False)
    assert flops(16384, True) / flops(16384, False) == pytest.approx(0.5, rel=0.02)


def test_lstm_multiplies_every_row_with_every_weight() -> None:
    x = value("x", 5, 3, 8)
    weights = [value("w_ih", 32, 8), value("w_hh", 32, 8), value("b", 32), value("c", 32)]
    state = (value("h", 1, 3, 8, grad=False), value("cell", 1, 3, 8, grad=False))
    out = (value("y", 5, 3, 8), value("hn", 1, 3, 8), value("cn", 1, 3, 8))
    made = op("lstm.input", out, x, state, tuple(weights), True, 1, 0.0, True, False, False)
    assert op_cost(made, find("cpu").device).forward_flops == 2 * 15 * (32 * 8 + 32 * 8)


def test_views_cost_nothing() -> None:
    x = value("x", 4, 6)
    for target, out in (
        ("view.default", value("y", 24)), ("transpose.int", value("y", 6, 4)),
        ("expand.default", x), ("slice.Tensor", value("y", 2, 6)), ("detach.default", x),
    ):  # fmt: skip
        assert op_cost(op(target, out, x), find("h100").device).forward_s == 0


def test_streaming_ops_take_their_bytes() -> None:
    device = find("h100").device
    x = value("x", 1024, 1024)
    rate = device.bytes_per_s * device.memory_efficiency
    added = op_cost(op("add.Tensor", value("y", 1024, 1024), x, x), device)
    assert added.forward_s == pytest.approx(3 * x.type.nbytes / rate + device.launch_s)
    assert added.backward_s == 0
    acted = op_cost(op("silu.default", value("y", 1024, 1024), x), device)
    assert acted.backward_s == pytest.approx(3 * x.type.nbytes / rate + device.launch_s)
    constant = op("silu.default", value("y", 9, grad=False), value("x", 9, grad=False))
    assert op_cost(constant, device).backward_s == 0


def test_an_embedding_fills_its_whole_gradient() -> None:
    table = value("w", 50000, 64)
    ids = value("ids", 8, dtype=torch.int64, grad=False)
    work = work_of(op("embedding.default", value("y", 8, 64), table, ids))
    assert work.forward.bytes < 10_000
    assert work.backward.bytes > table.type.nbytes


def test_conversions_cost_what_stays_on_the_rank() -> None:
    whole, part = value("x", 8, 64), value("y", 4, 64)
    split = Op("c", "autoshard.split", (whole, 0), (("axis", "tp"),), (part,))
    assert work_of(split).forward.bytes == 2 * part.type.nbytes
    assert work_of(split).backward.kernels == 0  # an all-gather: not the rank's own work
    reduced = Op("c", "autoshard.all_reduce", (whole,), (("axis", "tp"),), (whole,))
    assert work_of(reduced).forward.kernels == work_of(reduced).backward.kernels == 0


def test_dtypes_have_their_own_peaks() -> None:
    h100, v100 = find("h100").device, find("v100-32").device
    assert peak_flops(h100, BF16) == 989.5e12
    assert peak_flops(h100, torch.float32) == 67e12
    assert peak_flops(v100, BF16) == peak_flops(v100, torch.float32)  # no bf16 units
    assert peak_flops(v100, torch.float16) == 125e12


def test_products_outside_matrix_units() -> None:
    """In float32 they come near the peak, and rows that are not aligned cost no more."""
    h100 = find("h100").device

    def share(n: int, dtype: torch.dtype) -> float:
        x, w = value("x", 8192, 768, dtype=dtype), value("w", n, 768, dtype=dtype)
        cost = op_cost(op("linear.default", value("y", 8192, n, dtype=dtype), x, w), h100)
        return cost.forward_flops / cost.forward_s / peak_flops(h100, dtype)

    assert 0.7 < share(50304, torch.float32) < 0.75
    assert share(50257, torch.float32) == pytest.approx(share(50304, torch.float32), rel=0.01)
    assert share(50257, BF16) < 0.6 * share(50304, BF16)


def test_tiles_that_do_not_fill_the_device() -> None:
    assert tile_efficiency(Product(1, 8192, 8192, 512), 0) == 1
    assert tile_efficiency(Product(1, 128 * 132, 128, 512), 132) == 1
    # Two rounds of large tiles, or three of small ones.
    assert tile_efficiency(Product(1, 128 * 133, 128, 512), 132) == pytest.approx(0.9 * 266 / 396)
    assert tile_efficiency(Product(1, 128, 128, 512), 132) == pytest.approx(0.9 * 2 / 132)
    # Cut along the sum: 64 or 128 pieces of two half tiles, of which the former waste nothing.
    assert tile_efficiency(Product(1, 128, 128, 64 * 1024), 132) == pytest.approx(128 / 132)


def test_tiles_at_the_edges_are_computed_whole() -> None:
    full, over = Product(1, 128 * 132, 128, 512), Product(1, 128 * 132, 96, 512)
    assert tile_efficiency(over, 132) == pytest.approx(0.75 * tile_efficiency(full, 132))
    assert tile_efficiency(Product(1, 128 * 132, 64, 512), 132) == pytest.approx(0.9)


def test_short_sums_and_odd_sizes_are_slow() -> None:
    """Half the rate at the half depth; halving the common power of two costs a fixed share."""
    assert depth_efficiency(Product(1, 8, 8, 200), 200) == pytest.approx(0.5)
    assert depth_efficiency(Product(1, 8, 8, 200), 0) == 1
    rates = [alignment_efficiency(Product(1, 4096, n, 1024), 0.5) for n in (512, 64, 32, 16, 33)]
    assert rates == pytest.approx([1, 1, 0.5**0.5, 0.5, 1 / 8])


def test_splitting_never_makes_a_product_slower() -> None:
    device = find("h100").device
    whole = op_cost(_linear(8192, 4096, 4096), device)
    for split in (_linear(4096, 4096, 4096), _linear(8192, 2048, 4096), _linear(8192, 4096, 2048)):
        assert op_cost(split, device).total_s < whole.total_s


def test_gradients_of_a_value_with_several_uses_are_added() -> None:
    device = find("h100").device
    assert fan_out_s(1e6, 1, device) == 0
    assert fan_out_s(1e6, 3, device) == pytest.approx(2 * stream_s(3e6, device))


def _llama3_8b_layer(batch: int, sequence: int) -> list[Op]:
    """As Hugging Face writes it: norms and rotations are several kernels each."""
    b, s, h, f, f32 = batch, sequence, 4096, 14336, torch.float32
    x, wide = value("x", b, s, h), value("g", b, s, f)
    full, row = value("xf", b, s, h, dtype=f32), value("m", b, s, 1, dtype=f32)

    def product(n: int, k: int) -> Op:
        return op("linear.default", value("y", b, s, n), value("i", b, s, k), value("w", n, k))

    norm = [
        op("to.dtype", full, x), op("pow.Tensor_Scalar", full, full), op("mean.dim", row, full),
        op("rsqrt.default", row, row), op("mul.Tensor", full, full, row), op("to.dtype", x, full),
        op("mul.Tensor", x, x, value("w", h)),
    ]  # fmt: skip

    def rotation(heads: int) -> list[Op]:
        q, half = value("q", b, heads, s, 128), value("half", b, heads, s, 64)
        cos = value("cos", b, 1, s, 128, grad=False)
        return [
            op("mul.Tensor", q, q, cos), op("neg.default", half, half),
            op("cat.default", q, (half, half)), op("mul.Tensor", q, q, cos),
            op("add.Tensor", q, q, q),
        ]  # fmt: skip

    q, k = value("q", b, 32, s, 128), value("k", b, 8, s, 128)
    attention = op("scaled_dot_product_attention.default", q, q, k, k, None, 0.0, True)
    products = [product(h, h), product(1024, h), product(1024, h), product(h, h)]
    products += [product(f, h), product(f, h), product(h, f)]
    gate = [op("silu.default", wide, wide), op("mul.Tensor", wide, wide, wide)]
    residual = [op("add.Tensor", x, x, x)] * 2
    return [*products, attention, *norm, *norm, *rotation(32), *rotation(8), *gate, *residual]


@pytest.mark.parametrize(("batch", "sequence"), [(1, 8192), (2, 4096), (1, 4096), (4, 8192)])
def test_a_llama_layer_on_h100_reaches_a_plausible_share_of_peak(batch: int, sequence: int) -> None:
    """Published bf16 runs of 7 to 8 B models on H100 without recompute reach 40 to 55 %."""
    device = find("h100").device
    costs = [op_cost(o, device) for o in _llama3_8b_layer(batch, sequence)]
    tokens, weights = batch * sequence, 4096 * (4096 * 2 + 1024 * 2 + 3 * 14336)
    model_flops = 3 * (2 * tokens * weights + 4 * tokens * sequence * 4096)
    share = model_flops / sum(c.total_s for c in costs) / device.flops_per_s["bf16"]
    assert 0.40 <= share <= 0.55


def test_costs_are_cheap_to_ask_for() -> None:
    """Hundreds of (op, strategy) pairs per candidate mesh: about 10 us each; the limit is loose."""
    ops, device = _llama3_8b_layer(1, 8192), find("h100").device
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for o in ops:
            op_cost(o, device)
        best = min(best, time.perf_counter() - start)
    assert best / len(ops) < 40e-6


def test_unknown_ops_count_as_one_kernel_each_way() -> None:
    x = value("x", 1000)
    made = Op("o", "mylib.thing.default", (x,), (), (value("y", 1000),))
    device = Device(
        name="d", memory_bytes=1, bytes_per_s=1e9, flops_per_s={"bf16": 1e12},
        matmul_efficiency=1, memory_efficiency=1, launch_s=1e-3,
    )  # fmt: skip
    assert op_cost(made, device) == OpCost(4e-6 + 1e-3, 6e-6 + 1e-3, 0, 0)


def test_long_products_in_8_bits_are_faster_and_short_ones_pay_for_casts() -> None:
    h100, a100 = find("h100").device, find("a100-80").device

    def ratio(size: int, device: Device) -> float:
        layer = _linear(size, size, size)
        work = work_of(layer)
        return work_cost(in_float8(layer, work), device).total_s / work_cost(work, device).total_s

    assert 0.5 < ratio(8192, h100) < 0.75
    assert ratio(512, h100) > 1
    assert ratio(8192, a100) > 1  # no units for it: only the casts come on top


def test_only_linear_layers_are_cast() -> None:
    product = op("mm.default", value("y", 4, 6), value("a", 4, 5), value("b", 5, 6))
    assert in_float8(product, work_of(product)) == work_of(product)
