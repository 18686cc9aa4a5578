"""The tables of an evaluation laid out as the papers print them, with theirs below ours if asked.

A layout only arranges anew what other tables hold in full, for readers: its rows are not to be
counted again, and the published ones were measured by somebody else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pipelines.evaluation import published as papers
from pipelines.evaluation.published import Published, PublishedTable
from pipelines.report.tables import BOUND, SKIPPED, STDERR, Column, Row, Rows, Table

OURS, THEIRS = "this run", "published, not run here"
MODEL, PATH = Column("model", "Model"), Column("path", "Path")
SOURCE = Column("source", "Source")


class Metric(NamedTuple):
    """What is said of texts under `key`; `bounds` are those of its axis, if it has any."""

    key: str
    title: str
    show: str
    bounds: tuple[float, float] | None = None


MAUVE = Metric("mauve", "MAUVE ↑", ".3f", (0, 1))
PERPLEXITY = Metric("perplexity", "Generative perplexity ↓", ".1f")
WORDS = Metric("words", "Words in corpus ↑", ".3f", (0, 1))
ENTROPY = Metric("entropy", "Entropy of a text, nats", ".3f")
QUALITY = (MAUVE, PERPLEXITY, WORDS)

# Views that bound the likelihood, by what they begin with, and the one that is it.
BOUNDS, EXACT = ("endpoint_bound", "hybrid_bound"), "exact"


def lay_out(texts: Rows, likelihood: Rows, published: Sequence[Published]) -> dict[str, Table]:
    """Every layout that there is something for, by name; the papers' tables where they belong."""
    theirs = {name: papers.read(name) for name in published}
    made = {
        f"{metric.key}_by_budget": by_budget(
            texts, metric, theirs.get("owt_mauve") if metric is MAUVE else None
        )
        for metric in QUALITY
    }
    made["hybrid_splits"] = hybrid_splits(texts, theirs.get("owt_hybrid_mauve"))
    made["bits"] = bits(likelihood, theirs.get("text8_bpc"))
    return {name: table for name, table in made.items() if table is not None}


def by_budget(texts: Rows, metric: Metric, published: PublishedTable | None = None) -> Table | None:
    """A line for each model and path, a column for each budget T (000, unconditional generation).

    Hybrid paths have a table of their own. None where there is nothing to show.
    """
    rows = _ours(texts, hybrid=False, keys=(metric.key,))
    if published:
        rows += [
            {**row, metric.key: value, "budget": budget, "source": THEIRS}
            for row in published.rows
            for budget, value in row[metric.key].items()
        ]
    budgets = sorted({row["budget"] for row in rows if metric.key in row})
    lines: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(_of(row), _labels(row))
        if metric.key in row:
            line.pop(SKIPPED, None)  # a path that can be walked at some budgets was not skipped
            line |= _value(row, metric.key, to=f"T={row['budget']}")
        elif not any(f"T={budget}" in line for budget in budgets):
            line[SKIPPED] = row[SKIPPED]
    columns = tuple(Column(f"T={budget}", f"T={budget}", metric.show) for budget in budgets)
    return _table(
        f"{metric.title} by budget",
        f"T: denoiser calls. {_anchors(texts, metric)}",
        (MODEL, PATH, *columns),
        list(lines.values()) if budgets else [],
        published,
    )


def hybrid_splits(texts: Rows, published: PublishedTable | None = None) -> Table | None:
    """A line for each split of a hybrid path (000, hybrid continuous-then-MDM sampler)."""
    rows = _ours(texts, hybrid=True, keys=tuple(metric.key for metric in QUALITY))
    if published:
        rows += [{**row, "source": THEIRS} for row in published.rows]
    metrics = [metric for metric in QUALITY if any(metric.key in row for row in rows)]
    return _table(
        "Hybrid paths by split",
        "Continuous calls first, endpoint calls then; NFE: denoiser calls that were made.",
        (
            *(MODEL, PATH, Column("t_cont", "T_cont"), Column("t_mdm", "T_MDM")),
            Column("nfe", "NFE", ".4g"),
            *(Column(metric.key, metric.title, metric.show) for metric in metrics),
        ),
        [_split(row, metrics) for row in rows] if metrics else [],
        published,
    )


def ece(calibration: Rows) -> Table:
    """A line for each model, a column for each SNR (004 figure 4)."""
    lines: dict[str, dict[str, Any]] = {}
    for row in calibration:
        line = lines.setdefault(row["model"], {"model": row["model"]})
        line[row["state"]] = row["ece"]
    states = dict.fromkeys(row["state"] for row in calibration)
    return Table(
        title="Expected calibration error by SNR",
        note="Of the likeliest token at every position, under teacher forcing.",
        columns=(MODEL, *(Column(state, state, ".4f") for state in states)),
        rows=list(lines.values()),
    )


def bits(likelihood: Rows, published: PublishedTable | None = None) -> Table | None:
    """Bits per character and perplexity (003 table 1); what is no bound and not exact is left
    out."""
    rows: list[Row] = []
    for row in likelihood:
        bound = row["view"].startswith(BOUNDS)
        if bound or row["view"] == EXACT:
            signs = {key + BOUND: bound for key in ("bits_per_byte", "perplexity")}
            rows.append({**row, **signs, "source": OURS})
    for row in published.rows if published else ():
        name = f"{row['model']}, {row['family']}"
        rows.append({**row, "model": name, "source": THEIRS})
    return _table(
        "Bits per character and perplexity",
        "≤: an upper bound. Bits per byte are bits per character where the text is ASCII; "
        "perplexity is that of a token.",
        (
            *(MODEL, Column("view", "View")),
            Column("bits_per_byte", "BPC ↓", ".3f"),
            Column("perplexity", "PPL ↓", ".2f"),
        ),
        rows,
        published,
    )


def _ours(texts: Rows, *, hybrid: bool, keys: Sequence[str]) -> list[Row]:
    """The rows of walks, hybrid or not, that were measured or have a reason why not."""
    hybrids = {row["path"] for row in texts if "split" in row}  # a skipped row has no split
    return [
        {**row, "source": OURS}
        for row in texts
        if "path" in row
        and (row["path"] in hybrids) is hybrid
        and (SKIPPED in row or any(key in row for key in keys))
    ]


def _labels(row: Row) -> dict[str, Any]:
    return {key: row[key] for key in ("model", "path", "source") if key in row}


def _of(row: Row) -> tuple[str, ...]:
    return tuple(_labels(row).values())


def _value(row: Row, key: str, *, to: str) -> dict[str, Any]:
    """A value and its error under another key."""
    return {to + end: row[key + end] for end in ("", STDERR) if key + end in row}


def _split(row: Row, metrics: Iterable[Metric]) -> Row:
    if SKIPPED in row:
        return {**_labels(row), SKIPPED: row[SKIPPED]}
    t_cont, t_mdm = row["split"]
    line = {
        **_labels(row),
        "t_cont": t_cont,
        "t_mdm": t_mdm,
        "nfe": row.get("calls", t_cont + t_mdm),
    }
    for metric in metrics:
        line |= _value(row, metric.key, to=metric.key)
    return line


def _anchors(texts: Rows, metric: Metric) -> str:
    """What stands beside the models."""
    column = Column(metric.key, metric.title, metric.show)
    said = [
        f"{row['model']} {column.cell(row)}"
        for row in texts
        if "path" not in row and metric.key in row
    ]
    return f"Beside the models: {', '.join(said)}." if said else ""


def _table(
    title: str,
    note: str,
    columns: tuple[Column, ...],
    rows: Rows,
    published: PublishedTable | None,
) -> Table | None:
    """None if there are no rows; with a column for the source where there are two."""
    if not rows:
        return None
    # A reason stands where the values would begin, so that nothing else may come before it.
    rows = [
        {k: v for k, v in row.items() if k != SOURCE.key} if SKIPPED in row else row for row in rows
    ]
    if published is None:
        return Table(title=title, note=note, columns=columns, rows=rows)
    note = f"{note} {published.note}"
    return Table(title=title, note=note, columns=(*columns, SOURCE), rows=rows)
