"""Plots of sampling step by step, as PNG bytes; None if there is nothing to draw.

A row is a trace: lists with one number for each step, None where there was nothing to measure. Of
more than `TRACES` traces, only that of the largest budget is drawn for each model and path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, product
from types import MappingProxyType
from typing import NamedTuple

from pipelines.report.drawing import COLOURS, CURVES, groups, numbers, panels, styles, widen
from pipelines.report.tables import Row, Rows

SHARES = MappingProxyType({"masked": "0.82", "evidence": COLOURS[5], "revealed": COLOURS[0]})
TRACES = 24  # the most in one plot


class Series(NamedTuple):
    """One number for each step of a trace; `wide` ones may need a logarithmic axis."""

    label: str
    of: Callable[[Row], list[float]]
    wide: bool = False


REMASKING = (
    Series("remasked share", lambda row: numbers(row.get("remasked") or ())),
    Series("rewrites per token", lambda row: list(accumulate(numbers(row.get("rewritten") or ())))),
)
SHARPENING = (
    Series("max probability, mean", lambda row: numbers(row.get("max_prob") or ())),
    Series("nucleus size, mean", lambda row: numbers(row.get("nucleus_size") or ()), wide=True),
    Series("entropy in nats, mean", lambda row: numbers(row.get("entropy") or ())),
)


def schedule(rows: Rows) -> bytes | None:
    """The shares of masked, evidence and revealed tokens after each step (004 fig. 2a)."""
    rows = _few([row for row in rows if all(row.get(key) for key in SHARES)])
    if not rows:
        return None
    titles = [f"{row['model']} {_walk(row)}" for row in rows]
    made = panels(titles, width=2.5, height=2.2, share=False)
    for axes, row in zip(made.axes, rows, strict=True):
        shares = [numbers(row[key]) for key in SHARES]
        if len(shares[0]) == 1:  # a point has no area
            shares = [2 * share for share in shares]
        steps = range(1, len(shares[0]) + 1)
        axes.stackplot(steps, shares, labels=list(SHARES), colors=list(SHARES.values()))
        axes.set(xlabel="step", ylim=(0, 1), xlim=(1, len(steps)))
    made.figure.supylabel("share of tokens", fontsize="medium")
    made.legend()
    return made.png()


def remasking(rows: Rows) -> bytes | None:
    """The share of revealed tokens that each step masks again, and the cumulative rewrites per
    token (004 fig. 2b). Only of paths that mask tokens again."""
    return _by_step([row for row in rows if any(row.get("remasked") or ())], REMASKING)


def sharpening(rows: Rows) -> bytes | None:
    """How sharp the posterior of unrevealed tokens is by step (004 fig. 2c)."""
    return _by_step(rows, SHARPENING)


def _by_step(rows: Rows, series: Sequence[Series]) -> bytes | None:
    """A panel for each series; with many traces, a line of panels for each model."""
    rows = _few([row for row in rows if any(map(_points, (of(row) for _, of, _ in series)))])
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
        share="col",
    )
    panel_of = zip(product(parts.values(), series), made.axes, strict=True)
    for (part, (label, of, wide)), axes in panel_of:
        for row in part:
            if points := _points(of(row)):
                # A marker at every step would hide the curve.
                line = looks[name(row)] | {"markevery": (0.05, 0.15)}
                axes.plot(*zip(*points, strict=True), label=name(row), **line)
        axes.set(xlabel="share of the steps", ylabel=label, xlim=(0, 1))
        axes.grid(alpha=0.3)
        # Panels below each other share the axis, which must fit the values of all models.
        values = [value for row in rows for _, value in _points(of(row))]
        if wide:
            widen(axes, "y", values)
        else:
            axes.set_ylim(0, 1.05 * max(values, default=1.0) or 1.0)
    made.legend()
    return made.png()


def _points(values: Sequence[float]) -> list[tuple[float, float]]:
    """Finite values against the share of the steps, so that samples of any budget compare."""
    steps = [(step + 1) / len(values) for step in range(len(values))]
    return [point for point in zip(steps, values, strict=True) if math.isfinite(point[1])]


def _few(rows: Sequence[Row]) -> Sequence[Row]:
    if len(rows) <= TRACES:
        return rows
    walks = groups(rows, lambda row: (row["model"], row["path"])).values()
    return [max(walk, key=lambda row: row["budget"]) for walk in walks]


def _walk(row: Row) -> str:
    calls = " + ".join(map(str, row["split"])) if row.get("split") else row["budget"]
    return f"{row['path']} {calls}"
