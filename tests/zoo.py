"""Small deterministic models of many architectures, shared by the tests.

``build(name)`` gives a model in training mode, a batch of 8 samples and a loss function (``None``
where the model returns its loss). Dropout is 0; there are 4 heads and at least 4 layers where the
architecture has such; the same name gives the same numbers on every call.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from zoo_models import (
    DLRM,
    MLP,
    SEQUENCE,
    VGG,
    VOCAB,
    EncoderLM,
    LSTMLanguageModel,
    NanoGPT,
    TwoTower,
    UNet,
)

Batch = dict[str, Any] | tuple[Any, ...]
LossFn = Callable[[Any, Any], torch.Tensor]
Built = tuple[nn.Module, Batch, LossFn | None]

BATCH_SIZE = 8
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

_BUILDERS: dict[str, Callable[[], Built]] = {}


def _model(name: str) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    def register(function: Callable[[], Built]) -> Callable[[], Built]:
        _BUILDERS[name] = function
        return function

    return register


def names() -> tuple[str, ...]:
    return tuple(_BUILDERS)


def build(name: str, dtype: torch.dtype = torch.float64) -> Built:
    """``(model, batch, loss_fn or None)``; parameters and float inputs have ``dtype``."""
    with torch.random.fork_rng(devices=[]), _default_dtype(torch.float32):
        torch.manual_seed(0)
        model, batch, loss_fn = _BUILDERS[name]()
        _perturb(model)
    model = model.to(dtype).train()

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    if isinstance(batch, dict):
        return model, {k: cast(v) for k, v in batch.items()}, loss_fn
    return model, tuple(cast(v) for v in batch), loss_fn


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(old)


def _perturb(model: nn.Module) -> None:
    """Move vectors off their initial zeros and ones, where mistakes could hide."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))


def _ids(*shape: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randint(0, vocab, shape or (BATCH_SIZE, SEQUENCE))


def _labels(vocab: int = VOCAB) -> torch.Tensor:
    """Labels of which every sample ignores another number."""
    labels = _ids(vocab=vocab)
    for i in range(BATCH_SIZE):
        labels[i, : i % 5] = -100
    return labels


# ------------------------------------------------------------------------------- transformers


@_model("gpt2")
def _gpt2() -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=97, n_positions=SEQUENCE, n_embd=32, n_layer=4, n_head=4, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config), {"input_ids": _ids(vocab=97), "labels": _labels(97)}, None


def _decoder(config_name: str, model_name: str, **extra: Any) -> Built:
    import transformers

    sizes: dict[str, Any] = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=SEQUENCE,
        attention_dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = getattr(transformers, config_name)(**{**sizes, **extra})
    return (
        getattr(transformers, model_name)(config),
        {"input_ids": _ids(), "labels": _labels()},
        None,
    )


@_model("llama")
def _llama() -> Built:
    return _decoder("LlamaConfig", "LlamaForCausalLM")


@_model("qwen3")
def _qwen3() -> Built:
    return _decoder("Qwen3Config", "Qwen3ForCausalLM", head_dim=8, tie_word_embeddings=True)


@_model("gemma3")
def _gemma3() -> Built:
    return _decoder(
        "Gemma3TextConfig", "Gemma3ForCausalLM", num_hidden_layers=7, head_dim=8, sliding_window=4,
    )  # fmt: skip


@_model("mixtral")
def _mixtral() -> Built:
    built = _decoder(
        "MixtralConfig", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2,
        output_router_logits=True, experts_implementation="batched_mm",
    )  # fmt: skip
    return built


@_model("bert")
def _bert() -> Built:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=SEQUENCE, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForMaskedLM(config), {"input_ids": _ids(), "labels": _labels()}, None


@_model("t5")
def _t5() -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=16, dropout_rate=0.0,
    )  # fmt: skip
    config.decoder_start_token_id = 0
    labels = _ids(BATCH_SIZE, 12)
    labels[2:4, -3:] = -100
    return T5ForConditionalGeneration(config), {"input_ids": _ids(), "labels": labels}, None


@_model("whisper")
def _whisper() -> Built:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCAB, num_mel_bins=8, d_model=32, encoder_layers=4, decoder_layers=4,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_source_positions=16, max_target_positions=16, dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        begin_suppress_tokens=None,
    )  # fmt: skip
    batch = {"input_features": torch.randn(BATCH_SIZE, 8, 32), "labels": _ids(BATCH_SIZE, 12)}
    return WhisperForConditionalGeneration(config), batch, None


def _images(model: nn.Module, size: int = 32, classes: int = 8) -> Built:
    pixels = torch.randn(BATCH_SIZE, 3, size, size)
    return model, {"pixel_values": pixels, "labels": _ids(BATCH_SIZE, vocab=classes)}, None


@_model("vit")
def _vit() -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        image_size=16, patch_size=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = 8
    return _images(ViTForImageClassification(config), 16)


@_model("resnet")
def _resnet() -> Built:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[3, 2], layer_type="basic"
    )
    config.num_labels = 8
    return _images(ResNetForImageClassification(config))


@_model("convnext")
def _convnext() -> Built:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 3], num_stages=2)
    config.num_labels = 8
    return _images(ConvNextForImageClassification(config))


# --------------------------------------------------------------------------------- plain torch


@_model("nanogpt")
def _nanogpt() -> Built:
    return NanoGPT(), (_ids(), _ids()), None


@_model("encoder")
def _encoder() -> Built:
    def loss(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())

    return EncoderLM(), {"ids": _ids(), "targets": _labels()}, loss


def _cross_entropy(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return F.cross_entropy(output, batch[1])


def _classifier(model: nn.Module) -> Built:
    images = torch.randn(BATCH_SIZE, 3, 32, 32)
    return model, (images, _ids(BATCH_SIZE, vocab=8)), _cross_entropy


@_model("vgg")
def _vgg() -> Built:
    return _classifier(VGG(norm=False))


@_model("vgg_bn")
def _vgg_bn() -> Built:
    return _classifier(VGG(norm=True))


@_model("unet")
def _unet() -> Built:
    batch = {"x": torch.randn(BATCH_SIZE, 3, 16, 16), "mask": _ids(BATCH_SIZE, 16, 16, vocab=3)}
    return UNet(), batch, lambda output, b: F.cross_entropy(output, b["mask"])


@_model("lstm")
def _lstm() -> Built:
    return LSTMLanguageModel(), {"ids": _ids(), "targets": _ids()}, None


@_model("dlrm")
def _dlrm() -> Built:
    batch = {
        "dense": torch.randn(BATCH_SIZE, 12),
        "sparse": _ids(BATCH_SIZE, 5, 3, vocab=40),
        "clicks": _ids(BATCH_SIZE, vocab=2).float(),
    }
    return DLRM(), batch, lambda out, b: F.binary_cross_entropy_with_logits(out, b["clicks"])


@_model("mlp")
def _mlp() -> Built:
    batch = {"x": torch.randn(BATCH_SIZE, 12), "y": torch.randn(BATCH_SIZE, 4)}
    return MLP(), batch, lambda output, b: F.mse_loss(output, b["y"])


@_model("two_tower")
def _two_tower() -> Built:
    batch = {"left": torch.randn(BATCH_SIZE, 12), "right": torch.randn(BATCH_SIZE, 20)}
    return TwoTower(), batch, None
