"""Plots of models and samplers, as PNG bytes; None if there is nothing to draw.

Rows are those of the tables. A value that is absent, None or NaN was not measured and is left out.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from operator import itemgetter
from types import MappingProxyType

from pipelines.report.drawing import (
    COLOURS,
    CURVES,
    GREY,
    MARKERS,
    curve,
    groups,
    measured,
    numbers,
    panels,
    styles,
    widen,
)
from pipelines.report.tables import Column, Row, Rows, number

Bounds = tuple[float, float]
XY = tuple[str, str, str, str]  # the key and the label of x, then those of y
ECE = Column("ece", "ECE", ".3f")

# The losses in a journal, and their lines.
JOURNAL = MappingProxyType(
    {
        "loss": {"color": COLOURS[0], "lw": 0.7, "alpha": 0.7},
        "validation/loss": {"color": COLOURS[1], "marker": "o", "ms": 4},
    }
)
# What is drawn against SNR, and the labels of the axes.
ERRORS = MappingProxyType(
    {"nats": "cross-entropy, nats per token", "squared_error": "E(SNR) = |x - x̂|²"}
)
CONVERTER = MappingProxyType(
    {
        "converter_entropy": "entropy of the mixture, nats",
        "mask_weight": "weight of [MASK]",
        "token_weight": "weight of the token",
    }
)
# The state of converter and table in a journal, and the labels of the axes.
COURSE = MappingProxyType(
    {
        "converter/beta": "beta",
        "table/mean_cosine": "mean cosine of the table",
        "table/effective_rank": "effective rank of the table",
    }
)


def losses(journals: Mapping[str, Rows]) -> bytes | None:
    """Training and validation loss by step, a panel for each run's journal."""
    journals = {
        name: rows
        for name, rows in journals.items()
        if any(measured(rows, "step", key) for key in JOURNAL)
    }
    if not journals:
        return None
    made = panels(list(journals), width=4.5, columns=3, share=False)
    for axes, journal in zip(made.axes, journals.values(), strict=True):
        for key, line in JOURNAL.items():
            if rows := measured(journal, "step", key):
                curve(axes, rows, "step", key, label=key, **line)
        axes.set(xlabel="step", ylabel="nats per token")
        axes.legend(fontsize="small")
    return made.png()


def courses(journals: Mapping[str, Rows]) -> bytes | None:
    """The converter's scale and the table's spread by step: a curve for each run."""
    return _curves(journals, [("step", "step", *way) for way in COURSE.items()])


def by_snr(rows: Rows, ways: Mapping[str, str]) -> bytes | None:
    """The values under the keys of `ways` against positive SNR: a curve for each model."""
    rows = [row for row in measured(rows, "gamma") if row["gamma"] > 0]
    return by_model(rows, [("gamma", "SNR", *way) for way in ways.items()])


def by_state(rows: Rows, way: str, label: str) -> bytes | None:
    """The values under `way`, whose axis says `label`, against the share of tokens revealed and
    against SNR: a curve for each model."""
    across = ("revealed", "share of tokens revealed"), ("gamma", "SNR")
    return by_model(rows, [(*x, way, label) for x in across])


def by_model(rows: Rows, wanted: Sequence[XY]) -> bytes | None:
    """A panel for each of the axes that are wanted: a curve for each model."""
    return _curves(groups(rows, itemgetter("model")), wanted)


def _curves(by_name: Mapping[str, Rows], wanted: Sequence[XY]) -> bytes | None:
    """A panel for each of the axes that are wanted: a curve for each name."""
    seen = [
        {name: found for name, rows in by_name.items() if (found := measured(rows, x, y))}
        for x, _, y, _ in wanted
    ]
    if not any(seen):
        return None
    lines = styles(by_name)
    made = panels([""] * len(wanted), width=4.2, height=3.4, share=False)
    for axes, curves, (x, across, y, label) in zip(made.axes, seen, wanted, strict=True):
        for name, rows in curves.items():
            curve(axes, rows, x, y, label=name, **lines[name])
        widen(axes, "x", [row[x] for rows in curves.values() for row in rows])
        axes.set(xlabel=across, ylabel=label)
        axes.grid(alpha=0.3)
        axes.ticklabel_format(axis="y", useOffset=False)
    made.legend()
    return made.png()


def quality(
    rows: Rows,
    key: str,
    *,
    label: str,
    bounds: Bounds | None = None,
    anchors: Mapping[str, float] = MappingProxyType({}),
) -> bytes | None:
    """A figure of merit against calls: a curve for each model and path, and of a hybrid path (rows
    with a `split`) for each number of continuous calls.

    More than `CURVES` curves are divided into a panel for each model, or for each path if there
    are fewer paths.

    anchors: values drawn as horizontal lines, by name.
    bounds: of the axis of values; None may make it logarithmic.
    """
    rows = measured(rows, "calls", key)
    if not rows:
        return None
    keys = ("model", "path")
    parts: Mapping[str, Rows] = {"": rows}
    if len(groups(rows, partial(_name, keys=keys))) > CURVES:
        by = {key: groups(rows, itemgetter(key)) for key in keys}
        parting = min(keys, key=lambda key: len(by[key]))
        parts, keys = by[parting], tuple(key for key in keys if key != parting)
    name = partial(_name, keys=keys)
    lines = styles(map(name, rows))
    # A single panel has its legend below, so that the whole can be read on a narrow page.
    single = len(parts) == 1
    made = panels(list(parts), width=4.8 if single else 3.4, columns=3)
    anchors = {key: value for key, value in anchors.items() if math.isfinite(number(value))}
    for axes, part in zip(made.axes, parts.values(), strict=True):
        for curve_name, of_curve in groups(part, name).items():
            curve(axes, of_curve, "calls", key, label=curve_name, **lines[curve_name])
        for (anchor, value), dashes in zip(anchors.items(), itertools.cycle((":", "-.", "--"))):
            axes.axhline(value, color=GREY, ls=dashes, label=anchor)
        axes.set(xlabel="calls")
        axes.grid(alpha=0.3)
    first = made.axes[0]  # the others share its axes
    first.xaxis.get_major_locator().set_params(integer=True)
    widen(first, "x", [number(row["calls"]) for row in rows])
    if bounds:
        first.set_ylim(*bounds)
    else:
        widen(first, "y", [*(number(row[key]) for row in rows), *anchors.values()])
    made.figure.supylabel(label, fontsize="medium")
    made.legend(below=single)
    return made.png()


def frontier(rows: Rows, key: str, *, across: str, label: str, goal: str) -> bytes | None:
    """A figure against `diversity`, whose axis says `across`: a curve by temperature for each model
    and path, a panel for each budget.

    Rows without a path are drawn in grey, but for that of `goal`, a star. Those that lie far from
    the curves and the star are left out.
    """
    rows = measured(rows, "diversity", key)
    walks = [row for row in rows if "path" in row]
    if not walks:
        return None
    aims = [row for row in rows if row["model"] == goal]
    beside = [row for row in rows if "path" not in row and row["model"] != goal]
    parts = groups(walks, lambda row: f"{row['budget']} calls")
    lines = styles(map(_walk, walks))
    made = panels(list(parts), width=4.8, columns=1)
    around = {way: _around([*walks, *aims], way) for way in ("diversity", key)}
    near = [row for row in beside if all(a <= row[way] <= b for way, (a, b) in around.items())]
    heated = partial(curve, x="diversity", y=key, order="temperature")
    for axes, part in zip(made.axes, parts.values(), strict=True):
        for name, of_curve in groups(part, _walk).items():
            heated(axes, of_curve, label=name, **lines[name])
        for place, (name, of_curve) in enumerate(groups(near, itemgetter("model")).items()):
            look = {"color": GREY, "marker": MARKERS[place % len(MARKERS)], "mfc": "none"}
            heated(axes, of_curve, label=name, ms=5, lw=0.8, ls=":", **look)
        for row in aims:
            star = {"color": "black", "marker": "*", "ms": 12, "ls": "none", "zorder": 3}
            axes.plot(row["diversity"], row[key], label=goal, **star)
            axes.axvline(row["diversity"], color=GREY, ls=":", lw=1, zorder=0)
        axes.set(xlabel=across, xlim=around["diversity"], ylim=around[key])
        axes.grid(alpha=0.3)
    made.figure.supylabel(label, fontsize="medium")
    made.legend(below=True)
    return made.png()


def _walk(row: Row) -> str:
    """The name of a curve in a panel of one budget."""
    split = "{} + {}".format(*row["split"]) if row.get("split") else ""
    cut = f"nucleus {row['p']:g}" if row.get("p") else ""
    return " ".join(filter(None, (row["model"], row["path"], split, cut)))


def _around(rows: Rows, key: str) -> Bounds:
    """Their values and a tenth more on either side."""
    values = numbers(row[key] for row in rows)
    room = 0.1 * (max(values) - min(values)) or 0.1
    return min(values) - room, max(values) + room


def splits(rows: Rows, key: str, *, label: str, show: str = ".3g") -> bytes | None:
    """A figure of merit of hybrid paths, in the format `show`: continuous calls in rows, endpoint
    calls in columns."""
    import numpy as np

    rows = [row for row in measured(rows, key) if row.get("split")]
    if not rows:
        return None
    continuous, endpoint = (sorted({row["split"][i] for row in rows}) for i in (0, 1))
    parts = groups(rows, lambda row: f"{row['model']} {row['path']}")
    size = {"width": 1.6 + 0.75 * len(endpoint), "height": 1.2 + 0.45 * len(continuous)}
    made = panels(list(parts), **size, beside=0.9)
    values = numbers(row[key] for row in rows)
    low, high = min(values), max(values)
    for axes, part in zip(made.axes, parts.values(), strict=True):
        grid = np.full((len(continuous), len(endpoint)), math.nan)
        for row in part:
            at = continuous.index(row["split"][0]), endpoint.index(row["split"][1])
            grid[at] = number(row[key])
            # White text on dark colours, black on light ones.
            ink = "white" if grid[at] <= (low + high) / 2 else "black"
            axes.text(at[1], at[0], f"{grid[at]:{show}}", ha="center", va="center", color=ink)
        image = axes.imshow(grid, cmap="cividis", vmin=low, vmax=high, aspect="auto")
        axes.set_xticks(range(len(endpoint)), map(str, endpoint))
        axes.set_yticks(range(len(continuous)), map(str, continuous))
        axes.set(xlabel="endpoint calls", ylabel="continuous calls")
    made.figure.colorbar(image, ax=made.axes, label=label)
    return made.png()


def reliability(rows: Rows) -> bytes | None:
    """Accuracy against confidence, a panel for each SNR (004 fig. 4).

    The diagonal is perfect calibration, the area of a dot the share of predictions in its bin.
    Legends give the expected calibration error.
    """
    rows = [row for row in measured(rows, "gamma") if _bins(row)]
    if not rows:
        return None
    lines = styles(row["model"] for row in rows)
    by_gamma = dict(sorted(groups(rows, lambda row: row["gamma"]).items()))
    made = panels([f"SNR {gamma:g}" for gamma in by_gamma], width=3.0)
    for axes, part in zip(made.axes, by_gamma.values(), strict=True):
        axes.plot((0, 1), (0, 1), color=GREY, ls=":", lw=1)
        for row in part:
            confidence, accuracy, counts = zip(*_bins(row), strict=True)
            line = lines[row["model"]]
            color = line["color"]
            # Wrapped, so that the legend fits into its panel.
            label = textwrap.fill(f"{row['model']}: ECE {ECE.cell(row)}", 24)
            axes.plot(confidence, accuracy, color=color, ls=line["ls"], lw=1.2, label=label)
            area = [8 + 80 * count / sum(counts) for count in counts]
            axes.scatter(confidence, accuracy, s=area, color=color, marker=line["marker"])
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        axes.legend(fontsize="x-small", loc="best")
    return made.png()


def _bins(row: Row) -> list[tuple[float, ...]]:
    """Confidence, accuracy and count of the bins that have all three."""
    columns = (numbers(row.get(key) or ()) for key in ("confidence", "accuracy", "count"))
    bins = zip(*columns, strict=False)
    return [values for values in bins if all(map(math.isfinite, values)) and values[-1]]


def nll(rows: Rows) -> bytes | None:
    """Nats per token against gamma* of the hybrid bound, with standard errors (003 eq. 5).

    Rows without a `gamma_star` are drawn as horizontal lines, to compare the bound with.
    """
    rows = measured(rows, "nats_per_token")
    bounds = measured(rows, "gamma_star")
    if not bounds:
        return None
    made = panels([""], width=5.5)
    (axes,) = made.axes
    lines = styles(row["model"] for row in rows)
    for model, part in groups(bounds, lambda row: row["model"]).items():
        label = f"{model} hybrid bound"
        curve(axes, part, "gamma_star", "nats_per_token", label=label, **lines[model])
    for row in rows:
        if row not in bounds:
            label = f"{row['model']} {row['view']}".replace("_", " ")
            color = lines[row["model"]]["color"]
            axes.axhline(row["nats_per_token"], color=color, ls=":", label=label)
    widen(axes, "x", [row["gamma_star"] for row in bounds])
    axes.set(xlabel="gamma*", ylabel="nats per token")
    axes.grid(alpha=0.3)
    made.legend()
    return made.png()


def _name(row: Row, keys: Sequence[str]) -> str:
    """The name of a curve: the values under the keys, and a hybrid path's continuous calls."""
    names = [row[key] for key in keys]
    return " ".join([*names, *([f"{row['split'][0]} + …"] if row.get("split") else [])])
