"""Plan files: they come back as they were, and what is damaged is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from small_plan import small_plan

from autoshard.errors import PlanFileError
from autoshard.plan import files
from autoshard.plan.plan import PLAN_VERSION, Mesh, Plan


def test_a_saved_plan_comes_back_equal(tmp_path: Path) -> None:
    plan = small_plan()
    path = plan.save(tmp_path / "plan.json")
    assert path == tmp_path / "plan.json"
    assert Plan.load(path) == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]  # nothing partial is left


def test_a_plan_file_is_valid_under_its_schema() -> None:
    document = json.loads(msgspec.json.encode(small_plan()))
    jsonschema.validate(document, files.schema())
    del document["mesh"]["pp"]
    document["stages"] = "none"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, files.schema())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match=r"expected a plan file at .*none\.json"):
        Plan.load(tmp_path / "none.json")


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match="expected to write a plan file at"):
        small_plan().save(tmp_path / "none" / "plan.json")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_says_so(tmp_path: Path, share: float) -> None:
    path = small_plan().save(tmp_path / "plan.json")
    data = path.read_bytes().rstrip()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(PlanFileError, match="may be truncated; save the plan again"):
        Plan.load(path)


def edited(**changes: Any) -> bytes:
    document = json.loads(msgspec.json.encode(small_plan()))
    return json.dumps(document | changes).encode()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[1, 2]", "no plan file: it has no entry 'version'"),
        (b"{}", "no plan file: it has no entry 'version'"),
        (edited(version=PLAN_VERSION + 1), f"version {PLAN_VERSION + 1} but .* {PLAN_VERSION}"),
        (edited(mesh={"pp": "two"}), r"Expected `int`, got `str` - at `\$\.mesh\.pp`"),
        (edited(world_size=6), "mesh pp=2 dp=2 tp=2 holds 8 ranks but world_size is 6"),
        (edited(mesh={"pp": 1, "dp": 4, "tp": 2}), "it has 2 stages but pp is 1"),
        (edited(micro_batch_size=3), "dp=2 x micro_batch_size=3 does not divide"),
        (edited(micro_batch_size=0), "does not divide global_batch_size"),
        (edited(layers={}), "segment of layer 'shared', which is not under 'layers'"),
    ],
)
def test_a_wrong_file_is_refused(text: bytes, words: str) -> None:
    with pytest.raises(PlanFileError, match=words):
        files.loads(text, "plan.json")


def test_equal_plans_do_not_differ() -> None:
    plan = small_plan()
    found_otherwise = replace(plan, solver=replace(plan.solver, gap=0.5, candidates=()))
    assert plan.diff(plan) == ""
    assert plan.diff(found_otherwise) == ""


def test_diff_names_what_differs() -> None:
    plan = small_plan()
    block = plan.layers["Block"]["tp"]
    other = replace(
        plan,
        mesh=Mesh(pp=2, dp=4, tp=1),
        layers={
            **plan.layers,
            "Block": {"tp": replace(block, ops=dict.fromkeys(block.ops, "R -> R"))},
        },
        stages=(plan.stages[0], replace(plan.stages[1], segments=plan.stages[0].segments)),
    )
    lines = plan.diff(other).splitlines()
    assert "mesh.dp: 2 => 4" in lines
    assert "mesh.tp: 2 => 1" in lines
    assert f"layers.Block.tp.ops: {len(block.ops)} ops differ" in lines
    assert "stages[1].segments: 2 x Block; head => embeddings; 2 x Block, recompute full" in lines
    assert not any(line.startswith("world_size") for line in lines)
