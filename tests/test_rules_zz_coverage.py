"""No rule without proof; runs after all other tests of rules, by its name."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest
from rule_harness import unproven

from autoshard.placement import registry, rules


def test_every_rule_is_proven(request: pytest.FixtureRequest) -> None:
    """Only where the whole of every file of rule tests has run before this test."""
    here = Path(__file__)
    files = {p.name for p in here.parent.glob("test_rules_*.py")}
    ran = {Path(item.path).name for item in request.session.items}
    if not files <= ran or request.config.option.keyword or request.config.option.markexpr:
        pytest.skip("needs the tests of all rules in the same run")
    assert not unproven(), f"rules that no test proves: {sorted(unproven())}"


def test_no_op_has_two_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second registration would silently win or lose by the name of its file."""
    owner: dict[str, str] = {}
    for found in pkgutil.iter_modules(rules.__path__):
        module = importlib.import_module(f"{rules.__name__}.{found.name}")
        registered: list[dict[str, Any]] = [{}, {}, {}]
        for name, table in zip(
            ("_signatures", "_strategies", "_localisers"), registered, strict=True
        ):
            monkeypatch.setattr(registry, name, table)
        importlib.reload(module)
        for target in registered[0].keys() | registered[1].keys():
            assert owner.setdefault(target, found.name) == found.name, target
