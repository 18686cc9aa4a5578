"""What all plots share: panels, distinguishable styles, and curves with error bars.

Figures are made without pyplot, so that there is no global state and any thread may draw.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from pipelines.report.tables import STDERR, Row, Rows, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

T = TypeVar("T", bound=Hashable)

# The colours of Okabe and Ito, which colour-blind readers can tell apart, without yellow, which is
# faint on white. Markers and dashes help in greyscale and beyond seven curves.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vP*X"
DASHES = ("-", "--", ":")
GREY = "0.45"
CURVES = 8  # the most in one panel
COLUMNS = 4  # the most panels side by side
LETTERS = 11  # of a title, in an inch
MARGIN = 0.3  # inches around a legend, on both sides together
SPAN = 8  # an axis is logarithmic if its values span a larger ratio


class Panels(NamedTuple):
    """A figure and its panels, row by row."""

    figure: Figure
    axes: list[Axes]

    def png(self) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=120)
        return buffer.getvalue()

    def legend(self, *, below: bool = False) -> None:
        """One legend beside all panels, or below them, which names each curve once."""
        handles = {
            label: handle
            for axes in self.axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        place = partial(
            self.figure.legend,
            list(handles.values()),
            list(handles),
            loc="outside lower center" if below else "outside right upper",
            fontsize="small",
        )
        width, height = self.figure.get_size_inches()
        legend = place()
        if below and 2 * self._room(legend)[0] <= width:
            legend.remove()
            legend = place(ncols=2)
        across, down = self._room(legend)
        size = (max(width, across), height + down) if below else (width + across, max(height, down))
        self.figure.set_size_inches(size)

    def _room(self, legend: Legend) -> tuple[float, float]:
        """The width and height of a legend with its margin, in inches."""
        box = legend.get_window_extent()
        return box.width / self.figure.dpi + MARGIN, box.height / self.figure.dpi + MARGIN


def panels(
    titles: Sequence[str],
    *,
    width: float,
    height: float = 3.0,
    columns: int = COLUMNS,
    beside: float = 0.0,
    share: bool | str = True,
) -> Panels:
    """A panel of `width` x `height` inches for each title.

    beside: inches to the right of them, for a bar of colours.
    share: which axes the panels share, as in matplotlib's `sharex` and `sharey`.
    """
    from matplotlib.figure import Figure

    lines = math.ceil(len(titles) / columns)
    columns = math.ceil(len(titles) / lines)
    size = (width * columns + beside, height * lines)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=share, sharey=share).ravel()
    for axes, title in zip(grid, titles, strict=False):
        # Wrapped, so that the titles of neighbours do not run into each other.
        axes.set_title(textwrap.fill(title, int(LETTERS * width)), fontsize="medium")
        axes.tick_params(labelsize="small", labelbottom=True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(titles) :]:
        axes.remove()
    return Panels(figure, list(grid[: len(titles)]))


def style(index: int) -> dict[str, Any]:
    """Line and marker of a curve; the first 56 differ."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "ls": DASHES[index // len(COLOURS) % len(DASHES)],
        "ms": 4,
        "lw": 1.3,
    }


def styles(names: Iterable[T]) -> dict[T, dict[str, Any]]:
    """A style for each name, in order of appearance."""
    return {name: style(index) for index, name in enumerate(dict.fromkeys(names))}


def groups(rows: Iterable[Row], name: Callable[[Row], T]) -> dict[T, list[Row]]:
    """Rows by name, both in order of appearance."""
    found: dict[T, list[Row]] = {}
    for row in rows:
        found.setdefault(name(row), []).append(row)
    return found


def measured(rows: Iterable[Row], *keys: str) -> list[Row]:
    """The rows that have a finite number under every key."""
    return [row for row in rows if all(math.isfinite(number(row.get(key))) for key in keys)]


def numbers(values: Iterable[Any]) -> list[float]:
    return [number(value) for value in values]


def curve(axes: Axes, rows: Rows, x: str, y: str, *, order: str = "", **line: Any) -> None:
    """``y`` against ``x``, in order of ``x`` or of ``order``, with standard errors if there are
    any."""
    rows = sorted(rows, key=lambda row: number(row.get(order or x)))
    errors = numbers(row.get(y + STDERR) for row in rows)
    if any(map(math.isfinite, errors)):  # else the legend would show an error bar
        line |= {"yerr": errors, "capsize": 2.5, "elinewidth": 1}
    axes.errorbar(numbers(row[x] for row in rows), numbers(row[y] for row in rows), **line)


def widen(axes: Axes, which: Literal["x", "y"], values: Iterable[float]) -> None:
    """Make an axis logarithmic if its values are positive and span more than `SPAN`."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    values = list(values)
    if not values or min(values) <= 0 or max(values) <= SPAN * min(values):
        return
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(base=2 if max(values) < 2**10 * min(values) else 10))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
