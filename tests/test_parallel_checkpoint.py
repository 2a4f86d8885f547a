"""``save`` and ``load`` of ``Parallel``: any plan, any world size, one plain process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parallel_runs as runs
import pytest
import torch
import torch.distributed as dist
from parallel_runs import Setup, State
from ranks import Pool
from torch.distributed.checkpoint import FileSystemWriter
from torch.optim.lr_scheduler import LambdaLR

from autoshard.emit import emit
from autoshard.errors import CheckpointError
from autoshard.parallel import Parallel
from autoshard.runtime import checkpoint


def decay(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.7**step)


def save_and_go_on(given: Setup, folder: Path) -> tuple[list[float], State, State]:
    """Two steps, a checkpoint, two more: the state at the checkpoint and at the end."""
    made = runs.parallel(given)
    made.set_scheduler(decay)
    runs.train(made, given, range(2))
    saved = made.full_state_dict()
    assert made.save(folder).parent == folder
    losses = runs.train(made, given, range(2, 4))
    return losses, saved, made.full_state_dict()


def load_and_go_on(
    given: Setup, folder: Path, steps: range, again: Path | None, late: bool
) -> tuple[list[float], State, State]:
    """A model without any state loads a checkpoint and trains on; ``late``: the scheduler comes
    after the load."""
    made = runs.parallel(given, blank=True)
    if not late:
        made.set_scheduler(decay)
    made.load(folder)
    if late:
        made.set_scheduler(decay)
    assert made.steps_done == steps.start
    assert made.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.7**steps.start)
    loaded = made.full_state_dict()
    losses = runs.train(made, given, steps)
    assert made.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.7**steps.stop)
    if again is not None:
        made.save(again)
    return losses, loaded, made.full_state_dict()


WRITER = {"pp": 2, "tp": 2}
ZERO3, ZERO2 = {"dp": 4, "data_parallel": "zero3"}, {"dp": 2, "data_parallel": "zero2"}
CHAINS: dict[str, list[dict[str, Any]]] = {
    "gpt2": [ZERO3, {"tp": 4}, {"pp": 4}, ZERO2, {}],
    "odd": [{"tp": 4}, {"dp": 2, "tp": 2, "data_parallel": "zero3"}],
    "vgg_bn": [ZERO3, {"pp": 2, "dp": 2}, {"tp": 2}],
    "llama": [{"tp": 4}, ZERO3],
}
TOLERANCE = {"gpt2": 1e-9, "odd": 1e-9, "vgg_bn": 1e-8, "llama": 2e-5}
"""Llama casts to float32 inside; AdamW amplifies what rounding leaves of gradients near zero."""
FUSED = {"*c_attn.weight": "S(1;32,32,32)", "*c_attn.bias": "S(0;32,32,32)"}
"""Each rank holds its part of queries, of keys and of values."""


def planned(name: str, pins: dict[str, Any]) -> Setup:
    if name != "gpt2" or pins.get("tp", 1) == 1:
        return runs.setup(name, **pins)
    given = runs.setup(name, **pins, sharding=FUSED)
    entries = emit(given.program, given.plan).manifest["stages"][-1]["parameters"]
    blocks = {e["name"]: e["split"] and e["split"]["blocks"] for e in entries}
    assert blocks["transformer.h.3.attn.c_attn.weight"] == [32, 32, 32]
    return given


@pytest.mark.parametrize("name", CHAINS)
def test_any_plan_goes_on_from_any_other(name: str, ranks: Pool, tmp_path: Path) -> None:
    """A chain: each plan loads what the one before has saved, takes a step, and saves."""
    writer = planned(name, WRITER)
    last, saved, state = ranks.run(save_and_go_on, writer, tmp_path / "0")[0]

    resumed = ranks.run(load_and_go_on, writer, tmp_path / "0", range(2, 4), None, True)[0]
    assert resumed[0] == last
    runs.assert_equal(resumed[1], saved)
    runs.assert_equal(resumed[2], state)

    expected = runs.plain(name, 2 + len(CHAINS[name]), scheduler=decay)
    for index, pins in enumerate(CHAINS[name]):
        given = planned(name, pins)
        step = range(2 + index, 3 + index)
        folder, again = tmp_path / str(index), tmp_path / str(index + 1)
        results = ranks.run(
            load_and_go_on, given, folder, step, again, index % 2 == 1, world=given.world
        )
        (loss,), loaded, trained = results[0]
        runs.assert_equal(loaded, saved)
        assert all(other[0] == [loss] and other[1:] == ({}, {}) for other in results[1:])
        # Hugging Face computes losses in float32.
        assert loss == pytest.approx(expected.losses[step.start], rel=1e-6)
        saved = trained

        model, _, _ = runs.build(name)
        model.load_state_dict(checkpoint.load_plain(again), strict=True)
        runs.assert_equal(model.state_dict(), trained)
    runs.assert_close(saved, expected.state, TOLERANCE[name])


# -- what can go wrong ----------------------------------------------------------------------------


def interrupted(given: Setup, folder: Path) -> tuple[str, int, list[str]]:
    """The disk of one rank fills up in the second save."""
    made = runs.parallel(given)
    runs.train(made, given, range(1))
    made.save(folder)
    runs.train(made, given, range(1, 2))
    whole = FileSystemWriter.write_data
    if dist.get_rank() == 2:
        FileSystemWriter.write_data = _full_disk
    try:
        made.save(folder)
        error = "saved"
    except CheckpointError as caught:
        error = str(caught)
    finally:
        FileSystemWriter.write_data = whole
    fresh = runs.parallel(given, blank=True)
    fresh.load(folder)
    made.save(folder, keep=1)  # room again; a later save is not in the way of what was left behind
    dist.barrier()
    return error, fresh.steps_done, sorted(p.name for p in folder.iterdir())


def _full_disk(*_: object) -> None:
    raise OSError("no space left on device")


def test_interrupted_save_never_hides_the_last_good_one(ranks: Pool, tmp_path: Path) -> None:
    for error, step, names in ranks.run(interrupted, runs.setup("mlp", pp=2, dp=2), tmp_path):
        assert "no space left on device" in error and str(tmp_path) in error
        assert step == 1
        assert names == ["latest", "step-00000002"]


def failures(given: Setup, shallow: Setup, folder: Path) -> dict[str, str]:
    made = runs.parallel(given)
    found: dict[str, str] = {}

    def note(case: str, parallel: Parallel, place: Path, **options: Any) -> None:
        try:
            found[case] = f"loaded: {parallel.load(place, **options)}"
        except CheckpointError as error:
            found[case] = str(error)

    note("missing", made, folder / "nowhere")
    note("missing, but may be", made, folder / "nowhere", missing_ok=True)
    runs.train(made, given, range(1))
    made.save(folder / "good")
    small = Parallel(shallow_mlp(), shallow.program, shallow.plan, optimizer="adamw")
    small.save(folder / "small")
    note("another model", runs.parallel(given), folder / "small", missing_ok=True)
    note("a deeper model", small, folder / "good")
    note("another optimizer", runs.parallel(given, optimizer="sgd"), folder / "good")
    note("good", runs.parallel(given), folder / "good", missing_ok=True)
    return found


def shallow_mlp() -> torch.nn.Module:
    model, _, _ = runs.build("mlp")
    model.blocks = model.blocks[:2]
    return model


def shallow_setup() -> Setup:
    from equivalence import FAST_LINKS, encoded

    from autoshard.capture import capture
    from autoshard.options import Constraints
    from autoshard.plan.search import find_plan

    _, batch, loss_fn = runs.build("mlp")
    program = capture(shallow_mlp(), example_inputs=batch, loss_fn=loss_fn)
    pins = Constraints.of({"pp": 2, "dp": 2})
    plan = find_plan(program, cluster=FAST_LINKS, world_size=4, constraints=pins)
    return Setup("mlp", torch.float64, program, encoded(plan))


def test_bad_checkpoints_say_what_is_wrong(ranks: Pool, tmp_path: Path) -> None:
    given = runs.setup("mlp", pp=2, dp=2)
    results = ranks.run(failures, given, shallow_setup(), tmp_path)
    assert all(other == results[0] for other in results[1:])  # all ranks know, none waits
    found = results[0]
    assert "found no complete one" in found["missing"] and "nowhere" in found["missing"]
    assert "expected 'blocks.2." in found["another model"]
    assert "another tensor 'blocks.2." in found["a deeper model"]
    assert "optimizer SGD" in found["another optimizer"] and "AdamW" in found["another optimizer"]
    assert found["missing, but may be"] == "loaded: False" and found["good"] == "loaded: True"
