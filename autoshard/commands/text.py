"""Batches of bytes for language models, and models with real parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoshard.errors import OptionError

NUM_BYTES = 256


def byte_tokens(path: Path) -> Tensor:
    """A file's bytes as token ids, shape ``[size]``."""
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()


def text_batch(tokens: Tensor, batch_size: int, length: int, step: int) -> dict[str, Tensor]:
    """The global batch of a step: windows drawn at random by the step, the same on every rank.

    Labels are the ids themselves: the model shifts them.

    Args:
        tokens: shape ``[size]``.

    Returns:
        ``input_ids`` and ``labels``, shape ``[batch_size, length]``.

    Raises:
        OptionError: the text is shorter than a sample.
    """
    if tokens.numel() <= length:
        raise OptionError(
            f"expected a text of more than {length} bytes, the tokens of a sample, but it has "
            f"{tokens.numel()}: give a longer one, or a shorter --sequence-length"
        )
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(tokens.numel() - length, (batch_size,), generator=generator)
    ids = torch.stack([tokens[s : s + length] for s in starts.tolist()])
    return {"input_ids": ids, "labels": ids.clone()}


def materialise(model: nn.Module, seed: int) -> nn.Module:
    """A model on the meta device with real parameters, as its own initialisation draws them.

    Raises:
        OptionError: it is not a Hugging Face model, which can be built again from its config.
    """
    if not any(p.is_meta for p in model.parameters()):
        return model
    config = getattr(model, "config", None)
    if config is None:
        raise OptionError(
            "training needs a model with real parameters, but this one is on the meta device: "
            "give MODEL as file.py:function that builds it on the CPU"
        )
    torch.manual_seed(seed)
    made: nn.Module = type(model)(config)
    return made.train()


def example_of(model: nn.Module, example: Any) -> Mapping[str, Tensor]:
    """One sample of text for the model, from its own example or what it says of itself.

    Raises:
        OptionError: the model is no language model on ``input_ids`` and ``labels``, or its
            vocabulary has no room for bytes.
    """
    from autoshard.capture import huggingface

    example = example if example is not None else huggingface.example_batch(model, 1)
    if not isinstance(example, Mapping) or set(example) != {"input_ids", "labels"}:
        raise OptionError(
            f"training on text needs a model that takes input_ids and labels, but "
            f"{type(model).__name__} takes "
            + (", ".join(example) if isinstance(example, Mapping) else "something else")
            + ": write its training loop with autoshard.compile (see README)"
        )
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", NUM_BYTES)
    if vocabulary < NUM_BYTES:
        raise OptionError(
            f"text is read as bytes, so the model's vocabulary needs at least {NUM_BYTES} entries "
            f"but has {vocabulary}: raise vocab_size"
        )
    return example
