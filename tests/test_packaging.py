"""What gets installed: packages, the two links, the version, and what importing costs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import autoshard
import autoshard.cost_models
import autoshard.passes

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed() -> None:
    """Setuptools installs what is listed and nothing else."""
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("autoshard", "autoshard/passes", "autoshard/cost_models")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert listed == folders


def test_version_is_that_of_the_project() -> None:
    assert autoshard.__version__ == PROJECT["project"]["version"]


@pytest.mark.parametrize("name", ["passes", "cost_models"])
def test_top_level_folders_are_linked_into_the_package(name: str) -> None:
    link = ROOT / "autoshard" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert (ROOT / name / "__init__.py").is_file()


def test_public_names_resolve() -> None:
    for name in autoshard.__all__:
        assert getattr(autoshard, name) is not None
    assert set(autoshard.__all__) <= set(dir(autoshard))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = autoshard.nothing


@pytest.mark.parametrize(
    "statement",
    ["import autoshard", "from autoshard.commands import build_parser; build_parser()"],
)
def test_importing_does_not_import_torch(statement: str) -> None:
    """Help and the bare package must not cost the seconds that torch takes."""
    code = f"import sys; {statement}; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_wheel_holds_the_package_and_no_generic_names(tmp_path: Path) -> None:
    """``passes`` and ``cost_models`` must not become top-level names in site-packages."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("autoshard", "passes", "cost_models"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    build = (
        "from setuptools import build_meta; import sys; print(build_meta.build_wheel(sys.argv[1]))"
    )
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        check=True, cwd=source, timeout=120, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"autoshard", f"autoshard-{autoshard.__version__}.dist-info"}
    packaged = {
        f"autoshard/{folder}/{path.name}"
        for folder in ("passes", "cost_models")
        for path in (ROOT / folder).iterdir()
        if path.suffix in {".py", ".json"}
    }
    assert packaged <= set(names)
    assert "autoshard/py.typed" in names
