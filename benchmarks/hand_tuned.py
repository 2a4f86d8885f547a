"""The automatic plan against every plan that a person would try by hand, measured.

For each model and number of processes: measure this machine, pin every mesh with the micro-batches
and recompute that a person would try, plan once without pins, and train all of them in one
``torchrun``, taking turns, so that whatever else the machine does hits all of them alike. Plans
are made with their own ops measured (``--analytic``: by the cluster's figures alone).
Run ``python -m benchmarks.hand_tuned`` (``--quick`` for one model and fewer plans).
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
AUTOMATIC = "automatic"
STEPS_PER_TURN = 2
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One plan: what it is, and what a step takes.

    Attributes:
        to_best: times the seconds of the best plan by hand; the median over rounds of their ratio
            in the same round, which an unsteady machine disturbs least.
        spread: between the slowest and the fastest round, relative to the median.
    """

    name: str
    mesh: str
    details: str
    predicted_s: float
    measured_s: float
    to_best: float
    spread: float


def main() -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.hand_tuned")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument("--rounds", type=int, default=7, help="turns of every plan")
    parser.add_argument("--quick", action="store_true", help="one model, meshes only, 3 turns")
    parser.add_argument("--analytic", action="store_true", help="do not measure single ops")
    parser.add_argument("--json", action="store_true", help="print all rows as JSON")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if args.rank:
        _measure_on_rank(args.rank, args.rounds)
        return 0
    models = args.models[:1] if args.quick else args.models
    rounds = min(args.rounds, 3) if args.quick else args.rounds
    costs = None if args.analytic else "measured"
    results: dict[str, Any] = {}
    for processes in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            cluster = measured_cluster(Path(folder), processes)
            for model in models:
                rows = compare(
                    model, processes, cluster, Path(folder), rounds, args.quick, costs=costs
                )
                results[f"{model} on {processes}"] = _summary(rows)
                if not args.json:
                    _show(model, processes, rows)
    if args.json:
        print(json.dumps(results, indent=1))
    return 0


# -- plans ----------------------------------------------------------------------------------------


def by_hand(processes: int, batch_size: int, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and pins of what a person would try."""
    for tp in _divisors(processes):
        for pp in _divisors(processes // tp):
            dp = processes // tp // pp
            axes = {"dp": dp, "tp": tp, "pp": pp}
            name = " x ".join(f"{a}{n}" for a, n in axes.items() if n > 1)
            local = batch_size // dp
            for parts in (1,) if pp == 1 else (pp, 2 * pp):
                size = {"micro_batch_size": local // parts}
                pins = {**axes, **size, "recompute": "none", "data_parallel": "ddp"}
                yield f"{name}, {parts} micro-batches" if parts > 1 else name, pins
                if quick:
                    break
            if quick:
                continue
            if pp == 1:
                yield f"{name}, 2 micro-batches", {**pins, "micro_batch_size": local // 2}
            yield f"{name}, recompute", {**pins, "recompute": "full"}
            if dp > 1:
                yield f"{name}, ZeRO-3", {**pins, "data_parallel": "zero3"}


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _plans(
    program: Any, cluster: Any, processes: int, quick: bool, costs: str | None
) -> dict[str, Any]:
    from autoshard.errors import AutoshardError
    from autoshard.options import Constraints
    from autoshard.plan.search import find_plan

    found: dict[str, Any] = {}
    everything = [(AUTOMATIC, {}), *by_hand(processes, program.batch_size, quick)]
    for name, pins in everything:
        try:
            plan = find_plan(
                program, cluster=cluster, world_size=processes, constraints=Constraints.of(pins),
                costs=costs,
            )  # fmt: skip
        except AutoshardError as error:  # a mesh that the model has no room for
            print(f"  {name}: {error}", file=sys.stderr)
            continue
        known = {_choices(p) for n, p in found.items() if n != AUTOMATIC}
        if _choices(plan) not in known:  # recompute where there are no layers changes nothing
            found[name] = plan
    return found


# -- measuring ------------------------------------------------------------------------------------


def measured_cluster(folder: Path, processes: int) -> Any:
    """This machine as each of ``processes`` sees it, all of them measuring at once."""
    from autoshard.cluster import Cluster

    path = folder / f"machine-{processes}.json"
    _torchrun(processes, "autoshard", "profile", str(path))
    return Cluster.load(path)


def compare(
    model: str,
    processes: int,
    cluster: Any,
    folder: Path,
    rounds: int,
    quick: bool,
    *,
    costs: str | None = None,
) -> list[Row]:
    """Every plan by hand and the automatic one, trained in turns.

    Args:
        costs: as :func:`autoshard.compile` takes them.
    """
    from autoshard.capture import capture

    built, batch, loss_fn = MODELS[model]()
    program = capture(built, example_inputs=batch, loss_fn=loss_fn, model_name=model)
    start = time.perf_counter()
    plans = _plans(program, cluster, processes, quick, costs)
    print(
        f"{model} on {processes}: {len(plans)} plans in {time.perf_counter() - start:.0f} s",
        file=sys.stderr,
    )
    work = folder / f"{model}-{processes}"
    work.mkdir()
    (work / "program.pickle").write_bytes(pickle.dumps((model, program, plans)))
    _torchrun(processes, "benchmarks.hand_tuned", "--rank", str(work), "--rounds", str(rounds))
    seconds: dict[str, list[float]] = json.loads((work / "seconds.json").read_text())
    by_hand = (name for name in plans if name != AUTOMATIC)
    best = min(by_hand, key=lambda name: statistics.median(seconds[name]))
    rows = (_row(name, plans, seconds[name], seconds[best]) for name in plans)
    return sorted(rows, key=lambda row: row.to_best)


def _row(name: str, plans: dict[str, Any], seconds: list[float], best: list[float]) -> Row:
    plan = plans[name]
    mesh, middle = plan.mesh, statistics.median(seconds)
    modes = {s.recompute.mode for stage in plan.stages for s in stage.segments} - {"none"}
    details = [f"{plan.num_micro_batches} micro-batches" if plan.num_micro_batches > 1 else ""]
    details += [plan.data_parallel if mesh.dp > 1 else "", *(f"recompute {m}" for m in modes)]
    if name == AUTOMATIC:
        same = (n for n, p in plans.items() if n != AUTOMATIC and _choices(p) == _choices(plan))
        details += [f"the same as {other}" for other in same]
    return Row(
        name=name,
        mesh=f"dp{mesh.dp} tp{mesh.tp} pp{mesh.pp}",
        details=", ".join(filter(None, details)),
        predicted_s=plan.prediction.step_s,
        measured_s=middle,
        to_best=statistics.median(a / b for a, b in zip(seconds, best, strict=True)),
        spread=(max(seconds) - min(seconds)) / middle,
    )


def _choices(plan: Any) -> str:
    """What makes two plans run alike, as text."""
    stages = [stage.segments for stage in plan.stages]
    how = (plan.mesh, plan.micro_batch_size, plan.schedule, plan.data_parallel)
    return repr((how, plan.layers, stages))


def _torchrun(processes: int, module: str, *arguments: str) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={processes}", "-m", module, *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"}
    # What ranks print must not mix with a table or JSON.
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=sys.stderr)


def _measure_on_rank(work: Path, rounds: int) -> None:
    """One of the processes: every plan in turn, in another order each round."""
    import torch
    import torch.distributed as dist

    from autoshard.parallel import Parallel

    model, program, plans = pickle.loads((work / "program.pickle").read_bytes())
    torch.set_num_threads(1)
    built, batch, _ = MODELS[model]()
    trained = {}
    for name, plan in plans.items():
        parallel = Parallel(built, program, plan, optimizer="adamw")
        local = parallel.local_batch(batch)
        parallel.step(local)  # the first step sets up groups and buffers
        trained[name] = (parallel, local)
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    names = list(plans)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            parallel, local = trained[name]
            dist.barrier()
            start = time.perf_counter()
            for _ in range(STEPS_PER_TURN):
                parallel.step(local)
            slowest = torch.tensor([(time.perf_counter() - start) / STEPS_PER_TURN])
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            seconds[name].append(slowest.item())
    if dist.get_rank() == 0:
        (work / "seconds.json").write_text(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


# -- printing -------------------------------------------------------------------------------------


def _summary(rows: list[Row]) -> dict[str, Any]:
    automatic = next(r for r in rows if r.name == AUTOMATIC)
    best = min((r for r in rows if r.name != AUTOMATIC), key=lambda r: r.measured_s)
    return {
        "rows": [asdict(r) for r in rows],
        "best_by_hand": best.name,
        "automatic_to_best": automatic.to_best,
    }


def _show(model: str, processes: int, rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    summary = _summary(rows)
    table = Table(title=f"{model} on {processes} processes", title_justify="left")
    for column, justify in (("plan", "left"), ("mesh", "left"), ("details", "left"),
                            ("predicted ms", "right"), ("measured ms", "right"),
                            ("to best", "right"), ("spread", "right")):  # fmt: skip
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(
            row.name, row.mesh, row.details, f"{1e3 * row.predicted_s:.1f}",
            f"{1e3 * row.measured_s:.1f}", f"{row.to_best:.2f}", f"{row.spread:.0%}",
            style="bold" if row.name == AUTOMATIC else "",
        )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    console.print(
        f"the automatic plan takes {summary['automatic_to_best']:.2f} times as long as the best "
        f"by hand ({summary['best_by_hand']})"
    )


# -- models ---------------------------------------------------------------------------------------


def gpt2() -> Any:
    """Four layers of width 256: much work per parameter."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(SEED)
    config = GPT2Config(
        n_layer=4, n_embd=256, n_head=4, vocab_size=1024, n_positions=256, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    ids = torch.randint(0, 1024, (8, 256))
    return GPT2LMHeadModel(config).train(), {"input_ids": ids, "labels": ids}, None


def wide_mlp() -> Any:
    """Eight wide layers on few samples: many parameters for little work."""
    import torch
    from torch import nn

    torch.manual_seed(SEED)
    width = 1024
    layers = [m for _ in range(8) for m in (nn.Linear(width, width), nn.GELU())]
    model = nn.Sequential(*layers, nn.Linear(width, 16)).train()
    batch = (torch.randn(64, width), torch.randint(0, 16, (64,)))
    return model, batch, lambda out, batch: nn.functional.cross_entropy(out, batch[1])


MODELS = {"gpt2": gpt2, "wide-mlp": wide_mlp}


if __name__ == "__main__":
    sys.exit(main())
