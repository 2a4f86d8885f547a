"""Every error that autoshard raises on purpose: what was expected, what was given, what to do."""

from __future__ import annotations


class AutoshardError(Exception):
    """The base of all errors meant for the user; the command line exits with ``exit_code``."""

    exit_code = 1


class OptionError(AutoshardError, ValueError):
    """An argument, pin or command-line option that is unknown, malformed or contradicts another."""

    exit_code = 2


class CaptureError(AutoshardError):
    """The model cannot be captured as one exact graph; names the user's line and the cure."""

    exit_code = 3


class UnsupportedOpError(AutoshardError):
    """``strict=True`` and an op has no sharding rule."""

    exit_code = 4


class InfeasibleError(AutoshardError):
    """No plan fits: says which stage lacks how many bytes and the nearest option that would."""

    exit_code = 5


class PlanFileError(AutoshardError, ValueError):
    """A plan file that is truncated, of another version, or made for another model."""

    exit_code = 6


class LaunchError(AutoshardError, RuntimeError):
    """Running was asked for outside ``torchrun`` or with the wrong number of processes."""

    exit_code = 7


class CheckpointError(AutoshardError):
    """A checkpoint that is missing, incomplete, or of another model."""

    exit_code = 8


class InternalError(AssertionError):
    """An invariant of autoshard itself is broken: a bug, with the pass and the op that show it."""
