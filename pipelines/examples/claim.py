"""The finding as one table and one plot, made from the results of evaluations.

    python -m pipelines.examples.claim out=claim.png \\
        evaluations='{small: [runs/small-evaluation], frequent: [runs/frequent-0, runs/frequent-1]}'

Every evaluation has a frontier, and its first model is the one to beat. Evaluations of one text are
of the same data, models and judges by their names, and differ in the seeds that their models were
trained with. For each number of calls and each model,
the walk with the fewest bits per byte at the diversity of real text, averaged over the seeds, is
taken, by each judge. The interval of a single seed is the evaluation's own, from resampled texts;
that of several seeds is Student's t over the seeds. It covers the choice of texts and of rows of
real text only where each evaluation has made its own, by its `seed`. That of `fewer` does not cover
that the other model's walk is the best of several, see `pipelines.evaluation.questions.frontier`.
The table is printed as Markdown, the plot shows the same for the last judge.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

from infra import documents
from infra.errors import DataError
from infra.storage import Folder
from pipelines import verb
from pipelines.evaluation.cells import REAL
from pipelines.report import Row, Rows
from pipelines.report.drawing import GREY, groups, measured, panels, style
from pipelines.sweeping.arms import paired

REPORT = "report/evaluation.json"
ANEW = "Evaluate again"
HEAD = "| text | judge | calls | best walk | bits per byte | best walk | bits per byte | fewer |"


@dataclass(frozen=True, kw_only=True)
class ClaimConfig:
    """`evaluations`: by the name of a text, the run directories of `evaluate`, one for each seed of
    training. `out`: the file of the plot, PNG."""

    evaluations: dict[str, tuple[str, ...]]
    out: str

    def __post_init__(self) -> None:
        if not self.evaluations or not all(self.evaluations.values()):
            raise ValueError("evaluations must name a text, and of each text at least one run")


class Spread(NamedTuple):
    """A value, and the ends of its interval."""

    value: float
    low: float
    high: float


class Repeats(NamedTuple):
    """The rows of one walk in the headlines, one for each seed."""

    rows: tuple[Row, ...]

    @property
    def cell(self) -> tuple[str, int]:
        """The model and the number of calls."""
        return self.rows[0]["model"], self.rows[0]["budget"]

    @property
    def name(self) -> str:
        row = self.rows[0]
        split = " {} + {}".format(*row["split"]) if row.get("split") else ""
        return f"{row['model']}, {row['path']}{split}"

    def figure(self, key: str) -> Spread | None:
        """The mean over the seeds of the value under a key; None unless every seed has the value
        and both ends of its interval."""
        keys = key, f"{key}_low", f"{key}_high"
        if len(measured(self.rows, *keys)) < len(self.rows):
            return None
        if len(self.rows) == 1:
            return Spread(*(self.rows[0][name] for name in keys))
        over = paired([row[key] for row in self.rows])
        return Spread(over.mean, over.low, over.high)


def judges(rows: Rows) -> list[str]:
    """The judges of the rows of a headline, by name."""
    start, end = "headline_", "_interval"
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(start))
    return [key[len(start) : -len(end)] for key in keys if key.endswith(end)]


def best(headlines: Sequence[Rows], key: str) -> dict[tuple[str, int], tuple[Repeats, Spread]]:
    """By model and calls, the walk whose value under the key is the least, among those that have
    one in the headline of every seed."""
    found: dict[tuple[str, int], tuple[Repeats, Spread]] = {}
    rows = [row for headline in headlines for row in headline if "path" in row]
    for walk in (Repeats(tuple(of_walk)) for of_walk in groups(rows, _labels).values()):
        figure = walk.figure(key)
        if figure and len(walk.rows) == len(headlines):
            before = found.get(walk.cell, (walk, figure))
            found[walk.cell] = min(before, (walk, figure), key=lambda pair: pair[1].value)
    return found


def _labels(row: Row) -> tuple[Any, ...]:
    return row["model"], row["path"], row["budget"], row.get("p"), *(row.get("split") or ())


def lines(name: str, headlines: Sequence[Rows]) -> Iterator[str]:
    """The lines of the table for one text."""
    for judge in judges(headlines[0]):
        key = f"headline_{judge}"
        taken = best(headlines, key)
        models = _models(headlines)
        for calls in sorted({calls for _, calls in taken}):
            for model in models[1:]:
                first = models[0]
                if (first, calls) not in taken or (model, calls) not in taken:
                    continue
                cells = [name, judge, str(calls)]
                for walk, (value, low, high) in (taken[first, calls], taken[model, calls]):
                    cells += [walk.name, f"{value:.2f} [{low:.2f}, {high:.2f}]"]
                fewer = taken[model, calls][0].figure(f"ahead_{judge}")
                cells.append(f"{fewer.low:.3f} to {fewer.high:.3f}" if fewer else "–")
                yield f"| {' | '.join(cells)} |"
        yield f"| {name} | {judge} | – | real text | {_real(headlines, key):.2f} | | | |"


def _models(headlines: Sequence[Rows]) -> list[str]:
    """Those of the first evaluation, the one to beat first, whether or not they have a headline."""
    return list(dict.fromkeys(row["model"] for row in headlines[0] if "path" in row))


def _real(headlines: Sequence[Rows], key: str) -> float:
    return fmean(row[key] for rows in headlines for row in rows if row["model"] == REAL)


def draw(texts: Mapping[str, Sequence[Rows]]) -> bytes:
    """A panel for each text: bits per byte by the last judge against calls, and real text."""
    made = panels(list(texts), width=3.4, height=3.0, share=False)
    for axes, headlines in zip(made.axes, texts.values(), strict=True):
        judge = judges(headlines[0])[-1]
        key = f"headline_{judge}"
        found = best(headlines, key)
        for place, model in enumerate(_models(headlines)):
            points = sorted(
                (at, figure) for (whose, at), (_, figure) in found.items() if whose == model
            )
            if not points:
                continue
            calls, figures = zip(*points, strict=True)
            # The ends are quantiles of resamples, which need not lie around the value itself.
            below = [max(figure.value - figure.low, 0.0) for figure in figures]
            above = [max(figure.high - figure.value, 0.0) for figure in figures]
            middle = [figure.value for figure in figures]
            axes.errorbar(calls, middle, (below, above), label=model, **style(place))
        axes.axhline(_real(headlines, key), color=GREY, ls=":", label="real text")
        axes.set(xlabel="denoiser calls", ylabel=f"bits per byte by {judge}")
        axes.grid(alpha=0.3)
    made.axes[0].legend(fontsize="x-small")  # which holds for all panels
    return made.png()


class Evaluation(NamedTuple):
    """The rows of the headline of an evaluation, and what those of one text have in common: the
    digest of the data, and the models and the judges by name, the model to beat first."""

    url: str
    rows: Rows
    data: str
    models: list[str]
    judges: list[str]


def read(run: str) -> Evaluation:
    """An evaluation; DataError where it has no headline, or a report of another shape."""
    folder = Folder.at(run)
    said = documents.load(folder, REPORT, dict[str, Any], ANEW)
    kept = json.dumps({key: said[key] for key in ("headline", "data", "models") if key in said})
    found: _Said = documents.parse(kept.encode(), _Said, folder.url_of(REPORT), ANEW)
    rows: Rows = found.headline
    if wrong := [number for number, row in enumerate(rows) if not _has_labels(row)]:
        why = f"headline.{wrong[0]} does not say of which model and walk it is"
        raise DataError(folder.url_of(REPORT), why, ANEW)
    if not any(row["model"] == REAL for row in rows) or not judges(rows):
        why = "this evaluation has no headline"
        raise DataError(folder.url_of(REPORT), why, "Evaluate again with `frontier` and a judge")
    digest = found.data.get("digest", "")
    return Evaluation(folder.url, rows, digest, list(found.models), judges(rows))


@dataclass(frozen=True, kw_only=True)
class _Said:
    """What is read of a report."""

    headline: list[dict[str, int | float | str | list[int] | None]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)


def _has_labels(row: Row) -> bool:
    """Whether a row says of which model it is and, where it is of a walk, of how many calls."""
    walk = [("path", str), ("budget", int)] if "path" in row else []
    named = all(isinstance(row.get(key), form) for key, form in [("model", str), *walk])
    split = row.get("split")
    return named and (not split or (isinstance(split, list) and len(split) == 2))


def together(runs: Sequence[str]) -> list[Rows]:
    """The headlines of the evaluations of one text; DataError where two of them do not belong
    together, or are the same."""
    found: list[Evaluation] = []
    for evaluation in map(read, runs):
        for other in found:
            _require_seeds(other, evaluation)
        found.append(evaluation)
    return [evaluation.rows for evaluation in found]


def _require_seeds(one: Evaluation, other: Evaluation) -> None:
    """DataError unless two evaluations differ in their seeds alone."""
    if one.rows == other.rows:
        fix = "Name every evaluation of a text once"
        raise DataError(other.url, f"says the very same as {one.url}", fix)
    for what in ("data", "models", "judges"):
        before, now = getattr(one, what), getattr(other, what)
        if before != now:
            raise DataError(
                other.url,
                f"its {what} are {now}, and those of {one.url} are {before}",
                "Name evaluations of other data, models or judges as another text",
            )


def plan(config: ClaimConfig) -> dict[str, Any]:
    """What would be read, for `--dry-run`."""
    return asdict(config)


def execute(config: ClaimConfig) -> dict[str, Any]:
    texts = {name: together(runs) for name, runs in config.evaluations.items()}
    print(HEAD, "|" + "---|" * (HEAD.count("|") - 1), sep="\n")
    for name, headlines in texts.items():
        print(*lines(name, headlines), sep="\n")
    folder, name = Folder.holding(config.out)
    folder.write_bytes(name, draw(texts))
    return {"figure": config.out}


def main() -> int:
    return verb.run("claim", ClaimConfig, plan=plan, execute=execute, doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
