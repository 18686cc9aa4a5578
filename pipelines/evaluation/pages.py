"""The report of an evaluation: a verdict, a film, what every question says, the gate's
decision, and some texts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from infra import journal
from pipelines.evaluation.cells import REAL, REFERENCES, UNIGRAM, Cell
from pipelines.evaluation.gate import Decision
from pipelines.evaluation.question import Drawn
from pipelines.evaluation.questions.adversaries import Adversaries
from pipelines.evaluation.subjects import Subject
from pipelines.evaluation.survey import Survey
from pipelines.evaluation.verdict import fooled, leading, ranked, verdict
from pipelines.report import Column, Plot, Report, Rows, Table, Text
from pipelines.report.plots import courses, losses

TEXTS = 2  # of each source are shown; all of them are in the run directory
# What tells the rows of a table apart, in the names of their figures.
LABELS = ("model", "view", "state", "path", "split", "budget", "p", "temperature")
DIAGNOSTICS = (
    Column("model", "Model"),
    Column("kind", "Trained as"),
    Column("parameters", "Parameters"),
    Column("mean_cosine", "Table: mean cosine", ".3f"),
    Column("effective_rank", "effective rank", ".1f"),
    Column("beta", "Converter: beta", ".3f"),
    Column("version", "Version"),
    Column("address", "Address"),
    Column("run_id", "Run"),
    Column("weights", "SHA-256 of the weights"),
)
FOOLED = (
    Column("model", "Texts"),
    Column("above", "Rank above every model by"),
    Column("below", "Do not by"),
)
GATE = (
    Column("role", "As"),
    Column("metric", "Metric"),
    Column("candidate", "Candidate", ".4g"),
    Column("other", "Other", ".4g"),
    Column("difference", "Difference", ".4g"),
    Column("low", "From", ".4g"),
    Column("high", "To", ".4g"),
    Column("verdict", "Which says"),
)


def report(
    survey: Survey, decision: Decision | None, time: Table
) -> tuple[Report, dict[str, float]]:
    """The report, and the figures in it that were measured, by their names in MLflow."""
    config, manifest = survey.config, survey.held_out.manifest
    tables: dict[str, Table] = {"gate": _gate(decision)} if decision else {}
    topics: dict[str, set[str]] = {"The gate": {"gate"}}
    measured: dict[str, Table] = {}
    drawn: list[Drawn] = []
    facts: dict[str, Any] = {}
    for question in config.questions:
        own = question.tables(survey)
        plots = list(question.plots(survey, own))
        measured |= own
        own = {**own, **question.layouts(survey, own)}
        tables |= own
        drawn += plots
        facts |= question.facts(survey)
        topics[question.title] = {*own, *(name for name, *_ in plots)}
    training = list(_training(survey.subjects))
    tables |= {"diagnostics": _diagnostics(survey.subjects), "time": time}
    topics["Models and their training"] = {"diagnostics", *(name for name, *_ in training)}
    topics["Time"] = {"time"}
    texts = [row for table in measured.values() for row in table.rows]
    others = [name for name in config.beside if name not in (UNIGRAM, REAL)]
    if others:
        tables |= {"fooled": _fooled(fooled(texts, config.merits, others))}
        topics[Adversaries.title] = {"fooled"}
    merit = leading(texts, config.merits)
    shown = {name for name, _, png in drawn if png}
    # A plot that is made for a merit says more than the merit against calls, though none reach it.
    ahead = [each.plot for each in config.merits if each.own_plot in shown]
    first = set(ahead[:1] or ([merit.plot] if merit else []))
    made = Report(
        name="evaluation",
        title=f"Evaluation {config.name}",
        subtitle=f"{config.split} split of {manifest.source} (digest {manifest.digest[:12]}), "
        f"V = {manifest.vocabulary.size}, L = {manifest.length}, seed {config.seed}",
        facts={
            "data": {
                "digest": manifest.digest,
                "split": config.split,
                "blocks": manifest.blocks,
                "references": f"the first {max(config.held_out_rows.values())} rows of the split "
                f"in the order of seed {config.seed}, kept in samples/references",
            },
            **facts,
            "models": {subject.name: _told(subject) for subject in survey.subjects},
            "readers": {subject.origin["address"]: _told(subject) for subject in survey.readers},
        },
        tables={name: table for name, table in tables.items() if table.rows},
        plots=[Plot(name, caption, png) for name, caption, png in (*drawn, *training) if png],
        texts=list(_texts(survey)),
        verdict=verdict(texts, config.merits, decision),
        film=_film(survey, ranked(texts, merit) if merit else ()),
        topics={title: names - first for title, names in topics.items()},
        told=("models",),
    )
    return made, figures(measured)


def _told(subject: Subject) -> dict[str, Any]:
    return {**subject.origin, **subject.facts, "kind": subject.kind}


def _film(survey: Survey, walks: Rows) -> Mapping[str, Any] | None:
    """The film of the best walk that passes through finite SNR and was filmed, else of the best
    one, if there is any."""
    films = {
        cell: f
        for question in survey.config.questions
        for cell, f in question.films(survey).items()
    }
    places = {(row["model"], row["path"]): at for at, row in reversed(list(enumerate(walks)))}

    def order(cell: Cell) -> tuple[bool, int]:
        return not cell.walk.finite_snr, places.get((cell.model, cell.path), len(walks))

    found: Mapping[str, Any] = json.loads(films[min(films, key=order)]) if films else {}
    return found or None


def figures(tables: Mapping[str, Table]) -> dict[str, float]:
    """Every finite number of tables of measurements, under a name that MLflow takes."""
    return {
        f"{'/'.join(_label(row[label]) for label in LABELS if label in row)}/{column.key}": float(
            row[column.key]
        )
        for table in tables.values()
        for row in table.rows
        for column in table.columns
        if column.key in row.keys() - set(LABELS)
        and isinstance(row[column.key], int | float)
        and math.isfinite(row[column.key])
    }


def _label(value: Any) -> str:
    """Without the sign in numbers such as 1e+06, which no metric may bear."""
    said = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    return said.replace("+", "")


def _training(subjects: Sequence[Subject]) -> Iterator[Drawn]:
    """What the journals of the runs say that made the models."""
    journals = {
        subject.name: journal.read(subject.origin["run"])
        for subject in subjects
        if "run" in subject.origin
    }
    yield "loss", "Loss of the runs that made the models", losses(journals)
    yield "course", "Converter and table in training", courses(journals)


def _diagnostics(subjects: Sequence[Subject]) -> Table:
    return Table(
        title="Models",
        note="Rows of a DSL table are unit vectors: mean cosine over pairs, and the exponential of "
        "its spectral entropy, in [1, D]; a table that collapses shows in both (003 B.1).",
        columns=DIAGNOSTICS,
        rows=[{"model": s.name, "kind": s.kind, **s.origin, **s.facts} for s in subjects],
    )


def _fooled(rows: Rows) -> Table:
    return Table(
        title="Which figures the adversaries fool",
        note="A figure by which texts of no model rank above every model says nothing by itself.",
        columns=FOOLED,
        rows=rows,
    )


def _gate(decision: Decision) -> Table:
    note = (
        f"A difference above 0 says that {decision.candidate}, the candidate, is better than "
        f"{decision.other}; intervals at {100 * decision.confidence:g}%."
    )
    return Table(title="Gate to champion", note=note, columns=GATE, rows=decision.rows())


def _texts(survey: Survey) -> Iterator[Text]:
    for source in survey.sources:
        if source != REFERENCES:
            for text in survey.texts(source, TEXTS):
                yield Text(source, text)
