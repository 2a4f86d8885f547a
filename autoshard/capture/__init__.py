"""From a model to a :class:`autoshard.ir.Program`."""

from autoshard.capture.capture import capture
from autoshard.capture.check import check_against_eager
from autoshard.capture.interpret import execute, run_graph, run_program, tensors_of

__all__ = [
    "capture", "check_against_eager", "execute", "run_graph", "run_program", "tensors_of",
]  # fmt: skip
