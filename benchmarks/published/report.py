"""What is printed and written: tables, a scatter of predicted against measured, an HTML page."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment
from rich.console import Console
from rich.table import Table

from benchmarks.published.metrics import Scores, by_family, memory_error, scores, time_error
from benchmarks.published.predict import Outcome, Prediction, Skipped

NUM_WORST = 20
Cells = tuple[str, ...]

COLUMNS = ("family", "n", "skipped", "timed", "error", "abs error", "p90", "regret", "max", "tau",
    "oom right", "oom caught", "memory",
)  # fmt: skip
EXPLANATION = """\
error: median of predicted / measured step time - 1 (below 0: predicted too fast); abs error and
p90: median and 90th percentile of its size, over rows with status ok and trust A or B. regret: by
how much the layout that was predicted to be the fastest of its rank group is slower than the
fastest measured, mean and maximum over groups; tau: Kendall's, mean over groups. oom right: share
of rows whose fitting or not was predicted; oom caught: share of the rows out of memory. memory:
median size of the error of peak memory."""


def family_cells(outcomes: Sequence[Outcome]) -> list[Cells]:
    """One line of cells per family, and one for all."""
    groups = by_family(outcomes)
    lines = [_cells(name, scores(group)) for name, group in sorted(groups.items())]
    return [*lines, _cells("all", scores(outcomes))]


def _cells(name: str, found: Scores) -> Cells:
    return (
        name, str(found.n), str(found.n_skipped), str(found.n_timed),
        _percent(found.time_median_rel_err, signed=True),
        _percent(found.time_median_abs_rel_err), _percent(found.time_p90_abs_rel_err),
        _percent(found.regret_mean), _percent(found.regret_max),
        "" if found.kendall_tau_mean is None else f"{found.kendall_tau_mean:.2f}",
        _percent(found.confusion.accuracy), _percent(found.confusion.recall),
        _percent(found.memory_median_abs_rel_err),
    )  # fmt: skip


def _percent(share: float | None, *, signed: bool = False) -> str:
    if share is None:
        return ""
    return f"{100 * share:+.1f} %" if signed else f"{100 * share:.1f} %"


WORST_COLUMNS = ("row", "layout", "measured s", "predicted s", "error", "where the time goes")


def worst_cells(outcomes: Sequence[Outcome]) -> list[Cells]:
    """The rows whose step time is predicted worst."""
    judged = [(abs(e), e, o) for o in outcomes if (e := time_error(o)) is not None]
    lines: list[Cells] = []
    for _, error, outcome in sorted(judged, key=lambda item: -item[0])[:NUM_WORST]:
        result = outcome.result
        assert isinstance(result, Prediction) and outcome.row.time_s is not None
        lines.append(
            (outcome.row.id, result.layout, f"{outcome.row.time_s:.4g}", f"{result.time_s:.4g}",
             _percent(error, signed=True), _shares(result))
        )  # fmt: skip
    return lines


def _shares(result: Prediction) -> str:
    parts = sorted(result.parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{k} {100 * v / result.time_s:.0f} %" for k, v in parts if v)


def skipped_cells(outcomes: Sequence[Outcome]) -> list[Cells]:
    """Why rows have no prediction, most frequent first: family, reason, how many."""
    reasons = Counter(
        (o.row.family, o.result.reason) for o in outcomes if isinstance(o.result, Skipped)
    )
    return [(family, reason, str(n)) for (family, reason), n in reasons.most_common()]


def ranking_cells(outcomes: Sequence[Outcome]) -> list[Cells]:
    """Every rank group, worst regret first."""
    found = sorted(scores(outcomes).rankings, key=lambda r: -r.regret)
    return [
        (r.group, str(r.num_rows), _percent(r.regret), "" if r.tau is None else f"{r.tau:.2f}")
        for r in found
    ]


def confusion_cells(outcomes: Sequence[Outcome]) -> list[Cells]:
    """Measured by predicted."""
    found = scores(outcomes).confusion
    return [
        ("fits", str(found.fits_fits), str(found.fits_oom)),
        ("out of memory", str(found.oom_fits), str(found.oom_oom)),
    ]


def sections(outcomes: Sequence[Outcome]) -> list[tuple[str, Cells, list[Cells]]]:
    """Everything that is shown: title, columns, lines."""
    return [
        ("Published runs, predicted", COLUMNS, family_cells(outcomes)),
        ("Out of memory", ("measured", "predicted to fit", "predicted not to"),
         confusion_cells(outcomes)),
        ("Rank groups", ("group", "rows", "regret", "tau"), ranking_cells(outcomes)),
        (f"Worst {NUM_WORST} step times", WORST_COLUMNS, worst_cells(outcomes)),
        ("Not predicted", ("family", "reason", "rows"), skipped_cells(outcomes)),
    ]  # fmt: skip


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print the tables."""
    for title, columns, lines in sections(outcomes):
        if not lines:
            continue
        table = Table(title=title, title_justify="left", header_style="bold")
        text = {"family", "row", "layout", "reason", "group", "measured", "where the time goes"}
        for name in columns:
            table.add_column(name, justify="left" if name in text else "right", overflow="fold")
        for line in lines:
            table.add_row(*line, style="bold" if line[0] == "all" else None)
        console.print(table)
    console.print(EXPLANATION, style="dim")


def as_json(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """``{"all": {...}, "families": {name: {...}}}``."""
    groups = by_family(outcomes)
    return {
        "all": scores(outcomes).as_json(),
        "families": {name: scores(group).as_json() for name, group in groups.items()},
    }


def write_json(outcomes: Sequence[Outcome], path: Path) -> None:
    """The figures for machines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_json(outcomes), indent=2) + "\n", encoding="utf-8")


def write_pages(outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """``scatter.png``, ``index.html`` and ``rows.json`` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    image = scatter(outcomes)
    (folder / "scatter.png").write_bytes(image)
    page = Environment(autoescape=True).from_string(_PAGE).render(
        sections=sections(outcomes), explanation=EXPLANATION,
        image=base64.b64encode(image).decode(),
    )  # fmt: skip
    (folder / "index.html").write_text(page, encoding="utf-8")
    lines = [_as_record(outcome) for outcome in outcomes]
    (folder / "rows.json").write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    return [folder / name for name in ("scatter.png", "index.html", "rows.json")]


def _as_record(outcome: Outcome) -> Mapping[str, object]:
    row, result = outcome.row, outcome.result
    known = {
        "id": row.id, "family": row.family, "rank_group": row.rank_group, "status": row.status,
        "trust": row.trust, "measured_s": row.time_s, "memory_gb": row.memory_gb,
    }  # fmt: skip
    if isinstance(result, Skipped):
        return {**known, "skipped": result.reason}
    return {
        **known, "predicted_s": result.time_s, "time_error": time_error(outcome),
        "peak_bytes": result.peak_bytes, "usable_bytes": result.usable_bytes, "fits": result.fits,
        "memory_error": memory_error(outcome), "layout": result.layout, "parts": result.parts,
    }  # fmt: skip


def scatter(outcomes: Sequence[Outcome]) -> bytes:
    """Predicted against measured step time, both on logarithmic scales, as a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.add_subplot()
    groups: dict[str, list[tuple[float, float]]] = {}
    for outcome in outcomes:
        if time_error(outcome) is not None and isinstance(outcome.result, Prediction):
            assert outcome.row.time_s is not None
            name = outcome.row.family.split("-")[0]
            groups.setdefault(name, []).append((outcome.row.time_s, outcome.result.time_s))
    markers = "osD^v<>Pp*hX"
    for index, (name, points) in enumerate(sorted(groups.items())):
        axes.scatter(
            [x for x, _ in points], [y for _, y in points], s=18, alpha=0.7,
            marker=markers[index % len(markers)], label=f"{name} ({len(points)})",
        )  # fmt: skip
    every = [value for points in groups.values() for pair in points for value in pair]
    if every:
        ends = [min(every) / 1.3, max(every) * 1.3]
        axes.plot(ends, ends, color="black", linewidth=1)
        for factor in (1.1, 1 / 1.1):
            axes.plot(ends, [factor * e for e in ends], color="black", linewidth=0.5, ls="--")
        axes.legend(fontsize=8, ncols=2)
    axes.set(
        xscale="log", yscale="log", xlabel="measured step time, s", ylabel="predicted step time, s",
        title="Published training runs (dashed: 10 % off)",
    )  # fmt: skip
    axes.grid(True, which="major", linewidth=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Published training runs, predicted</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
  color: #222; background: #fff; }
img { max-width: 100%; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: right; }
th { border-bottom: 2px solid #888; }
th:first-child, td:first-child, td.text { text-align: left; }
tr.all { font-weight: bold; }
</style>
<h1>Published training runs, predicted</h1>
<p>{{ explanation }}</p>
<img src="data:image/png;base64,{{ image }}" alt="Predicted against measured step time">
{% for title, columns, lines in sections if lines %}
<h2>{{ title }}</h2>
<div class="wide"><table>
<thead><tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for line in lines %}<tr{% if line[0] == "all" %} class="all"{% endif %}>
{%- for cell in line %}<td{% if cell|length > 16 %} class="text"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% endfor %}
</html>
"""
