"""Seconds of one op on one device: a roofline (Williams, Waterman & Patterson 2009).

A kernel takes the longer of its arithmetic at the device's reachable rate and its traffic at the
reachable bandwidth, plus the gap to the next kernel. Matrix products run in tiles dealt to the
device's processors, so their rate falls where tiles do not fill them (:func:`tile_efficiency`),
where sums are short (:func:`depth_efficiency`) and where rows begin off the units that memory is
read in (:func:`alignment_efficiency`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from autoshard.cluster import Device
from autoshard.cost_models.products import NOTHING, Product, Way, Work
from autoshard.cost_models.work import work_of
from autoshard.ir import Op

_PEAK_NAMES: dict[torch.dtype, tuple[str, ...]] = {
    torch.float64: ("f64", "f32"),
    torch.float32: ("f32", "f64"),
    torch.bfloat16: ("bf16", "f32", "f16"),
    torch.float16: ("f16", "bf16", "f32"),
    torch.float8_e4m3fn: ("f8", "bf16", "f16"),
    torch.float8_e5m2: ("f8", "bf16", "f16"),
}
_TILES = ((128, 128, 1.0), (128, 64, 0.9), (64, 128, 0.9))
"""Rows and columns of a tile, and the share of the large tile's rate: half the tile reads three
quarters of the operands for half of the arithmetic."""
_ON_VECTOR_UNITS = (torch.float32, torch.float64)
"""Types that a GPU multiplies outside its matrix units, unless less exact results are allowed."""
_VECTOR_PRODUCTS, _VECTOR_ATTENTION = 0.75, 0.4
"""Shares of the peak that products and attention reach there: 49 and 27 of 67 TFLOP/s, measured in
float32 in GPT-2 of 12 layers (8 samples of 1024 tokens) on an H100."""
_SPLIT_K = 512
"""A product with fewer tiles than processors is cut along its summed dim, down to this length."""
_ALIGNED = 64
"""Numbers of two bytes in a line of 128 bytes."""


@dataclass(frozen=True, slots=True)
class OpCost:
    """Seconds and flops of one op, and where the seconds are from.

    Attributes:
        origin: ``"measured"`` or ``"analytic"``.
    """

    forward_s: float
    backward_s: float
    forward_flops: float
    backward_flops: float
    origin: str = "analytic"

    @property
    def total_s(self) -> float:
        return self.forward_s + self.backward_s


def peak_flops(device: Device, dtype: torch.dtype) -> float:
    """Peak rate of a dtype; one without units of its own runs as the next wider one."""
    rates = device.flops_per_s
    for name in _PEAK_NAMES.get(dtype, ()):
        if name in rates:
            return rates[name]
    return min(rates.values())


def op_cost(op: Op, device: Device) -> OpCost:
    """What one op costs on the types that it has.

    Args:
        op: any op, of a global or a localised graph; of a conversion only what the rank itself
            does (the collective is :func:`autoshard.cost_models.collective.conversion_s`).
        device: where it runs.
    """
    return work_cost(work_of(op), device)


def work_cost(work: Work, device: Device) -> OpCost:
    """What work costs, of an op alone or of its share in a fused kernel."""
    peak = peak_flops(device, work.dtype)
    forward, backward = work.forward, work.backward
    choices = [(forward, backward)]
    if device.num_units and work.dtype in _ON_VECTOR_UNITS:
        device = _vector_units(device)
        choices += [work.transformed] if work.transformed else []
    return OpCost(
        min(way_s(way, device, peak, work.unit) for way, _ in choices),
        min(way_s(way, device, peak, work.unit) for _, way in choices),
        forward.flops + sum(p.flops for p in forward.products),
        backward.flops + sum(p.flops for p in backward.products),
    )


def _vector_units(device: Device) -> Device:
    """A device as products see it that run outside its matrix units.

    Those are fed easily: large tiles, long sums and aligned rows matter little.
    """
    attention = device.attention_efficiency or device.matmul_efficiency
    return replace(
        device, matmul_efficiency=max(device.matmul_efficiency, _VECTOR_PRODUCTS),
        attention_efficiency=max(attention, _VECTOR_ATTENTION), product_depth=0.0, alignment=0.0,
    )  # fmt: skip


def way_s(way: Way, device: Device, peak: float, unit: str = "matmul") -> float:
    """Seconds of one way of an op."""
    if way == NOTHING:
        return 0.0
    arithmetic_s = 0.0
    for product in way.products:
        share = device.matmul_efficiency * product_efficiency(product, device)
        arithmetic_s += product.flops / (peak * share)
    if way.flops:
        share = device.matmul_efficiency
        if unit == "attention" and device.attention_efficiency is not None:
            share = device.attention_efficiency
        arithmetic_s += way.flops / (peak * share)
    rate = device.bytes_per_s * device.memory_efficiency
    return max(arithmetic_s, way.bytes / rate) + way.apart / rate + way.kernels * device.launch_s


def product_efficiency(product: Product, device: Device) -> float:
    """Share of the device's rate of large products that a product of this shape reaches."""
    share = depth_efficiency(product, device.product_depth)
    if device.num_units:
        share *= tile_efficiency(product, device.num_units)
        share *= alignment_efficiency(product, device.alignment)
    return share


def depth_efficiency(product: Product, half_depth: float) -> float:
    """``k / (k + half_depth)``: a tile's fixed work against its ``k`` steps.

    Loading the first operands and writing the result take as long however long the sums are
    (NVIDIA, "CUTLASS: efficient GEMM": prologue, main loop, epilogue; Hockney's ``n_1/2``, 1982).
    """
    return product.k / (product.k + half_depth) if product.k else 1.0


def alignment_efficiency(product: Product, exponent: float) -> float:
    """``(g / 64) ** exponent`` for the largest power of two ``g <= 64`` that divides m, n and k.

    Tensor cores want rows that begin at multiples of 128 bytes: Anthony et al. (2024, "The case for
    co-designing model architectures with hardware", section 5) measure how the rate of transformer
    products falls with the power of two in their sizes, by a half and more towards odd ones.
    """
    shared = math.gcd(product.m, product.n, product.k, _ALIGNED) if product.m else _ALIGNED
    return float((shared / _ALIGNED) ** exponent)


def tile_efficiency(product: Product, num_units: int) -> float:
    """Share of the processors' time that a product's tiles use for what is asked.

    Tile quantisation: tiles at the edges are computed whole. Wave quantisation: ``t`` tiles on
    ``u`` processors take ``ceil(t / u)`` rounds (NVIDIA, "Matrix Multiplication Background User's
    Guide"). Long sums are cut into pieces, as split-K kernels do, so few tiles still fill the
    device. Of a few tile shapes the best counts, as libraries choose it.
    """
    if num_units == 0:
        return 1.0
    batch, m, n, k = product
    best = 0.0
    for rows, columns, rate in _TILES:
        tiles = batch * -(-m // rows) * -(-n // columns)
        if not tiles:
            return 1.0
        used = batch * m * n / (tiles * rows * columns)
        pieces = 1
        while tiles * pieces < num_units and k // (2 * pieces) >= _SPLIT_K:
            pieces *= 2
        tiles *= pieces
        rounds = -(-tiles // num_units)
        best = max(best, rate * used * tiles / (rounds * num_units))
    return best


def stream_s(num_bytes: float, device: Device, kernels: int = 1) -> float:
    """Kernels that only move bytes, such as adding gradients or an optimizer's update."""
    return num_bytes / (device.bytes_per_s * device.memory_efficiency) + kernels * device.launch_s


def fan_out_s(value_bytes: float, num_uses: int, device: Device) -> float:
    """Backward adds the gradients of a value's uses: per use beyond the first one addition."""
    return (num_uses - 1) * stream_s(3 * value_bytes, device) if num_uses > 1 else 0.0
