"""``autoshard trace``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from autoshard.commands import shared
from autoshard.errors import OptionError


class TraceCommand:
    """Show the predicted step of a plan on the clock, next to a measured one if there is one.

    A .json file is a trace that ui.perfetto.dev and chrome://tracing show; .png and .svg are charts
    with a row per rank. The prediction has a row per pipeline rank, a measurement one per process.

    examples:
      autoshard trace plan.json --out step.svg
      autoshard train --model gpt2 --world-size 4 --text book.txt --plan plan.json --trace run.json
      autoshard trace plan.json --measured run.json --out both.png
    """

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("plan", type=Path, metavar="PLAN.json")
        parser.add_argument(
            "--out", type=Path, required=True, metavar="FILE", help="where to write: .json, .png "
            "or .svg",
        )  # fmt: skip
        parser.add_argument(
            "--measured", type=Path, metavar="FILE", help="what autoshard train --trace wrote"
        )
        parser.add_argument("--force", action="store_true", help="overwrite FILE")

    def run(self, args: argparse.Namespace) -> None:
        from autoshard.plan.plan import Plan
        from autoshard.plan.timeline import predicted_timeline
        from autoshard.report import trace
        from autoshard.report.chart import FORMATS, chart

        suffix = args.out.suffix.lower().removeprefix(".")
        if suffix not in ("json", *FORMATS):
            raise OptionError(f"--out expects a file .json, .png or .svg but got {args.out}")
        shared.check_free(args.out, args.force)
        timelines = [predicted_timeline(Plan.load(args.plan))]
        if args.measured is not None:
            timelines += [t for t in trace.read(args.measured) if t.name != "predicted"]
        if suffix == "json":
            args.out.write_text(trace.chrome_trace(timelines))
        else:
            args.out.write_bytes(chart(timelines, suffix))
        for timeline in timelines:
            print(f"{timeline.name:10} {timeline.step_s:.4g} s per step")
        print(f"wrote {args.out}", file=sys.stderr)
