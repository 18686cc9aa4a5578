"""The verdict of an evaluation in two sentences, from its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from pipelines.evaluation.gate import Decision
from pipelines.evaluation.question import Merit
from pipelines.report import STDERR, Column, Row, Rows
from pipelines.report.tables import number

DEVIATIONS = 1.96  # on either side of a normal variable make an interval at CONFIDENCE


def verdict(texts: Rows, merits: Sequence[Merit], decision: Decision | None) -> str:
    """Which model is best along which path, by how much; and what the gate decided.

    `texts` are the rows of the table of texts.
    """
    gate = f"The gate decided: {decision.why}." if decision else "No gate decided on a champion."
    merit = leading(texts, merits)
    return f"{_best(texts, merit) if merit else _unranked(merits)} {gate}"


def leading(texts: Rows, merits: Sequence[Merit]) -> Merit | None:
    """The merit that texts are ranked by: the first that is measured and has a better side. Where
    figures of equally diverse texts were asked for, it is one of these or none."""
    asked = [merit for merit in merits if merit.unranked] or merits
    fitting = (merit for merit in asked if merit.better and ranked(texts, merit))
    return next(fitting, None)


def _unranked(merits: Iterable[Merit]) -> str:
    said = (merit.unranked for merit in merits if merit.unranked)
    return next(said, "No model has written texts that could be ranked.")


def ranked(texts: Rows, merit: Merit) -> list[Row]:
    """The walks that have the merit, the best first."""
    walks = [row for row in texts if "path" in row and _has(row, merit)]
    return sorted(walks, key=lambda row: -merit.better * number(row[merit.key]))


def _has(row: Row, merit: Merit) -> bool:
    return math.isfinite(number(row.get(merit.key)))


def fooled(texts: Rows, merits: Iterable[Merit], names: Iterable[str]) -> list[Row]:
    """For each of the texts of these names, which no model has written: the titles of the merits
    by which they rank above every walk (`above`), and of those by which they do not (`below`).

    Only merits that walks have, and of which one side is better. Texts without one do not rank
    above by it.
    """
    best = {
        merit: ranked(texts, merit)[0] for merit in merits if merit.better and ranked(texts, merit)
    }
    found = []
    for name in names:
        said: dict[str, list[str]] = {"above": [], "below": []}
        beside = [row for row in texts if row.get("model") == name and "path" not in row]
        for merit, first in best.items():
            values = (number(row.get(merit.key)) - number(first[merit.key]) for row in beside)
            above = any(merit.better * value > 0 for value in values)
            said["above" if above else "below"].append(merit.title.strip(" ↑↓"))
        found.append({"model": name, **{key: ", ".join(said[key]) or "none" for key in said}})
    return found


def _best(texts: Rows, merit: Merit) -> str:
    """Judges like texts of less diversity, so a judge's figure says where that was not matched."""
    first, *others = ranked(texts, merit)
    title, show = merit.title.strip(" ↑↓"), Column(merit.key, merit.title, merit.show)
    unmatched = " at unmatched diversity" if merit.better < 0 and not merit.unranked else ""
    best = f"{title}{unmatched}: {_walk(first)} ranks first with {show.cell(first)}"
    rival = _rival(first, others, texts, merit)
    if rival is None:
        return f"{best}, and there is nothing to compare it with."
    return f"{best}, against {show.cell(rival)} of {_walk(rival)}: {_lead(first, rival, merit)}."


def _rival(first: Row, others: Sequence[Row], texts: Rows, merit: Merit) -> Row | None:
    """The best walk of another model; else of another path; else what a model must beat."""
    models = (row for row in others if row["model"] != first["model"])
    paths = (row for row in others if row["path"] != first["path"])
    floors = (row for row in texts if "path" not in row and _has(row, merit))
    return next(models, None) or next(paths, None) or next(floors, None)


def _lead(first: Row, rival: Row, merit: Merit) -> str:
    """The difference with its interval: that of the paired resamples, where the merit has one of
    the two walks. Else from both standard errors as of independent texts: too wide, if anything,
    where two walks share their noise, and without the choice of both walks as the best ones."""
    lead = merit.better * (number(first[merit.key]) - number(rival[merit.key]))
    errors = (number(row.get(merit.key + STDERR)) for row in (first, rival))
    reach = DEVIATIONS * math.hypot(*errors)
    low, high = _paired(first, rival, merit) or (lead - reach, lead + reach)
    size = f"by {lead:{merit.show}}"
    if math.isnan(low):
        side = "better" if lead >= 0 else "worse"
        return f"{side} {size}, without an interval, since there is no standard error"
    if math.isinf(low) or math.isinf(high):
        return f"ahead {size}, with an unbounded interval, so chance may explain it"
    interval = f"{size} [{low:{merit.show}}, {high:{merit.show}}] at 95 %"
    if low > 0:
        return f"better {interval}"
    if high < 0:
        return f"worse {interval}"
    return f"{'ahead' if lead >= 0 else 'behind'} {interval}, which chance may explain"


def _paired(first: Row, rival: Row, merit: Merit) -> tuple[float, float] | None:
    """The ends of the interval of the lead that one of the rows states: how far its walk is ahead
    of the best one that the model to beat has in as many calls, infinite where too many resamples
    have no headline of both. None where that is another pair. It does not cover that the walk is
    the best of several of its model."""
    low, high = f"{merit.ahead}_low", f"{merit.ahead}_high"
    ours, theirs = ([number(row.get(key)) for key in (low, high)] for row in (first, rival))
    stated = [not any(map(math.isnan, ends)) for ends in (ours, theirs)]
    if first.get("budget") != rival.get("budget") or sum(stated) != 1:
        return None
    return (ours[0], ours[1]) if stated[0] else (-theirs[1], -theirs[0])


def _walk(row: Row) -> str:
    if "path" not in row:
        return str(row["model"])
    split = " + ".join(map(str, row["split"])) if row.get("split") else row["budget"]
    return f"{row['model']} along {row['path']} ({split} calls)"
