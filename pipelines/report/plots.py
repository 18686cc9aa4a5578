"""The plots of an evaluation, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

# What of a journal is drawn, and how.
CURVES: Mapping[str, Mapping[str, Any]] = {
    "loss": {"lw": 0.7, "alpha": 0.6},
    "validation/loss": {"marker": "o", "ms": 4},
}


def losses(runs: Mapping[str, Rows]) -> bytes:
    """Training and validation loss by step, a panel for each run's journal."""
    figure = _figure(width=4.5 * len(runs))
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for axes, (name, journal) in zip(panels, runs.items(), strict=True):
        for key, style in CURVES.items():
            rows = [row for row in journal if key in row]
            axes.plot([row["step"] for row in rows], [row[key] for row in rows], label=key, **style)
        axes.set(title=name, xlabel="step", ylabel="nats per token")
        axes.legend()
    return _png(figure)


def quality(samples: Rows, anchors: Mapping[str, float]) -> bytes:
    """The share of known words against calls, with horizontal lines for what is not sampled."""
    figure = _figure(width=8)
    axes = figure.subplots()
    for name, rows in _by(samples, "model", "path"):
        calls, shares = [r["calls"] for r in rows], [r["words"] for r in rows]
        errors = [row["words_stderr"] for row in rows]
        axes.errorbar(calls, shares, yerr=errors, marker="o", capsize=3, label=name)
    for name, share in anchors.items():
        axes.axhline(share, color="0.5", ls=":")
        axes.annotate(name, (1, share), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set(xlabel="calls", ylabel="share of words in the corpus", ylim=(0, 1))
    figure.legend(loc="outside right upper", fontsize="small")
    return _png(figure)


def errors_by_snr(states: Rows) -> bytes:
    """Cross-entropy and squared error against SNR."""
    figure = _figure(width=9)
    left, right = figure.subplots(1, 2)
    for name, rows in _by(states, "model"):
        gammas = [row["gamma"] for row in rows]
        for axes, key in ((left, "nats"), (right, "squared_error")):
            values, errors = ([row[k] for row in rows] for k in (key, f"{key}_stderr"))
            axes.errorbar(gammas, values, yerr=errors, marker="o", capsize=3, label=name)
    left.set(xscale="log", xlabel="SNR", ylabel="cross-entropy, nats per token")
    right.set(xscale="log", xlabel="SNR", ylabel="E(SNR) = |x - x̂|²")
    right.ticklabel_format(axis="y", useOffset=False)
    left.legend()
    return _png(figure)


def _by(rows: Rows, *keys: str) -> Iterable[tuple[str, list[Mapping[str, Any]]]]:
    def name(row: Mapping[str, Any]) -> str:
        return " ".join(str(row[key]) for key in keys)

    return [(key, list(group)) for key, group in groupby(rows, name)]


def _figure(width: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, 3.8), layout="constrained")  # Agg, and no global state


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
