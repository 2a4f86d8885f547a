"""``autoshard show``."""

from __future__ import annotations

import argparse
from pathlib import Path

from autoshard.commands import shared


class ShowCommand:
    """Show a saved plan, or why something in it is placed as it is.

    examples:
      autoshard show plan.json
      autoshard show plan.json --explain lm_head.weight
      autoshard show plan.json --json
    """

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("plan", type=Path, metavar="PLAN.json")
        how = parser.add_mutually_exclusive_group()
        how.add_argument(
            "--explain", metavar="NAME", help="say where a parameter, op or layer lies, and why"
        )
        how.add_argument(
            "--json",
            action="store_true",
            help="print the line of JSON that autoshard plan --json prints",
        )

    def run(self, args: argparse.Namespace) -> None:
        from autoshard.plan.plan import Plan

        plan = Plan.load(args.plan)
        if args.explain:
            print(plan.explain(args.explain))
        elif args.json:
            print(shared.as_json(plan))
        else:
            plan.print()
