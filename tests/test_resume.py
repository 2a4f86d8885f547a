"""A user's script under ``torchrun``: killed in mid-training, it ends as if it had not been."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from ranks import Pool

from autoshard.runtime import checkpoint

HERE = Path(__file__).parent


def torchrun(folder: Path, how: str, restarts: int) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4",
        "--max-restarts", str(restarts), "--monitor-interval", "0.2",
        str(HERE / "resume_program.py"), str(folder), how,
    ]  # fmt: skip
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


def losses(output: str) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for step, loss in re.findall(r"^step (\d+): loss (\S+)$", output, re.MULTILINE):
        found.setdefault(int(step), []).append(loss)
    return found


def uninterrupted(folder: Path) -> None:
    import resume_program

    resume_program.main(str(folder), "")


def test_killed_and_resumed_bit_for_bit(tmp_path: Path, ranks: Pool) -> None:
    """Rank 3 is killed after step 3, of which only two are saved. Dropout is on."""
    killed = torchrun(tmp_path / "killed", "kill", 1)
    assert killed.returncode == 0, killed.stderr[-4000:]
    assert killed.stdout.count("resumed at step 2") == 1
    seen = losses(killed.stdout)
    assert sorted(seen) == [1, 2, 3, 4, 5, 6]
    assert len(seen[3]) == 2 and len(set(seen[3])) == 1  # taken twice, with one result

    ranks.run(uninterrupted, tmp_path / "whole")
    names = {p.name for p in (tmp_path / "killed").iterdir()}
    assert names == {"latest", "step-00000004", "step-00000006"}
    mine, other = (checkpoint.load_plain(tmp_path / run) for run in ("killed", "whole"))
    assert mine.keys() == other.keys() and mine
    for name, tensor in mine.items():
        assert torch.equal(tensor, other[name]), name
    moments = [checkpoint.load_plain_optimizer(tmp_path / run) for run in ("killed", "whole")]
    for name, state in moments[0].items():
        for what, tensor in state.items():
            assert torch.equal(tensor, moments[1][name][what]), (name, what)


def test_one_rank_that_fails_ends_the_run(tmp_path: Path) -> None:
    start = time.monotonic()
    failed = torchrun(tmp_path, "raise", 0)
    assert failed.returncode != 0
    assert time.monotonic() - start < 120  # the start included; collectives wait for minutes
    assert "rank 3 of 4 failed first" in failed.stderr
    assert failed.stderr.count("ValueError: this sample is broken") >= 4  # every rank shows it
    assert sorted(losses(failed.stdout)) == [1, 2, 3]
    assert checkpoint.latest_step(tmp_path) == 2
