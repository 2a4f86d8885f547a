"""Stage 0 of 2 of LlamaForCausalLM: embeddings, model.layers.0 to model.layers.1.

Ranks: pp=2, dp=1, tp=2. Micro-batches of 8 samples, 1 per step and data-parallel rank. Shapes are
those of one rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from autoshard.runtime.ops import all_reduce, all_reduce_gradient
from autoshard.runtime.parameters import Layer, Parameter, Split, local
from autoshard.runtime.stage import BaseStage


class LlamaDecoderLayer(Layer):
    """model.layers.0 to model.layers.1.

    On one rank of tp=2:
        hidden: f32[8, 12, 32], tp R
        cos: f32[1, 1, 12, 8], tp R
        sin: f32[1, 1, 12, 8], tp R
        returns: f32[8, 12, 32], tp R
    """

    PARAMETERS = {
        "input_layernorm.weight": Parameter((32,)),
        "self_attn.q_proj.weight": Parameter((32, 32), split=Split(0)),
        "self_attn.k_proj.weight": Parameter((16, 32), split=Split(0)),
        "self_attn.v_proj.weight": Parameter((16, 32), split=Split(0)),
        "self_attn.o_proj.weight": Parameter((32, 32), split=Split(1)),
        "post_attention_layernorm.weight": Parameter((32,)),
        "mlp.gate_proj.weight": Parameter((48, 32), split=Split(0)),
        "mlp.up_proj.weight": Parameter((48, 32), split=Split(0)),
        "mlp.down_proj.weight": Parameter((32, 48), split=Split(1)),
    }

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # input_layernorm
        x = hidden.pow(2).mean(-1, keepdim=True) + 1e-06
        x = local(self.input_layernorm.weight) * (hidden * torch.rsqrt(x))

        # self_attn
        x = all_reduce_gradient(x, axis="tp")
        q = F.linear(x, local(self.self_attn.q_proj.weight))
        q = q.reshape(8, 12, 2, 8).transpose(1, 2)
        k = F.linear(x, local(self.self_attn.k_proj.weight))
        k = k.reshape(8, 12, 1, 8).transpose(1, 2)
        v = F.linear(x, local(self.self_attn.v_proj.weight))
        v = v.reshape(8, 12, 1, 8).transpose(1, 2)
        x = q * cos
        x_2 = q[..., :4]
        joined = torch.cat((-q[..., 4:], x_2), dim=-1)
        x = x + joined * sin
        x_2 = k * cos
        x_3 = k[..., :4]
        joined = torch.cat((-k[..., 4:], x_3), dim=-1)
        x_2 = x_2 + joined * sin
        x = F.scaled_dot_product_attention(
            x, x_2, v, is_causal=True, scale=0.3535533905932738, enable_gqa=True
        )
        x = x.transpose(1, 2).reshape(8, 12, 16)
        o = F.linear(x, local(self.self_attn.o_proj.weight))
        o = all_reduce(o, axis="tp")
        hidden = hidden + o

        # post_attention_layernorm
        x = hidden.pow(2).mean(-1, keepdim=True) + 1e-06
        x = local(self.post_attention_layernorm.weight) * (hidden * torch.rsqrt(x))

        # mlp
        x = all_reduce_gradient(x, axis="tp")
        gate = F.linear(x, local(self.mlp.gate_proj.weight))
        gate = F.silu(gate)
        up = F.linear(x, local(self.mlp.up_proj.weight))
        gate = gate * up
        down = F.linear(gate, local(self.mlp.down_proj.weight))
        down = all_reduce(down, axis="tp")
        hidden = hidden + down
        return hidden


class Stage(BaseStage):
    """embeddings, model.layers.0 to model.layers.1."""

    INPUTS = ()
    OUTPUTS = ("hidden",)
    BATCH = ("input_ids",)
    PROLOGUE = ()
    LAYERS = (LlamaDecoderLayer,) * 2

    PARAMETERS = {
        "model.embed_tokens.weight": Parameter((96, 32)),
        "model.rotary_emb.inv_freq": Parameter(
            (4,), trainable=False, buffer=True, persistent=False
        ),
    }

    def forward(self, *, key: Tensor, input_ids: Tensor) -> Tensor:
        # model
        positions = torch.arange(12, device=input_ids.device)
        positions = positions.unsqueeze(0)
        # model.rotary_emb
        x = positions.unsqueeze(2).to(torch.float32) * self.model.rotary_emb.inv_freq
        joined = torch.cat((x, x), dim=-1)
        cos = joined.cos()
        sin = joined.sin()
        # model.layers.0.self_attn
        cos = cos.unsqueeze(1)
        sin = sin.unsqueeze(1)
        hidden = self.run_embeddings(input_ids)
        for layer, _ in self._calls[0:2]:
            hidden = layer(hidden, cos, sin)
        return hidden

    def run_embeddings(self, input_ids: Tensor) -> Tensor:
        # model.embed_tokens
        embed_tokens = F.embedding(input_ids, local(self.model.embed_tokens.weight))
        return embed_tokens
