"""Every schedule on four processes: the numbers of the plain model, whatever stages hold."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import equivalence as harness
import pytest
import torch
import zoo
from equivalence import difference, plan_of, program_of, reference
from ranks import Pool
from transformers import GPT2Config, GPT2LMHeadModel
from zoo_models import SEQUENCE, VOCAB

from autoshard.emit import emit
from autoshard.errors import OptionError
from autoshard.ir import Program
from autoshard.options import Constraints
from autoshard.parallel import Parallel
from autoshard.plan import files
from autoshard.plan.plan import Plan
from autoshard.schedules import SCHEDULES

DTYPE = torch.float64
PIPELINES = [name for name, kind in SCHEDULES.items() if name != "none" and not kind.stale]


def deep_gpt2(dtype: torch.dtype) -> zoo.Built:
    """GPT-2 with eight layers, for eight stages; embedding and head are tied."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB, n_positions=SEQUENCE, n_embd=16, n_layer=8, n_head=2,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
            )
        )  # fmt: skip
        ids = torch.randint(0, VOCAB, (zoo.BATCH_SIZE, SEQUENCE))
        labels = torch.randint(0, VOCAB, (zoo.BATCH_SIZE, SEQUENCE))
    for row in range(zoo.BATCH_SIZE):
        labels[row, : row % 5] = -100  # micro-batches have different numbers of targets
    return model.to(dtype).train(), {"input_ids": ids, "labels": labels}, None


def pins_of(schedule: str, **pins: Any) -> dict[str, Any]:
    kind = SCHEDULES[schedule]
    chunks = {"virtual_stages": 2} if kind.least_virtual > 1 else {}
    return {"pp": 4, "micro_batch_size": 1, "schedule": schedule, **chunks, **pins}


@functools.cache
def program() -> Program:
    return program_of(deep_gpt2, DTYPE, True)


@functools.cache
def expected(steps: int) -> harness.Trained:
    return reference(deep_gpt2, DTYPE, lifted=True, steps=steps)


def trained(pool: Pool, plan: Plan, steps: int = 2) -> harness.Trained:
    arguments = (deep_gpt2, DTYPE, program(), harness.encoded(plan), steps)
    return pool.run(harness.distributed, *arguments)[0]


# -- every schedule -------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", PIPELINES)
def test_gpt2_on_four_processes(schedule: str, ranks: Pool) -> None:
    """Three optimizer steps; in V shape the tied embedding and head are on one rank."""
    plan = plan_of(program(), 4, pins_of(schedule))
    assert (plan.schedule, plan.num_micro_batches) == (schedule, zoo.BATCH_SIZE)
    assert len(plan.stages) == 4 * SCHEDULES[schedule].least_virtual
    found = difference(trained(ranks, plan, 3), expected(3))
    assert found.worst <= 1e-8, found


@pytest.mark.parametrize(
    ("schedule", "size"),
    [("interleaved-1f1b", 4), ("interleaved-zb", 8), ("zb-v", 4), ("dualpipe-v", 2)],
)
def test_fewer_micro_batches_than_the_phases_of_a_schedule(
    schedule: str, size: int, ranks: Pool
) -> None:
    """What there is none of is left out of the schedule."""
    plan = plan_of(program(), 4, pins_of(schedule, micro_batch_size=size))
    found = difference(trained(ranks, plan), expected(2))
    assert found.worst <= 1e-8, found


@pytest.mark.parametrize(
    "pins",
    [
        pins_of("zb-h1", stages=(2, 3, 3, 2)),
        pins_of("interleaved-1f1b", stages=(1, 2, 1, 1, 1, 1, 2, 1)),
        pins_of("zb-v", pp=2, dp=2, data_parallel="ddp"),
        pins_of("zb-v", pp=2, dp=2, data_parallel="zero1"),
        pins_of("interleaved-1f1b", pp=2, dp=2, virtual_stages=3, data_parallel="zero2"),
        pins_of("looped-bfs", pp=2, dp=2, data_parallel="zero3"),
        pins_of("dualpipe-v", pp=2, tp=2),
        pins_of("zb-h1", recompute="full"),
        pins_of("interleaved-1f1b", recompute="selective"),
    ],
    ids=lambda pins: "-".join(str(v) for v in pins.values()),
)
def test_uneven_stages_axes_and_recomputation(pins: dict[str, Any], ranks: Pool) -> None:
    plan = plan_of(program(), 4, pins)
    if "stages" in pins:
        sizes = [len(stage.segments) for stage in plan.stages]
        assert len(set(sizes)) > 1
    found = difference(trained(ranks, plan), expected(2))
    assert found.worst <= 1e-8, found


@pytest.mark.parametrize(
    ("model", "schedule", "pins"),
    [
        ("t5", "interleaved-1f1b", {}),
        ("t5", "zb-v", {}),
        ("llama", "zb-h1", {}),
        ("unet", "dualpipe-v", {"micro_batch_size": zoo.BATCH_SIZE}),
        ("resnet", "interleaved-zb", {"pp": 2, "dp": 2, "micro_batch_size": zoo.BATCH_SIZE // 2}),
    ],
)
def test_skips_masks_and_statistics_of_batches(
    model: str, schedule: str, pins: dict[str, Any], ranks: Pool
) -> None:
    """T5 and U-Net send tensors over many stages; batch norm allows one micro-batch only."""
    lifted = harness.casts(program_of(model, DTYPE))
    made = program_of(model, DTYPE, lifted)
    plan = plan_of(made, 4, pins_of(schedule, **pins))
    arguments = (model, DTYPE, made, harness.encoded(plan), 2)
    found = ranks.run(harness.distributed, *arguments)[0]
    apart = difference(found, reference(model, DTYPE, lifted=lifted, steps=2))
    assert apart.worst <= 1e-8, apart


# -- what a rank holds, evaluation, checkpoints ---------------------------------------------------


def made(plan_text: bytes, given: Program) -> tuple[Parallel, list[Any]]:
    model, batch, _ = deep_gpt2(DTYPE)
    parallel = Parallel(model, given, files.loads(plan_text), optimizer="adamw")
    return parallel, [parallel.local_batch(b) for b in harness.batches(batch, 4)]


def evaluations(plan_text: bytes, given: Program) -> tuple[list[float], list[str], int]:
    """Losses of two steps, each with an evaluation before; what this rank trains; its chunks."""
    parallel, batches = made(plan_text, given)
    losses = []
    for batch in batches[:2]:
        losses += [parallel.evaluate(batch), parallel.step(batch)]
    return losses, [slot.name for slot in parallel.engine.slots], len(parallel.engine.stages)


@pytest.mark.parametrize("schedule", ["interleaved-1f1b", "zb-v", "zb-h1"])
def test_evaluation_and_what_a_rank_holds(schedule: str, ranks: Pool) -> None:
    plan = plan_of(program(), 4, pins_of(schedule))
    results = ranks.run(evaluations, harness.encoded(plan), program())
    for losses, names, chunks in results:
        assert losses == results[0][0]
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
        assert losses[1::2] == pytest.approx(expected(2).losses, rel=1e-12)
        assert len(names) == len(set(names))
        assert chunks == plan.virtual_stages
    holders = [
        rank for rank, (_, names, _) in enumerate(results) if "transformer.wte.weight" in names
    ]
    assert holders == ([0] if schedule == "zb-v" else [0, 3])


def save(plan_text: bytes, given: Program, folder: Path) -> None:
    parallel, batches = made(plan_text, given)
    for batch in batches[:2]:
        parallel.step(batch)
    parallel.save(folder)


def load(plan_text: bytes, given: Program, folder: Path) -> list[float]:
    parallel, batches = made(plan_text, given)
    parallel.load(folder)
    return [parallel.step(batch) for batch in batches[2:]]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (pins_of("interleaved-1f1b"), pins_of("zb-v")),
        (pins_of("zb-v", pp=2, dp=2), {"dp": 4, "data_parallel": "zero3"}),
        ({"pp": 2, "tp": 2}, pins_of("dualpipe-v")),
    ],
    ids=["looped-to-folded", "folded-to-one-stage", "one-stage-to-folded"],
)
def test_checkpoints_of_several_stages_per_rank(
    before: dict[str, Any], after: dict[str, Any], ranks: Pool, tmp_path: Path
) -> None:
    plans = [plan_of(program(), 4, pins) for pins in (before, after)]
    ranks.run(save, harness.encoded(plans[0]), program(), tmp_path)
    losses = ranks.run(load, harness.encoded(plans[1]), program(), tmp_path)
    for found in losses:
        assert found == pytest.approx(expected(4).losses[2:], rel=1e-9)


# -- emission and refusals ------------------------------------------------------------------------


def test_chunks_of_equal_layers_share_a_file() -> None:
    plan = plan_of(program(), 4, pins_of("zb-v", stages=(2, 1, 1, 1, 1, 1, 1, 2)))
    made = emit(program(), plan)
    stages = made.manifest["stages"]
    assert [stage["rank"] for stage in stages] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert len({stage["file"] for stage in stages[1:-1]}) == 1
    assert len(made.files) == 3
    assert made.manifest["virtual_stages"] == 2
    assert "Stages 1, 2, 3, 4, 5, 6 of 8" in made.files[stages[1]["file"]]


@pytest.mark.parametrize("mode", ["zero2", "zero3"])
@pytest.mark.parametrize("schedule", ["zb-h1", "zb-v", "dualpipe-v"])
def test_modes_that_reduce_in_each_backward_are_refused(schedule: str, mode: str) -> None:
    with pytest.raises(OptionError, match=f"ddp or zero1 with a schedule that .* but got '{mode}'"):
        Constraints.of(pins_of(schedule, pp=2, dp=2, data_parallel=mode))
