"""The finding as one table and one plot, made from the results of evaluations.

    python -m pipelines.examples.claim out=claim.png evaluations='[runs/frequent-evaluation]'

Every evaluation has a frontier, and its first model is the one to beat. For each number of calls
and each model, the walk with the fewest bits per byte at the diversity of real text is taken, by
each judge. The table is printed as Markdown, the plot shows the same for the last judge.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infra.documents import from_json
from infra.errors import DataError
from infra.storage import Folder
from pipelines import verb
from pipelines.evaluation.cells import REAL
from pipelines.report import Row, Rows
from pipelines.report.drawing import GREY, groups, measured, panels, style

REPORT = "report/evaluation.json"
HEAD = "| text | judge | calls | best walk | bits per byte | best walk | bits per byte | fewer |"


@dataclass(frozen=True, kw_only=True)
class ClaimConfig:
    """`evaluations`: run directories of `evaluate`. `out`: the file of the plot, PNG."""

    evaluations: tuple[str, ...]
    out: str

    def __post_init__(self) -> None:
        if not self.evaluations:
            raise ValueError("evaluations must hold at least one")


def judges(rows: Rows) -> list[str]:
    """The judges of the rows of a headline, by name."""
    start, end = "headline_", "_interval"
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(start))
    return [key[len(start) : -len(end)] for key in keys if key.endswith(end)]


def best(rows: Rows, judge: str) -> dict[tuple[str, int], Row]:
    """By model and calls, the walk with the fewest bits per byte whose interval has ends."""
    found: dict[tuple[str, int], Row] = {}
    key = f"headline_{judge}"
    for row in measured(rows, key, f"{key}_low", f"{key}_high", "budget"):
        place = row["model"], row["budget"]
        found[place] = min(found.get(place, row), row, key=lambda row: row[key])
    return found


def lines(name: str, rows: Rows) -> Iterator[str]:
    """The lines of the table for one evaluation."""
    (real,) = (row for row in rows if row["model"] == REAL)
    for judge in judges(rows):
        taken = best(rows, judge)
        first, *others = dict.fromkeys(model for model, _ in taken)
        for calls in sorted({calls for _, calls in taken}):
            for model in others:
                if (first, calls) not in taken or (model, calls) not in taken:
                    continue
                before, after = taken[first, calls], taken[model, calls]
                cells = [name, judge, str(calls), *_shown(before, judge), *_shown(after, judge)]
                fewer = after.get(f"ahead_{judge}_interval", "–")
                yield "| {} | {} |".format(" | ".join(cells), fewer)
        yield f"| {name} | {judge} | – | real text | {real[f'headline_{judge}']:.2f} | | | |"


def _shown(row: Row, judge: str) -> tuple[str, str]:
    split = " {} + {}".format(*row["split"]) if row.get("split") else ""
    low, high = row[f"headline_{judge}_low"], row[f"headline_{judge}_high"]
    path = f"{row['model']}, {row['path']}{split}"
    return path, f"{row[f'headline_{judge}']:.2f} [{low:.2f}, {high:.2f}]"


def draw(evaluations: dict[str, Rows]) -> bytes:
    """A panel for each evaluation: bits per byte by the last judge against calls, and real text."""
    made = panels(list(evaluations), width=3.4, height=3.0, share=False)
    for axes, rows in zip(made.axes, evaluations.values(), strict=True):
        judge = judges(rows)[-1]
        key = f"headline_{judge}"
        for place, (model, of_model) in enumerate(
            groups(best(rows, judge).values(), lambda row: row["model"]).items()
        ):
            points = sorted(of_model, key=lambda row: row["budget"])
            middle = [row[key] for row in points]
            below = [row[key] - row[f"{key}_low"] for row in points]
            above = [row[f"{key}_high"] - row[key] for row in points]
            calls, look = [row["budget"] for row in points], style(place)
            axes.errorbar(calls, middle, (below, above), label=model, **look)
        (real,) = (row[key] for row in rows if row["model"] == REAL)
        axes.axhline(real, color=GREY, ls=":", label="real text")
        axes.set(xlabel="denoiser calls", ylabel=f"bits per byte by {judge}")
        axes.grid(alpha=0.3)
    made.axes[0].legend(fontsize="x-small")  # which holds for all panels
    return made.png()


def read(run: str) -> Rows:
    """The rows of the headline of an evaluation; DataError where it has none."""
    folder = Folder.at(run)
    try:
        tables = from_json(folder.read_bytes(REPORT))
    except ValueError as error:
        raise DataError(folder.url_of(REPORT), str(error), "Evaluate again") from error
    rows: Rows = tables.get("headline", ())
    if not any(row["model"] == REAL for row in rows) or not judges(rows):
        why = "this evaluation has no headline"
        raise DataError(folder.url_of(REPORT), why, "Evaluate again with `frontier` and a judge")
    return rows


def plan(config: ClaimConfig) -> dict[str, Any]:
    """What would be read, for `--dry-run`."""
    return asdict(config)


def execute(config: ClaimConfig) -> dict[str, Any]:
    evaluations = {
        Folder.at(run).url.rstrip("/").rpartition("/")[2].removesuffix("-evaluation"): read(run)
        for run in config.evaluations
    }
    print(HEAD, "|" + "---|" * (HEAD.count("|") - 1), sep="\n")
    for name, rows in evaluations.items():
        print(*lines(name, rows), sep="\n")
    Path(config.out).write_bytes(draw(evaluations))
    return {"figure": config.out}


def main() -> int:
    return verb.run("claim", ClaimConfig, plan=plan, execute=execute, doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
