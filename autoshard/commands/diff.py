"""``autoshard diff``."""

from __future__ import annotations

import argparse
from pathlib import Path


class DiffCommand:
    """Say what differs between two saved plans, an entry per line.

    Predictions are compared; how the plans were found is not. Prints nothing but
    "the plans are equal" if nothing differs.

    example:
      autoshard diff automatic.json hand.json
    """

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("plan", type=Path, metavar="PLAN.json")
        parser.add_argument("other", type=Path, metavar="OTHER.json")

    def run(self, args: argparse.Namespace) -> None:
        from autoshard.plan.plan import Plan

        print(Plan.load(args.plan).diff(Plan.load(args.other)) or "the plans are equal")
