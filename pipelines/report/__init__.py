"""Tables for people and programs, and one self-contained page of everything.

A table is a list of plain rows, which is what JSON gets; how a cell is shown is said once, in its
column, so that terminal, Markdown and HTML cannot disagree with each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.report import page
from pipelines.report.page import Plot, Text
from pipelines.report.tables import BOUND, SKIPPED, STDERR, Column, Row, Rows, Table, markdown

__all__ = [
    "BOUND",
    "SKIPPED",
    "STDERR",
    "Column",
    "Plot",
    "Report",
    "Row",
    "Rows",
    "Table",
    "Text",
    "markdown",
]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a run has to say; `facts` go into the JSON beside the tables' rows.

    `name` is that of the JSON and the Markdown file; the page is always `report.html`.
    """

    name: str
    title: str
    subtitle: str
    facts: Mapping[str, Any]
    tables: Mapping[str, Table]
    plots: Sequence[Plot]
    texts: Sequence[Text]

    def files(self) -> dict[str, bytes]:
        """The report's files by name."""
        return {
            f"{self.name}.json": self.json().encode(),
            f"{self.name}.md": self.markdown().encode(),
            **{f"{plot.name}.png": plot.png for plot in self.plots},
            "report.html": self.html().encode(),
        }

    def json(self) -> str:
        """Facts and rows; what is not finite is null."""
        rows = {key: list(table.rows) for key, table in self.tables.items()}
        return json.dumps(_finite({**self.facts, **rows}), indent=1, ensure_ascii=False) + "\n"

    def markdown(self) -> str:
        tables = [f"## {t.title}\n\n{t.note}\n\n{markdown(t)}" for t in self.tables.values()]
        plots = [f"![{plot.caption}]({plot.name}.png)\n" for plot in self.plots]
        return "\n".join([f"# {self.title}\n\n{self.subtitle}\n", *tables, *plots])

    def html(self) -> str:
        """One page that needs nothing but itself. All text that comes from outside is escaped."""
        return page.html(
            title=self.title,
            subtitle=self.subtitle,
            tables=self.tables,
            plots=self.plots,
            texts=self.texts,
            facts=self.facts,
        )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
