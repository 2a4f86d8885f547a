"""Well-known training models by name, built without allocating their parameters.

Shapes are those of the published models: GPT-2 (Radford et al. 2019), GPT-3 (Brown et al. 2020,
table 2.1), Llama 2 and 3 (Touvron et al. 2023; Grattafiori et al. 2024, table 3), Mistral, Qwen3,
Gemma 3, Mixtral, BERT (Devlin et al. 2019), T5 (Raffel et al. 2020), ViT (Dosovitskiy et al. 2021),
Whisper (Radford et al. 2022), VGG (Simonyan and Zisserman 2015), ResNet (He et al. 2016).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autoshard.errors import OptionError
from autoshard.models.spec import ModelSpec

VGG16 = "VGG-16"
"""The one architecture here that transformers does not have."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A Hugging Face architecture with a configuration, or a builder of its own."""

    architecture: str
    config: Mapping[str, Any] = field(default_factory=dict)
    sequence_length: int = 0


def _gpt(layers: int, width: int, heads: int, length: int = 1024) -> Preset:
    config = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": length}
    return Preset("GPT2LMHeadModel", config, length)


def _llama(
    layers: int, width: int, heads: int, kv_heads: int, hidden: int,
    vocabulary: int = 128256, length: int = 8192, theta: float = 500000.0, kind: str = "Llama",
    **more: Any,
) -> Preset:  # fmt: skip
    config = {
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": hidden, "vocab_size": vocabulary,
        "max_position_embeddings": length, "rope_theta": theta, **more,
    }  # fmt: skip
    return Preset(f"{kind}ForCausalLM", config, length)


def _bert(layers: int, width: int, heads: int) -> Preset:
    config = {
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }  # fmt: skip
    return Preset("BertForMaskedLM", config, 512)


def _t5(layers: int, width: int, heads: int, hidden: int) -> Preset:
    config = {
        "num_layers": layers, "num_decoder_layers": layers, "d_model": width, "d_ff": hidden,
        "num_heads": heads, "d_kv": 64, "decoder_start_token_id": 0,
    }  # fmt: skip
    return Preset("T5ForConditionalGeneration", config, 512)


def _vit(layers: int, width: int, heads: int, patch: int) -> Preset:
    config = {
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "intermediate_size": 4 * width, "patch_size": patch, "num_labels": 1000,
    }  # fmt: skip
    return Preset("ViTForImageClassification", config)


PRESETS: dict[str, Preset] = {
    "gpt2": _gpt(12, 768, 12),
    "gpt2-medium": _gpt(24, 1024, 16),
    "gpt2-large": _gpt(36, 1280, 20),
    "gpt2-xl": _gpt(48, 1600, 25),
    "gpt3-2.7b": _gpt(32, 2560, 32, 2048),
    "gpt3-6.7b": _gpt(32, 4096, 32, 2048),
    "gpt3-13b": _gpt(40, 5120, 40, 2048),
    "gpt3-175b": _gpt(96, 12288, 96, 2048),
    "gpt3-1t": _gpt(128, 25600, 160, 2048),
    "llama2-7b": _llama(32, 4096, 32, 32, 11008, 32000, 4096, 10000.0),
    "llama2-13b": _llama(40, 5120, 40, 40, 13824, 32000, 4096, 10000.0),
    "llama2-70b": _llama(80, 8192, 64, 8, 28672, 32000, 4096, 10000.0),
    "llama3-8b": _llama(32, 4096, 32, 8, 14336),
    "llama3-70b": _llama(80, 8192, 64, 8, 28672),
    "llama3-405b": _llama(126, 16384, 128, 8, 53248),
    "mistral-7b": _llama(
        32, 4096, 32, 8, 14336, 32000, 8192, 10000.0, kind="Mistral", sliding_window=None
    ),
    "qwen3-8b": _llama(36, 4096, 32, 8, 12288, 151936, 8192, 1e6, kind="Qwen3", head_dim=128),
    "qwen3-32b": _llama(64, 5120, 64, 8, 25600, 151936, 8192, 1e6, kind="Qwen3", head_dim=128),
    "mixtral-8x7b": _llama(
        32, 4096, 32, 8, 14336, 32000, 4096, 1e6, kind="Mixtral",
        num_local_experts=8, num_experts_per_tok=2,
    ),
    "bert-base": _bert(12, 768, 12),
    "bert-large": _bert(24, 1024, 16),
    "t5-base": _t5(12, 768, 12, 3072),
    "t5-large": _t5(24, 1024, 16, 4096),
    "vit-base": _vit(12, 768, 12, 16),
    "vit-large": _vit(24, 1024, 16, 16),
    "resnet50": Preset("ResNetForImageClassification", {"num_labels": 1000}),
    "vgg16": Preset(VGG16),
}  # fmt: skip


def build_preset(name: str, sequence_length: int | None = None) -> ModelSpec:
    """The model of that name on the meta device, with one example batch.

    Raises:
        OptionError: a sequence length for a model that has none, or beyond its positions.
    """
    preset = PRESETS[name]
    if preset.architecture == VGG16:
        if sequence_length:
            raise OptionError(
                "--sequence-length is for models on token ids, but vgg16 takes images: leave it out"
            )
        return _vgg16()
    from autoshard.models.huggingface import build_architecture

    return build_architecture(
        preset.architecture, dict(preset.config), name, sequence_length or preset.sequence_length
    )


def _vgg16() -> ModelSpec:
    """VGG-16, configuration D of the paper (table 1)."""
    import torch
    from torch import nn

    with torch.device("meta"):
        features: list[nn.Module] = []
        channels = 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
            if width:
                features += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            else:
                features.append(nn.MaxPool2d(2))
        classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Dropout(),
            nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 1000),
        )  # fmt: skip
        model = nn.Sequential()
        model.add_module("features", nn.Sequential(*features))
        model.add_module("classifier", classifier)
    batch = (torch.zeros(1, 3, 224, 224), torch.zeros(1, dtype=torch.long))

    def loss(output: torch.Tensor, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return nn.functional.cross_entropy(output, batch[1])

    return ModelSpec("vgg16", model, batch, loss, one_sample=True)
