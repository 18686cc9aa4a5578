"""Tables for people and programs, and one self-contained page of everything.

A table is a list of plain rows, which is what JSON gets; how a cell is shown is said once, in its
column, so that terminal, Markdown and HTML cannot disagree with each other.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

TEMPLATE = Path(__file__).with_name("template.html")
STDERR = "_stderr"  # ends the key of a value's standard error
SKIPPED = "skipped"  # the key of the reason why a row has no values
NOTHING = "–"

Row = Mapping[str, Any]


class Column(NamedTuple):
    """The values under `key`, shown in the format `show`, each with its error if it has one."""

    key: str
    title: str
    show: str = ""

    def cell(self, row: Row) -> str:
        value, error = row.get(self.key), row.get(self.key + STDERR)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return NOTHING
        shown = f"{value:{self.show}}" if isinstance(value, float) else str(value)
        if error is None or math.isnan(error):
            return shown
        return f"{shown} ± {error:{self.show}}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under a title. A row that was skipped has its reason where its values would begin."""

    title: str
    note: str
    columns: tuple[Column, ...]
    rows: Sequence[Row]

    def cells(self) -> list[list[str]]:
        """Heads first. A reason is the last cell of its row and stands for all the others."""
        return [[column.title for column in self.columns], *map(self._cells, self.rows)]

    def _cells(self, row: Row) -> list[str]:
        if SKIPPED not in row:
            return [column.cell(row) for column in self.columns]
        return [*(c.cell(row) for c in self.columns if c.key in row), str(row[SKIPPED])]


class Plot(NamedTuple):
    """A PNG and what it shows."""

    name: str
    caption: str
    png: bytes


class Text(NamedTuple):
    """What a model wrote, and under what heading."""

    heading: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that an evaluation has to say; `facts` go into the JSON beside the tables' rows."""

    title: str
    subtitle: str
    facts: Mapping[str, Any]
    tables: Mapping[str, Table]
    plots: Sequence[Plot]
    texts: Sequence[Text]

    def files(self) -> dict[str, bytes]:
        """The report's files by name."""
        return {
            "evaluation.json": self.json().encode(),
            "evaluation.md": self.markdown().encode(),
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
        return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
            title=html.escape(self.title),
            subtitle=html.escape(self.subtitle),
            tables="\n".join(map(_table, self.tables.values())),
            plots="\n".join(map(_figure, self.plots)),
            texts="\n".join(map(_text, self.texts)),
        )


def markdown(table: Table) -> str:
    """A Markdown table whose columns are aligned, so that a terminal can show it too."""
    head, *rows = [[cell.replace("|", "\\|") for cell in cells] for cells in table.cells()]
    whole = [head, *(row for row in rows if len(row) == len(head))]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "".join(f"| {_aligned(line, widths)} |\n" for line in lines)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    last = sum(widths[len(cells) - 1 :]) + 3 * (len(widths) - len(cells))
    padded = [cell.ljust(width) for cell, width in zip(cells[:-1], widths, strict=False)]
    return " | ".join([*padded, cells[-1].ljust(last)])


def _table(table: Table) -> str:
    head, *rows = table.cells()
    lines = [_line("th", head, len(head)), *(_line("td", row, len(head)) for row in rows)]
    return (
        f"<h2>{html.escape(table.title)}</h2>\n<p>{html.escape(table.note)}</p>\n"
        f"<table>\n{''.join(lines)}</table>"
    )


def _line(tag: str, cells: Sequence[str], columns: int) -> str:
    span = f' colspan="{columns - len(cells) + 1}"'
    inside = [f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells[:-1]]
    last = f"<{tag}{span if columns > len(cells) else ''}>{html.escape(cells[-1])}</{tag}>"
    return f"<tr>{''.join(inside)}{last}</tr>\n"


def _figure(plot: Plot) -> str:
    data = base64.b64encode(plot.png).decode()
    caption = html.escape(plot.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _text(text: Text) -> str:
    return f"<h2>{html.escape(text.heading)}</h2>\n<pre>{html.escape(text.text)}</pre>"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
