"""What the hardware is: a device, and the tiers of links that connect it to others.

SI units throughout: bytes, seconds, bytes per second, floating-point operations per second.
Clusters come from presets (JSON files beside :mod:`autoshard.cost_models`, each figure with its
source), from files of the same format, or from the machine itself; :func:`find` takes any of them.
"""

from __future__ import annotations

from autoshard.cluster.checks import check, check_size
from autoshard.cluster.files import presets
from autoshard.cluster.hardware import (
    CLUSTER_VERSION,
    COLLECTIVE_KINDS,
    Cluster,
    Device,
    Tier,
)
from autoshard.cluster.links import Level, Link, link
from autoshard.cluster.lookup import core_share, find, num_cores, this_machine

__all__ = [
    "CLUSTER_VERSION",
    "COLLECTIVE_KINDS",
    "Cluster",
    "Device",
    "Level",
    "Link",
    "Tier",
    "check",
    "check_size",
    "core_share",
    "find",
    "link",
    "num_cores",
    "presets",
    "this_machine",
]
