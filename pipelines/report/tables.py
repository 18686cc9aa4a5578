"""Tables: plain rows, and columns that say how their values are shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

STDERR = "_stderr"  # suffix of the key of a value's standard error
BOUND = "_bound"  # suffix of the key that says whether a value is an upper bound
SKIPPED = "skipped"  # the key of the reason why a row has no values
NOTHING = "–"

Row = Mapping[str, Any]
Rows = Sequence[Row]


def number(value: Any) -> float:
    """The value as a float, NaN for None."""
    return math.nan if value is None else float(value)


class Column(NamedTuple):
    """The values under `key` in the format `show`, with their standard errors.

    Significant digits (`.4g`) are for what was measured: whole numbers keep all of theirs.
    """

    key: str
    title: str
    show: str = ""

    def cell(self, row: Row) -> str:
        value, error = row.get(self.key), number(row.get(self.key + STDERR))
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return NOTHING
        show = "" if isinstance(value, int) and self.show.endswith("g") else self.show
        shown = f"{value:{show}}" if isinstance(value, int | float) else str(value)
        sign = "≤ " if row.get(self.key + BOUND) else ""
        return sign + shown + ("" if math.isnan(error) else f" ± {error:{self.show}}")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under a title. A skipped row shows its labels and then the reason."""

    title: str
    note: str
    columns: tuple[Column, ...]
    rows: Rows

    def cells(self) -> list[list[str]]:
        """The text of the cells, heads first. A skipped row is shorter: its reason comes last."""
        return [[column.title for column in self.columns], *map(self._cells, self.rows)]

    def _cells(self, row: Row) -> list[str]:
        if SKIPPED not in row:
            return [column.cell(row) for column in self.columns]
        return [*(c.cell(row) for c in self.columns if c.key in row), str(row[SKIPPED])]


def markdown(table: Table) -> str:
    """A Markdown table with aligned columns, which is legible in a terminal too."""
    head, *rows = [[_plain(cell) for cell in cells] for cells in table.cells()]
    whole = [head, *(row for row in rows if len(row) == len(head))]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "".join(f"| {_aligned(line, widths)} |\n" for line in lines)


def _plain(cell: str) -> str:
    """On one line, with the bar escaped, which ends a cell in Markdown."""
    return " ".join(cell.replace("|", "\\|").splitlines())


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    last = sum(widths[len(cells) - 1 :]) + 3 * (len(widths) - len(cells))
    padded = [cell.ljust(width) for cell, width in zip(cells[:-1], widths, strict=False)]
    return " | ".join([*padded, cells[-1].ljust(last)])
