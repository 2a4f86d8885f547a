"""Matrix products of linear layers on operands that are cast to 8 bits.

As recipes for training in float8 have it (Micikevicius et al. 2022, "FP8 formats for deep
learning", section 4; NVIDIA Transformer Engine; torchao): input, weight and the output's gradient
are scaled and cast, results come out in 16 bits, and everything else stays as it was. A cast reads
16 bits and writes 8 twice, since the hardware wants the second product's operand transposed.
"""

from __future__ import annotations

import torch

from autoshard.cost_models.products import Work
from autoshard.ir import Op

_CAST_BYTES = 4.0
"""Per element: read in 16 bits, written in 8 bits as it is and transposed."""


def in_float8(op: Op, work: Work) -> Work:
    """The work of a linear layer with its products in 8 bits; of any other op, as it is."""
    if op.target.split(".")[1] != "linear" or work.dtype.itemsize != 2:
        return work
    x, w = (v.type.numel for v in op.operands[:2])
    y = op.output.type
    once = x + w + y.nbytes
    forward = work.forward._replace(
        bytes=float(once), kernels=work.forward.kernels + 2, apart=_CAST_BYTES * (x + w)
    )
    products = len(work.backward.products)
    backward = work.backward._replace(
        bytes=float(products * once), kernels=work.backward.kernels + (products > 0),
        apart=_CAST_BYTES * y.numel if products else 0.0,
    )  # fmt: skip
    return Work(forward, backward, torch.float8_e4m3fn, work.unit)
