"""Emitted source computes what the plain model computes, whatever the plan."""

from __future__ import annotations

import subprocess
import sys
import traceback
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from emitted import Outcome, check, emitted_step, plain
from plans import MEGATRON, make_plan
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from autoshard.capture import capture
from autoshard.emit import Emitted, emit, load_stage
from autoshard.errors import OptionError
from autoshard.ir import Program
from autoshard.plan.plan import Recompute
from autoshard.runtime.mesh import Mesh, using
from autoshard.runtime.random import make_key


def tiny_gpt2(dropout: float = 0.0) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=3, n_head=4, n_embd=32, vocab_size=96, n_positions=32, use_cache=False,
            bos_token_id=1, eos_token_id=2, attn_pdrop=dropout, embd_pdrop=dropout,
            resid_pdrop=dropout, loss_type="ForCausalLM",
        )
    ).double()  # fmt: skip


def tiny_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=32,
            intermediate_size=48, vocab_size=96, max_position_embeddings=32, use_cache=False,
            bos_token_id=1, eos_token_id=2, loss_type="ForCausalLM",
        )
    ).double()  # fmt: skip


def shifted_loss(output, batch) -> torch.Tensor:
    """The models' own loss, but without their cast to float32."""
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def batch_of(size: int = 8) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 96, (size, 12))
    labels = ids.clone()
    for row in range(size):  # ranks and micro-batches hold different numbers of targets
        labels[row, row % 5 :: 3] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def case(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, dict, Program]:
    torch.manual_seed(0)
    model = {"gpt2": tiny_gpt2, "llama": tiny_llama}[request.param]()
    batch = batch_of()
    return model, batch, capture(model, example_inputs=batch, loss_fn=shifted_loss)


MESHES = [
    {},
    {"micro_batches": 4},
    {"dp": 2},
    {"dp": 2, "micro_batches": 2},
    {"tp": 2},
    {"tp": 2, "split": MEGATRON},
    {"tp": 4, "split": MEGATRON},
    {"pp": 2, "micro_batches": 2},
    {"pp": 3, "dp": 2, "tp": 2, "micro_batches": 2, "split": MEGATRON},
]


def _name(mesh: dict) -> str:
    return "-".join("split" if k == "split" else f"{k}{v}" for k, v in mesh.items()) or "one"


@pytest.mark.parametrize("mesh", MESHES, ids=_name)
def test_a_step_equals_the_plain_model(case, mesh, monkeypatch) -> None:
    monkeypatch.setenv("AUTOSHARD_VERIFY", "2")
    model, batch, program = case
    expected = plain(model, batch, shifted_loss)
    tolerance = 1e-10 if "GPT2" in type(model).__name__ else 2e-6  # Llama casts to float32 inside
    check(expected, emitted_step(program, make_plan(program, **mesh), model, batch), tolerance)


@pytest.mark.parametrize(
    "recompute",
    [
        Recompute(mode="full"),
        Recompute(mode="selective", keep=("mlp_c_fc", "attn_c_proj")),
    ],
)
def test_recomputation_changes_nothing(recompute) -> None:
    model, batch = tiny_gpt2(), batch_of()
    program = capture(model, example_inputs=batch, loss_fn=shifted_loss)
    plan = make_plan(program, tp=2, micro_batches=2, split=MEGATRON, recompute=recompute)
    source = emit(program, plan).files["stage_0.py"]
    assert "recompute(layer, " in source
    assert source.count("with keep():") == (3 if recompute.keep else 0)  # and one all-reduce
    check(plain(model, batch, shifted_loss), emitted_step(program, plan, model, batch))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_emitted_blocks_read_well(name, golden) -> None:
    """Golden files of one block under Megatron's plan; reviewed as code."""
    model = {"gpt2": tiny_gpt2, "llama": tiny_llama}[name]().float()
    program = capture(model, example_inputs=batch_of())
    made = emit(program, make_plan(program, tp=2, pp=2, split=MEGATRON))
    golden(f"{name}_tp2.py", made.files["stage_0.py"])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_emitted_source_is_formatted(name, tmp_path) -> None:
    model = {"gpt2": tiny_gpt2, "llama": tiny_llama}[name]()
    program = capture(model, example_inputs=batch_of(), loss_fn=shifted_loss)
    emit(program, make_plan(program, dp=2, tp=2, pp=2, micro_batches=2)).write(tmp_path)
    for arguments in (["format", "--check"], ["check", "--select", "E,F,I,B,UP"]):
        command = [sys.executable, "-m", "ruff", *arguments, "--line-length", "100"]
        done = subprocess.run(
            [*command, "--isolated", str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_files_are_written_once_and_read_back(tmp_path) -> None:
    model, batch = tiny_gpt2(), batch_of()
    program = capture(model, example_inputs=batch, loss_fn=shifted_loss)
    made = emit(program, make_plan(program, pp=2))
    made.write(tmp_path)
    with pytest.raises(OptionError, match="pass force=True"):
        made.write(tmp_path)
    made.write(tmp_path, force=True)
    again = Emitted.read(tmp_path)
    assert dict(again.files) == dict(made.files) and again.manifest == made.manifest
    tied = [p["name"] for p in made.manifest["stages"][1]["parameters"]]
    assert "transformer.wte.weight" in tied
    info = next(
        p for p in made.manifest["stages"][0]["parameters"] if p["name"] == "transformer.wte.weight"
    )
    assert set(info["aliases"]) == {"transformer.wte.weight", "lm_head.weight"}


def test_equal_stages_share_a_file() -> None:
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=6, n_head=2, n_embd=16, vocab_size=32, n_positions=16, use_cache=False,
            bos_token_id=1, eos_token_id=2, loss_type="ForCausalLM",
        )
    )  # fmt: skip
    ids = torch.randint(0, 32, (4, 8))
    program = capture(model, example_inputs={"input_ids": ids}, loss_fn=self_loss)
    made = emit(program, make_plan(program, pp=4))
    files = [stage["file"] for stage in made.manifest["stages"]]
    assert files == ["stage_0.py", "stage_1.py", "stage_1.py", "stage_3.py"]
    assert "transformer.h.1 to transformer.h.4" in made.files["stage_1.py"]
    paths = [[layer["path"] for layer in s["layers"]] for s in made.manifest["stages"]]
    assert paths[2] == ["transformer.h.3", "transformer.h.4"]


def self_loss(output, batch) -> torch.Tensor:
    return F.cross_entropy(output.logits.flatten(0, 1), batch["input_ids"].flatten())


def test_dropout_draws_the_same_numbers_again() -> None:
    """One step is a function of its key: with recomputation, and on every run, the same bits."""
    model, batch = tiny_gpt2(dropout=0.3), batch_of()
    program = capture(model, example_inputs=batch, loss_fn=shifted_loss)
    mesh = {"dp": 2, "tp": 2, "micro_batches": 2, "split": MEGATRON}
    first = emitted_step(program, make_plan(program, **mesh), model, batch)
    for recompute in (
        None,
        Recompute(mode="full"),
        Recompute(mode="selective", keep=("mlp_c_fc",)),
    ):
        again = emitted_step(program, make_plan(program, recompute=recompute, **mesh), model, batch)
        assert torch.equal(first.loss, again.loss)
        check(first, again, 1e-12)
    other = emitted_step(program, replace(make_plan(program, **mesh), seed=1), model, batch)
    assert not torch.equal(first.loss, other.loss)


def test_tracebacks_show_emitted_source() -> None:
    model, batch = tiny_gpt2(), batch_of()
    program = capture(model, example_inputs=batch, loss_fn=shifted_loss)
    made = emit(program, make_plan(program))
    with using(Mesh({})):
        stage = load_stage(made, 0)(made.manifest["stages"][0])
        with pytest.raises((RuntimeError, IndexError)) as caught:
            stage(
                key=make_key(0, 0, 0), input_ids=batch["input_ids"][:, :5], labels=batch["labels"]
            )
    text = "".join(traceback.format_exception(caught.value))
    assert "= self.run_" in text and "<emitted stage_0.py" in text


class ShiftedRight(nn.Module):
    """Decoder inputs made from the labels by writing into zeros, as encoder-decoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 16)
        self.head = nn.Linear(16, 96)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        inputs = labels.new_zeros(labels.shape)
        inputs[:, 1:] = labels[:, :-1].clone()
        inputs = inputs.masked_fill(inputs == -100, 0)
        return self.head(self.embed(inputs))


@pytest.mark.parametrize("mesh", [{"micro_batches": 2}, {"dp": 2, "micro_batches": 2, "pp": 2}])
def test_rows_of_constants_are_cut_like_the_batch(mesh) -> None:
    def loss_fn(output, batch) -> torch.Tensor:
        return F.cross_entropy(output.flatten(0, 1), batch["labels"].flatten())

    model, batch = ShiftedRight().double(), {"labels": batch_of()["labels"]}
    program = capture(model, example_inputs=batch, loss_fn=loss_fn)
    output = model(batch["labels"])
    loss = loss_fn(output, batch)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    expected = Outcome(loss.detach(), gradients, {})
    check(expected, emitted_step(program, make_plan(program, **mesh), model, batch))
