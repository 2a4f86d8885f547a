"""``autoshard plan --compare``: a hand-tuned configuration beside the plan that was found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoshard.errors import InfeasibleError, OptionError, PlanFileError

if TYPE_CHECKING:
    from autoshard.plan.plan import Plan
    from autoshard.report.compare import Comparison

ENOUGH_BYTES = 1 << 60
"""Memory that holds everything."""


def read(path: Path) -> dict[str, Any] | Plan:
    """A saved plan, or the pins of a configuration.

    Raises:
        OptionError: the file is missing, no JSON object, or has pins that there are not.
        PlanFileError: it is a plan, but a damaged one.
    """
    from autoshard.options import Constraints
    from autoshard.plan import files

    try:
        text = path.read_bytes()
        document = json.loads(text)
    except OSError as error:
        raise OptionError(f"--compare expects a file but {path}: {error.strerror}") from error
    except ValueError as error:
        raise OptionError(
            f"--compare expects JSON in {path} but it has none ({error}): give a saved plan, or "
            'pins such as {"tp": 8, "pp": 2}'
        ) from error
    if not isinstance(document, dict):
        raise OptionError(f"--compare expects a JSON object of pins in {path} but got {document!r}")
    if "version" in document and "stages" in document:
        return files.loads(text, str(path))
    for name, value in document.items():
        if isinstance(value, list):
            document[name] = tuple(value)
    try:
        Constraints.of(document)
    except OptionError as error:
        raise OptionError(f"--compare {path}: {error}") from error
    return document


def compare(
    chosen: Plan, other: dict[str, Any] | Plan, name: str, plan_with: Callable[[Any], Plan]
) -> Comparison:
    """What the other configuration costs where the chosen plan would run.

    Args:
        plan_with: plans the same model under these constraints.

    Raises:
        OptionError: no mesh of this size can hold the pins.
        PlanFileError: a saved plan of another model, batch, world size or cluster.
    """
    from autoshard.report.compare import Comparison

    if not isinstance(other, dict):
        _same_question(chosen, other, name)
        return Comparison(chosen=chosen, other=other, name=name)
    try:
        return Comparison(chosen=chosen, other=plan_with(other), name=name)
    except InfeasibleError as error:
        enough = plan_with({**other, "memory_bytes": ENOUGH_BYTES})
        return Comparison(chosen=chosen, other=enough, name=name, too_large=str(error))


def _same_question(chosen: Plan, other: Plan, name: str) -> None:
    for what in ("program", "world_size", "global_batch_size", "precision", "optimizer", "cluster"):
        mine, theirs = getattr(chosen, what), getattr(other, what)
        if mine != theirs:
            if what == "cluster":
                mine, theirs = mine.name, theirs.name
            raise PlanFileError(
                f"{name} is a plan for another {what.replace('_', ' ')} ({theirs}) than this one "
                f"({mine}), so their costs cannot be compared: plan it again alike, or give its "
                'pins as JSON, such as {"tp": 8, "pp": 2}'
            )
    if not other.prediction.ranks:
        raise PlanFileError(f"{name} does not say where its step goes: plan it again")
