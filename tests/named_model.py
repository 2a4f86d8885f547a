"""A module whose function :mod:`test_models` and :mod:`test_commands` name on the command line."""

from __future__ import annotations

from torch import nn


def build() -> nn.Module:
    """A model without an example batch."""
    return nn.Linear(4, 4)
