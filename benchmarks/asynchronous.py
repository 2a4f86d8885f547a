"""Does training with older weights converge, and what does it save?

Trains a small language model on bytes of Python's own documentation on 4 processes, with as many
updates from as many samples each: bulk-synchronous data parallelism (BSP), PipeDream with weight
stashing and with vertical sync, PipeDream-2BW, asynchronous data parallelism (ASP) and its bounded
form (SSP). Prints a table of losses and writes the curves as one plot.

Then predicts VGG16 on V100 GPUs over links of several speeds: data parallelism against the
PipeDream plan that the planner finds, next to what PipeDream published (Narayanan et al. 2019,
table 1).

Run ``python -m benchmarks.asynchronous`` (``--updates 100`` for a short look, ``--predict`` for the
second part alone).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoshard
from autoshard import cluster as clusters
from autoshard.api import make_plan
from autoshard.cluster import Cluster, Tier
from autoshard.plan.plan import Plan

ROOT = Path(__file__).resolve().parent.parent
NUM_PROCESSES = 4
SAMPLES = 16
"""Per update."""
LENGTH = 64
HELD_OUT = 8
"""Batches of text that is not trained on."""
SEED = 0
SMOOTHING = 20
"""Updates that a point of the plot is the mean of."""
PUBLISHED = {(16, 4, 10.0): "15-1, 5.28", (16, 8, 25.0): "15-1, 2.98"}
"""Stages and gain per epoch over data parallelism (PipeDream, table 1), by GPUs, GPUs per node and
Gb/s per node: Azure NC24 v3 (PCIe) and EC2 p3.16xlarge (NVLink)."""
SHARED_EFFICIENCY, ALONE_EFFICIENCY = 0.5, 0.95
"""Share of Ethernet that NCCL reaches over TCP with several GPUs per node, and with one,
as its users measured: 14.5 to 14.9 of 32 Gb/s on 2 x 8 V100 and 30.6 to 31.4 on 2 x 1 (NVIDIA/nccl,
issue 209), 1.7 of 3.1 GB/s on 2 x 4 (NVIDIA/nccl-tests, issue 83)."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to train.

    Attributes:
        per_step: updates that a call of ``step`` feeds.
    """

    name: str
    pins: Mapping[str, Any]
    per_step: int = 1


PIPELINE = (1,) * NUM_PROCESSES
WAYS = (
    Way("BSP", {"dp": NUM_PROCESSES, "data_parallel": "ddp", "micro_batch_size": 4}),
    Way("PipeDream", {"schedule": "pipedream", "replicas": PIPELINE}),
    Way("vertical sync", {"schedule": "pipedream", "replicas": PIPELINE, "vertical_sync": True}),
    Way("2BW", {"schedule": "pipedream-2bw", "replicas": PIPELINE, "micro_batch_size": 4}),
    Way("ASP", {"data_parallel": "asp"}, NUM_PROCESSES),
    Way("SSP", {"data_parallel": "ssp", "staleness": 1}, NUM_PROCESSES),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What a way came to.

    Attributes:
        losses: of every step, by the weights that its forward met.
        held_out: at the end, on text that was not trained on.
        staleness: per stage, in updates; ``None``: unbounded.
    """

    name: str
    losses: list[float]
    per_step: int
    held_out: float
    staleness: list[int | None]


# -- what is trained ------------------------------------------------------------------------------


class Block(nn.Module):
    """Causal attention and a feed-forward net, both on normalised inputs."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries, self.keys, self.values, self.out = (nn.Linear(width, width) for _ in "qkvo")
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        y = self.norm_1(x)
        q, k, v = (
            part(y).view(n, length, self.heads, width // self.heads).transpose(1, 2)
            for part in (self.queries, self.keys, self.values)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class ByteModel(nn.Module):
    """Predicts the next byte."""

    def __init__(self, width: int = 64, blocks: int = 4) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.bytes(ids) + self.places
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def text_batch(count: int, number: int, *, held_out: bool = False) -> dict[str, Tensor]:
    """The ``number``-th batch of ``count`` random places in the text, or in its last tenth."""
    joined = "\n\n".join(pydoc_data.topics.topics.values()).encode()
    text = torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()
    border = 9 * len(text) // 10
    text = text[border:] if held_out else text[:border]
    generator = torch.Generator().manual_seed(1000 * (number + 1) + held_out)
    starts = torch.randint(0, len(text) - LENGTH - 1, (count,), generator=generator).tolist()
    ids = torch.stack([text[s : s + LENGTH + 1] for s in starts])
    return {"ids": ids[:, :-1], "labels": ids[:, 1:]}


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


# -- on a rank ------------------------------------------------------------------------------------


def train(way: Way, updates: int) -> Curve:
    """As many updates as asked for, and the loss on held-out text afterwards."""
    torch.manual_seed(SEED)
    samples = SAMPLES * way.per_step
    parallel = autoshard.compile(
        ByteModel(), world_size=NUM_PROCESSES, example_inputs=text_batch(samples, 0),
        optimizer=adam, cluster="cpu", constraints={"allow_stale": True, **way.pins},
    )  # fmt: skip
    steps = range(updates // way.per_step)
    losses = [parallel.step(parallel.local_batch(text_batch(samples, step))) for step in steps]
    losses = [*losses, *parallel.drain()]
    held_out = [
        parallel.evaluate(parallel.local_batch(text_batch(samples, k, held_out=True)))
        for k in range(HELD_OUT)
    ]
    return Curve(
        name=way.name, losses=_of_all_workers(way, losses), per_step=way.per_step,
        held_out=statistics.mean(held_out), staleness=list(parallel.plan.staleness),
    )  # fmt: skip


def _of_all_workers(way: Way, losses: list[float]) -> list[float]:
    """Asynchronous workers know the losses of their own minibatches only."""
    known = [loss for loss in losses if not math.isnan(loss)]
    if way.pins.get("data_parallel") not in ("asp", "ssp"):
        return known
    every: list[list[float]] = [[] for _ in range(NUM_PROCESSES)]
    torch.distributed.all_gather_object(every, known)
    return [statistics.mean(step) for step in zip(*every, strict=True)]


def rank_main(updates: int, path: Path) -> None:
    """Train every way; rank 0 writes the curves."""
    curves = []
    for way in WAYS:
        curve = train(way, updates)
        curves.append(curve)
        if torch.distributed.get_rank() == 0:
            print(f"{way.name}: held-out loss {curve.held_out:.3f}", flush=True)
    if torch.distributed.get_rank() == 0:
        path.write_text(
            json.dumps([{n: getattr(c, n) for n in Curve.__slots__} for c in curves])  # type: ignore[attr-defined]
        )


def curves_of(updates: int) -> list[Curve]:
    """Train every way on 4 processes of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curves.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={NUM_PROCESSES}", "-m", "benchmarks.asynchronous",
            "--updates", str(updates), "--rank", str(path),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
        return [Curve(**entry) for entry in json.loads(path.read_text())]


# -- what is printed ------------------------------------------------------------------------------


def table(curves: Sequence[Curve]) -> str:
    """Losses at points of the run and at its end, one line per way."""
    points = (0.25, 0.5, 1.0)
    lines = [
        "| way | staleness in updates | " + " | ".join(f"{100 * p:.0f} %" for p in points)
        + " | held out |",
        "|" + "---|" * (3 + len(points)),
    ]  # fmt: skip
    for curve in curves:
        late = ", ".join("any" if s is None else str(s) for s in curve.staleness) or "0"
        smooth = smoothed(curve)
        shown = [smooth[max(0, round(p * len(smooth)) - 1)] for p in points]
        cells = [curve.name, late, *(f"{loss:.3f}" for loss in shown), f"{curve.held_out:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def smoothed(curve: Curve) -> list[float]:
    """Means over ``SMOOTHING`` updates up to each step."""
    span = max(1, SMOOTHING // curve.per_step)
    losses = curve.losses
    return [statistics.mean(losses[max(0, k - span + 1) : k + 1]) for k in range(len(losses))]


def plot(curves: Sequence[Curve], path: Path) -> None:
    """All curves over the samples that were trained on."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        samples = [SAMPLES * curve.per_step * (k + 1) for k in range(len(curve.losses))]
        axes.plot(samples, smoothed(curve), label=f"{curve.name} ({curve.held_out:.3f} held out)")
    axes.set_xlabel("samples")
    axes.set_ylabel(f"loss, mean of {SMOOTHING} updates")
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


# -- VGG16 on slow links --------------------------------------------------------------------------


class VGG16(nn.Module):
    """Thirteen convolutions and three linear layers (Simonyan and Zisserman 2014)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(),
            nn.Linear(4096, 1000),
        )  # fmt: skip

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.classifier(self.features(x).flatten(1)), labels)


def v100_cluster(gigabits: float, per_node: int = 4) -> Cluster:
    """V100 GPUs on PCIe, or eight of them on NVLink, and one Ethernet card per node."""
    found = clusters.find("v100-16")
    pcie = Tier(name="pcie", size=per_node, bytes_per_s=12e9, latency_s=1e-5)
    reached = SHARED_EFFICIENCY if per_node > 1 else ALONE_EFFICIENCY
    ethernet = Tier(
        name="ethernet", size=0, bytes_per_s=gigabits / 8 * 1e9 / per_node, latency_s=3e-5,
        efficiency=dict.fromkeys(clusters.COLLECTIVE_KINDS, reached),
    )  # fmt: skip
    inner = found.tiers[0] if per_node == found.tiers[0].size else pcie
    tiers = (inner, ethernet) if per_node > 1 else (ethernet,)
    return replace(found, name=f"V100, {gigabits:g} Gb/s", tiers=tiers)


def gain(gigabits: float, world_size: int = 16, per_node: int = 4) -> tuple[float, Plan]:
    """By how much the best PipeDream plan has more samples a second than data parallelism, and that
    plan."""
    data, best = compared(gigabits, world_size, per_node)
    return _samples_per_s(best) / _samples_per_s(data), best


def compared(gigabits: float, world_size: int, per_node: int) -> tuple[Plan, Plan]:
    """Data parallelism and the best PipeDream plan; 64 samples per GPU or minibatch."""

    def planned(minibatches: int, pins: Mapping[str, Any]) -> Plan:
        samples = 64 * minibatches
        batch = {
            "x": torch.empty(samples, 3, 224, 224, device="meta"),
            "labels": torch.empty(samples, dtype=torch.long, device="meta"),
        }
        with torch.device("meta"):
            model = VGG16()
        return make_plan(
            model, world_size=world_size, example_inputs=batch, optimizer="sgd-momentum",
            cluster=v100_cluster(gigabits, per_node), constraints=pins,
        ).plan  # fmt: skip

    data = planned(
        world_size,
        {"dp": world_size, "pp": 1, "tp": 1, "data_parallel": "ddp", "micro_batch_size": 64},
    )
    stale = {"schedule": "pipedream", "micro_batch_size": 64, "allow_stale": True}
    # A stage's replicas share a step's minibatches equally, so as many are tried as lead to 15-1
    # and the like.
    plans = [planned(m, stale) for m in (world_size - 1, world_size - 2, world_size)]
    return data, max(plans, key=_samples_per_s)


def _samples_per_s(plan: Plan) -> float:
    return plan.global_batch_size / plan.prediction.step_s


def gains() -> str:
    """A table over link speeds."""
    lines = [
        "| GPUs | Ethernet per node | data parallel, of it reduction | stages | PipeDream | gain "
        "| published |",
        "|" + "---|" * 7,
    ]
    for world_size, per_node in ((4, 1), (16, 4), (16, 8)):
        for gigabits in (1.0, 5.0, 10.0, 25.0, 100.0):
            data, best = compared(gigabits, world_size, per_node)
            rates = _samples_per_s(data), _samples_per_s(best)
            reduction = data.prediction.parts["gradient_reduction"] / data.prediction.step_s
            ranks = "-".join(map(str, best.replicas))
            nodes = f"{world_size // per_node} x {per_node}"
            known = PUBLISHED.get((world_size, per_node, gigabits), "")
            cells = (
                nodes, f"{gigabits:g} Gb/s", f"{rates[0]:.0f} samples/s, {reduction:.0%}", ranks,
                f"{rates[1]:.0f} samples/s", f"{rates[1] / rates[0]:.2f}", known,
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Train, predict and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.asynchronous")
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "asynchronous.png")
    parser.add_argument("--predict", action="store_true", help="VGG16 alone")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        rank_main(args.updates, args.rank)
        return 0
    if not args.predict:
        curves = curves_of(args.updates)
        print(f"\nLoss after so much of {args.updates} updates of {SAMPLES} samples\n")
        print(table(curves))
        plot(curves, args.out)
        print(f"\ncurves in {args.out}\n")
    print("VGG16 on V100 GPUs, 64 samples per minibatch, predicted\n")
    print(gains())
    return 0


if __name__ == "__main__":
    sys.exit(main())
