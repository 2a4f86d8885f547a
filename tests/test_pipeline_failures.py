"""What cannot be run, and ranks that fail in the middle of a schedule: an error on every rank."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from typing import Any

import equivalence as harness
import pytest
import torch
import torch.distributed as dist
from equivalence import plan_of
from ranks import Pool
from test_pipeline_schedules import DTYPE, deep_gpt2, made, pins_of, program
from torch import Tensor, nn

from autoshard.capture import capture
from autoshard.errors import OptionError
from autoshard.ir import Program
from autoshard.runtime.engine import Engine, EngineConfig
from autoshard.runtime.local_stages import LocalStage
from autoshard.runtime.mesh import Mesh
from autoshard.schedule import Schedule

TIMEOUT_S = 2.0


def step(plan_text: bytes, given: Program, trouble: str) -> tuple[str, float]:
    """What a step ends with, and after how long, if rank 1 stops in micro-batch 3.

    Others may wait for it then, or find it ``gone`` when they want to send.
    """
    parallel, batches = made(plan_text, given)
    mesh = parallel.plan.mesh
    parallel.__dict__["mesh"] = Mesh.create(
        {"pp": mesh.pp, "dp": mesh.dp, "tp": mesh.tp}, timeout=timedelta(seconds=TIMEOUT_S)
    )
    parallel.step(batches[0])
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls != 4:
            return
        if dist.get_rank() != 1:
            time.sleep(TIMEOUT_S / 4)
        elif trouble == "hangs":
            time.sleep(2 * TIMEOUT_S)
        elif trouble == "fails":
            raise ValueError("no more of this")
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == 1 or trouble == "gone":
        parallel.engine.stages[0].module.register_forward_pre_hook(fail)
    start = time.monotonic()
    try:
        parallel.step(batches[1])
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "", time.monotonic() - start


@pytest.mark.parametrize(
    ("schedule", "trouble"),
    [
        ("1f1b", "fails"),
        ("zb-v", "fails"),
        ("zb-v", "hangs"),
        ("1f1b", "killed"),
        ("1f1b", "gone"),
        ("zb-v", "gone"),
    ],
)
def test_a_rank_that_stops_in_the_middle(schedule: str, trouble: str, ranks: Pool) -> None:
    plan = harness.encoded(plan_of(program(), 4, pins_of(schedule)))
    lost = 1 if trouble in ("killed", "gone") else None
    results = ranks.run(step, plan, program(), trouble, killed=lost)
    for rank, (error, seconds) in enumerate(results):
        assert seconds < 4 * TIMEOUT_S, results
        if rank == 1 and trouble == "fails":
            assert error == "ValueError: no more of this"
        else:
            assert error.startswith("TransferError: stage"), error
    waited = [error for error, _ in results if "on pipeline rank 1 (" in error]
    assert any("in vain for" in error for error in waited)


def shorter(plan_text: bytes, given: Program) -> str:
    """A second step with shorter sequences: gloo would take a short message for a long one."""
    parallel, batches = made(plan_text, given)
    parallel.step(batches[0])
    with pytest.raises(OptionError) as caught:
        parallel.step({name: tensor[:, :-2] for name, tensor in batches[1].items()})
    return str(caught.value)


def test_another_sequence_length_is_refused_before_anything_is_sent(ranks: Pool) -> None:
    plan = harness.encoded(plan_of(program(), 4, pins_of("interleaved-1f1b")))
    for text in ranks.run(shorter, plan, program()):
        assert "expected" in text and "shape" in text


# -- plans ----------------------------------------------------------------------------------------


def refused(pins: dict[str, Any], words: str, given: Program | None = None) -> None:
    with pytest.raises(OptionError, match=words):
        plan_of(given or program(), 4, pins)


def test_stages_that_cannot_be() -> None:
    refused(
        pins_of("zb-v", stages=(0, 2, 1, 1, 1, 1, 2, 2)), "a number of segments per stage such as"
    )
    refused(pins_of("interleaved-1f1b", virtual_stages=5), "virtual_stages may be at most 10")
    refused(pins_of("1f1b", micro_batch_size=3), "micro_batch_size must divide the samples")
    refused({"pp": 2, "dp": 2, "schedule": "none"}, "schedule 'none' means one stage, but pp is 2")


class Idle(nn.Module):
    """Its second part has no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Softsign(), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def test_a_stage_without_parameters() -> None:
    """What has no parameters joins a part that has, so three stages are too many."""
    given = capture(Idle(), example_inputs={"x": torch.randn(8, 4)}, model_name="idle")
    with pytest.raises(OptionError, match=r"pp may be at most 2 .parts with parameters"):
        plan_of(given, 3, {"pp": 3})


# -- the engine -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("0F0 0B0\n1F0 1B0", "2 ranks and 2 micro-batches but got one of 2 and 1"),
        ("0F0 0F1 0B0 0B1", "2 ranks and 2 micro-batches but got one of 1 and 2"),
        (
            "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1\n1F0 1F1 1B0 1B1",
            r"has the stages \[0\] but got one that gives it \[0, 2\]",
        ),
    ],
)
def test_a_schedule_for_others(schedule: str, words: str) -> None:
    mesh = Mesh({"pp": 2, "dp": 1, "tp": 1})
    config = EngineConfig(batch=(), num_micro_batches=2, schedule=Schedule.parse(schedule))
    with pytest.raises(OptionError, match=words):
        Engine([LocalStage(index=0, module=nn.Linear(1, 1))], mesh=mesh, config=config)


def test_deep_gpt2_is_the_same_on_every_call() -> None:
    one, other = (deep_gpt2(DTYPE)[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
