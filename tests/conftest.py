"""Fixtures of all tests: fixed seeds, one thread, a pool of ranks, golden files."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Pool
from xdist.scheduler import LoadScopeScheduling

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write golden files instead of comparing"
    )


class OneWorkerPerFile(LoadScopeScheduling):
    """A worker runs whole files, and one runs all files of rules: a last test counts proofs."""

    def _split_scope(self, nodeid: str) -> str:
        name = Path(nodeid.split("::", 1)[0]).stem
        return "rules" if name.startswith("test_rules_") else name


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return OneWorkerPerFile(config, log)


@pytest.fixture(autouse=True)
def _reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Four gloo processes, started at the first use and kept until the session ends."""
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)`` compares ``text`` with the file ``tests/golden/<name>``."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        hint = "run pytest with --update-golden and review the change"
        if not path.exists():
            pytest.fail(f"{path} does not exist; {hint}")
        if path.read_text() != text:
            lines = (path.read_text().splitlines(), text.splitlines())
            diff = "\n".join(difflib.unified_diff(*lines, "golden", "now", lineterm=""))
            pytest.fail(f"{path} differs; {hint}\n{diff}")

    return check
