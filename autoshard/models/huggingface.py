"""Hugging Face architectures built on the meta device, with a batch of the right shape."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoshard.errors import OptionError
from autoshard.models.spec import ModelSpec


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside hold their parameters on the meta device, but real buffers.

    Building under ``torch.device("meta")`` would lose buffers that are computed while building,
    such as rotary frequencies, since they are in no checkpoint.
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            self._parameters[name] = nn.Parameter(
                parameter.to("meta"), requires_grad=parameter.requires_grad
            )

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def import_transformers() -> Any:
    """The transformers package.

    Raises:
        OptionError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise OptionError(
            "this model needs Hugging Face transformers: pip install 'autoshard[huggingface]'"
        ) from error
    return transformers


def build_architecture(
    architecture: str, config: dict[str, Any], name: str, sequence_length: int | None = None
) -> ModelSpec:
    """A model class of transformers with ``config`` entries over the class's defaults."""
    transformers = import_transformers()
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise OptionError(
            f"transformers {transformers.__version__} has no model {architecture!r}: check the "
            "entry 'architectures', or give MODEL as file.py:function"
        )
    settings = {"use_cache": False, **config}
    try:
        made = model_class.config_class(**settings)
    except (TypeError, ValueError) as error:
        raise OptionError(f"the configuration of {architecture} was refused: {error}") from error
    with parameters_on_meta():
        model = model_class(made)
    return ModelSpec(name, model, example_batch(model, sequence_length), one_sample=True)


def build_config_class(config_class: str, sequence_length: int | None) -> ModelSpec:
    """The default training model of a configuration class such as ``LlamaConfig``."""
    transformers = import_transformers()
    made = getattr(transformers, config_class, None)
    if not (isinstance(made, type) and issubclass(made, transformers.PreTrainedConfig)):
        known = [name for name in dir(transformers) if name.endswith("Config")]
        close = difflib.get_close_matches(config_class, known, 3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise OptionError(
            f"hf: expects a configuration class of transformers {transformers.__version__}, such "
            f"as hf:LlamaConfig, but got {config_class!r}{hint}"
        )
    name = config_class.removesuffix("Config")
    return build_architecture(_training_class(made()), {}, name, sequence_length)


def build_config_file(path: Path, sequence_length: int | None) -> ModelSpec:
    """The model of a ``config.json``: its ``architectures`` entry, else by ``model_type``."""
    transformers = import_transformers()
    try:
        config = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise OptionError(f"expected a Hugging Face config file at {path}: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise OptionError(f"{path} has no 'model_type': it is no Hugging Face config file")
    try:
        made = transformers.AutoConfig.for_model(**config)
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise OptionError(f"transformers refused the config file {path}: {reason}") from error
    architecture = (config.get("architectures") or [_training_class(made)])[0]
    for key in ("model_type", "architectures", "transformers_version"):
        config.pop(key, None)
    return build_architecture(architecture, config, path.stem, sequence_length)


def _training_class(config: Any) -> str:
    """The first of transformers' auto classes with a loss that knows this configuration."""
    from transformers.models.auto import modeling_auto as auto

    for mapping in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    ):
        if config.model_type in mapping:
            found = mapping[config.model_type]
            return str(found if isinstance(found, str) else found[0])
    raise OptionError(
        f"transformers has no model with a training loss for {type(config).__name__}: "
        "give MODEL as file.py:function that returns (model, example_inputs)"
    )


def example_batch(model: nn.Module, sequence_length: int | None) -> Mapping[str, Tensor] | None:
    """One sample with labels; ``None`` where capture's own guess is as good (no sequence asked).

    Raises:
        OptionError: a sequence length for a model that takes no token ids.
    """
    if not sequence_length:
        return None
    main_input = getattr(model, "main_input_name", "input_ids")
    if main_input != "input_ids":
        raise OptionError(
            f"--sequence-length is for models on token ids, but {type(model).__name__} takes "
            f"{main_input}: leave it out"
        )
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(most, int) and sequence_length > most:
        raise OptionError(
            f"--sequence-length expects at most {most}, the positions of {type(model).__name__}, "
            f"but got {sequence_length}"
        )
    ids = torch.zeros(1, sequence_length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids.clone()}
