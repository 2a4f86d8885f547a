"""The cluster that a row ran on: a preset's device, and the links that the row's text names."""

from __future__ import annotations

import re
from dataclasses import replace

from autoshard import cluster as clusters
from autoshard.cluster import Cluster
from autoshard.errors import OptionError
from benchmarks.published.rows import Row

PRESETS: dict[str, str] = {
    "V100-16": "v100-16", "V100-32": "v100-32", "A100-40": "a100-40", "A100-80": "a100-80",
    "A800-80": "a100-80", "H100-SXM": "h100", "H100-SXM-96": "h100", "H200-SXM": "h200",
    "B200": "b200", "MI300X": "mi300x",
}  # fmt: skip
"""Accelerator -> preset. An A800 is an A100 with fewer links; those are in the row."""
H100_96_BYTES_PER_S, H100_96_MEMORY_BYTES = 2.4e12, 94 * 2**30
"""HBM2e instead of HBM3 (torchtitan's benchmark notes: 96 GB, 2.4 TB/s)."""

_PER_GPU = re.compile(r"([\d.]+) ?GB/s(?:/dir)?(?:/GPU| nominal|/dir|\)|$| \()")
_PER_NODE = re.compile(r"([\d.]+) ?GB/s/node")


def cluster_of(row: Row) -> Cluster:
    """The row's cluster.

    Raises:
        OptionError: an accelerator that no preset stands for.
    """
    if row.accelerator not in PRESETS:
        raise OptionError(
            f"no cluster preset for accelerator {row.accelerator!r}; known are {', '.join(PRESETS)}"
        )
    base = clusters.find(PRESETS[row.accelerator])
    device = base.device
    if row.accelerator == "H100-SXM-96":
        device = replace(device, bytes_per_s=H100_96_BYTES_PER_S, memory_bytes=H100_96_MEMORY_BYTES)
    node, network = base.tiers[0], base.tiers[-1]
    size = row.gpus_per_node or node.size
    node = replace(node, size=size, bytes_per_s=_rate(row.intra_node_link) or node.bytes_per_s)
    if "NVSwitch" in row.intra_node_link:
        node = replace(node, group_share={})
    rate = _rate(row.inter_node_link, size) or network.bytes_per_s
    network = replace(network, bytes_per_s=rate)
    tiers = (node, network) if size > 1 else (network,)
    return replace(base, name=f"{row.accelerator} of {row.family}", device=device, tiers=tiers)


def _rate(text: str, per_node: int = 1) -> float | None:
    """Bytes per second, GPU and direction; ``None`` where the text has no figure."""
    if found := _PER_GPU.search(text):
        return float(found[1]) * 1e9
    if found := _PER_NODE.search(text):
        return float(found[1]) * 1e9 / per_node
    return None
