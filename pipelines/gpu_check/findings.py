"""What a stage finds, and whether it clears its bar."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from pipelines.benchmarks.results import Bar
from pipelines.report import Column, Row, Table

PASS, FAIL, UNMEASURED = "pass", "FAIL", "not measured"
COLUMNS = (
    Column("stage", "Stage"),
    Column("what", "What"),
    Column("value", "Value", ".4g"),
    Column("unit", "Unit"),
    Column("bar", "Bar"),
    Column("verdict", "Verdict"),
)


class Finding(NamedTuple):
    """A fact (a text), or a figure that may have a bar. None: it could not be measured.

    A bar that is not `here` is never passed: it needs a GPU, or the card and the sizes that it was
    set for.
    """

    what: str
    value: float | str | None
    unit: str = ""
    bar: Bar | None = None

    @property
    def verdict(self) -> str:
        """Empty for what has no bar."""
        if self.bar is None:
            return ""
        if not self.bar.here or not isinstance(self.value, int | float):
            return UNMEASURED
        return PASS if self.bar.met(self.value) else FAIL

    def row(self) -> dict[str, Any]:
        """As JSON holds it, in which a number that is not finite is a text."""
        bar = str(self.bar or "")
        finite = not isinstance(self.value, float) or math.isfinite(self.value)
        value = self.value if finite else str(self.value)
        return {**self._asdict(), "value": value, "bar": bar, "verdict": self.verdict}


def finished(how: str, *, whole: bool) -> Finding:
    """Whether a stage came to its end; it fails the check where it did not."""
    return Finding(f"the stage {how}", int(whole), "", Bar("≥", 1))


def table(rows: Iterable[Row]) -> Table:
    """All that was found, in the order of the stages."""
    note = f"{PASS} and {FAIL}: against the bar. {UNMEASURED}: this device cannot show it."
    return Table(title="GPU check", note=note, columns=COLUMNS, rows=tuple(rows))
