"""A result: a ratio measured in one run, the bar it is to clear, and whether it does.

Shapes: R rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from pipelines.report import SKIPPED, Column, Row, Table

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
UNJUDGED = "not measured here"


class Bar(NamedTuple):
    """What is to be reached, of the ratio or, where there is a `unit`, of our own figure.

    `here` says whether this machine and these sizes are those that the bar is about: where they
    are not, the figure is shown and not judged.
    """

    sign: Literal["≤", "≥"]
    limit: float
    here: bool
    unit: str = ""

    def __str__(self) -> str:
        limit = f"{self.limit:,.2f}".rstrip("0").rstrip(".")
        return f"{self.sign} {limit} {self.unit}".rstrip()

    def verdict(self, value: float) -> str:
        if not self.here:
            return UNJUDGED
        met = value <= self.limit if self.sign == "≤" else value >= self.limit
        return "met" if met else "not met"


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
    """Ours over theirs, round by round: the median and the quartiles over the rounds.

    key: the figure's name in JSON and MLflow.
    """
    ours_R, theirs_R = np.atleast_1d(ours_R), np.atleast_1d(theirs_R)
    ratio_R = ours_R / theirs_R
    median, ours = float(np.median(ratio_R)), float(np.median(ours_R))
    row: dict[str, Any] = {
        "key": key,
        "what": what,
        "against": against,
        "ratio": median,
        "ours": ours,
        "theirs": float(np.median(theirs_R)),
        "unit": unit,
    }
    if len(ratio_R) > 1:
        low, high = np.quantile(ratio_R, (0.25, 0.75))
        row |= {"low": float(low), "high": float(high), "spread": f"{low:.3g} to {high:.3g}"}
    if bar:
        row |= {"bar": str(bar), "verdict": bar.verdict(ours if bar.unit else median)}
    return row


def unmeasured(key: str, what: str, why: str) -> Row:
    """A bar of which this run says nothing."""
    return {"key": key, "what": what, SKIPPED: f"{UNJUDGED}: {why}"}


def table(title: str, note: str, rows: Sequence[Row]) -> Table:
    return Table(title=title, note=note, columns=COLUMNS, rows=rows)
