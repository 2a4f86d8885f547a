"""Programs of ranks for stale and unevenly replicated training, and what they must come to.

The reference is one process that keeps every version of every stage's weights and takes each
micro-batch's gradient at the versions that the papers say, written down here once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
import zoo
from equivalence import FAST_LINKS, encoded, loss_of, uncast
from equivalence import batches as varied
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from autoshard.api import make_plan
from autoshard.ir import Program
from autoshard.parallel import Parallel
from autoshard.plan import files
from autoshard.plan.plan import Plan

State = dict[str, Tensor]
Batch = dict[str, Tensor]
BATCH_SIZE = 12


class Chain(nn.Module):
    """Blocks in a row, with a value that skips one of them."""

    def __init__(self, width: int = 16, blocks: int = 5) -> None:
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh())
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return F.cross_entropy(self.head(x), labels)


class SmallVGG16(nn.Module):
    """VGG16 (Simonyan and Zisserman 2014), narrow: 13 convolutions and 3 linear layers."""

    def __init__(self, width: int = 4, size: int = 32, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for factor, count in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
            for _ in range(count):
                layers += [nn.Conv2d(channels, factor * width, 3, padding=1), nn.ReLU()]
                channels = factor * width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        inner, hidden = channels * (size // 32) ** 2, 64 * width
        self.classifier = nn.Sequential(
            nn.Linear(inner, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, classes),
        )  # fmt: skip

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.classifier(self.features(x).flatten(1)), labels)


def build(name: str) -> nn.Module:
    """``chain``, ``vgg`` or a model of the zoo; the same on every call."""
    if name not in ("chain", "vgg"):
        return zoo.build(name)[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return (Chain() if name == "chain" else SmallVGG16()).double()


def batches(name: str, count: int) -> list[Batch]:
    """Global batches, all different; no target of a language model is left out."""
    if name not in ("chain", "vgg"):
        given = cast(Batch, zoo.build(name)[1])
        whole = {n: t if t.is_floating_point() else t.clamp(min=0) for n, t in given.items()}
        return cast(list[Batch], varied(whole, count))
    generator = torch.Generator().manual_seed(11)
    shape = (BATCH_SIZE, 8) if name == "chain" else (BATCH_SIZE, 3, 32, 32)
    classes = 5 if name == "chain" else 10

    def one() -> Batch:
        return {
            "x": torch.randn(shape, generator=generator, dtype=torch.float64),
            "labels": torch.randint(0, classes, (BATCH_SIZE,), generator=generator),
        }

    return [one() for _ in range(count)]


@dataclass(frozen=True)
class Setup:
    """What every rank needs to make the same ``Parallel``."""

    model: str
    program: Program
    plan_text: bytes

    @property
    def plan(self) -> Plan:
        return files.loads(self.plan_text)


def setup(name: str, world: int = 4, **pins: Any) -> Setup:
    loss = Loss(name)
    with uncast():
        planned = make_plan(
            loss.model, world_size=world, example_inputs=batches(name, 1)[0], loss_fn=loss.loss_fn,
            cluster=FAST_LINKS, constraints={"allow_stale": True, **pins},
        )  # fmt: skip
    return Setup(name, planned.program, encoded(planned.plan))


def momentum(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adam(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def parallel(given: Setup, optimizer: Any = momentum) -> Parallel:
    return Parallel(build(given.model), given.program, given.plan, optimizer=optimizer)


def stages_of(given: Setup) -> list[list[str]]:
    """Names of every stage's parameters; a tied one is of the first stage that has it."""
    seen: set[str] = set()
    stages = []
    for stage in parallel(given).emitted.manifest["stages"]:
        names = [p["name"] for p in stage["parameters"] if not p["buffer"]]
        stages.append([name for name in dict.fromkeys(names) if name not in seen])
        seen.update(names)
    return stages


class Loss(nn.Module):
    """The loss of a model on a batch, with its weights given."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = build(name)
        self.loss_fn = None if name in ("chain", "vgg") else zoo.build(name)[2]

    def forward(self, batch: Batch) -> Tensor:
        with uncast():
            return loss_of(self.model, batch, self.loss_fn)

    def of(self, weights: State, batch: Batch) -> Tensor:
        named = {f"model.{name}": tensor for name, tensor in weights.items()}
        return cast(Tensor, functional_call(self, named, (batch,)))


def trained(given: Setup, steps: int, optimizer: Any) -> tuple[list[float], list[float], State]:
    """On a rank: losses of the steps, those left at the end, and the weights."""
    made = parallel(given, optimizer)
    losses = [made.step(made.local_batch(b)) for b in batches(given.model, steps)]
    return losses, made.drain(), made.full_state_dict()


# -- the reference --------------------------------------------------------------------------------

Version = Callable[[int, int], int]
"""From stage and micro-batch to the number of updates that the weights it meets have had."""


def stashing(replicas: Sequence[int]) -> Version:
    def version(stage: int, i: int) -> int:
        r = replicas[stage]
        in_flight = (sum(replicas[stage:]) + r - 1) // r
        return max(0, i // r - in_flight + 1)

    return version


def vertical(replicas: Sequence[int]) -> Version:
    """All stages use weights that have seen the micro-batches that the input stage's have."""
    entry = stashing(replicas)
    return lambda stage, i: entry(0, i) * replicas[0] // replicas[stage]


def double_buffered(m: int) -> Version:
    return lambda stage, i: max(0, i // m - 1)


def newest(m: int) -> Version:
    return lambda stage, i: i // m


STRAIGHT = {"replicas": (1, 1, 1, 1)}
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "pipedream": ({"schedule": "pipedream", "micro_batch_size": 8, **STRAIGHT}, stashing),
    "pipedream, 2-2": (
        {"schedule": "pipedream", "replicas": (2, 2), "micro_batch_size": 4},
        stashing,
    ),
    "pipedream, 2-1-1": (
        {"schedule": "pipedream", "replicas": (2, 1, 1), "micro_batch_size": 4},
        stashing,
    ),
    "pipedream, 1-1-2": (
        {"schedule": "pipedream", "replicas": (1, 1, 2), "micro_batch_size": 2},
        stashing,
    ),
    "vertical sync": (
        {"schedule": "pipedream", "micro_batch_size": 8, "vertical_sync": True, **STRAIGHT},
        vertical,
    ),
    "vertical sync, 1-1-2": (
        {
            "schedule": "pipedream",
            "micro_batch_size": 2,
            "replicas": (1, 1, 2),
            "vertical_sync": True,
        },
        vertical,
    ),
    "2bw": (
        {"schedule": "pipedream-2bw", "micro_batch_size": 2, **STRAIGHT},
        double_buffered,
    ),
    "2bw, 1-2-1": (
        {"schedule": "pipedream-2bw", "micro_batch_size": 2, "replicas": (1, 2, 1)},
        double_buffered,
    ),
    "2-1-1, flushed": ({"replicas": (2, 1, 1), "micro_batch_size": 2}, newest),
}
"""Schedules for models of the zoo: pins, and the rule that their versions follow."""


class Reference:
    """Every version of every stage's weights.

    Args:
        per_update: of each stage, the micro-batches whose mean gradient makes an update.
    """

    def __init__(
        self,
        given: Setup,
        version: Version,
        per_update: Sequence[int],
        optimizer: Any,
    ) -> None:
        self.loss = Loss(given.model)
        self.model = self.loss.model
        named = dict(self.model.named_parameters())
        self.names = stages_of(given)
        self.version, self.per_update = version, per_update
        self.masters = [{n: nn.Parameter(named[n].detach().clone()) for n in s} for s in self.names]
        self.optimizers = [optimizer(list(m.values())) for m in self.masters]
        self.begin()
        self.losses: list[float] = []

    def begin(self) -> None:
        """As after the pipeline has run empty."""
        self.history = [[self._copy(s)] for s in range(len(self.names))]
        self.sums: list[State] = [{} for _ in self.names]
        self.seen = 0

    def _copy(self, stage: int) -> State:
        return {n: p.detach().clone() for n, p in self.masters[stage].items()}

    def micro_batch(self, batch: Batch) -> None:
        leaves = {
            n: t.clone().requires_grad_()
            for s in range(len(self.names))
            for n, t in self.history[s][self.version(s, self.seen)].items()
        }
        loss = self.loss.of(leaves, batch)
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        self.losses.append(loss.item())
        self.seen += 1
        for stage, names in enumerate(self.names):
            for n in names:
                known = self.sums[stage].get(n, 0.0)
                self.sums[stage][n] = known + gradients[n] / self.per_update[stage]
            if self.seen % self.per_update[stage] == 0:
                for n, parameter in self.masters[stage].items():
                    parameter.grad = self.sums[stage][n]
                self.optimizers[stage].step()
                self.sums[stage] = {}
                self.history[stage].append(self._copy(stage))

    def step(self, batch: Batch, micro_batches: int) -> float:
        """The micro-batches of a global batch; returns their mean loss."""
        parts = {name: tensor.chunk(micro_batches) for name, tensor in batch.items()}
        for i in range(micro_batches):
            self.micro_batch({name: part[i] for name, part in parts.items()})
        return sum(self.losses[-micro_batches:]) / micro_batches

    @property
    def state(self) -> State:
        """Weights and, as the last forward has left them, buffers."""
        weights = {n: p.detach().clone() for m in self.masters for n, p in m.items()}
        return {**{n: b.detach().clone() for n, b in self.model.named_buffers()}, **weights}


def reference(given: Setup, rule: Any, optimizer: Any) -> Reference:
    """One process with every version of the weights that a plan may use."""
    plan = given.plan
    m, each = plan.num_micro_batches, plan.schedule == "pipedream"
    version = rule(plan.replicas) if each else rule(m)
    return Reference(given, version, plan.replicas if each else [m] * len(plan.stages), optimizer)


def micro_batches_of(batch: Batch, count: int) -> Iterator[Batch]:
    parts = {name: tensor.chunk(count) for name, tensor in batch.items()}
    return ({name: part[i] for name, part in parts.items()} for i in range(count))
