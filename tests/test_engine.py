"""The engine on four processes against the plain model on one: losses, gradients, parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from engine_model import batch, batch_values, boundary, plain, stage
from ranks import Pool
from torch import Tensor

from autoshard.runtime import data
from autoshard.runtime.engine import Engine, EngineConfig
from autoshard.runtime.mesh import Mesh, using
from autoshard.runtime.parameters import declared, whole

SIZE = 8


@dataclass(frozen=True)
class Case:
    pp: int = 1
    dp: int = 1
    tp: int = 1
    micro: int = 1
    mode: str = "ddp"
    schedule: str = "none"
    max_norm: float | None = None
    optimizer: str = "adamw"
    steps: int = 3
    dtype: torch.dtype = torch.float64
    remat: bool = False

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.tp


@dataclass
class Result:
    losses: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    norm: float = 0.0


def make_engine(case: Case, mesh: Mesh) -> Engine:
    edge = (boundary(mesh, SIZE, case.micro, case.dtype),)
    config = EngineConfig(
        batch=batch_values(SIZE),
        num_micro_batches=case.micro,
        schedule=case.schedule,
        data_parallel=case.mode,
        inputs=edge if mesh.rank("pp") else (),
        outputs=edge if mesh.rank("pp") < mesh.size("pp") - 1 else (),
        max_norm=case.max_norm,
    )
    return Engine(
        stage(mesh, case.dtype, case.remat), mesh=mesh, config=config, optimizer=case.optimizer
    )


def distributed(case: Case) -> Result:
    mesh = Mesh.create({"pp": case.pp, "dp": case.dp, "tp": case.tp})
    result = Result()
    with using(mesh):
        engine = make_engine(case, mesh)
        for step in range(case.steps):
            local = data.local_batch(
                batch(SIZE, step), batch_values(SIZE), rank=mesh.rank("dp"), size=mesh.size("dp")
            )
            result.evaluations.append(engine.evaluate(local))
            result.losses.append(engine.step(local))
            if step == 0:
                result.norm = engine.gradient_norm()
                for name, declaration, tensor in declared(engine.module):
                    assert tensor.grad is not None, name
                    result.gradients[name] = whole(tensor.grad, declaration).detach()
        for name, declaration, tensor in declared(engine.module):
            result.parameters[name] = whole(tensor.detach(), declaration)
    return result


def reference(case: Case) -> Result:
    from autoshard.runtime.optimizer import factory

    model, result = plain(case.dtype), Result()
    optimizer = factory(case.optimizer)(list(model.parameters()))
    for step in range(case.steps):
        optimizer.zero_grad()
        loss = model(**batch(SIZE, step))
        loss.backward()
        if case.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), case.max_norm)
        if step == 0:
            result.norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
            result.gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        result.losses.append(float(loss.detach()))
    result.parameters = {n: p.detach() for n, p in model.named_parameters()}
    return result


def check(results: list[Result], expected: Result, tolerance: float) -> None:
    for result in results:
        assert result.losses == results[0].losses
        assert result.losses == pytest.approx(expected.losses, rel=tolerance)
        assert result.evaluations == pytest.approx(expected.losses, rel=tolerance)
        assert result.norm == pytest.approx(expected.norm, rel=tolerance)
        for kind in ("gradients", "parameters"):
            got: dict[str, Tensor] = getattr(result, kind)
            for name, tensor in got.items():
                error = (tensor - getattr(expected, kind)[name]).abs().max()
                assert error < tolerance, f"{kind} {name}: {error:.3e}"
    assert {n for r in results for n in r.parameters} == set(expected.parameters)


MODES = ("ddp", "zero1", "zero2", "zero3")
CASES = [
    *(Case(dp=4, mode=mode, micro=2) for mode in MODES),
    *(Case(dp=2, tp=2, mode=mode, micro=2) for mode in MODES),
    *(Case(pp=2, dp=2, mode=mode, micro=4, schedule="1f1b") for mode in MODES),
    *(Case(pp=2, dp=2, mode=mode, micro=2, schedule="gpipe") for mode in MODES),
    Case(tp=4, micro=2),
    Case(pp=4, micro=4, schedule="1f1b"),
    Case(pp=4, micro=2, schedule="1f1b"),
    Case(pp=2, tp=2, micro=4, schedule="1f1b", max_norm=0.1),
    Case(dp=2, tp=2, mode="zero2", max_norm=0.1),
    Case(pp=2, dp=2, mode="zero1", micro=2, schedule="1f1b", max_norm=0.1),
    Case(pp=2, dp=2, mode="ddp", micro=2, schedule="1f1b", optimizer="sgd-momentum"),
    Case(dp=4, mode="zero3", optimizer="adagrad"),
    *(Case(dp=2, tp=2, mode=mode, micro=2, remat=True, steps=2) for mode in MODES),
    *(
        Case(pp=2, dp=2, mode=mode, micro=4, remat=True, schedule="1f1b", steps=2)
        for mode in MODES
    ),
]  # fmt: skip


def name_of(case: Any) -> str:
    shown = {k: v for k, v in vars(case).items() if v != getattr(Case(), k) or k == "mode"}
    return "-".join(f"{v}" if k in {"mode", "schedule"} else f"{k}{v}" for k, v in shown.items())


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_equals_the_plain_model(case: Case, ranks: Pool) -> None:
    results = ranks.run(distributed, case, world=case.world)
    check(results, reference(case), 1e-10)


def test_one_rank() -> None:
    """One process needs no process group."""
    case = Case(micro=2)
    mesh = Mesh({"pp": 1, "dp": 1, "tp": 1})
    with using(mesh):
        engine = make_engine(case, mesh)
        losses = [engine.step(batch(SIZE, step)) for step in range(case.steps)]
    expected = reference(case)
    assert losses == pytest.approx(expected.losses, rel=1e-12)
    for name, parameter in engine.module.named_parameters():
        assert (parameter - expected.parameters[name]).abs().max() < 1e-12
