"""Models by name: nothing is allocated, functions of the user's are called, errors help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from autoshard import models
from autoshard.errors import OptionError
from autoshard.models.presets import VGG16

PARAMETERS = {
    "gpt2": 124_439_808,
    "bert-large": 335_174_458,
    "llama3-8b": 8_030_261_248,
    "vgg16": 138_357_544,
    "resnet50": 25_557_032,
}
"""Sizes as published with the models."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_has_the_published_size_and_no_storage(name: str) -> None:
    spec = models.find(name)
    parameters = list(spec.model.parameters())
    assert sum(p.numel() for p in parameters) == PARAMETERS[name]
    assert all(p.is_meta for p in parameters)
    assert spec.one_sample
    assert spec.model.training


def test_every_preset_names_an_architecture_that_exists() -> None:
    import transformers

    for preset in models.PRESETS.values():
        known = preset.architecture == VGG16 or hasattr(transformers, preset.architecture)
        assert known, preset.architecture


def test_405_billion_parameters_fit_in_little_memory() -> None:
    """Peak resident memory of building the largest preset, in a process of its own."""
    code = (
        "import resource, torch\nfrom autoshard import models\n"
        "spec = models.find('llama3-405b')\n"
        "assert sum(p.numel() for p in spec.model.parameters()) > 405e9\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=280
    )
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(found.stdout.split()[-1]) * unit < 1.5 * 2**30


def test_buffers_that_are_computed_while_building_are_real() -> None:
    """Rotary frequencies are in no checkpoint: on the meta device they would be lost."""
    spec = models.find("llama3-8b")
    frequencies = spec.model.get_buffer("model.rotary_emb.inv_freq")
    assert not frequencies.is_meta
    assert frequencies[0] == 1.0


def test_the_sequence_length_can_be_chosen() -> None:
    assert models.find("gpt2").example_inputs["input_ids"].shape == (1, 1024)
    assert models.find("gpt2", 128).example_inputs["labels"].shape == (1, 128)


@pytest.mark.parametrize(
    ("name", "length", "words"),
    [
        ("gpt2", 2048, "at most 1024, the positions of GPT2LMHeadModel, but got 2048"),
        ("gpt2", 0, "at least 1 but got 0"),
        ("vgg16", 128, "vgg16 takes images: leave it out"),
        ("resnet50", 128, "takes pixel_values: leave it out"),
    ],
)
def test_a_sequence_length_that_the_model_cannot_have_is_refused(
    name: str, length: int, words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        models.find(name, length)


def test_a_configuration_class_builds_its_default_model() -> None:
    spec = models.find("hf:GPT2Config", 64)
    assert type(spec.model).__name__ == "GPT2LMHeadModel"
    assert spec.name == "GPT2"
    assert spec.example_inputs["input_ids"].shape == (1, 64)


def test_a_configuration_file_builds_its_model(tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 64,
              "intermediate_size": 64, "num_attention_heads": 2,
              "architectures": ["LlamaForCausalLM"]}  # fmt: skip
    path.write_text(json.dumps(config))
    spec = models.find(str(path))
    assert type(spec.model).__name__ == "LlamaForCausalLM"
    assert spec.model.config.num_hidden_layers == 2
    assert spec.model.config.use_cache is False
    assert all(p.is_meta for p in spec.model.parameters())


FUNCTIONS = """
import torch
from torch import nn
import neighbour

def model():
    return nn.Linear(2, 2)

def with_example(width=3):
    return nn.Linear(width, 2), (torch.zeros(4, width), torch.zeros(4, 2))

def with_loss():
    return *with_example(), lambda output, batch: (output - batch[1]).square().mean()

def needs_more(width):
    return nn.Linear(width, 2)

def no_model():
    return 7

def empty():
    return ()

def fails():
    raise RuntimeError("my own bug")
"""


@pytest.fixture
def functions(tmp_path: Path) -> str:
    (tmp_path / "neighbour.py").write_text("")
    path = tmp_path / "functions_of_a_user.py"
    path.write_text(FUNCTIONS)
    return str(path)


def test_a_function_in_a_file_is_called(functions: str) -> None:
    before = list(sys.path)
    plain = models.find(f"{functions}:model")
    assert isinstance(plain.model, nn.Linear)
    assert plain.example_inputs is None and plain.one_sample
    full = models.find(f"{functions}:with_loss")
    assert full.example_inputs[0].shape == (4, 3) and not full.one_sample
    assert full.loss_fn is not None
    assert full.loss_fn(torch.ones(4, 2), full.example_inputs) == 1.0
    assert sys.path == before


def test_a_function_in_a_package_is_called() -> None:
    spec = models.find("named_model:build")
    assert spec.name == "build"
    assert isinstance(spec.model, nn.Linear)


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ("modell", "has no function 'modell'; did you mean model"),
        ("needs_more", "expects the arguments width, but it is called without any"),
        ("no_model", r"expected to return a model, .* but got int"),
        ("empty", "expected to return a model"),
    ],
)
def test_a_function_that_gives_no_model_is_refused(
    functions: str, attribute: str, words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        models.find(f"{functions}:{attribute}")


def test_the_users_own_errors_pass_through(functions: str) -> None:
    with pytest.raises(RuntimeError, match="my own bug"):
        models.find(f"{functions}:fails")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt3", "unknown model 'gpt3' .did you mean gpt2"),
        ("nothing", "unknown model 'nothing': give a preset .gpt2, "),
        ("hf:LlamaConfg", "got 'LlamaConfg'; did you mean LlamaConfig"),
        ("hf:LlamaModel", "expects a configuration class"),
        ("none.json", "expected a Hugging Face config file at none.json"),
        ("none.py:build", "expected a Python file at none.py but there is none"),
        ("no_such_package.models:build", "cannot import 'no_such_package.models'"),
        ("torch.nn:Nothing", "torch.nn has no function 'Nothing'"),
    ],
)
def test_an_unknown_model_is_refused(name: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        models.find(name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "expected a Hugging Face config file"),
        ("[]", "has no 'model_type'"),
        ("{}", "has no 'model_type'"),
        ('{"model_type": "no_such_model"}', "transformers refused the config file"),
        ('{"model_type": "gpt2", "architectures": ["NoModel"]}', "has no model 'NoModel'"),
    ],
)
def test_a_wrong_configuration_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=words):
        models.find(str(path))
