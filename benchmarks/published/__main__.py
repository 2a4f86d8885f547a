"""The planner's predictions held against published training runs.

For every row of a csv file of measurements the model of its shape is captured, its layout pinned,
and step time and memory predicted as ``autoshard.compile`` would.
"""

from __future__ import annotations

import argparse
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path

from rich.console import Console

from autoshard.errors import AutoshardError, OptionError
from benchmarks.published.report import show, write_json, write_pages
from benchmarks.published.rows import Row, read_rows
from benchmarks.published.run import predict_all


def main(arguments: list[str] | None = None) -> int:
    """Predict and report; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published", description=__doc__)
    parser.add_argument("--data", required=True, type=Path, metavar="FILE.csv")
    parser.add_argument("--families", metavar="GLOB", default="*", help="such as 'mosaic-*'")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="scatter.png, index.html, rows.json"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures for machines")
    parser.add_argument("--processes", type=int, metavar="N", help="default: one per core")
    args = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 170)
    try:
        rows = chosen(read_rows(args.data), args.families)
        start = time.perf_counter()
        with Console(stderr=True).status(f"{len(rows)} rows") as status:
            outcomes = predict_all(
                rows, processes=args.processes,
                progress=lambda done: status.update(f"{done} of {len(rows)} rows"),
            )  # fmt: skip
    except AutoshardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(outcomes, console)
    if args.json:
        write_json(outcomes, args.json)
    written = write_pages(outcomes, args.out) if args.out else []
    took = f"{len(rows)} rows in {time.perf_counter() - start:.0f} s"
    console.print("; ".join([took, *(f"wrote {path}" for path in written)]))
    return 0


def chosen(rows: list[Row], families: str) -> list[Row]:
    """The rows of the families that a pattern names.

    Raises:
        OptionError: there are none.
    """
    found = [row for row in rows if fnmatchcase(row.family, families)]
    if not found:
        known = sorted({row.family for row in rows})
        raise OptionError(
            f"--families {families!r} names no family of the file; it has {', '.join(known)}"
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
