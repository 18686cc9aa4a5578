"""The tables of an evaluation laid out as the papers print them, with theirs below ours.

Such a table is made only where the configuration asks for the papers': our rows stand in full in
another one. Its rows are not logged, and the published ones are the papers' measurements, not ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

from pipelines.evaluation.question import Merit
from pipelines.report import SKIPPED, STDERR, Column, Row, Rows, Table

FILE = Path(__file__).with_name("published.yaml")
Published = Literal["owt_mauve", "owt_hybrid_mauve", "text8_bpc"]

HYBRIDS: Published = "owt_hybrid_mauve"

OURS, THEIRS = "this run", "published, not run here"
MODEL, PATH = Column("model", "Model"), Column("path", "Path")
SOURCE = Column("source", "Source")


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """Rows as a paper prints them, where they stand there, and what was measured how."""

    source: str
    protocol: str
    rows: tuple[Mapping[str, Any], ...]

    @property
    def note(self) -> str:
        return f"Published, not run here: {self.source} ({self.protocol})."


@lru_cache
def published_table(name: Published) -> PublishedTable:
    """The papers' table of that name."""
    table = yaml.safe_load(FILE.read_text(encoding="utf-8"))[name]
    return PublishedTable(**table | {"rows": tuple(table["rows"])})


def of_texts(
    texts: Rows, merits: Sequence[Merit], published: Sequence[Published]
) -> dict[str, Table]:
    """The papers' tables of texts that are asked for, by name, below the same figures of ours."""
    made = {
        f"{merit.key}_by_budget": by_budget(texts, merit, published_table(merit.published))
        for merit in merits
        if merit.published in published
    }
    if HYBRIDS in published:
        quality = [merit for merit in merits if merit.better]
        made["hybrid_splits"] = hybrid_splits(texts, quality, published_table(HYBRIDS))
    return made


def by_budget(texts: Rows, merit: Merit, published: PublishedTable) -> Table:
    """A line for each model and path, a column for each budget T (000, unconditional generation).

    Hybrid paths have a table of their own.
    """
    rows = _ours(texts, hybrid=False, keys=(merit.key,))
    rows += [
        {**row, merit.key: value, "budget": budget, "source": THEIRS}
        for row in published.rows
        for budget, value in row[merit.key].items()
    ]
    budgets = sorted({row["budget"] for row in rows if merit.key in row})
    lines: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(tuple(_labels(row).values()), _labels(row))
        if merit.key in row:
            line.pop(SKIPPED, None)  # a path that can be walked at some budgets was not skipped
            line |= _value(row, merit.key, to=f"T={row['budget']}")
        elif not any(f"T={budget}" in line for budget in budgets):
            line[SKIPPED] = row[SKIPPED]
    columns = tuple(Column(f"T={budget}", f"T={budget}", merit.show) for budget in budgets)
    return with_sources(
        f"{merit.title} by budget",
        " ".join(filter(None, ("T: denoiser calls.", _anchors(texts, merit)))),
        (MODEL, PATH, *columns),
        list(lines.values()),
        published,
    )


def hybrid_splits(texts: Rows, merits: Iterable[Merit], published: PublishedTable) -> Table:
    """A line for each split of a hybrid path (000, hybrid continuous-then-MDM sampler)."""
    rows = _ours(texts, hybrid=True, keys=[merit.key for merit in merits])
    rows += [{**row, "source": THEIRS} for row in published.rows]
    merits = [merit for merit in merits if any(merit.key in row for row in rows)]
    return with_sources(
        "Hybrid paths by split",
        "Continuous calls first, endpoint calls then; NFE: denoiser calls that were made.",
        (
            *(MODEL, PATH, Column("t_cont", "T_cont"), Column("t_mdm", "T_MDM")),
            Column("nfe", "NFE", ".4g"),
            *(Column(merit.key, merit.title, merit.show) for merit in merits),
        ),
        [_split(row, merits) for row in rows],
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


def _value(row: Row, key: str, *, to: str) -> dict[str, Any]:
    """A value and its error under another key."""
    return {to + end: row[key + end] for end in ("", STDERR) if key + end in row}


def _split(row: Row, merits: Iterable[Merit]) -> Row:
    if SKIPPED in row:
        return {**_labels(row), SKIPPED: row[SKIPPED]}
    first, second = row["split"]
    line = {"t_cont": first, "t_mdm": second, "nfe": row.get("calls", first + second)}
    for merit in merits:
        line |= _value(row, merit.key, to=merit.key)
    return {**_labels(row), **line}


def _anchors(texts: Rows, merit: Merit) -> str:
    """What stands beside the models."""
    column = Column(merit.key, merit.title, merit.show)
    beside = [row for row in texts if "path" not in row and merit.key in row]
    said = ", ".join(f"{row['model']} {column.cell(row)}" for row in beside)
    return f"Beside the models: {said}." if said else ""


def with_sources(
    title: str, note: str, columns: tuple[Column, ...], rows: Rows, published: PublishedTable
) -> Table:
    """A table whose last column says whose the row is."""
    # A reason stands where the values would begin, so that nothing else may come before it.
    said = [{k: v for k, v in row.items() if k != SOURCE.key or SKIPPED not in row} for row in rows]
    note = f"{note} {published.note}"
    return Table(title=title, note=note, columns=(*columns, SOURCE), rows=said)
