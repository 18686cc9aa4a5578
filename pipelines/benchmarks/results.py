"""Rows of the result tables: a ratio measured in one run, and the bar that it should clear.

Shapes: R rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from pipelines.report import Column, Row, Table

COLUMNS = (
    Column("what", "What"),
    Column("against", "Against"),
    Column("ratio", "Ratio", ".3g"),
    Column("spread", "Quartiles"),
    Column("ours", "Ours", ".4g"),
    Column("theirs", "Theirs", ".4g"),
    Column("unit", "Unit"),
    Column("bar", "Bar"),
    Column("verdict", "Verdict"),
)


class Bar(NamedTuple):
    """A limit for the ratio or, where there is a `unit`, for our own figure.

    here: whether this run has the sizes and the machine for which the bar was set. Elsewhere the
        figure is shown without a verdict.
    """

    sign: Literal["≤", "≥"]
    limit: float
    here: bool = True
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:.3g} {self.unit}".rstrip()

    def met(self, value: float) -> bool:
        return value <= self.limit if self.sign == "≤" else value >= self.limit

    def verdict(self, value: float) -> str:
        if not self.here:
            return "not judged at these sizes"
        return "met" if self.met(value) else "not met"


def ratio(
    key: str,
    what: str,
    against: str,
    ours_R: np.ndarray | float,
    theirs_R: np.ndarray | float,
    *,
    unit: str = "s",
    bar: Bar | None = None,
) -> Row:
    """Ours divided by theirs in each round: the median and the quartiles over rounds.

    key: the figure's name in JSON and MLflow.
    """
    ours_R, theirs_R = np.atleast_1d(ours_R), np.atleast_1d(theirs_R)
    low, median, high = np.quantile(ours_R / theirs_R, (0.25, 0.5, 0.75)).tolist()
    ours = float(np.median(ours_R))
    row: dict[str, Any] = {
        "key": key,
        "what": what,
        "against": against,
        "ratio": median,
        "ours": ours,
        "theirs": float(np.median(theirs_R)),
        "unit": unit,
    }
    if len(ours_R) > 1:
        row |= {"low": low, "high": high, "spread": f"{low:.3g} to {high:.3g}"}
    if bar:
        row |= {"bar": str(bar), "verdict": bar.verdict(ours if bar.unit else median)}
    return row


def table(title: str, note: str, rows: Sequence[Row]) -> Table:
    return Table(title=title, note=note, columns=COLUMNS, rows=rows)
