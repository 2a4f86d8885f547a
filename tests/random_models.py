"""Models as small as they can be for every op to be split over 8 ranks in some way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import zoo_models
from emitted import Outcome
from equivalence import loss_of, uncast
from torch import Tensor, nn

from autoshard.capture import capture
from autoshard.ir import Program

BATCH, SEQUENCE, VOCAB = 8, 8, 61
"""The vocabulary does not divide."""


@dataclass(frozen=True)
class Case:
    """A model with its program, one batch, and what the plain model makes of it."""

    program: Program
    model: nn.Module
    batch: dict[str, Tensor]
    expected: Outcome


def _ids(*shape: int, vocab: int = VOCAB) -> Tensor:
    return torch.randint(0, vocab, shape)


def _labels() -> Tensor:
    labels = _ids(BATCH, SEQUENCE)
    for i in range(BATCH):
        labels[i, : i % 5] = -100
    return labels


def _language(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor], Any]:
    return model, {"input_ids": _ids(BATCH, SEQUENCE), "labels": _labels()}, None


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return _language(GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCAB, n_positions=SEQUENCE, n_embd=16, n_layer=2, n_head=4, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
    )))  # fmt: skip


_DECODER: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=SEQUENCE,
    attention_dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _language(LlamaForCausalLM(LlamaConfig(**_DECODER)))


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return _language(MixtralForCausalLM(MixtralConfig(
        **{**_DECODER, "num_hidden_layers": 1}, num_local_experts=4, num_experts_per_tok=2,
        output_router_logits=True, experts_implementation="batched_mm",
    )))  # fmt: skip


def _t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=16, dropout_rate=0.0,
    )  # fmt: skip
    config.decoder_start_token_id = 0
    return _language(T5ForConditionalGeneration(config))


def _convnet() -> Any:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(16), nn.GELU(),
        nn.GroupNorm(8, 16), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 8),
    )  # fmt: skip
    batch = {"input": torch.randn(BATCH, 3, 8, 8), "labels": _ids(BATCH, vocab=8)}
    return model, batch, lambda output, b: F.cross_entropy(output, b["labels"])


def _dlrm() -> Any:
    batch = {
        "dense": torch.randn(BATCH, 12),
        "sparse": _ids(BATCH, 3, 3, vocab=40),
        "clicks": _ids(BATCH, vocab=2).float(),
    }
    model = zoo_models.DLRM(tables=3)
    return model, batch, lambda out, b: F.binary_cross_entropy_with_logits(out, b["clicks"])


def _lstm() -> Any:
    batch = {"ids": _ids(BATCH, SEQUENCE), "targets": _ids(BATCH, SEQUENCE)}
    return zoo_models.LSTMLanguageModel(), batch, None


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": _gpt2, "llama": _llama, "mixtral": _mixtral, "t5": _t5, "convnet": _convnet,
    "lstm": _lstm, "dlrm": _dlrm,
}  # fmt: skip


@functools.cache
def build(name: str) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, batch, loss_fn = MODELS[name]()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    model = model.double().train()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with uncast():
        program = capture(model, example_inputs=batch, loss_fn=loss_fn, model_name=name)
        loss = loss_of(model, batch, loss_fn)
        loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    model.zero_grad()
    model.load_state_dict(state)
    return Case(program, model, batch, Outcome(loss.detach(), gradients, buffers))
