"""Train every model of the tests' zoo in every way, and compare with the plain model.

``python -m benchmarks.equivalence`` (``make equivalence``) writes docs/equivalence.md; with
``--schedules`` it trains some of the models under every synchronous pipeline schedule instead, and
writes docs/schedules.md. Nothing stops at a failure: what failed, or could not be done and why,
stands in the table. The exit code is 1 if a run was further from the plain model than its
tolerance, or failed for a reason that is no limit of the model.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the zoo, the harness and the ranks

import equivalence as harness  # noqa: E402
import ranks  # noqa: E402
import zoo  # noqa: E402

from autoshard.errors import AutoshardError  # noqa: E402
from autoshard.plan.plan import Plan  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Precision:
    """One way to run a model.

    Attributes:
        lifted: casts to float32 inside the model are lifted.
        rounded: float32 limits what can be had.
        tolerance: of loss, gradients and (unless ``stateless``) the updated state.
    """

    label: str
    dtype: torch.dtype
    tolerance: float
    lifted: bool = False
    rounded: bool = False
    stateless: bool = False

    def worst(self, difference: harness.Difference) -> float:
        state = 0.0 if self.stateless else difference.state
        return max(difference.loss, difference.gradient, state)


EXACT = Precision(label="float64", dtype=torch.float64, tolerance=1e-8)
LIFTED = Precision(label="float64, uncast", dtype=torch.float64, tolerance=1e-8, lifted=True)
CASTING = Precision(label="float64, as it is", dtype=torch.float64, tolerance=1e-6, rounded=True)
SINGLE = Precision(
    label="float32", dtype=torch.float32, tolerance=1e-5, rounded=True, stateless=True
)
CONFIGURATIONS = {**harness.CONFIGURATIONS, **harness.SCHEDULE_CONFIGURATIONS}
OF_SCHEDULES = ("gpt2", "llama", "t5", "unet", "resnet")
"""Ties, casts, skips over stages, many of them, and statistics of batches."""
ROUNDINGS = 10
"""How many times the plain model's own rounding a run may be off, if that is more."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The outcome of one run."""

    model: str
    precision: Precision
    configuration: str
    difference: harness.Difference | None = None
    tolerance: float = 0.0
    plan: Plan | None = None
    refused: str = ""
    failure: str = ""

    @property
    def worst(self) -> float:
        assert self.difference is not None
        return self.precision.worst(self.difference)

    @property
    def good(self) -> bool:
        """Within the tolerance, or refused with a reason that the user is told."""
        if self.difference is None:
            return bool(self.refused)
        return self.worst <= self.tolerance


def precisions(model: str) -> tuple[Precision, ...]:
    """A model that casts to float32 is run as it is and with its casts lifted."""
    if harness.casts(harness.program_of(model, torch.float64)):
        return (LIFTED, CASTING, SINGLE)
    return (EXACT, SINGLE)


def run(pool: ranks.Pool, model: str, precision: Precision, name: str) -> Cell:
    """Plan, train and compare; never raises."""
    where: dict[str, Any] = {"model": model, "precision": precision, "configuration": name}
    try:
        program = harness.program_of(model, precision.dtype, precision.lifted)
        plan = harness.plan_of(program, 4, CONFIGURATIONS[name])
    except AutoshardError as error:
        return Cell(**where, refused=str(error))
    except Exception as error:
        return Cell(**where, failure=f"{type(error).__name__}: {error}")
    try:
        arguments = (model, precision.dtype, program, harness.encoded(plan))
        trained = pool.run(harness.distributed, *arguments)[0]
    except Exception as error:
        return Cell(**where, plan=plan, failure=_last_line(str(error)))
    assert trained is not None
    plain = _reference(model, precision.dtype, precision.lifted)
    found = harness.difference(trained, plain, rounded=precision.rounded)
    return Cell(**where, plan=plan, difference=found, tolerance=_tolerance(model, precision))


@functools.cache
def _reference(model: str, dtype: torch.dtype, lifted: bool) -> harness.Trained:
    return harness.reference(model, dtype, lifted=lifted)


@functools.cache
def _tolerance(model: str, precision: Precision) -> float:
    """Where float32 rounds: at least some times what it does to the plain model itself."""
    if not precision.rounded:
        return precision.tolerance
    exact = harness.in_dtype(_reference(model, torch.float64, True), precision.dtype)
    plain = _reference(model, precision.dtype, precision.lifted)
    own = precision.worst(harness.difference(plain, exact, rounded=True))
    return max(precision.tolerance, ROUNDINGS * own)


def _last_line(text: str) -> str:
    return [line for line in text.strip().splitlines() if line.strip()][-1].strip()


# ------------------------------------------------------------------------------------- the page


def page(cells: Sequence[Cell], configurations: Sequence[str]) -> str:
    """docs/equivalence.md."""
    table = {(c.model, c.precision.label, c.configuration): c for c in cells}
    rows = list(dict.fromkeys((c.model, c.precision.label) for c in cells))
    notes: dict[str, int] = {}
    head = f"| model | precision | {' | '.join(configurations)} |"
    lines = [head, "|---" * (len(configurations) + 2) + "|"]
    for model, label in rows:
        texts = [_text(table.get((model, label, c)), notes) for c in configurations]
        lines.append(f"| {model} | {label} | {' | '.join(texts)} |")
    listed = [f"{number}. {text}" for text, number in notes.items()]
    good = sum(c.good for c in cells)
    return "\n".join(
        [_INTRODUCTION, *lines, "", f"{good} of {len(cells)} runs are as they should be.", "",
         *(["Where there is a number in brackets:", "", *listed, ""] if listed else []),
         _LAYOUTS, *_layouts(cells, configurations), ""]
    )  # fmt: skip


def _text(cell: Cell | None, notes: dict[str, int]) -> str:
    if cell is None:
        return ""
    if cell.difference is not None:
        number = f"{cell.worst:.0e}"
        return number if cell.good else f"**{number}** {_note(_where(cell), notes)}"
    text = _note(cell.refused or cell.failure, notes)
    return f"refused {text}" if cell.refused else f"**failed** {text}"


def _where(cell: Cell) -> str:
    assert cell.difference is not None
    return "; ".join(f"{kind}: {name}" for kind, name in cell.difference.where.items())


def _note(text: str, notes: dict[str, int]) -> str:
    flat = " ".join(text.split()).replace("|", "\\|")
    return f"[{notes.setdefault(flat, len(notes) + 1)}]"


def _layouts(cells: Iterable[Cell], configurations: Sequence[str]) -> list[str]:
    """Per model and configuration what the plan does, as evidence that something is distributed."""
    first: dict[tuple[str, str], Plan] = {}
    models: dict[str, None] = {}
    for cell in cells:
        models.setdefault(cell.model)
        if cell.plan is not None:
            first.setdefault((cell.model, cell.configuration), cell.plan)
    lines = [
        f"| model | {' | '.join(configurations)} |",
        "|---" * (len(configurations) + 1) + "|",
    ]
    for model in models:
        texts = [layout(first[model, c]) if (model, c) in first else "" for c in configurations]
        lines.append(f"| {model} | {' | '.join(texts)} |")
    return lines


def layout(plan: Plan) -> str:
    """``dp2 tp2, 4 x 1, 12 split``."""
    mesh = plan.mesh
    axes = [f"{a}{n}" for a, n in (("pp", mesh.pp), ("dp", mesh.dp), ("tp", mesh.tp)) if n > 1]
    parts = [" ".join(axes) or "one rank", f"{plan.num_micro_batches} x {plan.micro_batch_size}"]
    if mesh.dp > 1:
        parts.append(plan.data_parallel)
    if mesh.pp > 1:
        parts.append(f"{plan.schedule} x{plan.virtual_stages}".removesuffix(" x1"))
    if mesh.tp > 1:
        parts.append(f"{num_split(plan)} split")
    modes = {s.recompute.mode for stage in plan.stages for s in stage.segments} - {"none"}
    return ", ".join([*parts, *sorted(modes)])


def num_split(plan: Plan) -> int:
    """Parameters that lie split over the tensor axis, in distinct layers."""
    return sum(
        state.startswith("S")
        for axes in plan.layers.values()
        if "tp" in axes
        for state in axes["tp"].parameters.values()
    )


_INTRODUCTION = """\
# Equivalence

`python -m benchmarks.equivalence` writes this page (with `--schedules` that of the synchronous
pipeline schedules; for the others see [stale-schedules.md](stale-schedules.md)).
Small versions of every architecture of the tests' zoo are
trained for 3 AdamW steps on 4 processes (gloo, CPU), each of which holds other samples, and by the
plain model on one process. A cell is the largest difference between the two over all steps, of

* the loss,
* every gradient, relative to the largest element of its tensor (or to 1e-3, if all are smaller),
* every updated parameter and buffer.

In float64 that must be at most 1e-8. Many models cast parts of themselves to float32 whatever their
parameters are, and two correct runs then differ by float32's rounding. Such a model is run twice:
with these casts lifted in both runs ("uncast"), so that no error can hide behind rounding, and as
it is. There, and in float32, elements are compared relative to `1 + |element|`, with a tolerance
of 1e-6 (in float32 1e-5, loss and gradients), or 10 times the rounding of the plain model itself
(how far it is from the plain model in float64 throughout), if that is more.

A number in bold is beyond its tolerance. "Refused" is an error message at planning, such as for a
model with too few parts for four stages. Samples that interact in forward (batch norm, in-batch
negatives) allow one micro-batch only: such plans split the batch over ranks and not in time.
"""

_LAYOUTS = """\
## What was run

For each cell above: the mesh, micro-batches per rank and step x samples in each, the data-parallel
mode, the schedule, how many parameters of distinct layers lie split over the tensor axis, and
recomputation. Plans are for links much faster than the device, so that splitting always pays.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.equivalence", description=__doc__)
    parser.add_argument("--models", nargs="+", metavar="MODEL")
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, metavar="NAME")
    parser.add_argument("--schedules", action="store_true", help="every synchronous schedule")
    parser.add_argument("--precisions", nargs="+", metavar="NAME", help="part of a label")
    parser.add_argument("--out", type=Path, help="the page to write")
    options = parser.parse_args(arguments)
    models, names, out = _defaults(schedules=options.schedules)
    options.models = options.models or models
    options.configurations = options.configurations or names
    options.out = options.out or out
    torch.set_num_threads(1)
    cells: list[Cell] = []
    pool = ranks.Pool(4)
    try:
        for model in options.models:
            for precision in precisions(model):
                if options.precisions and precision.label not in options.precisions:
                    continue
                for name in options.configurations:
                    start = time.monotonic()
                    cells.append(run(pool, model, precision, name))
                    print(_progress(cells[-1], time.monotonic() - start), flush=True)
            options.out.write_text(page(cells, options.configurations))
    finally:
        pool.close()
    return 0 if all(c.good for c in cells) else 1


def _defaults(*, schedules: bool) -> tuple[list[str], list[str], Path]:
    """Models, configurations and page."""
    if schedules:
        names = list(harness.SCHEDULE_CONFIGURATIONS)
        return list(OF_SCHEDULES), names, ROOT / "docs" / "schedules.md"
    return list(zoo.names()), list(harness.CONFIGURATIONS), ROOT / "docs" / "equivalence.md"


def _progress(cell: Cell, seconds: float) -> str:
    notes: dict[str, int] = {}
    mark = "ok " if cell.good else "BAD"
    text = _text(cell, notes)
    detail = "; ".join(notes)
    shown = layout(cell.plan) if cell.plan else ""
    head = f"{mark} {cell.model} [{cell.precision.label}] {cell.configuration}: {text}"
    return f"{head} ({shown}) {detail} {seconds:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
