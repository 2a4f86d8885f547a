"""Models, plans and ranks' programs for the tests of ``Parallel`` with emitted stages."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import zoo
from equivalence import FAST_LINKS, batches, encoded, loss_of
from torch import Tensor, nn
from zoo_models import SEQUENCE, VOCAB, Block

from autoshard.capture import capture
from autoshard.ir import Program
from autoshard.options import Constraints
from autoshard.parallel import OptimizerChoice, Parallel
from autoshard.passes.cast import cast_program
from autoshard.plan import files
from autoshard.plan.plan import Plan, Recompute
from autoshard.plan.search import find_plan

State = dict[str, Tensor]

# -- models ---------------------------------------------------------------------------------------


class Odd(nn.Module):
    """All that a state dict can hold: ties, frozen and unused tensors, all sorts of buffers."""

    positions: Tensor
    scale: Tensor

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.register_buffer("positions", torch.randn(SEQUENCE, width), persistent=False)
        self.register_buffer("scale", torch.tensor(0.5))
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(4))
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.spare = nn.Linear(3, 5)  # never used, and tied
        self.spare_too = nn.Linear(3, 5)
        self.spare_too.weight = self.spare.weight
        self.register_buffer("unused", torch.arange(3))
        self.register_buffer("unused_cache", torch.randn(2), persistent=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions * self.scale
        for block in self.blocks:
            x = block(x)
        logits = self.head(x + self.frozen(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _ids_and_labels() -> dict[str, Tensor]:
    ids = torch.randint(0, VOCAB, (zoo.BATCH_SIZE, SEQUENCE))
    labels = torch.randint(0, VOCAB, (zoo.BATCH_SIZE, SEQUENCE))
    for row in range(zoo.BATCH_SIZE):
        labels[row, : row % 5] = -100
    return {"ids": ids, "labels": labels}


def _dropping_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_positions=SEQUENCE, n_embd=32, n_layer=4, n_head=4,
            bos_token_id=1, eos_token_id=1, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2,
        )
    )  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float64) -> zoo.Built:
    """``odd`` and ``dropping-gpt2``, or a model of the zoo; the same on every call."""
    if name not in ("odd", "dropping-gpt2"):
        return zoo.build(name, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Odd() if name == "odd" else _dropping_gpt2()
        batch = _ids_and_labels()
    if name != "odd":
        batch = {"input_ids": batch["ids"], "labels": batch["labels"]}
    return model.to(dtype).train(), batch, None


# -- plans ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What every rank needs to make the same ``Parallel``."""

    model: str
    dtype: torch.dtype
    program: Program
    plan_text: bytes

    @property
    def plan(self) -> Plan:
        return files.loads(self.plan_text)

    @property
    def world(self) -> int:
        return self.plan.world_size

    def edited(self, **changes: Any) -> Setup:
        return replace(self, plan_text=encoded(replace(self.plan, **changes)))


@functools.cache
def captured(name: str, dtype: torch.dtype, precision: str | None) -> Program:
    model, batch, loss_fn = build(name, dtype)
    program = capture(model, example_inputs=batch, loss_fn=loss_fn, model_name=name)
    return program if precision is None else cast_program(program, precision)


_setups: dict[str, Setup] = {}


def setup(
    name: str, dtype: torch.dtype = torch.float64, precision: str | None = None, **pins: Any
) -> Setup:
    """A plan with these degrees (1 where not given) and other pins, on links that cost nothing."""
    key = repr((name, dtype, precision, pins))
    if key not in _setups:
        program = captured(name, dtype, precision)
        degrees = {axis: pins.get(axis, 1) for axis in ("pp", "dp", "tp")}
        plan = find_plan(
            program, cluster=FAST_LINKS, world_size=math.prod(degrees.values()),
            precision=precision, constraints=Constraints.of({**pins, **degrees}),
        )  # fmt: skip
        _setups[key] = Setup(name, dtype, program, encoded(plan))
    return _setups[key]


def recomputed(given: Setup, mode: str) -> Setup:
    """The same plan with another way to recompute in every segment."""
    stages = tuple(
        replace(
            stage,
            segments=tuple(replace(s, recompute=Recompute(mode=mode)) for s in stage.segments),
        )
        for stage in given.plan.stages
    )
    return given.edited(stages=stages)


# -- on a rank ------------------------------------------------------------------------------------


def parallel(
    given: Setup, *, blank: bool = False, optimizer: OptimizerChoice = "adamw"
) -> Parallel:
    """``blank``: the model has lost all its state, so that only a checkpoint can bring it back."""
    model, _, _ = build(given.model, given.dtype)
    if blank:
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    return Parallel(model, given.program, given.plan, optimizer=optimizer)


def data(given: Setup, steps: range) -> Iterator[Any]:
    """Global batches, other ones for every step."""
    _, batch, _ = build(given.model, given.dtype)
    yield from batches(batch, steps.stop)[steps.start :]


def train(made: Parallel, given: Setup, steps: range) -> list[float]:
    return [made.step(made.local_batch(batch)) for batch in data(given, steps)]


# -- the plain model on one process ---------------------------------------------------------------


@dataclass
class Plain:
    losses: list[float]
    gradients: list[State]
    state: State


def plain(
    name: str,
    steps: int,
    *,
    dtype: torch.dtype = torch.float64,
    optimizer: Any = torch.optim.AdamW,
    scheduler: Any = None,
    clip_norm: float | None = None,
) -> Plain:
    model, batch, loss_fn = build(name, dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    stepped = optimizer(trained)
    rates = scheduler(stepped) if scheduler else None
    result = Plain([], [], {})
    for one in batches(batch, steps):
        stepped.zero_grad()
        loss = loss_of(model, one, loss_fn)
        loss.backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, clip_norm)
        result.losses.append(loss.item())
        result.gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
        stepped.step()
        if rates is not None:
            rates.step()
    result.state = {n: t.clone() for n, t in model.state_dict().items()}
    return result


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], error: float) -> None:
    """The same names in the same order, shapes and dtypes, and values up to ``error``."""
    assert list(found) == list(expected)
    for name, tensor in found.items():
        other = expected[name]
        assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype), name
        torch.testing.assert_close(
            tensor, other, rtol=0, atol=error, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Bit for bit."""
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
