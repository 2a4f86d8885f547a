"""What transformers models need to be captured well, and the batches that they know themselves.

While they are exported, transformers models take other branches than in training: they build a
dense mask where attention would use ``is_causal``, and keep a cache. Both are turned off here, so
that the captured graph is the training graph.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn

MAX_SEQUENCE = 2048
"""Longest sequence of a batch that the user did not give."""
_DEFAULT_BATCH_SIZE = 8


def is_huggingface(model: nn.Module) -> bool:
    """True if the model, or a module in it, is a transformers model; never imports transformers."""
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and any(
        isinstance(m, module.PreTrainedModel) for m in model.modules()
    )


@contextlib.contextmanager
def training_branches(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """While active, transformers models in ``model`` run the code that they run in training."""
    if not is_huggingface(model):
        yield
        return
    from transformers import masking_utils

    with contextlib.ExitStack() as stack:
        for name in _patch_tracing(stack, masking_utils):
            notes.append(
                f"this release of transformers has no masking_utils.{name}: attention may be "
                "captured with dense masks, which is right but slower"
            )
        for config in _configs(model):
            _set(stack, config, "use_cache", False)
            implementation = getattr(config, "_attn_implementation", None)
            if implementation not in (None, "eager", "sdpa"):
                _set(stack, config, "_attn_implementation", "sdpa")
                notes.append(f"attention {implementation!r} is captured as 'sdpa'")
        yield


def _patch_tracing(stack: contextlib.ExitStack, masking: ModuleType) -> list[str]:
    """Let masks be left out as in training; returns what this release should have but has not.

    Releases ask in different ways whether they are traced; a mask that was given is still one.
    """
    traced: Callable[[Any], bool] | None = getattr(masking, "is_tracing", None)

    def is_tracing(tensor: Any = None) -> bool:
        return tensor is not None and traced is not None and traced(tensor)

    asked: dict[str, Callable[..., bool]] = {
        "is_torchdynamo_exporting": lambda: False,
        "is_tracing": is_tracing,
        "is_torchdynamo_compiling": lambda: False,
    }
    present = [name for name in asked if hasattr(masking, name)]
    for name in present:
        stack.enter_context(mock.patch.object(masking, name, asked[name]))
    packed = "find_packed_sequence_indices"
    if hasattr(masking, packed):
        stack.enter_context(mock.patch.object(masking, packed, lambda position_ids: None))
    return [*([] if present else ["is_tracing"]), *([] if hasattr(masking, packed) else [packed])]


def _configs(model: nn.Module) -> list[Any]:
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return list(found.values())


def _set(stack: contextlib.ExitStack, config: Any, name: str, value: object) -> None:
    if hasattr(config, name) and getattr(config, name) != value:
        stack.callback(setattr, config, name, getattr(config, name))
        setattr(config, name, value)


def example_batch(model: nn.Module, batch_size: int | None) -> dict[str, torch.Tensor] | None:
    """A batch for the model's training forward, on the meta device; ``None`` if unknown."""
    config = getattr(model, "config", None)
    if not is_huggingface(model) or config is None:
        return None
    size = batch_size or _DEFAULT_BATCH_SIZE
    task = type(model).__name__
    main = getattr(model, "main_input_name", "input_ids")
    length = _sequence_length(config)
    if main == "pixel_values" and task.endswith("ForImageClassification"):
        vision = getattr(config, "vision_config", config)
        side = getattr(vision, "image_size", 224)
        height, width = (side, side) if isinstance(side, int) else side
        pixels = _floats(model, size, getattr(vision, "num_channels", 3), height, width)
        return {"pixel_values": pixels, "labels": _ids(size)}
    if main == "input_features" and task.endswith("ForConditionalGeneration"):
        frames = 2 * config.max_source_positions
        labels = _ids(size, min(length, config.max_target_positions))
        return {
            "input_features": _floats(model, size, config.num_mel_bins, frames),
            "labels": labels,
        }
    if main != "input_ids":
        return None
    if task.endswith(("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration",
                      "ForTokenClassification")):  # fmt: skip
        return {"input_ids": _ids(size, length), "labels": _ids(size, length)}
    if task.endswith("ForSequenceClassification"):
        return {"input_ids": _ids(size, length), "labels": _ids(size)}
    if task.endswith("ForQuestionAnswering"):
        ends = {"start_positions": _ids(size), "end_positions": _ids(size)}
        return {"input_ids": _ids(size, length), **ends}
    return None


def _sequence_length(config: Any) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_target_positions"):
        if isinstance(length := getattr(text, name, None), int) and length > 0:
            return min(length, MAX_SEQUENCE)
    return 512


def _ids(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def _floats(model: nn.Module, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=next(model.parameters()).dtype, device="meta")
