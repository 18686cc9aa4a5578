"""What a path does step by step: the texts with most calls of each path, watched as they are drawn
(004 figure 2)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pyarrow as pa

from dsl.recorders import Rewrites, Schedule, Sharpening
from pipelines.evaluation.cells import Cell, labels, longest
from pipelines.evaluation.question import Drawn, Part, Question
from pipelines.evaluation.questions.texts import draw
from pipelines.evaluation.subjects import Subject
from pipelines.evaluation.survey import Survey
from pipelines.evaluation.workspace import Workspace
from pipelines.film import Film
from pipelines.report import Table
from pipelines.report.traces import remasking, schedule, sharpening

FRAMES = 2**14  # tokens that the frames of a film show together: at most about 400 kB on a page


def _watch(workspace: Workspace, *, cell: Cell) -> pa.Table:
    """A cell's first texts again, with recorders; what each has seen, as JSON. The film is that of
    the first text."""
    title = {"One text as it is drawn": f"{cell.model} along {cell.path}, {cell.budget} calls"}
    film = Film(workspace.vocabulary, title, rows=1, tokens=FRAMES)
    samples, recorders = workspace.config.samples, (Schedule(), Sharpening(), Rewrites(), film)
    recorded = draw(workspace, cell, 0, min(samples.traced, samples.rows), recorders).recorded
    seen = {recorder.name: recorded[recorder.name] for recorder in recorders}
    return pa.table({name: [json.dumps(_finite(values))] for name, values in seen.items()})


class Traces(Question):
    title = "Step by step"

    def of_model(self, survey: Survey, subject: Subject) -> Iterator[Part]:
        for cell in _watched(survey):
            if cell.model == subject.name:
                work = partial(_watch, cell=cell)
                yield Part(group=f"parts/traces/{cell.name}", first=0, work=work)

    def plots(self, survey: Survey, tables: Mapping[str, Table]) -> Iterator[Drawn]:
        rows = []
        for cell in _watched(survey):
            (row,) = survey.parts.read(f"parts/traces/{cell.name}").to_pylist()
            rows.append(labels(cell))
            for name, seen in row.items():
                rows[-1] |= {} if name == Film.name else json.loads(seen)
        yield "schedule", "What each step leaves masked, evident and revealed", schedule(rows)
        yield "remasking", "What each step takes back", remasking(rows)
        yield "sharpening", "How sure the posterior is by step", sharpening(rows)

    def films(self, survey: Survey) -> Mapping[Cell, str]:
        seen = {c: survey.parts.read(f"parts/traces/{c.name}") for c in _watched(survey)}
        return {c: table[Film.name][0].as_py() for c, table in seen.items()}


def _watched(survey: Survey) -> list[Cell]:
    return longest(survey.walked) if survey.config.samples.traced else []


def _finite(value: Any) -> Any:
    """What JSON can hold: what is not a number is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
