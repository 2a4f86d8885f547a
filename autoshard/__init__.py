"""autoshard: an automatic parallelization compiler for PyTorch training.

``parallel = autoshard.compile(model, world_size=64)`` plans data, tensor and pipeline parallelism
and recomputation jointly; ``print(parallel.plan)`` shows the plan, ``parallel.emit("out/")``
writes it as readable PyTorch, and under ``torchrun`` ``parallel.step(batch)`` trains.

Names load on first use, so that importing the package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoshard.api import compile
    from autoshard.cluster import Cluster, Device, Tier
    from autoshard.errors import (
        AutoshardError,
        CaptureError,
        CheckpointError,
        InfeasibleError,
        LaunchError,
        OptionError,
        PlanFileError,
        UnsupportedOpError,
    )
    from autoshard.options import Constraints
    from autoshard.parallel import Parallel
    from autoshard.plan.plan import Plan
    from autoshard.runtime.experts import sparse_experts

__version__ = "0.1.0"

_HOMES = {
    "compile": "api", "Parallel": "parallel", "Plan": "plan.plan", "Constraints": "options",
    "Cluster": "cluster", "Device": "cluster", "Tier": "cluster",
    "AutoshardError": "errors", "CaptureError": "errors", "CheckpointError": "errors",
    "InfeasibleError": "errors", "LaunchError": "errors", "OptionError": "errors",
    "PlanFileError": "errors", "UnsupportedOpError": "errors",
    "sparse_experts": "runtime.experts",
}  # fmt: skip

__all__ = [
    "AutoshardError",
    "CaptureError",
    "CheckpointError",
    "Cluster",
    "Constraints",
    "Device",
    "InfeasibleError",
    "LaunchError",
    "OptionError",
    "Parallel",
    "Plan",
    "PlanFileError",
    "Tier",
    "UnsupportedOpError",
    "compile",
    "sparse_experts",
]


def __getattr__(name: str) -> Any:
    if name == "profile":  # so that autoshard.profile.read_pipedream needs no import of its own
        return importlib.import_module("autoshard.profile")
    if name not in _HOMES:
        raise AttributeError(f"module 'autoshard' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"autoshard.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
