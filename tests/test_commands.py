"""The command line, in this process: output, exit codes, files, and the set of flags."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autoshard.commands import COMMANDS, build_parser, main, shared, text
from autoshard.errors import OptionError

ROOT = Path(__file__).resolve().parent.parent

MODEL = {"--model", "--sequence-length"}
PLANNING = {
    "--cluster",
    "--global-batch-size",
    "--precision",
    "--optimizer",
    "--pin",
    "--costs",
    "--strict",
    "--time-limit",
    "--seed",
}
FLAGS = {
    "plan": {"--world-size", "--compare", "--save", "--force", "--json", *MODEL, *PLANNING},
    "show": {"plan", "--explain", "--json"},
    "diff": {"plan", "other"},
    "trace": {"plan", "--out", "--measured", "--force"},
    "profile": {"path", "--processes", "--name", "--force"},
    "emit": {"plan", "--out", "--force", *MODEL},
    "train": {
        "--world-size",
        "--text",
        "--steps",
        "--learning-rate",
        "--clip-norm",
        "--plan",
        "--save",
        "--save-every",
        "--max-restarts",
        "--trace",
        "--json",
        *MODEL,
        *PLANNING,
    },
}
"""People write these in scripts: a change here is a change for users, and goes in CHANGELOG.md."""


def subparsers() -> dict[str, argparse.ArgumentParser]:
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("no commands")


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A GPT-2 small enough to plan in a second."""
    path = tmp_path / "tiny.json"
    path.write_text(
        json.dumps(
            {
                "model_type": "gpt2",
                "n_layer": 2,
                "n_embd": 32,
                "n_head": 2,
                "vocab_size": 256,
                "n_positions": 32,
                "bos_token_id": 0,
                "eos_token_id": 0,
            }
        )
    )
    return str(path)


@pytest.fixture
def planned(config: str, tmp_path: Path) -> Path:
    """A plan file for ``config`` on one device."""
    path = tmp_path / "plan.json"
    arguments = ["plan", "--model", config, "--world-size", "1", "--cluster", "cpu"]
    assert main([*arguments, "--global-batch-size", "4", "--save", str(path), "--json"]) == 0
    return path


# -- flags and help -------------------------------------------------------------------------------


def test_the_flags_are_the_known_ones() -> None:
    assert tuple(subparsers()) == COMMANDS
    found = {
        name: {a.option_strings[0] if a.option_strings else a.dest for a in parser._actions}
        for name, parser in subparsers().items()
    }
    assert {name: flags - {"-h"} for name, flags in found.items()} == FLAGS


def test_every_flag_but_the_obvious_has_a_help_text() -> None:
    obvious = {"model", "plan", "other"}
    for name, parser in subparsers().items():
        for action in parser._actions:
            assert action.help or action.dest in obvious, f"{name} {action.dest}"


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_shows_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    assert f"autoshard {' '.join(command)}".strip() in capsys.readouterr().out


def test_help_lists_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    from autoshard import errors

    main(["--help"])
    listed = capsys.readouterr().out.split("exit codes:")[1]
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and hasattr(k, "exit_code")]
    for kind in kinds:
        assert f"\n  {kind.exit_code}  " in listed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from autoshard import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"autoshard {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["plann"], ["plan"], ["plan", "--model", "gpt2"], ["show"], ["train"]]
)
def test_wrong_usage_is_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert "usage: autoshard" in capsys.readouterr().err


# -- plan, show, diff, emit -----------------------------------------------------------------------


def test_plan_prints_the_plan(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["plan", "--model", config, "--world-size", "2", "--cluster", "cpu"])
    out = capsys.readouterr().out
    assert code == 0
    assert "2 x " in out and "Pipeline stages" in out
    assert "16 samples per step" in out  # 8 per device, since a preset's example is one sample


def test_plan_json_is_all_of_stdout(
    config: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    arguments = [
        "plan",
        "--model",
        config,
        "--world-size",
        "4",
        "--cluster",
        "cpu",
        "--json",
        "--pin",
        "pp=2",
        "--pin",
        "dp=2",
        "--global-batch-size",
        "8",
        "--sequence-length",
        "16",
        "--save",
        str(path),
    ]
    assert main(arguments) == 0
    out, err = capfd.readouterr()
    summary = json.loads(out)  # what solvers print would break this
    assert summary["mesh"] == {"pp": 2, "dp": 2, "cp": 1, "tp": 1, "ep": 1}
    assert summary["schedule"] == "1f1b"
    assert summary["micro_batch_size"] * summary["num_micro_batches"] == 4
    assert summary["predicted_step_s"] > 0
    assert len(summary["peak_bytes_per_stage"]) == 2
    assert min(summary["peak_bytes_per_stage"]) > 0
    assert summary["solver"]["gap"] >= 0
    assert {"import", "build", "capture", "costs", "stages"} <= set(summary["seconds"])
    assert f"wrote {path}" in err


def test_plan_compares_with_pins_and_with_a_saved_plan(
    config: str, planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["plan", "--model", config, "--cluster", "cpu", "--global-batch-size", "4"]
    hand = tmp_path / "hand.json"
    hand.write_text(json.dumps({"pp": 2, "stages": [2, 2], "recompute": "full"}))
    compare = ["--compare", str(hand)]
    capsys.readouterr()
    assert main([*common, "--world-size", "2", *compare]) == 0
    text = capsys.readouterr().out.split("Against hand.json")[1]
    assert "longer per step" in text and "Each pipeline rank of hand.json" in text
    assert main([*common, "--world-size", "2", *compare, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    other = found["compared"]
    assert other["fits"] and other["name"] == "hand.json"
    assert other["plan"]["pins"]["stages"] == [2, 2]
    difference_s = other["plan"]["predicted_step_s"] - found["predicted_step_s"]
    assert sum(other["differences_s"].values()) == pytest.approx(difference_s)
    for rank in other["plan"]["predicted_ranks_s"]:
        parts = ("compute", "recompute", "exposed_communication", "optimizer", "bubble")
        assert sum(rank[p] for p in parts) == pytest.approx(other["plan"]["predicted_step_s"])

    assert main([*common, "--world-size", "1", "--compare", str(planned)]) == 0
    assert "takes as long as the chosen plan" in capsys.readouterr().out


def test_a_compared_configuration_that_does_not_fit_is_priced_all_the_same(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from autoshard.cluster import find

    cpu = find("cpu")
    small = tmp_path / "small.json"
    replace(cpu, device=replace(cpu.device, memory_bytes=650_000)).save(small)
    hand = tmp_path / "hand.json"
    hand.write_text('{"dp": 2, "data_parallel": "ddp", "micro_batch_size": 8}')
    common = ["plan", "--model", config, "--cluster", str(small), "--world-size", "2"]
    assert main([*common, "--compare", str(hand), "--json"]) == 0
    other = json.loads(capsys.readouterr().out)["compared"]
    assert not other["fits"] and "lacks" in other["too_large"]
    assert max(other["plan"]["peak_bytes_per_stage"]) > 650_000


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("{", 2, "expects JSON in .*hand.json but it has none"),
        ("[1]", 2, r"expects a JSON object of pins .* got \[1\]"),
        ('{"tq": 2}', 2, r"hand.json: unknown constraint 'tq' \(known: pp, .*tp"),
        ('{"micro_batch": 2}', 2, r"unknown constraint 'micro_batch'; did you mean 'micro_batch_s"),
        ('{"tp": 0}', 2, "constraint tp expects a positive integer but got 0"),
        ('{"tp": 2, "pp": 2}', 2, "holds 4 ranks, which does not divide world_size=2"),
        (None, 2, "expects a file but .*No such file"),
        ('{"version": 2, "stages": []}', 6, "no valid plan"),
    ],
)
def test_what_cannot_be_compared(
    text: str | None, code: int, words: str, config: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hand = tmp_path / "hand.json"
    if text is not None:
        hand.write_text(text)
    arguments = ["plan", "--model", config, "--world-size", "2", "--cluster", "cpu"]
    assert main([*arguments, "--compare", str(hand)]) == code
    assert re.search(words, capsys.readouterr().err)


def test_a_plan_for_another_question_cannot_be_compared(
    config: str, planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--model", config, "--world-size", "1", "--cluster", "cpu"]
    assert main([*arguments, "--global-batch-size", "8", "--compare", str(planned)]) == 6
    assert "plan.json is a plan for another program" in capsys.readouterr().err


def test_plan_never_overwrites_without_force(
    config: str, planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = planned.read_bytes()
    arguments = [
        "plan",
        "--model",
        config,
        "--world-size",
        "1",
        "--cluster",
        "cpu",
        "--global-batch-size",
        "2",
        "--save",
        str(planned),
    ]
    assert main(arguments) == 2
    assert "exists: give another path, or --force" in capsys.readouterr().err
    assert planned.read_bytes() == before
    assert main([*arguments, "--force"]) == 0
    assert planned.read_bytes() != before


def test_show(planned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["show", str(planned)]) == 0
    shown = capsys.readouterr().out
    assert "4 samples per step" in shown
    assert main(["show", str(planned), "--explain", "transformer.wte.weight"]) == 0
    assert "of layer embeddings" in capsys.readouterr().out
    assert main(["show", str(planned), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["global_batch_size"] == 4
    assert main(["show", str(planned), "--explain", "nothing"]) == 2
    assert "named 'nothing'" in capsys.readouterr().err


def test_diff(
    config: str, planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    main(
        [
            "plan",
            "--model",
            config,
            "--world-size",
            "1",
            "--cluster",
            "cpu",
            "--json",
            "--global-batch-size",
            "4",
            "--pin",
            "micro_batch_size=2",
            "--save",
            str(other),
        ]
    )
    capsys.readouterr()
    assert main(["diff", str(planned), str(planned)]) == 0
    assert capsys.readouterr().out == "the plans are equal\n"
    assert main(["diff", str(planned), str(other)]) == 0
    assert "pins.micro_batch_size: - => 2" in capsys.readouterr().out


def test_emit(
    config: str, planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    capsys.readouterr()
    arguments = ["emit", str(planned), "--model", config, "--out", str(folder)]
    assert main(arguments) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert {p.name for p in written} >= {"stage_0.py", "manifest.json"}
    compile((folder / "stage_0.py").read_text(), "stage_0.py", "exec")
    assert main(arguments) == 2
    assert main([*arguments, "--force"]) == 0


def test_a_plan_for_another_model_is_exit_code_6(
    config: str, planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["emit", str(planned), "--model", config, "--out", str(tmp_path / "out")]
    assert main([*arguments, "--sequence-length", "8"]) == 6
    assert "the model, its inputs or its loss have changed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["plan", "--model", "gpt2", "--world-size", "0"], 2, "integer of at least 1, but got 0"),
        (["plan", "--model", "gpt2", "--world-size", "2", "--pin", "tp"], 2, "KEY=VALUE"),
        (["plan", "--model", "gpt2", "--world-size", "2", "--pin", "tp=3"], 2, "not divide"),
        (["plan", "--model", "gpt3", "--world-size", "2"], 2, "did you mean"),
        (["plan", "--model", "named_model:build", "--world-size", "2"], 3, "example_inputs"),
        (
            ["plan", "--model", "gpt2", "--world-size", "2", "--global-batch-size", "0"],
            2,
            "--global-batch-size expects a positive number but got 0",
        ),
        (["plan", "--model", "gpt2", "--world-size", "2", "--cluster", "h1000"], 2, "'h100'"),
        (
            ["plan", "--model", "gpt2", "--world-size", "2", "--save", "/none/plan.json"],
            2,
            "expected a folder /none",
        ),
        (["profile", "here.json", "--processes", "0"], 2, "--processes expects a positive number"),
        (["profile", "none/here.json"], 2, "expected a folder none"),
        (["show", "none.json"], 6, "expected a plan file at none.json"),
        (["train", "--model", "gpt2", "--text", "none.txt"], 2, "expected a text file"),
    ],
)
def test_errors_are_one_message_and_a_code(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"autoshard {arguments[0]}: ") and words in err
    assert "Traceback" not in err


# -- pins, progress, text -------------------------------------------------------------------------


def test_pins_are_parsed() -> None:
    pins = [
        "tp=2",
        "schedule=gpipe",
        "sharding.a.weight=S(1;4,4)",
        "stages=3,4",
        "sharding.b=R",
        "allow_coupled_micro_batches=true",
    ]
    assert shared.parse_pins(pins) == {
        "tp": 2,
        "schedule": "gpipe",
        "sharding": {"a.weight": "S(1;4,4)", "b": "R"},
        "stages": (3, 4),
        "allow_coupled_micro_batches": True,
    }
    assert shared.parse_pins(["stages=5"]) == {"stages": (5,)}
    assert shared.parse_pins(["tp=2", "tp=2"]) == {"tp": 2}


@pytest.mark.parametrize(
    ("pins", "words"),
    [
        (["tp"], "KEY=VALUE such as tp=2 but got 'tp'"),
        (["tp="], "KEY=VALUE"),
        (["tp=2", "tp=4"], "tp is given twice, as 2 and as 4"),
        (["sharding.w=R", "sharding.w=V"], "w is given twice"),
    ],
)
def test_contradicting_pins_are_refused(pins: list[str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        shared.parse_pins(pins)


def test_progress_is_silent_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (True, False):
        with shared.progress(quiet) as say:
            say("working")
    assert capsys.readouterr() == ("", "")


def test_text_batches_are_the_same_for_the_same_step() -> None:
    tokens = torch.arange(1000) % 256
    one, again = (text.text_batch(tokens, 4, 16, step=3) for _ in range(2))
    assert torch.equal(one["input_ids"], again["input_ids"])
    assert not torch.equal(one["input_ids"], text.text_batch(tokens, 4, 16, step=4)["input_ids"])
    assert one["labels"].shape == (4, 16)
    with pytest.raises(OptionError, match="more than 1000 bytes"):
        text.text_batch(tokens, 4, 1000, step=0)


# -- profile --------------------------------------------------------------------------------------


def test_profile_with_two_processes_measures_their_links(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from autoshard.cluster import COLLECTIVE_KINDS, find

    path = tmp_path / "here.json"
    arguments = ["profile", str(path), "--processes", "2", "--name", "here"]
    found = run(arguments)
    assert found.returncode == 0, found.stderr
    assert "GFLOP/s" in found.stdout and f"wrote {path}" in found.stderr
    here = find(path)
    assert here.name == "here" and here.device.kind == "cpu"
    (tier,) = here.tiers
    assert set(tier.efficiency) == set(COLLECTIVE_KINDS)
    assert "measured: node all_reduce fits" in here.source
    assert main(["plan", "--model", config, "--world-size", "2", "--cluster", str(path)]) == 0
    assert "cpu" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "exists: give another path, or --force" in capsys.readouterr().err


# -- train ----------------------------------------------------------------------------------------


def run(arguments: list[str], kill_after: int = 0) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; ``kill_after`` a step, kill -9 of its rank 1."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "autoshard", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        out = ""
        while kill_after and (line := process.stdout.readline()):
            out += line
            if json.loads(line)["step"] == kill_after:
                os.kill(rank_of(process.pid, 1), signal.SIGKILL)
                break
        rest, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(command, process.returncode, out + rest, err)


def rank_of(parent: int, rank: int) -> int:
    """The process with this rank among the children of the one that started it."""
    for task in Path(f"/proc/{parent}/task").iterdir():
        for child in (task / "children").read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    raise AssertionError(f"no child of {parent} has rank {rank}")


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(Path(argparse.__file__).read_text())
    return path


def steps_of(found: subprocess.CompletedProcess[str]) -> dict[int, float]:
    assert found.returncode == 0, found.stderr
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    return {line["step"]: line["loss"] for line in lines}


LAST = 24
"""Steps: enough of them after the 4th for a kill to arrive in time on a busy machine."""


def test_train_goes_on_after_a_kill(config: str, book: Path, tmp_path: Path) -> None:
    """By a saved plan: all at once; and 2 steps, then the rest with a rank killed after the 4th."""
    planned, saved = str(tmp_path / "plan.json"), str(tmp_path / "run")
    common = ["--model", config, "--world-size", "2", "--cluster", "cpu"]
    assert main(["plan", *common, "--global-batch-size", "4", "--save", planned, "--json"]) == 0
    train = ["train", *common, "--text", str(book), "--learning-rate", "1e-2", "--json"]
    train += ["--plan", planned]
    trace = tmp_path / "trace.json"
    whole = steps_of(run([*train, "--steps", str(LAST), "--trace", str(trace)]))
    assert list(whole) == list(range(1, LAST + 1))
    assert whole[LAST] < whole[1]
    assert main(["trace", planned, "--measured", str(trace), "--out", f"{tmp_path}/step.svg"]) == 0

    first = steps_of(run([*train, "--steps", "2", "--save", saved, "--save-every", "1"]))
    assert first == {step: whole[step] for step in (1, 2)}
    more = ["--steps", str(LAST), "--save", saved, "--save-every", "1", "--max-restarts", "1"]
    killed = run([*train, *more], kill_after=4)
    assert "after step 2" in killed.stderr
    resumed = [int(step) for step in re.findall(r"after step (\d+)", killed.stderr)]
    assert len(resumed) == 2 and resumed[1] in range(3, LAST), killed.stderr
    assert steps_of(killed) == {step: whole[step] for step in range(3, LAST + 1)}


def test_train_hands_on_the_exit_code_of_its_processes(config: str, book: Path) -> None:
    """An error that only the processes can find is printed once, with its own exit code."""
    found = run(
        [
            "train",
            "--model",
            config,
            "--world-size",
            "2",
            "--text",
            str(book),
            "--pin",
            "memory_bytes=1000",
        ]
    )
    assert found.returncode == 5, found.stderr
    assert found.stderr.count("no plan for") == 1
    assert "Traceback" not in found.stderr


def test_train_outside_torchrun_needs_a_world_size(
    config: str, book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--model", config, "--text", str(book)]) == 2
    assert "--world-size expects the number of processes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--steps", "0"], "--steps expects a positive number but got 0"),
        (["--learning-rate", "-1"], "--learning-rate expects a positive number"),
        (["--save-every", "2"], "--save-every needs --save"),
        (["--trace", "none/trace.json"], "--trace expects a file in a folder that exists"),
        (["--plan", "plan.json", "--pin", "tp=1"], "--plan has every choice made"),
        (["--world-size", "0"], "integer of at least 1"),
    ],
)
def test_train_refuses_bad_values_before_starting_processes(
    config: str, book: Path, more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--model", config, "--text", str(book), "--world-size", "2", *more]
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_text_needs_a_language_model_with_room_for_bytes() -> None:
    from autoshard import models

    resnet: Callable[[], Any] = lambda: models.find("resnet50").model  # noqa: E731
    with pytest.raises(OptionError, match="takes pixel_values, labels"):
        text.example_of(resnet(), None)
    small = models.find("gpt2").model
    small.config.vocab_size = 255
    with pytest.raises(OptionError, match="at least 256 entries but has 255"):
        text.example_of(small, models.find("gpt2").example_inputs)
    with pytest.raises(OptionError, match="this one is on the meta device"):
        text.materialise(torch.nn.Linear(2, 2, device="meta"), 0)
