"""Plots of samples being made, step by step, as PNG bytes; None where there is nothing to draw.

A row is a trace: lists of one number a step, None where there was nothing to measure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from pipelines.report.drawing import COLOURS, CURVES, groups, numbers, panels, styles, widen
from pipelines.report.tables import Row, Rows, number

SHARES = MappingProxyType({"masked": "0.82", "evidence": COLOURS[5], "revealed": COLOURS[0]})
SHARPENING = MappingProxyType(
    {
        "max_prob": "max probability, mean",
        "nucleus_size": "nucleus size, mean",
        "entropy": "entropy in nats, mean",
    }
)
Series = Callable[[Row], list[float]]


def schedule(rows: Rows) -> bytes | None:
    """The shares of masked, evident and revealed tokens that each step leaves (004 fig. 2a)."""
    rows = [row for row in rows if all(row.get(key) for key in SHARES)]
    if not rows:
        return None
    titles = [f"{row['model']} {_walk(row)}" for row in rows]
    made = panels(titles, width=2.5, height=2.2, beside=1.0, share=False)
    for axes, row in zip(made.axes, rows, strict=True):
        shares = [numbers(row[key]) for key in SHARES]
        steps = range(1, len(shares[0]) + 1)
        axes.stackplot(steps, shares, labels=list(SHARES), colors=list(SHARES.values()))
        axes.set(xlabel="step", ylim=(0, 1), xlim=(1, max(2, len(steps))))
    made.figure.supylabel("share of tokens", fontsize="medium")
    made.legend()
    return made.png()


def remasking(rows: Rows) -> bytes | None:
    """How much each step takes back, and the rewrites that came of it so far (004 fig. 2b)."""
    rows = [row for row in rows if any(row.get("remasked") or ())]
    return _by_step(
        rows,
        {
            "remasked share of the revealed": lambda row: numbers(row["remasked"]),
            "rewrites per token": lambda row: list(itertools.accumulate(numbers(row["rewritten"]))),
        },
    )


def sharpening(rows: Rows) -> bytes | None:
    """How sure the posterior is of what is not revealed yet (004 fig. 2c)."""
    rows = [row for row in rows if any(map(_finite, (row.get(key) for key in SHARPENING)))]
    return _by_step(
        rows,
        {
            label: lambda row, key=key: numbers(row.get(key) or ())
            for key, label in SHARPENING.items()
        },
    )


def _by_step(rows: Rows, series: Mapping[str, Series]) -> bytes | None:
    """A panel for each series, and a line of panels for each model where one would be crowded."""
    if not rows:
        return None
    crowded = len(rows) > CURVES
    parts = groups(rows, lambda row: row["model"]) if crowded else {"": rows}
    name = _walk if crowded else lambda row: f"{row['model']} {_walk(row)}"
    looks = styles(map(name, rows))
    made = panels(
        [part for part in parts for _ in series],
        width=3.1,
        height=2.5,
        columns=len(series),
        beside=0.5 + 0.075 * max(map(len, looks)),
        share="col",
    )
    for (part, (label, of)), axes in zip(
        itertools.product(parts.values(), series.items()), made.axes, strict=True
    ):
        for row in part:
            values = of(row)
            # Walks of any length side by side; a marker at every step would hide the curve.
            steps = [(step + 1) / len(values) for step in range(len(values))]
            axes.plot(steps, values, label=name(row), **looks[name(row)], markevery=(0.05, 0.15))
        axes.set(xlabel="share of the steps", ylabel=label, xlim=(0, 1))
        axes.grid(alpha=0.3)
    for axes, of in zip(made.axes, series.values(), strict=False):
        values = [value for row in rows for value in of(row) if math.isfinite(value)]
        widen(axes.yaxis, values)
    made.legend()
    return made.png()


def _finite(values: Sequence[float | None] | None) -> bool:
    return any(math.isfinite(number(value)) for value in values or ())


def _walk(row: Row) -> str:
    calls = " + ".join(map(str, row["split"])) if row.get("split") else row["budget"]
    return f"{row['path']} {calls}"
