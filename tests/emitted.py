"""Run emitted stages on thread-backed ranks and collect what a plain model would give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from ranks import run_threads
from torch import Tensor, nn

from autoshard.capture import tensors_of
from autoshard.emit import Emitted, emit, load_stage
from autoshard.ir import Program
from autoshard.plan.plan import Plan
from autoshard.runtime.collectives import sum_over
from autoshard.runtime.mesh import current
from autoshard.runtime.parameters import declared, load_parameters, sum_partial_gradients, whole
from autoshard.runtime.random import make_key


@dataclass
class Outcome:
    """Loss, whole gradients and whole buffers after one step, by qualified name."""

    loss: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def plain(model: nn.Module, batch: Mapping[str, Tensor], loss_fn=None) -> Outcome:
    model.zero_grad()
    output = model(**{k: v for k, v in batch.items() if k != "labels" or loss_fn is None})
    loss = loss_fn(output, batch) if loss_fn else output.loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Outcome(loss.detach(), grads, {n: b.clone() for n, b in model.named_buffers()})


def emitted_step(
    program: Program, plan: Plan, model: nn.Module, batch: Mapping[str, Tensor]
) -> Outcome:
    """One step of the plan on ``dp * tp`` threads; each of them runs all pipeline stages."""
    state = {k: v.detach().clone() for k, v in tensors_of(program, model).items()}
    state |= program.constants
    made = emit(program, plan)
    outcomes = run_threads(
        plan.mesh.dp * plan.mesh.tp,
        _rank,
        made,
        plan,
        state,
        dict(batch),
        {v.name: v.type.per_sample for v in program.batch},
        axes={"pp": 1, "dp": plan.mesh.dp, "tp": plan.mesh.tp},
    )
    for other in outcomes[1:]:
        torch.testing.assert_close(other.loss, outcomes[0].loss)
        for name, gradient in other.gradients.items():
            torch.testing.assert_close(gradient, outcomes[0].gradients[name])
    return outcomes[0]


def _rank(
    made: Emitted,
    plan: Plan,
    state: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    per_sample: Mapping[str, bool],
) -> Outcome:
    mesh = current()
    stages = []
    for index, spec in enumerate(made.manifest["stages"]):
        stage = load_stage(made, index)(spec)
        load_parameters(stage, state)
        stages.append(stage.train())
    local = {
        k: v.chunk(mesh.size("dp"))[mesh.rank("dp")] if per_sample[k] else v
        for k, v in batch.items()
    }
    count = plan.num_micro_batches
    shared = [stage.prologue(local) for stage in stages]
    total = torch.zeros((), dtype=torch.float64)
    for index in range(count):
        cut = {k: v.chunk(count)[index] if per_sample[k] else v for k, v in local.items()}
        activations: tuple[Tensor, ...] = ()
        for stage, known in zip(stages, shared, strict=True):
            given = {n: known[n].chunk(count)[index] if n in stage.CUT else known[n]
                     for n in stage.PROLOGUE}  # fmt: skip
            out = stage(
                *activations,
                key=make_key(plan.seed, 0, index),
                **{n: cut[n] for n in stage.BATCH},
                **given,
            )
            activations = out if isinstance(out, tuple) else (out,)
        (loss,) = activations
        loss.backward()
        total = total + loss.detach()
    gradients: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    for stage in stages:
        sum_partial_gradients(stage)
        for name, declaration, tensor in declared(stage):
            if declaration.buffer:
                buffers[name] = whole(tensor, declaration)
            elif tensor.grad is not None:
                gradient = sum_over(whole(tensor.grad, declaration), mesh, "dp")
                gradients[name] = gradients[name] + gradient if name in gradients else gradient
    return Outcome(sum_over(total, mesh, "dp"), gradients, buffers)


def check(expected: Outcome, actual: Outcome, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(
        actual.loss, expected.loss.to(actual.loss.dtype), rtol=tolerance, atol=tolerance
    )
    assert set(actual.gradients) == set(expected.gradients)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(
            actual.gradients[name], gradient, rtol=tolerance, atol=tolerance,
            msg=lambda text, name=name: f"gradient of {name}: {text}",
        )  # fmt: skip
