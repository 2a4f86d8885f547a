"""Predicted against measured step time and memory on one device, for models that fit there.

Each case is planned for one device and trained through emission and runtime, as a plan for a
thousand devices would be; ``plain`` is the same model in plain PyTorch (autocast for bfloat16), in
turns with it. A rank of any larger plan is made of such work, so an error here is the part of a
plan's error that no network explains.
Run ``python -m benchmarks.one_device --cluster h100`` on a machine that has one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import autoshard
from autoshard.errors import AutoshardError

SEED = 0
TURNS = 4
STEPS_PER_TURN = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model and how it is trained.

    Attributes:
        size: samples per step, all in one micro-batch.
        recompute: the pin of that name.
    """

    model: str
    size: int
    length: int
    recompute: str = "none"
    precision: str | None = "bf16"

    @property
    def name(self) -> str:
        return f"{self.model} {self.size} x {self.length}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was found for a case; bytes are ``None`` where the allocator does not count.

    Attributes:
        plain_s: seconds of a step in plain PyTorch without recomputation; ``None``: out of memory.
        loss_error: largest relative difference of the losses from those of plain PyTorch.
    """

    case: Case
    predicted_s: float
    measured_s: float
    plain_s: float | None
    predicted_bytes: int
    measured_bytes: int | None
    loss_error: float | None


# -- models ---------------------------------------------------------------------------------------


def gpt2(layers: int, width: int, heads: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, use_cache=False,
    ))  # fmt: skip


def llama_1b() -> nn.Module:
    """The shape of Llama-3.2-1B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        num_hidden_layers=16, hidden_size=2048, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=8192, vocab_size=128256, max_position_embeddings=8192,
        tie_word_embeddings=True, use_cache=False,
    ))  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tiny": lambda: gpt2(2, 64, 2),
    "gpt2": lambda: gpt2(12, 768, 12),
    "gpt2-large": lambda: gpt2(36, 1280, 20),
    "llama-1b": llama_1b,
}


def cases(quick: bool) -> Iterator[Case]:
    """What is measured, the smallest first."""
    if quick:
        yield Case(model="tiny", size=4, length=64, precision=None)
        yield Case(model="tiny", size=4, length=64, recompute="full", precision=None)
        return
    for size in (4, 16, 32):
        yield Case(model="gpt2", size=size, length=1024)
    yield Case(model="gpt2", size=16, length=1024, recompute="full")
    yield Case(model="gpt2", size=8, length=1024, precision=None)
    for size in (4, 12):
        yield Case(model="gpt2-large", size=size, length=1024)
    yield Case(model="gpt2-large", size=12, length=1024, recompute="full")
    for size, length in ((4, 2048), (1, 8192)):
        yield Case(model="llama-1b", size=size, length=length)
    yield Case(model="llama-1b", size=4, length=2048, recompute="full")


# -- measuring ------------------------------------------------------------------------------------


def measure(case: Case, cluster: str, costs: str | None) -> Row:
    """Plan a case, and train it in turns with the plain model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(SEED)
    with device:
        model = MODELS[case.model]().train()
    ids = torch.randint(0, 1000, (case.size, case.length), device=device)
    batch = {"input_ids": ids, "labels": ids}
    parallel = autoshard.compile(
        model, world_size=1, example_inputs=batch, cluster=cluster, precision=case.precision,
        costs=costs, constraints={"recompute": case.recompute, "micro_batch_size": case.size},
    )  # fmt: skip
    local = parallel.local_batch(batch)
    ways = {"planned": lambda: parallel.step(local), "plain": plain_step(model, batch, case)}
    losses: dict[str, list[float]] = {way: [] for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for step in range(2):  # the first sets up buffers; the second is a step like any other
        held, losses_now = peak_of(ways["planned"], device)
        losses["planned"].append(losses_now)
        peak = held if step else None
    model_bytes = plain_bytes(model)
    for _ in range(TURNS):
        for way, step_of in ways.items():
            try:
                found = timed(step_of, device)
            except torch.OutOfMemoryError:
                continue
            seconds[way].append(found[0])
            losses[way] += found[1]
    same = list(zip(losses["planned"], losses["plain"], strict=False))
    return Row(
        case=case,
        predicted_s=parallel.plan.prediction.step_s,
        measured_s=statistics.median(seconds["planned"]),
        plain_s=statistics.median(seconds["plain"]) if seconds["plain"] else None,
        predicted_bytes=parallel.plan.prediction.peak_bytes,
        measured_bytes=None if peak is None else peak - model_bytes,
        loss_error=max(abs(a / b - 1) for a, b in same) if same else None,
    )


def plain_step(model: nn.Module, batch: dict[str, Tensor], case: Case) -> Callable[[], float]:
    """A training step as a person writes it; the optimizer is made at the first."""
    update: list[torch.optim.Optimizer] = []

    def step() -> float:
        if not update:
            update.append(torch.optim.AdamW(model.parameters()))
        update[0].zero_grad()
        with _autocast(batch["input_ids"].device, case.precision):
            loss: Tensor = model(**batch).loss
        loss.backward()
        update[0].step()
        return loss.item()

    return step


def _autocast(device: torch.device, precision: str | None) -> AbstractContextManager[Any]:
    if precision is None:
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def plain_bytes(model: nn.Module) -> int:
    """What the plain model adds to the memory of the planned one: its parameters alone."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def peak_of(step: Callable[[], float], device: torch.device) -> tuple[int | None, float]:
    """Bytes allocated at most during a step, and its loss."""
    if device.type != "cuda":
        return None, step()
    torch.cuda.reset_peak_memory_stats(device)
    loss = step()
    return torch.cuda.max_memory_allocated(device), loss


def timed(step: Callable[[], float], device: torch.device) -> tuple[float, list[float]]:
    """Seconds of a step over a turn, and the losses; the first step of a turn is not timed."""
    losses = [step()]
    start = time.perf_counter()
    losses += [step() for _ in range(STEPS_PER_TURN)]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / STEPS_PER_TURN, losses


# -- printing -------------------------------------------------------------------------------------


def show(rows: list[Row]) -> None:
    """A table and the medians."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="One device: predicted and measured", title_justify="left")
    for column in ("case", "precision", "recompute", "predicted ms", "measured ms", "error",
                   "to plain", "predicted GiB", "measured GiB", "error", "loss"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("case", "recompute") else "right")
    for row in rows:
        memory = row.measured_bytes
        table.add_row(
            row.case.name, row.case.precision or "f32", row.case.recompute,
            f"{1e3 * row.predicted_s:.1f}", f"{1e3 * row.measured_s:.1f}",
            f"{row.predicted_s / row.measured_s - 1:+.1%}",
            f"{row.measured_s / row.plain_s:.3f}" if row.plain_s else "-",
            f"{row.predicted_bytes / 2**30:.2f}", f"{memory / 2**30:.2f}" if memory else "-",
            f"{row.predicted_bytes / memory - 1:+.1%}" if memory else "-",
            f"{row.loss_error:.1e}" if row.loss_error is not None else "-",
        )  # fmt: skip
    console = Console(width=150)
    console.print(table)
    time_error = statistics.median(abs(r.predicted_s / r.measured_s - 1) for r in rows)
    text = f"{len(rows)} cases: median error of step time {time_error:.1%}"
    memory_errors = [
        abs(r.predicted_bytes / r.measured_bytes - 1) for r in rows if r.measured_bytes
    ]
    if memory_errors:
        text += f", of peak memory {statistics.median(memory_errors):.1%}"
    console.print(text)


def main() -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.one_device")
    parser.add_argument("--cluster", default="cpu", help="preset or cluster file; default cpu")
    parser.add_argument("--costs", choices=["measured"], help="measure the plan's ops first")
    parser.add_argument("--quick", action="store_true", help="a tiny model only")
    parser.add_argument("--json", metavar="FILE", help="write all rows there, too")
    args = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}  # fmt: skip
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    rows = []
    for case in cases(args.quick):
        try:
            rows.append(measure(case, args.cluster, args.costs))
        except (AutoshardError, torch.OutOfMemoryError) as error:
            print(f"{case.name}: {error}", file=sys.stderr)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if not rows:
        return 1
    show(rows)
    if args.json:
        with open(args.json, "w") as file:
            json.dump([asdict(row) for row in rows], file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
