"""The command line: ``autoshard plan | show | diff | trace | emit | train | profile``.

Each command is a class whose docstring is its help text. :func:`main` returns the exit code, see
``EXIT_CODES``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Protocol

from autoshard import __version__
from autoshard.errors import AutoshardError, CheckpointError, LaunchError

COMMANDS = ("plan", "show", "diff", "trace", "emit", "train", "profile")

EXIT_CODES = """\
exit codes:
  0  success
  1  failure of another kind (a traceback, or a process that died)
  2  a wrong option or value
  3  the model cannot be captured
  4  --strict, and an op has no sharding rule
  5  no plan fits in the devices' memory
  6  a plan file that is damaged, of another version, or for another model
  7  training was started with the wrong number of processes
  8  a checkpoint that is missing, incomplete, or of another model
"""


class Command(Protocol):
    """One subcommand."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare its options."""

    def run(self, args: argparse.Namespace) -> None:
        """Do it; errors meant for the user are :class:`AutoshardError`."""


def _command(name: str) -> Command:
    module = importlib.import_module(f"autoshard.commands.{name}")
    command: Command = getattr(module, f"{name.capitalize()}Command")()
    return command


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; importing torch is left to the commands' ``run``."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="autoshard",
        formatter_class=raw,
        description="Plan, inspect, emit and run distributed training of ordinary PyTorch models.",
        epilog=f"start with:\n  autoshard plan --model gpt2 --world-size 8\n\n{EXIT_CODES}",
    )
    parser.add_argument("--version", action="version", version=f"autoshard {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = _command(name)
        first, _, rest = (type(command).__doc__ or "").strip().partition("\n")
        sub = commands.add_parser(
            name, help=first, description=f"{first}\n{rest}", formatter_class=raw
        )
        command.add_arguments(sub)
        sub.set_defaults(handler=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; errors meant for the user become a line on stderr and an exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    args.argv = argv
    try:
        args.handler.run(args)
    except AutoshardError as error:
        if _says_it(error):
            print(f"autoshard {args.command}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader has gone: nothing is left to say
        return 0
    except KeyboardInterrupt:
        print(f"autoshard {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _says_it(error: AutoshardError) -> bool:
    """Whether this process is the one to print an error.

    What follows from the options alone is the same on every rank, so rank 0 says it for all.
    """
    alone = isinstance(error, (CheckpointError, LaunchError))
    return alone or os.environ.get("RANK", "0") == "0"


def entry_point() -> None:
    """The ``autoshard`` script."""
    sys.exit(main())
