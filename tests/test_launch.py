"""What torchrun tells a process, and the errors where it does not."""

from __future__ import annotations

import sys

import pytest

from autoshard.errors import LaunchError
from autoshard.runtime import launch

TORCHRUN = {
    "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}  # fmt: skip


def test_outside_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1"])
    assert launch.environment() is None
    with pytest.raises(LaunchError, match=r"torchrun --nproc-per-node 4 train.py --lr 1"):
        launch.initialise(4)


def test_wrong_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match="expected 8 processes but got 4"):
        launch.initialise(8)


def test_environment() -> None:
    found = launch.environment(
        {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    )
    assert found == launch.Environment(
        rank=1, local_rank=1, world_size=4, address="localhost", port=29500, attempt=2,
        agent_store=True,
    )  # fmt: skip
    with pytest.raises(LaunchError, match="RANK"):
        launch.environment({**TORCHRUN, "RANK": "one"})


def test_torchrun_line_for_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    line = launch.torchrun_line(64, 8)
    assert "--nnodes 8 --nproc-per-node 8" in line and "--rdzv-endpoint" in line
