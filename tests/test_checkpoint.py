"""Checkpoints: any plan writes, any other reads, one plain process too; never half a checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_model import batch, batch_values, plain
from ranks import Pool, RankError
from test_engine import SIZE, Case, make_engine, reference
from torch import Tensor

from autoshard.errors import CheckpointError
from autoshard.runtime import checkpoint, data
from autoshard.runtime.mesh import Mesh, using
from autoshard.runtime.parameters import declared, whole

ALIASES = {"head.weight": "embed.weight"}


def run(
    case: Case, steps: range, folder: Path, resume: bool, keep: int | None = None
) -> dict[str, Tensor]:
    """Train ``steps``, then save; whole parameters."""
    mesh = Mesh.create({"pp": case.pp, "dp": case.dp, "tp": case.tp})
    with using(mesh):
        engine = make_engine(case, mesh)
        if resume:
            with torch.no_grad():
                for slot in engine.slots:
                    slot.local.fill_(float("nan"))
            assert checkpoint.load(engine, folder) == steps.start
        for step in steps:
            engine.step(
                data.local_batch(
                    batch(SIZE, step), batch_values(SIZE), rank=mesh.rank("dp"),
                    size=mesh.size("dp"),
                )
            )  # fmt: skip
        checkpoint.save(engine, folder, aliases=ALIASES, keep=keep)
        return {n: whole(t, d).clone() for n, d, t in declared(engine.module)}


WRITERS = [
    Case(pp=2, dp=2, mode="zero1", micro=2, schedule="1f1b"),
    Case(dp=2, tp=2, mode="zero3"),
    Case(pp=2, tp=2, micro=2, schedule="gpipe", optimizer="sgd-momentum"),
]
READERS = [
    Case(dp=4, mode="zero2", micro=2),
    Case(tp=4),
    Case(pp=4, micro=4, schedule="1f1b"),
    Case(dp=3 - 1, mode="ddp"),
]


@pytest.mark.parametrize("writer", WRITERS, ids=lambda c: f"pp{c.pp}dp{c.dp}tp{c.tp}{c.mode}")
def test_any_plan_reads_what_another_wrote(writer: Case, ranks: Pool, tmp_path: Path) -> None:
    ranks.run(run, writer, range(2), tmp_path, False, world=writer.world)
    expected = reference(replace(writer, steps=2)).parameters
    for name, tensor in checkpoint.load_plain(tmp_path).items():
        if name != "head.weight":
            assert (tensor - expected[name]).abs().max() < 1e-10, name
    expected = reference(replace(writer, steps=3)).parameters
    for index, reader in enumerate(READERS):
        folder = tmp_path / f"reader{index}"
        shutil.copytree(tmp_path / "step-00000002", folder / "step-00000002")
        reader = replace(reader, optimizer=writer.optimizer)
        for found in ranks.run(run, reader, range(2, 3), folder, True, world=reader.world):
            for name, tensor in found.items():
                assert (tensor - expected[name]).abs().max() < 1e-10, (reader, name)


def test_same_plan_goes_on_bit_for_bit(ranks: Pool, tmp_path: Path) -> None:
    case = Case(pp=2, dp=2, mode="zero1", micro=2, schedule="1f1b")
    whole_run = ranks.run(run, case, range(4), tmp_path / "a", False)
    ranks.run(run, case, range(2), tmp_path / "b", False)
    resumed = ranks.run(run, case, range(2, 4), tmp_path / "b", True)
    for mine, other in zip(whole_run, resumed, strict=True):
        for name, tensor in mine.items():
            assert torch.equal(tensor, other[name]), name


def test_one_plain_process(ranks: Pool, tmp_path: Path) -> None:
    """``load_plain`` gives what the user's own model takes, and the optimizer's state."""
    case = Case(dp=2, tp=2, mode="zero1", steps=2)
    ranks.run(run, case, range(2), tmp_path, False)
    model = plain()
    state = checkpoint.load_plain(tmp_path)
    model.load_state_dict(state, strict=True)
    assert state["head.weight"] is state["embed.weight"]
    expected = reference(case).parameters
    for name, parameter in model.named_parameters():
        assert (parameter - expected[name]).abs().max() < 1e-10
    moments = checkpoint.load_plain_optimizer(tmp_path)
    assert set(moments) == set(expected)
    assert moments["embed.weight"]["exp_avg"].shape == expected["embed.weight"].shape
    assert float(moments["embed.weight"]["step"]) == 2


def train_alone(folder: Path, steps: int, keep: int | None = None) -> None:
    mesh = Mesh({"pp": 1, "dp": 1, "tp": 1})
    with using(mesh):
        engine = make_engine(Case(), mesh)
        for step in range(steps):
            engine.step(batch(SIZE, step))
            checkpoint.save(engine, folder, aliases=ALIASES, keep=keep)


def load_alone(folder: Path) -> int:
    mesh = Mesh({"pp": 1, "dp": 1, "tp": 1})
    with using(mesh):
        return checkpoint.load(make_engine(Case(), mesh), folder)


def test_interrupted_save_leaves_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_alone(tmp_path, 2)
    last = checkpoint.find(tmp_path)

    # The disk fills up while the tensors are written.
    def fail(*args: object, **kwargs: object) -> None:
        (tmp_path / ".unfinished-step-00000001" / "__0_0.distcp").write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_state", fail)
        with pytest.raises(CheckpointError, match="no space left"):
            train_alone(tmp_path, 1)
    assert checkpoint.find(tmp_path) == last
    # The process dies between the rename and the pointer.
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", fail)
        with pytest.raises(CheckpointError):
            train_alone(tmp_path, 1)
    assert checkpoint.find(tmp_path) == last
    assert load_alone(tmp_path) == 2
    # A later run can save over what was left behind.
    train_alone(tmp_path, 3)
    assert load_alone(tmp_path) == 3


def test_folder_without_pointer_or_with_incomplete_checkpoints(tmp_path: Path) -> None:
    train_alone(tmp_path, 2)
    (tmp_path / "latest").unlink()
    assert load_alone(tmp_path) == 2
    (tmp_path / "step-00000002" / ".metadata").unlink()
    assert load_alone(tmp_path) == 1
    assert checkpoint.latest_step(tmp_path) == 1


def test_keeps_the_newest(tmp_path: Path) -> None:
    train_alone(tmp_path, 4, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000003", "step-00000004"]


def test_bad_checkpoints(tmp_path: Path) -> None:
    assert checkpoint.latest_step(tmp_path) is None
    with pytest.raises(CheckpointError, match="found no complete one"):
        load_alone(tmp_path)
    train_alone(tmp_path, 1)
    place = checkpoint.find(tmp_path)
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(CheckpointError, match="version 1"):
        load_alone(tmp_path)
    (place / "manifest.json").write_text(json.dumps(manifest))
    (place / ".metadata").write_bytes(b"\0")
    with pytest.raises(CheckpointError, match="index"):
        load_alone(tmp_path)


def test_checkpoint_of_another_optimizer(tmp_path: Path) -> None:
    train_alone(tmp_path, 1)
    mesh = Mesh({"pp": 1, "dp": 1, "tp": 1})
    with using(mesh), pytest.raises(CheckpointError, match=r"optimizer SGD in .* but got AdamW"):
        checkpoint.load(make_engine(Case(optimizer="sgd"), mesh), tmp_path)


def load_into_other(folder: Path) -> None:
    import engine_model

    engine_model.BLOCKS = 8
    try:
        mesh = Mesh.create({"pp": 1, "dp": 4, "tp": 1})
        with using(mesh):
            checkpoint.load(make_engine(Case(dp=4), mesh), folder)
    finally:
        engine_model.BLOCKS = 4


def test_checkpoint_of_another_model(ranks: Pool, tmp_path: Path) -> None:
    train_alone(tmp_path, 1)
    with pytest.raises(RankError, match=r"expected 'blocks.4.scale' in the checkpoint"):
        ranks.run(load_into_other, tmp_path)
