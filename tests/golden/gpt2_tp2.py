"""Stage 0 of 2 of GPT2LMHeadModel: embeddings, transformer.h.0 to transformer.h.1.

Ranks: pp=2, dp=1, tp=2. Micro-batches of 8 samples, 1 per step and data-parallel rank. Shapes are
those of one rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from autoshard.runtime.ops import all_reduce, all_reduce_gradient, share
from autoshard.runtime.parameters import Layer, Parameter, Split, local
from autoshard.runtime.stage import BaseStage


class GPT2Block(Layer):
    """transformer.h.0 to transformer.h.1.

    On one rank of tp=2:
        hidden: f32[8, 12, 32], tp R
        returns: f32[8, 12, 32], tp R
    """

    PARAMETERS = {
        "ln_1.weight": Parameter((32,)),
        "ln_1.bias": Parameter((32,)),
        "attn.c_attn.weight": Parameter((32, 96), split=Split(1, blocks=(32, 32, 32))),
        "attn.c_attn.bias": Parameter((96,), split=Split(0, blocks=(32, 32, 32))),
        "attn.c_proj.weight": Parameter((32, 32), split=Split(0)),
        "attn.c_proj.bias": Parameter((32,)),
        "ln_2.weight": Parameter((32,)),
        "ln_2.bias": Parameter((32,)),
        "mlp.c_fc.weight": Parameter((32, 128), split=Split(1)),
        "mlp.c_fc.bias": Parameter((128,), split=Split(0)),
        "mlp.c_proj.weight": Parameter((128, 32), split=Split(0)),
        "mlp.c_proj.bias": Parameter((32,)),
    }

    def forward(self, hidden: Tensor) -> Tensor:
        # ln_1
        x = F.layer_norm(hidden, (32,), local(self.ln_1.weight), local(self.ln_1.bias))

        # attn
        x = all_reduce_gradient(x, axis="tp")
        c_attn = F.linear(x, local(self.attn.c_attn.weight).T, local(self.attn.c_attn.bias))
        q, k, v = c_attn.split((16, 16, 16), dim=2)
        k = k.reshape(8, 12, 2, 8).transpose(1, 2)
        v = v.reshape(8, 12, 2, 8).transpose(1, 2)
        q = q.reshape(8, 12, 2, 8).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3535533905932738)
        x = x.transpose(1, 2).reshape(8, 12, 16)
        c_proj = F.linear(
            x, local(self.attn.c_proj.weight).T, share(local(self.attn.c_proj.bias), axis="tp")
        )
        c_proj = all_reduce(c_proj, axis="tp")
        hidden = c_proj + hidden

        # ln_2
        x = F.layer_norm(hidden, (32,), local(self.ln_2.weight), local(self.ln_2.bias))

        # mlp
        x = all_reduce_gradient(x, axis="tp")
        c_fc = F.linear(x, local(self.mlp.c_fc.weight).T, local(self.mlp.c_fc.bias))
        x = c_fc * 0.5
        x_2 = (c_fc + c_fc.pow(3.0) * 0.044715) * 0.7978845608028654
        x = x * (x_2.tanh() + 1.0)
        c_proj = F.linear(
            x, local(self.mlp.c_proj.weight).T, share(local(self.mlp.c_proj.bias), axis="tp")
        )
        c_proj = all_reduce(c_proj, axis="tp")
        hidden = hidden + c_proj
        return hidden


class Stage(BaseStage):
    """embeddings, transformer.h.0 to transformer.h.1."""

    INPUTS = ()
    OUTPUTS = ("hidden",)
    BATCH = ("input_ids",)
    PROLOGUE = ()
    LAYERS = (GPT2Block,) * 2

    PARAMETERS = {
        "transformer.wte.weight": Parameter((96, 32)),
        "transformer.wpe.weight": Parameter((32, 32)),
    }

    def forward(self, *, key: Tensor, input_ids: Tensor) -> Tensor:
        # transformer
        positions = torch.arange(12, device=input_ids.device)
        positions = positions.unsqueeze(0)
        hidden = self.run_embeddings(input_ids, positions)
        for layer, _ in self._calls[0:2]:
            hidden = layer(hidden)
        return hidden

    def run_embeddings(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        # transformer.wte
        wte = F.embedding(input_ids, local(self.transformer.wte.weight))
        # transformer.wpe
        wpe = F.embedding(positions, local(self.transformer.wpe.weight))
        wte = wte + wpe
        return wte
