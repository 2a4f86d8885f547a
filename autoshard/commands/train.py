"""``autoshard train``."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from autoshard.commands import shared
from autoshard.errors import LaunchError, OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from autoshard.parallel import Parallel


class TrainCommand:
    """Train a language model on text, distributed as the planner decides.

    Starts its own processes on this machine; under torchrun it uses the ones that are there.
    Text is read as bytes (token ids 0 to 255), so any file will do. The model must take input_ids
    and labels, as Hugging Face's causal language models do, and starts from random parameters.

    examples:
      autoshard train --model config.json --world-size 4 --text book.txt --steps 50
      autoshard train --model gpt2 --world-size 2 --text book.txt --save run/    (again: resumes)
      torchrun --nproc-per-node 8 -m autoshard train --model gpt2 --text book.txt --json
    """

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--world-size",
            type=int,
            metavar="N",
            help="processes to start on this machine (not needed under torchrun)",
        )
        parser.add_argument(
            "--text", type=Path, required=True, metavar="FILE", help="what to train on"
        )
        shared.add_model_arguments(parser)
        shared.add_planning_arguments(parser)
        group = parser.add_argument_group("training")
        group.add_argument(
            "--steps", type=int, default=20, metavar="N", help="train up to this step; default 20"
        )
        group.add_argument(
            "--learning-rate", type=float, default=3e-4, metavar="RATE", help="default 3e-4"
        )
        group.add_argument(
            "--clip-norm",
            type=float,
            metavar="NORM",
            help="scale gradients down to this norm over all ranks",
        )
        group.add_argument(
            "--plan", type=Path, metavar="PLAN.json", help="use this plan instead of searching"
        )
        group.add_argument(
            "--save",
            type=Path,
            metavar="FOLDER",
            help="checkpoint there at the end, and resume from there if it has one",
        )
        group.add_argument(
            "--save-every", type=int, metavar="N", help="checkpoint every N steps, too"
        )
        group.add_argument(
            "--max-restarts",
            type=int,
            default=0,
            metavar="N",
            help="start all processes again when one dies, up to N times; with "
            "--save they resume (default 0)",
        )
        group.add_argument(
            "--trace",
            type=Path,
            metavar="FILE",
            help="write what every rank did when in the last step, for ui.perfetto.dev and "
            "autoshard trace --measured; overwrites FILE",
        )
        group.add_argument(
            "--json",
            action="store_true",
            help="print one JSON object per step: step, loss, seconds",
        )

    def run(self, args: argparse.Namespace) -> None:
        _check(args)
        from autoshard.runtime import launch

        environment = launch.environment()
        if environment is None:
            from autoshard.commands import launching

            launching.run(args.world_size, args.argv, args.max_restarts)
        elif args.world_size not in (None, environment.world_size):
            raise LaunchError(
                f"expected {args.world_size} processes (--world-size) but torchrun started "
                f"{environment.world_size}: drop --world-size, or make them agree"
            )
        else:
            _train(args)


def _check(args: argparse.Namespace) -> None:
    """Reject what can be rejected before any process is started."""
    from autoshard.options import Constraints, validate_world_size

    constraints = Constraints.of(shared.parse_pins(args.pin))
    if args.world_size is not None:
        validate_world_size(args.world_size, constraints)
    shared.check_planning_arguments(args)
    for flag in ("steps", "learning_rate", "clip_norm", "save_every"):
        value = getattr(args, flag)
        if value is not None and not value > 0:
            name = "--" + flag.replace("_", "-")
            raise OptionError(f"{name} expects a positive number but got {value:g}")
    if args.save_every and not args.save:
        raise OptionError("--save-every needs --save FOLDER to know where")
    if args.plan and args.pin:
        raise OptionError("--plan has every choice made, so --pin cannot change any: give one")
    if args.trace and (args.trace.is_dir() or not args.trace.parent.is_dir()):
        raise OptionError(f"--trace expects a file in a folder that exists but got {args.trace}")
    if not args.text.is_file():
        raise OptionError(f"expected a text file at {args.text} but there is none")
    if args.plan:
        from autoshard.plan.plan import Plan

        Plan.load(args.plan)


def _train(args: argparse.Namespace) -> None:
    from autoshard.commands import text
    from autoshard.runtime import checkpoint

    parallel, length = _compile(args)
    tokens = text.byte_tokens(args.text)
    if args.save and checkpoint.latest_step(args.save) is not None:
        parallel.load(args.save)
        _say(parallel, f"resumed {args.save} after step {parallel.steps_done}")
    if parallel.is_main and not args.json:
        parallel.plan.print()
    saved = first = parallel.steps_done
    seconds: list[float] = []
    for step in range(first, args.steps):
        batch = text.text_batch(tokens, parallel.plan.global_batch_size, length, step)
        start = time.perf_counter()
        if args.trace and step + 1 == args.steps:
            loss = _traced(parallel, parallel.local_batch(batch), args.trace)
        else:
            loss = parallel.step(parallel.local_batch(batch))
        seconds.append(time.perf_counter() - start)
        if parallel.is_main:
            _report(args.json, step + 1, loss, seconds[-1])
        if args.save_every and (step + 1) % args.save_every == 0:
            parallel.save(args.save)
            saved = step + 1
    if args.save and saved < args.steps:
        _say(parallel, f"wrote {parallel.save(args.save)}")
    if not args.json and len(seconds) > 1:
        measured = statistics.median(seconds[1:])
        _say(
            parallel,
            f"{measured:.3g} s per step (median without the first), predicted "
            f"{parallel.plan.prediction.step_s:.3g} s",
        )
    if first >= args.steps:
        _say(parallel, f"nothing to do: {first} steps are done and --steps is {args.steps}")


def _compile(args: argparse.Namespace) -> tuple[Parallel, int]:
    """The model on this rank, and tokens per sample."""
    import torch

    import autoshard
    from autoshard.commands import text
    from autoshard.runtime import launch

    torch.manual_seed(args.seed)  # parameters are drawn alike on every rank
    spec = shared.load_model(args)
    model = text.materialise(spec.model, args.seed)
    example = text.example_of(model, spec.example_inputs)
    world_size = launch.world_size()
    batch_size = args.global_batch_size
    if batch_size is None and args.plan is None:
        batch_size = shared.batch_size(args, spec, world_size)
    parallel = autoshard.compile(
        model,
        world_size=world_size,
        example_inputs=example,
        loss_fn=spec.loss_fn,
        cluster=args.cluster,
        global_batch_size=batch_size,
        optimizer=args.optimizer,
        precision=args.precision,
        constraints=shared.parse_pins(args.pin),
        strict=args.strict,
        seed=args.seed,
        time_limit_s=args.time_limit,
        costs=args.costs,
        plan=args.plan,
    )
    parallel.clip_norm = args.clip_norm
    for group in parallel.optimizer.param_groups:
        group["lr"] = args.learning_rate
    return parallel, int(example["input_ids"].shape[1])


def _traced(parallel: Parallel, batch: dict[str, Tensor], path: Path) -> float:
    """A step whose timeline is written; its loss."""
    from autoshard.report.trace import chrome_trace

    loss, timeline = parallel.trace(batch)
    if parallel.is_main:
        path.write_text(chrome_trace([timeline]))
    return loss


def _report(as_json: bool, step: int, loss: float, seconds: float) -> None:
    if as_json:
        print(json.dumps({"step": step, "loss": loss, "seconds": seconds}), flush=True)
    else:
        print(f"step {step:4d}  loss {loss:.4f}  {seconds * 1e3:.0f} ms", flush=True)


def _say(parallel: Parallel, message: str) -> None:
    if parallel.is_main:
        print(message, file=sys.stderr, flush=True)
