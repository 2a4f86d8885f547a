"""A plan as a self-contained HTML fragment for notebooks."""

from __future__ import annotations

import io

from rich.console import Console

from autoshard.plan.plan import Plan
from autoshard.report.table import render as render_tables


def render(plan: Plan) -> str:
    """The tables of :mod:`autoshard.report.table` with inline styles, nothing loaded."""
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(render_tables(plan))
    return console.export_html(
        inline_styles=True, code_format='<pre style="line-height:1.2;overflow-x:auto">{code}</pre>'
    )
