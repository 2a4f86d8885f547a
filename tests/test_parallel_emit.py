"""What ``Parallel`` does anywhere: emission to a folder, and clear errors where it cannot run."""

from __future__ import annotations

import compileall
import subprocess
import sys
from pathlib import Path
from typing import Any

import parallel_runs as runs
import pytest
import torch
import zoo
from equivalence import FAST_LINKS
from parallel_runs import Setup
from ranks import Pool

import autoshard
from autoshard.emit import Emitted
from autoshard.errors import LaunchError, OptionError
from autoshard.parallel import Parallel

HERE = Path(__file__).parent
PLANS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"pp": 2, "tp": 2}),
    ("llama", {"tp": 4}),
    ("t5", {"pp": 2, "dp": 2, "micro_batch_size": 2, "recompute": "full"}),
    ("resnet", {"dp": 2, "tp": 2}),
    ("dropping-gpt2", {"dp": 2, "tp": 2}),
]


@pytest.mark.parametrize(("name", "pins"), PLANS, ids=lambda v: v if isinstance(v, str) else "")
def test_emitted_source_compiles_and_is_clean(
    name: str, pins: dict[str, Any], tmp_path: Path
) -> None:
    given = runs.setup(name, **pins)
    written = runs.parallel(given).emit(tmp_path / "out")
    assert all(path.is_file() for path in written)
    assert {p.name for p in written} == {p.name for p in (tmp_path / "out").iterdir()}
    assert compileall.compile_dir(tmp_path / "out", quiet=1)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length", "100",
               "--select", "E,F,I,B,UP,SIM", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def step_from_folder(given: Setup, folder: Path) -> tuple[list[float], list[float]]:
    """Train what was written, in place of what would be emitted."""
    made, read = runs.parallel(given), runs.parallel(given)
    read.emitted = Emitted.read(folder)
    return runs.train(made, given, range(2)), runs.train(read, given, range(2))


def test_what_was_written_runs(ranks: Pool, tmp_path: Path) -> None:
    given = runs.setup("gpt2", pp=2, tp=2)
    made = runs.parallel(given)
    made.emit(tmp_path)
    for emitted, read in ranks.run(step_from_folder, given, tmp_path):
        assert emitted == read
    # An edit takes effect: the folder is what runs, not what the plan would emit.
    for path in tmp_path.glob("stage_*.py"):
        path.write_text(path.read_text().replace("return loss", "return loss * 2", 1))
    for emitted, read in ranks.run(step_from_folder, given, tmp_path):
        assert read[0] == pytest.approx(2 * emitted[0])


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    made = runs.parallel(runs.setup("mlp", pp=2, dp=2))
    stages = made.emit(tmp_path)[0]
    stages.write_text("# mine now\n")
    with pytest.raises(OptionError, match="pass force=True"):
        made.emit(tmp_path)
    assert stages.read_text() == "# mine now\n"
    made.emit(tmp_path, force=True)
    assert stages.read_text() == made.emitted.files[stages.name]


# -- not under torchrun ---------------------------------------------------------------------------


def compiled() -> Parallel:
    model, batch, loss_fn = zoo.build("mlp")
    return autoshard.compile(
        model, world_size=4, example_inputs=batch, loss_fn=loss_fn, cluster=FAST_LINKS,
        constraints={"dp": 2, "tp": 2},
    )  # fmt: skip


def check_all_but_running(made: Parallel, folder: Path) -> None:
    assert "dp=2 tp=2" in repr(made) and "predicted" in repr(made)
    assert str(made.plan) and made.plan._repr_html_()
    assert made.emit(folder)
    made.plan.save(folder / "plan.json")
    assert autoshard.Plan.load(folder / "plan.json") == made.plan


def running(made: Parallel, folder: Path) -> dict[str, Any]:
    _, batch, _ = zoo.build("mlp")
    return {
        "step": lambda: made.step(batch),
        "evaluate": lambda: made.evaluate(batch),
        "local_batch": lambda: made.local_batch(batch),
        "sampler": lambda: made.sampler(range(100)),
        "optimizer": lambda: made.optimizer,
        "module": lambda: made.module,
        "full_state_dict": made.full_state_dict,
        "full_grads": made.full_grads,
        "save": lambda: made.save(folder / "saved"),
        "load": lambda: made.load(folder / "saved", missing_ok=True),
    }


TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def test_outside_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "--epochs", "3"])
    made = compiled()
    assert made.is_main
    check_all_but_running(made, tmp_path)
    line = r"torchrun --nproc-per-node 4 train\.py --epochs 3"
    for name, call in running(made, tmp_path).items():
        with pytest.raises(LaunchError, match=line):
            call()
            pytest.fail(name)
    assert not torch.distributed.is_initialized()


def test_with_another_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(TORCHRUN, ("1", "1", "2", "localhost", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    made = compiled()
    assert not made.is_main  # rank 1 of 2
    check_all_but_running(made, tmp_path)
    message = r"expected 4 processes but got 2; start it with:\n  torchrun --nproc-per-node 4 train"
    for name, call in running(made, tmp_path).items():
        with pytest.raises(LaunchError, match=message):
            call()
            pytest.fail(name)
    assert not torch.distributed.is_initialized()
