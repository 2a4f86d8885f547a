"""``python -m autoshard`` is the ``autoshard`` command."""

from autoshard.commands import entry_point

entry_point()
