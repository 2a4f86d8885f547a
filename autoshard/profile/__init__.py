"""Measures what the present machine takes: ops, layers, links; see the modules for the parts.

Profiles that PipeDream measured are read and split by :func:`read_pipedream` and
:func:`split_pipedream`.
"""

from autoshard.profile.pipedream import read_pipedream
from autoshard.profile.pipedream_split import split_pipedream

__all__ = ["read_pipedream", "split_pipedream"]
