"""How long planning takes, as a user sees it: whole processes, from import to saved plan.

    python -m benchmarks.planning [NAME ...] [--growth] [--published] [--repeat N] [--json FILE]

Each case is the command ``autoshard plan`` in a process of its own, on one thread. The table shows
wall and CPU seconds, the largest resident memory, and the seconds of each phase; the goals are
those for 2 idle cores. ``--growth`` plans one model for 8 to 16,384 devices, and others of 8 to
512 layers for 1,024. ``--published`` plans the cases that have a published hand-tuned configuration
with that configuration pinned, too, and shows the throughput of both beside the published one and
beside what is predicted for that configuration on its authors' software, which has more
fused kernels and keeps less in memory than the runtime here.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.published.predict import Prediction, Predictor
from benchmarks.published.rows import Row
from benchmarks.throughput import Decoder, Throughput, of_step, predicted
from benchmarks.throughput import table as throughput_table

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("import", "build", "capture", "batch", "sharding", "bounds", "costs", "stages", "front")


@dataclass(frozen=True, slots=True, kw_only=True)
class HandTuned:
    """A published configuration of a case.

    Attributes:
        pins: what was published of it.
        row: the same as a row of published runs, on its authors' software.
        throughput: what its authors measured.
    """

    decoder: Decoder
    pins: tuple[str, ...]
    row: Row
    throughput: Throughput


@dataclass(frozen=True, slots=True)
class Case:
    """A planning job, and how long it may take."""

    name: str
    options: tuple[str, ...]
    goal_s: float
    goal_bytes: int | None = None
    hand_tuned: HandTuned | None = None


def _case(
    name: str,
    model: str,
    world_size: int,
    *more: str,
    batch: int,
    goal_s: float,
    goal_bytes: int | None = None,
    hand_tuned: HandTuned | None = None,
) -> Case:
    planned = ("--model", model, "--world-size", str(world_size), "--precision", "bf16")
    options = (*planned, "--global-batch-size", str(batch), *more)
    return Case(name, options, goal_s, goal_bytes, hand_tuned)


# Grattafiori et al. 2024, table 4 and section 3.3.2 (chunks of one layer, no recomputation); what
# the runtime here recomputes under an interleaved schedule is left to the planner.
_LLAMA = HandTuned(
    decoder=Decoder(
        layers=126, hidden=16384, vocabulary=128256, sequence=8192,
        layer_weights=16384 * (2 * 16384 + 2 * 1024 + 3 * 53248),
    ),
    pins=("tp=8", "cp=1", "pp=16", "dp=128", "micro_batch_size=1"),
    row=Row(
        id="llama3-405b", family="llama3", accelerator="H100-SXM", gpus=16384, gpus_per_node=8,
        inter_node_link="400 Gb/s RoCE, 50GB/s/GPU", status="ok", year=2024, layers=126,
        hidden=16384, heads=128, kv_heads=8, ffn=53248, ffn_gated=1, vocab=128256, seq=8192,
        global_batch=2048, microbatch=1, tp=8, pp=16, vpp=8, dp=128, zero_stage=1, seq_parallel=1,
        recompute="none", schedule="interleaved-1f1b", precision="bf16",
    ),
    throughput=Throughput(
        case="llama3-405b-16384", plan="published", step_s=None, model_flops_per_s="380-430",
        hardware_flops_per_s="-", layout="tp=8 cp=1 pp=16 dp=128 (Grattafiori et al. 2024)",
    ),
)  # fmt: skip
# Narayanan et al. 2021, table 1, last row, with the interleaved schedule of section 2.2.
_GPT = HandTuned(
    decoder=Decoder(
        layers=128, hidden=25600, vocabulary=51200, sequence=2048, layer_weights=12 * 25600**2
    ),
    pins=(
        "tp=8", "pp=64", "dp=6", "micro_batch_size=1", "schedule=interleaved-1f1b",
        "virtual_stages=2", "recompute=full",
    ),
    row=Row(
        id="gpt3-1t", family="ptdp-table1", accelerator="A100-80", gpus=3072, gpus_per_node=8,
        inter_node_link="8x HDR200, 25GB/s/GPU", status="ok", year=2021, layers=128, hidden=25600,
        heads=160, kv_heads=160, ffn=102400, vocab=51200, seq=2048, global_batch=3072,
        microbatch=1, tp=8, pp=64, vpp=1, dp=6, zero_stage=0, seq_parallel=0, recompute="full",
        schedule="1f1b", precision="fp16",
    ),
    throughput=Throughput(
        case="gpt3-1t-3072", plan="published", step_s=None, model_flops_per_s="-",
        hardware_flops_per_s="163", layout="tp=8 pp=64 dp=6 (Narayanan et al. 2021)",
    ),
)  # fmt: skip

_LONG = ("--sequence-length", "8192")
CASES = (
    Case("gpt2-8", ("--model", "gpt2", "--world-size", "8"), 10.0),
    _case(
        "llama3-8b-64", "llama3-8b", 64, *_LONG, batch=512, goal_s=20.0, goal_bytes=3 * 2**29
    ),
    # A step of 16 Mi tokens: Grattafiori et al. 2024, table 4.
    _case(
        "llama3-405b-16384", "llama3-405b", 16384, *_LONG, batch=2048, goal_s=40.0,
        goal_bytes=2 * 10**9, hand_tuned=_LLAMA,
    ),
    # Narayanan et al. 2021, table 1, last row.
    _case(
        "gpt3-1t-3072", "gpt3-1t", 3072, "--cluster", "a100-80", batch=3072, goal_s=40.0,
        goal_bytes=2 * 10**9, hand_tuned=_GPT,
    ),
)  # fmt: skip
WORLD_SIZES = (8, 64, 512, 4096, 16384)
DEPTHS = (8, 32, 126, 512)


def growth(folder: Path) -> list[Case]:
    """The same model on more and more devices, and on 1,024 devices at more and more layers."""
    cases = [
        _case(f"world {n}", "llama3-8b", n, *_LONG, batch=8 * n, goal_s=40.0) for n in WORLD_SIZES
    ]
    for depth in DEPTHS:
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
            "intermediate_size": 14336, "num_hidden_layers": depth, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
        }  # fmt: skip
        path = folder / f"llama-{depth}-layers.json"
        path.write_text(json.dumps(config))
        cases.append(_case(f"{depth} layers", str(path), 1024, *_LONG, batch=8192, goal_s=40.0))
    return cases


@dataclass(frozen=True, slots=True)
class Result:
    """One run of a case.

    Attributes:
        phases: seconds by phase; ``other`` is the rest of the wall time.
        step_s, gap: what the plan predicts and how far it may be from the best of the declared
            space, to see that speed was not bought with a worse plan.
        mesh: degrees of the plan.
        summary: what the command says of the plan.
    """

    name: str
    wall_s: float
    cpu_s: float
    peak_bytes: int
    phases: dict[str, float]
    step_s: float
    gap: float
    mesh: dict[str, int]
    goal_s: float
    goal_bytes: int | None
    summary: dict[str, object]


def run(case: Case) -> Result:
    """Plan in a child process and measure it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "autoshard",
            "plan",
            *case.options,
            "--json",
            "--save",
            str(Path(folder) / "plan.json"),
        ]
        read, write = os.pipe()
        start = time.perf_counter()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(
            command, stdout=write, stderr=subprocess.PIPE, cwd=ROOT, env=environment
        )
        os.close(write)
        assert child.stderr is not None
        with os.fdopen(read) as output:
            text = output.read()
        errors = child.stderr.read().decode()
        _, status, usage = os.wait4(child.pid, 0)
        wall_s = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}:\n{errors}")
    return _result(case, json.loads(text), wall_s, usage)


def _result(
    case: Case, summary: dict[str, object], wall_s: float, usage: resource.struct_rusage
) -> Result:
    phases: dict[str, float] = dict(summary["seconds"])  # type: ignore[call-overload]
    phases["other"] = wall_s - sum(phases.values())
    unit = 1 if sys.platform == "darwin" else 1024
    return Result(
        name=case.name,
        wall_s=wall_s,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * unit,
        phases=phases,
        step_s=float(summary["predicted_step_s"]),  # type: ignore[arg-type]
        gap=float(summary["solver"]["gap"]),  # type: ignore[index]
        mesh=dict(summary["mesh"]),  # type: ignore[call-overload]
        goal_s=case.goal_s,
        goal_bytes=case.goal_bytes,
        summary=summary,
    )


def throughput(case: Case, automatic: Result) -> list[Throughput]:
    """The automatic plan of a case, its hand-tuned one as the planner prices it, and its authors'.

    The hand-tuned one is a planning job of its own with more choices pinned.
    """
    hand = case.hand_tuned
    assert hand is not None, "only cases with a published configuration are compared"
    pins = tuple(option for pin in hand.pins for option in ("--pin", pin))
    pinned = run(replace(case, options=(*case.options, *pins)))
    return [
        predicted(case.name, "automatic", hand.decoder, automatic.summary),
        predicted(case.name, "hand-tuned", hand.decoder, pinned.summary),
        _on_its_software(case.name, hand),
        hand.throughput,
    ]


def _on_its_software(case: str, hand: HandTuned) -> Throughput:
    """What is predicted as for a row of :mod:`benchmarks.published`."""
    row, result = hand.row, Predictor().predict(hand.row)
    assert isinstance(result, Prediction), result
    assert row.global_batch is not None and row.layers is not None
    again = row.layers if row.recompute == "full" else 0
    return of_step(
        case, "hand-tuned, its software", result.layout, result.time_s, hand.decoder,
        row.global_batch, row.gpus, again,
    )  # fmt: skip


def table(results: list[Result]) -> Table:
    """One row per case: the whole, its goal, and the phases."""
    columns = [*PHASES, "other"]
    found = Table(title="Planning, whole process", title_justify="left")
    names = ("case", "wall s", "goal s", "CPU s", "peak GiB", *columns, "step s", "gap", "plan")
    for name in names:
        found.add_column(name, justify="left" if name in ("case", "plan") else "right")
    for r in results:
        found.add_row(
            r.name,
            f"{r.wall_s:.1f}",
            f"{r.goal_s:.0f}",
            f"{r.cpu_s:.1f}",
            f"{r.peak_bytes / 2**30:.2f}",
            *(f"{r.phases.get(c, 0.0):.1f}" for c in columns),
            f"{r.step_s:.3g}",
            f"{100 * r.gap:.1f} %",
            " ".join(f"{axis}={n}" for axis, n in r.mesh.items() if n > 1),
        )
    return found


def main() -> int:
    """Run the cases; 0 whether or not they meet their goals, since the machine may be busy."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"cases to run: {', '.join(c.name for c in CASES)}; default all",
    )
    parser.add_argument("--growth", action="store_true", help="over world sizes and depths instead")
    parser.add_argument(
        "--published", action="store_true", help="compare throughput with hand-tuned plans, too"
    )
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="keep the fastest of N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    args = parser.parse_args()
    unknown = set(args.names) - {c.name for c in CASES}
    if unknown:
        parser.error(f"unknown case {', '.join(sorted(unknown))}")
    chosen = [c for c in CASES if not args.names or c.name in args.names]
    with tempfile.TemporaryDirectory() as folder:
        cases = growth(Path(folder)) if args.growth else chosen
        results = []
        for case in cases:
            results.append(min((run(case) for _ in range(args.repeat)), key=lambda r: r.wall_s))
            print(f"{case.name}: {results[-1].wall_s:.1f} s", file=sys.stderr, flush=True)
    console = Console()
    console = console if console.is_terminal else Console(width=180)
    console.print(table(results))
    rows: list[Throughput] = []
    if args.published:
        pairs = zip(cases, results, strict=True)
        rows = [row for case, r in pairs if case.hand_tuned for row in throughput(case, r)]
        console.print(throughput_table(rows))
    if args.json:
        found = [asdict(r) for r in results] + [asdict(row) for row in rows]
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
