"""``autoshard plan``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoshard.commands import compare, shared

if TYPE_CHECKING:
    from autoshard.options import Constraints
    from autoshard.plan.plan import Plan
    from autoshard.report.compare import Comparison


class PlanCommand:
    """Find the best distributed training plan for a model on a cluster.

    Needs no cluster and allocates no parameters: a laptop plans a 405B model.

    examples:
      autoshard plan --model gpt2 --world-size 8
      autoshard plan --model llama3-8b --world-size 64 --cluster h100 --precision bf16 \\
          --global-batch-size 512 --save plan.json
      autoshard plan --model train.py:build --world-size 4 --cluster cpu --pin tp=2 --json
      autoshard plan --model llama3-8b --world-size 64 --compare hand.json
          where hand.json is a saved plan, or pins: {"tp": 8, "pp": 2, "micro_batch_size": 1}
    """

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--world-size",
            type=int,
            required=True,
            metavar="N",
            help="number of devices, one process each",
        )
        shared.add_model_arguments(parser)
        shared.add_planning_arguments(parser)
        parser.add_argument(
            "--compare",
            type=Path,
            metavar="FILE",
            help="say what another configuration costs (a saved plan, or a JSON object of pins) "
            "and what makes the difference",
        )
        output = parser.add_argument_group("output")
        output.add_argument("--save", type=Path, metavar="FILE", help="write the plan as JSON")
        output.add_argument("--force", action="store_true", help="overwrite FILE")
        output.add_argument(
            "--json",
            action="store_true",
            help="print one line of JSON for scripts: mesh, schedule, predicted "
            "seconds and bytes, solver gap, seconds by phase",
        )

    def run(self, args: argparse.Namespace) -> None:
        watch = shared.Stopwatch()
        from autoshard.options import Constraints, validate_world_size

        constraints = Constraints.of(shared.parse_pins(args.pin))
        validate_world_size(args.world_size, constraints)
        shared.check_planning_arguments(args)
        if args.save:
            shared.check_free(args.save, args.force)
        other = compare.read(args.compare) if args.compare else None
        comparison: Comparison | None = None
        with shared.progress(args.json) as say:
            say("importing torch")
            from autoshard.api import make_plan

            watch.lap("import")
            say(f"building {args.model}")
            spec = shared.load_model(args)
            watch.lap("build")

            def plan_with(pins: Constraints | dict[str, Any]) -> Plan:
                return make_plan(
                    spec.model,
                    world_size=args.world_size,
                    example_inputs=spec.example_inputs,
                    loss_fn=spec.loss_fn,
                    cluster=args.cluster or (None if args.costs else "h100"),
                    global_batch_size=shared.batch_size(args, spec, args.world_size),
                    optimizer=args.optimizer,
                    precision=args.precision,
                    constraints=pins,
                    strict=args.strict,
                    seed=args.seed,
                    time_limit_s=args.time_limit,
                    costs=args.costs,
                    model_name=spec.name,
                    progress=say,
                ).plan

            plan = plan_with(constraints)
            if other is not None:
                comparison = compare.compare(plan, other, args.compare.name, plan_with)
        if args.save:
            shared.write_plan(plan, args.save, args.force)
        if args.json:
            print(json.dumps(self._as_data(plan, comparison, watch.seconds)))
            return
        plan.print()
        if comparison:
            from autoshard.report.compare import as_text

            print(f"\nAgainst {comparison.name}\n\n{as_text(comparison)}")

    def _as_data(
        self, plan: Plan, comparison: Comparison | None, seconds: dict[str, float]
    ) -> dict[str, Any]:
        found = shared.as_data(plan, seconds)
        if comparison:
            found["compared"] = {**comparison.as_data(), "plan": shared.as_data(comparison.other)}
        return found
