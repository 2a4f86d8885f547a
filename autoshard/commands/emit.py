"""``autoshard emit``."""

from __future__ import annotations

import argparse
from pathlib import Path

from autoshard.commands import shared


class EmitCommand:
    """Write the distributed model as Python source, one file per distinct stage, and a manifest.

    The model is captured again, so give the same MODEL (and sequence length) that was planned.

    example:
      autoshard plan --model gpt2 --world-size 8 --save plan.json
      autoshard emit plan.json --model gpt2 --out out/
    """

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("plan", type=Path, metavar="PLAN.json")
        shared.add_model_arguments(parser)
        output = parser.add_argument_group("output")
        output.add_argument(
            "--out",
            type=Path,
            required=True,
            metavar="FOLDER",
            help="where to write; created if it does not exist",
        )
        output.add_argument("--force", action="store_true", help="overwrite files in FOLDER")

    def run(self, args: argparse.Namespace) -> None:
        from autoshard.plan.plan import Plan

        plan = Plan.load(args.plan)
        with shared.progress(False) as say:
            say("importing torch")
            from autoshard.api import compile

            say(f"building {args.model}")
            spec = shared.load_model(args)
            say("capturing the model")
            parallel = compile(
                spec.model,
                world_size=plan.world_size,
                example_inputs=spec.example_inputs,
                loss_fn=spec.loss_fn,
                plan=plan,
            )
            say("emitting")
            written = parallel.emit(args.out, force=args.force)
        for path in written:
            print(path)
