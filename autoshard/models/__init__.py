"""Models by name: presets, Hugging Face configurations, and functions in Python files.

``find("llama3-8b")``, ``find("hf:LlamaConfig")``, ``find("path/config.json")``,
``find("train.py:build")``, ``find("package.module:build")``.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from torch import nn

from autoshard.errors import OptionError
from autoshard.models.presets import PRESETS, build_preset
from autoshard.models.spec import ModelSpec

__all__ = ["PRESETS", "ModelSpec", "find"]


def find(name: str, sequence_length: int | None = None) -> ModelSpec:
    """Build the model that ``name`` stands for, on the meta device where that is possible.

    Raises:
        OptionError: nothing of that name (with close matches), a function that returns something
            else, or a sequence length for a model that has none. What the user's own code raises
            passes through.
    """
    if sequence_length is not None and sequence_length < 1:
        raise OptionError(f"expected a sequence length of at least 1 but got {sequence_length}")
    if name in PRESETS:
        return build_preset(name, sequence_length)
    if name.startswith("hf:"):
        from autoshard.models.huggingface import build_config_class

        return build_config_class(name[3:], sequence_length)
    if name.endswith(".json"):
        from autoshard.models.huggingface import build_config_file

        return build_config_file(Path(name), sequence_length)
    if ":" in name:
        if sequence_length is not None:
            raise OptionError(
                f"a sequence length is for presets and Hugging Face models, but {name} makes its "
                "own example_inputs: set the length there"
            )
        return _from_function(name)
    close = difflib.get_close_matches(name, PRESETS, 3)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    raise OptionError(
        f"unknown model {name!r}{hint}: give a preset ({', '.join(PRESETS)}), hf:CONFIG_CLASS, "
        "a Hugging Face config.json, file.py:function or package.module:function"
    )


def _from_function(name: str) -> ModelSpec:
    place, _, attribute = name.rpartition(":")
    module = _load_file(Path(place)) if place.endswith(".py") else _import(place)
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        close = difflib.get_close_matches(attribute, known, 3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise OptionError(f"{place} has no function {attribute!r}{hint}")
    needed = [p.name for p in inspect.signature(function).parameters.values() if _needed(p)]
    if needed:
        raise OptionError(
            f"{name} expects the arguments {', '.join(needed)}, but it is called without any: give "
            "them defaults, or name a function that needs none"
        )
    result: Any = function()
    parts = result if isinstance(result, tuple) else (result,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        raise OptionError(
            f"{name} expected to return a model, (model, example_inputs) or "
            f"(model, example_inputs, loss_fn) but got {type(result).__name__}"
        )
    model, example, loss_fn = (*parts, None, None)[:3]
    return ModelSpec(attribute, model, example, loss_fn, one_sample=example is None)


def _needed(parameter: inspect.Parameter) -> bool:
    variadic = (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and parameter.kind not in variadic


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise OptionError(f"expected a Python file at {path} but there is none")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise OptionError(f"{path} cannot be loaded as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # classes in it can be pickled
    folder = str(path.parent.resolve())
    sys.path.insert(0, folder)  # as when Python runs the file: it may import its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
    return module


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise OptionError(f"cannot import {name!r}: {error}") from error
