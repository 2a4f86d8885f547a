"""A plan as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autoshard.plan.plan import Alternative, Candidate, Plan
from autoshard.report.breakdown import (
    NOTHING,
    busiest,
    communication_table,
    rank_table,
    rank_unit,
    shown,
)
from autoshard.report.stages import SHARED, memory_table, memory_unit, time_table
from autoshard.report.units import nbytes, percent, seconds

NUM_ALTERNATIVES = 6
FILE_WIDTH = 100
NUM_REPLICATED = 5
BAR_WIDTH = 24


def render(plan: Plan) -> RenderableType:
    """Everything about a plan that fits on a screen."""
    parts: list[RenderableType] = [_summary(plan), *_section("Where the step goes", _time(plan))]
    parts += _communication(plan)
    parts += _section("Pipeline stages, one micro-batch", time_table(plan))
    parts += _section(f"Peak memory of a rank ({memory_unit(plan)})", memory_table(plan))
    if plan.mesh.tp > 1:
        parts += _section(f"Parameters on the {plan.mesh.tp} tensor ranks", _placements(plan))
    if plan.replicated:
        title = "Operations that every tensor rank runs whole (share of compute)"
        parts += _section(title, _replicated(plan))
    parts += _others(plan)
    parts += [Text(f"note: {note}", style="yellow") for note in (*_coupling(plan), *plan.notes)]
    return Group(*parts)


def show(plan: Plan) -> None:
    """Print to the terminal, with colours and width where it has them."""
    console = Console()
    if console.is_terminal:
        console.print(render(plan))
    else:
        print(as_text(plan))


def as_text(plan: Plan, width: int = FILE_WIDTH) -> str:
    """The same without colours, for logs."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(render(plan))
    lines = (line.rstrip() for line in captured.get().splitlines())
    return "\n".join(lines)


def _section(title: str, body: RenderableType) -> list[RenderableType]:
    return [Text(""), Text(title, style="bold"), Padding(body, (0, 0, 0, 2))]


def _plain(**more: object) -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), **more)  # type: ignore[arg-type]


def _summary(plan: Plan) -> Table:
    mesh, prediction, solver = plan.mesh, plan.prediction, plan.solver
    capacity = nbytes(plan.cluster.device.memory_bytes)
    table = _plain(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("model", f"{plan.model} (program {plan.program[:12]})")
    table.add_row("cluster", f"{plan.world_size} x {plan.cluster.device.name}, {capacity} each")
    context = f" x context {mesh.cp}" if mesh.cp > 1 else ""
    experts = f", experts over {mesh.ep} data ranks" if mesh.ep > 1 else ""
    if plan.is_replicated:
        table.add_row("ranks", f"{', '.join(map(str, plan.replicas))} for stages 0, 1, ...")
    table.add_row(
        "mesh", f"pipeline {mesh.pp} x data {mesh.dp}{context} x tensor {mesh.tp}{experts}"
    )
    table.add_row(
        "batch",
        f"{plan.global_batch_size} samples per step = {mesh.dp} data ranks x "
        f"{plan.num_micro_batches} micro-batches of {plan.micro_batch_size}",
    )
    chunks = f" with {plan.virtual_stages} stages per rank" if plan.virtual_stages > 1 else ""
    table.add_row(
        "training",
        f"schedule {plan.schedule}{chunks}, data parallel {plan.data_parallel}, optimizer "
        f"{plan.optimizer}, precision {plan.precision}",
    )
    if plan.staleness:
        late = ", ".join("unbounded" if s is None else str(s) for s in plan.staleness)
        sync = ", vertical sync" if plan.vertical_sync else ""
        versions = ", ".join(str(stage.weight_versions) for stage in plan.stages)
        table.add_row(
            "staleness", f"{late} updates; {versions} version(s) of the weights held{sync}"
        )
    if plan.pins:
        table.add_row("pinned", ", ".join(f"{k}={v}" for k, v in plan.pins.items()))
    table.add_row(
        "predicted",
        f"{seconds(prediction.step_s)} per step, peak {nbytes(prediction.peak_bytes)} per device "
        f"({_origin(prediction.origin)})",
    )
    table.add_row(
        "search",
        f"{solver.status}, gap {percent(solver.gap)} in the declared space; "
        f"planned in {seconds(sum(solver.seconds.values()))}",
    )
    return table


def _origin(origin: Mapping[str, float]) -> str:
    """Where the compute times come from: ``costs analytic``, or the shares of each kind."""
    used = {kind: share for kind, share in origin.items() if share > 0}
    if len(used) == 1:
        return f"costs {next(iter(used))}"
    return "costs " + ", ".join(f"{percent(share)} {kind}" for kind, share in used.items())


def _time(plan: Plan) -> Table:
    step_s = plan.prediction.step_s or 1.0
    table = _plain(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for name, part_s in plan.prediction.parts.items():
        if part_s < NOTHING * step_s:
            continue
        bar = "█" * round(BAR_WIDTH * part_s / step_s)
        table.add_row(name.replace("_", " "), seconds(part_s), percent(part_s / step_s), bar)
    return table


def _communication(plan: Plan) -> list[RenderableType]:
    """What the busiest pipeline rank communicates, and how the ranks differ."""
    found: list[RenderableType] = []
    if not plan.prediction.ranks:
        return found
    rank = busiest(plan)
    if shown(plan, rank):
        where = f" of pipeline rank {rank}" if plan.mesh.pp > 1 else ""
        found += _section(f"Communication{where}, one step", communication_table(plan, rank))
    if plan.mesh.pp > 1:
        found += _section(f"Pipeline ranks, one step ({rank_unit(plan)})", rank_table(plan))
    return found


def _placements(plan: Plan) -> RenderableType:
    """Per layer one row for each state that its parameters have at rest."""
    table = _plain()
    for name in ("layer", "state", "parameters"):
        table.add_column(name, overflow="fold")
    used: set[str] = set()
    for layer, axes in plan.layers.items():
        if layer == SHARED:
            continue
        by_state: dict[str, list[str]] = {}
        for parameter, state in axes["tp"].parameters.items() if "tp" in axes else ():
            by_state.setdefault(state, []).append(parameter)
        for index, (state, names) in enumerate(by_state.items()):
            used.add(state)
            table.add_row("" if index else layer, state, ", ".join(names))
    return Group(table, *(Text(line, style="dim") for line in _legend(used)))


def _legend(states: set[str]) -> Iterator[str]:
    if any(s.startswith("S(") and ";" not in s for s in states):
        yield "S(d): split along dim d"
    if any(";" in s for s in states):
        yield "S(d;a,b,..): split along dim d, each block of a, b, .. on its own"
    if "R" in states:
        yield "R: whole, with the whole gradient on every rank"
    if "V" in states:
        yield "V: whole; gradients are addends, summed over the ranks once per step"


def _replicated(plan: Plan) -> Table:
    """Equal ops of several modules as one row; the smallest rows as one."""
    groups: dict[tuple[str, str], list[str]] = {}
    shares: dict[tuple[str, str], float] = {}
    for op in plan.replicated:
        key = (op.target.removeprefix("aten.").removesuffix(".default"), op.reason)
        groups.setdefault(key, []).append(op.module or op.source.rpartition("/")[2])
        shares[key] = shares.get(key, 0.0) + op.share_of_step
    table = _plain()
    for name in ("share", "op", "where", "why"):
        table.add_column(name, justify="right" if name == "share" else "left")
    ordered = sorted(groups, key=lambda key: -shares[key])
    for key in ordered[:NUM_REPLICATED]:
        table.add_row(percent(shares[key]), key[0], _places(groups[key]), key[1])
    if rest := ordered[NUM_REPLICATED:]:
        number = sum(len(groups[key]) for key in rest)
        together = sum(shares[key] for key in rest)
        table.add_row("", f"and {number} more, together {percent(together)}", "", "")
    return table


def _places(modules: list[str], most: int = 3) -> str:
    names = list(dict.fromkeys(m for m in modules if m))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _coupling(plan: Plan) -> Iterator[str]:
    if not plan.coupled:
        return
    where = ", ".join(plan.coupled[:3])
    if len(plan.coupled) > 3:
        where += f" and {len(plan.coupled) - 3} more"
    if plan.num_micro_batches > 1:
        yield (
            f"samples interact in forward ({where}) and micro-batches were allowed: each "
            "micro-batch sees its own samples only, so results differ from one process"
        )
    else:
        yield (
            f"samples interact in forward ({where}): splitting the batch over ranks stays exact, "
            "micro-batches would change the result and are not used"
        )


def _others(plan: Plan) -> list[RenderableType]:
    """What else there was: runner-up plans, the front, and what was ruled out."""
    found: list[RenderableType] = []
    if plan.runners_up:
        rows = plan.runners_up[:NUM_ALTERNATIVES]
        found += _section("Runner-up plans, of another mesh or schedule", _solved(plan, rows))
    if len(plan.front) > 1:
        title = "Time against memory, the best of the configurations that were solved"
        found += _section(title, _solved(plan, _spread(plan.front)))
    if refused := [c for c in plan.solver.candidates if c.step_s is None]:
        found += _section("Configurations that were ruled out", _refused(refused))
    return found


def _spread(points: Sequence[Alternative]) -> list[Alternative]:
    """At most so many points as are shown, the first and the last among them."""
    last, shown = len(points) - 1, min(NUM_ALTERNATIVES, len(points))
    return [points[round(k * last / max(1, shown - 1))] for k in range(shown)]


def _solved(plan: Plan, rows: Sequence[Alternative]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    left = {"mesh", "schedule", "data parallel", "recomputed"}
    names = ("step", "", "peak", "mesh", "schedule", "data parallel", "recomputed")
    for name in names:
        figure = name in ("step", "", "peak")
        table.add_column(name, justify="left" if name in left else "right", no_wrap=figure)
    for other in rows:
        chunks = f" x{other.virtual_stages}" if other.virtual_stages > 1 else ""
        slower = max(0.0, other.step_s / (plan.prediction.step_s or 1.0) - 1)
        again = [f"{n} {mode}" for mode, n in other.recompute.items() if mode != "none"]
        table.add_row(
            seconds(other.step_s),
            f"{percent(slower)} slower" if slower else "the plan",
            nbytes(other.peak_bytes),
            f"{other.mesh}, batch {other.micro_batch_size}",
            f"{other.schedule}{chunks}",
            other.data_parallel,
            ", ".join(again) or "none",
        )
    return table


def _refused(candidates: Sequence[Candidate]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("mesh", "micro-batch", "schedule", "data parallel", "why not"):
        table.add_column(name, justify="right" if name == "micro-batch" else "left")
    for other in candidates[:NUM_ALTERNATIVES]:
        table.add_row(
            str(other.mesh), str(other.micro_batch_size), other.schedule, other.data_parallel,
            other.reason,
        )  # fmt: skip
    return table
