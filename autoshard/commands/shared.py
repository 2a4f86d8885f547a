"""Options that several commands share, and how a plan is made from them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoshard.errors import OptionError

if TYPE_CHECKING:
    from autoshard.models import ModelSpec
    from autoshard.plan.plan import Alternative, Breakdown, Memory, Mesh, Plan

MODEL_HELP = """\
MODEL is one of
  gpt2, llama3-8b, bert-large, resnet50, ...   a preset (a wrong name lists them all)
  hf:LlamaConfig                               a Hugging Face configuration class, its defaults
  path/to/config.json                          a Hugging Face configuration file
  train.py:build, package.module:build         a function of yours that takes nothing and returns
                                               model, (model, example_inputs) or
                                               (model, example_inputs, loss_fn)
Parameters of presets and Hugging Face models are not allocated for planning."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``--model`` and ``--sequence-length``."""
    group = parser.add_argument_group("model", description=MODEL_HELP)
    group.add_argument("--model", required=True, metavar="MODEL")
    group.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help="tokens per sample (default: the model's own)",
    )


def add_planning_arguments(parser: argparse.ArgumentParser) -> None:
    """What the planner is told."""
    group = parser.add_argument_group("planning")
    add = group.add_argument
    add(
        "--cluster",
        metavar="NAME|FILE",
        help="preset (h100, dgx-a100, 8xv100, cpu, ...) or cluster file; default: this machine "
        "when training, else h100",
    )
    add(
        "--global-batch-size",
        type=int,
        metavar="N",
        help="samples per step over all devices; default: the example's, or 8 per device for "
        "presets and Hugging Face models",
    )
    add(
        "--precision",
        choices=("bf16",),
        help="compute in bfloat16 over float32 parameters; default: as the parameters are",
    )
    add(
        "--optimizer",
        default="adamw",
        metavar="NAME",
        help="adamw, adam, sgd, sgd-momentum, ...; default adamw",
    )
    add(
        "--pin",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="fix a choice instead of searching it; may be repeated. Keys: pp, dp, tp (ranks per "
        "axis), micro_batch_size, schedule (none, gpipe, 1f1b), data_parallel (ddp, zero1, zero2, "
        "zero3), recompute (none, full, selective), memory_bytes, stages (segments per stage: "
        "3,4,3), allow_coupled_micro_batches (true), sharding.PARAMETER=S(0)",
    )
    add(
        "--costs",
        choices=("measured",),
        help="measure the ops on this machine's device instead of computing what they cost; "
        "measurements are kept on disk",
    )
    add(
        "--strict",
        action="store_true",
        help="fail on an op that has no sharding rule instead of running it whole everywhere",
    )
    add(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="stop searching then and take the best plan so far",
    )
    add("--seed", type=int, default=0, metavar="N", help="of initialisation and dropout; default 0")


def check_planning_arguments(args: argparse.Namespace) -> None:
    """Reject values that no model or cluster can make right, before anything is built.

    Raises:
        OptionError: names the option, what it expects and what it got.
    """
    for name in ("sequence_length", "global_batch_size", "time_limit"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            flag = "--" + name.replace("_", "-")
            raise OptionError(f"{flag} expects a positive number but got {value:g}")


def parse_pins(pins: list[str]) -> dict[str, Any]:
    """``["tp=2", "sharding.lm_head.weight=S(0)"]`` as constraints.

    Raises:
        OptionError: no ``=``, or a name given twice with different values.
    """
    found: dict[str, Any] = {}
    sharding: dict[str, str] = {}
    for pin in pins:
        key, separator, text = pin.partition("=")
        if not separator or not text:
            raise OptionError(f"--pin expects KEY=VALUE such as tp=2 but got {pin!r}")
        value: Any = text
        target: dict[str, Any] = found
        if key.startswith("sharding."):
            target, key = sharding, key.removeprefix("sharding.")
        else:
            value = _value(text)
        if target.get(key, value) != value:
            raise OptionError(
                f"--pin {key} is given twice, as {target[key]!r} and as {value!r}: keep one"
            )
        target[key] = value
    if sharding:
        found["sharding"] = sharding
    if isinstance(found.get("stages"), int):
        found["stages"] = (found["stages"],)
    return found


def _value(text: str) -> Any:
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    if "," in text:
        return tuple(_value(part) for part in text.split(",") if part)
    try:
        return int(text)
    except ValueError:
        return text


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show on stderr what is being done; nothing if ``quiet`` or not on a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda text: None
        return
    start = time.monotonic()

    def say(text: str) -> None:
        status.update(f"{text} [dim]({time.monotonic() - start:.0f} s)[/]")

    with console.status("starting") as status:
        yield say


def load_model(args: argparse.Namespace) -> ModelSpec:
    """The model that the options name.

    Raises:
        OptionError: an unknown model, or a sequence length for a model that has none.
    """
    # Remarks of transformers on configurations are not about what is done here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from autoshard import models

    return models.find(args.model, args.sequence_length)


def batch_size(args: argparse.Namespace, spec: ModelSpec, world_size: int) -> int | None:
    """The global batch size; ``None``: the example's own.

    An example that only shows what one sample looks like says nothing of it.
    """
    if args.global_batch_size is not None or not spec.one_sample:
        return args.global_batch_size  # type: ignore[no-any-return]
    from autoshard.api import SAMPLES_PER_DEVICE

    return SAMPLES_PER_DEVICE * world_size


def write_plan(plan: Plan, path: Path, force: bool) -> None:
    """Save a plan without overwriting.

    Raises:
        OptionError: the file exists and ``force`` is not given.
    """
    check_free(path, force)
    plan.save(path)
    print(f"wrote {path}", file=sys.stderr)


def check_free(path: Path, force: bool) -> None:
    """Raise unless ``path`` may be written; called before the work, too.

    Raises:
        OptionError: the file exists and ``force`` is not given, or its folder does not exist.
    """
    if path.exists() and not force:
        raise OptionError(f"{path} exists: give another path, or --force to overwrite it")
    if not path.parent.is_dir():
        raise OptionError(f"expected a folder {path.parent} to write {path.name} in: create it")


def as_json(plan: Plan, seconds: Mapping[str, float] | None = None) -> str:
    """:func:`as_data` on one line."""
    return json.dumps(as_data(plan, seconds))


def as_data(plan: Plan, seconds: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What scripts want to know of a plan.

    Args:
        seconds: phases outside the planner, such as importing torch, to add to its own.
    """
    return {
        "model": plan.model,
        "program": plan.program,
        "cluster": plan.cluster.name,
        "world_size": plan.world_size,
        "mesh": _mesh(plan.mesh),
        "schedule": plan.schedule,
        "virtual_stages": plan.virtual_stages,
        "data_parallel": plan.data_parallel,
        "micro_batch_size": plan.micro_batch_size,
        "num_micro_batches": plan.num_micro_batches,
        "global_batch_size": plan.global_batch_size,
        "precision": plan.precision,
        "optimizer": plan.optimizer,
        "recompute": [sorted({s.recompute.mode for s in stage.segments}) for stage in plan.stages],
        "predicted_step_s": plan.prediction.step_s,
        "predicted_parts_s": dict(plan.prediction.parts),
        "predicted_ranks_s": [_rank(rank) for rank in plan.prediction.ranks],
        "memory_per_stage": [_memory(stage.memory) for stage in plan.stages],
        "peak_bytes_per_stage": [stage.memory.total for stage in plan.stages],
        "segments_per_stage": [len(stage.segments) for stage in plan.stages],
        "solver": {
            "status": plan.solver.status,
            "gap": plan.solver.gap,
            "bound_s": plan.solver.bound_s,
        },
        "seconds": {**(seconds or {}), **plan.solver.seconds},
        "replicated_ops": len(plan.replicated),
        "coupled": list(plan.coupled),
        "notes": list(plan.notes),
        "pins": dict(plan.pins),
        "runners_up": [_alternative(other) for other in plan.runners_up],
        "front": [_alternative(point) for point in plan.front],
    }


def _alternative(other: Alternative) -> dict[str, Any]:
    return {
        "mesh": _mesh(other.mesh),
        "schedule": other.schedule,
        "virtual_stages": other.virtual_stages,
        "micro_batch_size": other.micro_batch_size,
        "data_parallel": other.data_parallel,
        "recompute": dict(other.recompute),
        "predicted_step_s": other.step_s,
        "peak_bytes": other.peak_bytes,
    }


def _mesh(mesh: Mesh) -> dict[str, int]:
    return {axis: getattr(mesh, axis) for axis in ("pp", "dp", "cp", "tp", "ep")}


def _rank(rank: Breakdown) -> dict[str, Any]:
    """Where a pipeline rank's step goes; all but the hidden communication adds up to it."""
    return {
        "compute": rank.compute_s,
        "recompute": rank.recompute_s,
        "exposed_communication": rank.exposed_s,
        "hidden_communication": rank.hidden_s,
        "optimizer": rank.optimizer_s,
        "bubble": rank.bubble_s,
        "communication": [
            {
                "kind": c.kind, "axis": c.axis, "count": c.count, "bytes": c.num_bytes,
                "seconds": c.seconds, "exposed": c.exposed_s,
            }
            for c in rank.communication
        ],
    }  # fmt: skip


def _memory(memory: Memory) -> dict[str, int]:
    return {
        "weights": memory.parameters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "workspace": memory.workspace,
    }


class Stopwatch:
    """Seconds by phase of what happens outside the planner."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Everything since the last lap was ``phase``."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
