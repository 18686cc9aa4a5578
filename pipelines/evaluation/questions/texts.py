"""What each model writes along every path at every budget: the texts, and what can be counted in
them.

Shapes: B rows of a part, L positions, N texts, M references.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from dsl.denoiser import Denoiser
from dsl.sampling import Sample, sample
from dsl.state import State
from dsl.truncation import Nucleus, Truncated, require_temperature
from pipelines.evaluation import layouts, metrics
from pipelines.evaluation.cells import REAL, REFERENCES, UNIGRAM, Cell, labels
from pipelines.evaluation.gate import OfTexts, Resamples, means, ratios
from pipelines.evaluation.held_out import HeldOut
from pipelines.evaluation.metrics import NGRAMS
from pipelines.evaluation.parts import chunks, texts
from pipelines.evaluation.question import (
    Columns,
    Drawn,
    Merit,
    Part,
    Question,
    Questions,
    entries,
    parts_of_texts,
    repeats,
    tokens_of,
)
from pipelines.evaluation.subjects import Subject
from pipelines.evaluation.survey import Survey
from pipelines.evaluation.workspace import WORDS, Workspace
from pipelines.report import SKIPPED, Column, Row, Rows, Table
from pipelines.report.plots import quality, splits

LABELS = (Column("model", "Model"), Column("path", "Path"))
OWN = (Column("split", "Split"), Column("nucleus", "Nucleus"))  # of some paths only
CALLS = (Column("budget", "Budget"), Column("calls", "Calls a text", ".1f"))
SECONDS = Column("seconds", "Seconds a text", ".4f")


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """`rows` texts for each model, path and budget, at one temperature and nucleus for all cells
    that have none of their own.

    `repeats`: all of it so many times, with other noise, for the spread of what is measured on
    texts as a whole. `traced` of them are also watched step by step.
    """

    rows: int = 256
    repeats: int = 1
    traced: int = 16
    temperature: float = 1.0
    nucleus: Nucleus = field(default_factory=Nucleus)

    def __post_init__(self) -> None:
        for name, least in (("rows", 2), ("repeats", 1), ("traced", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        require_temperature(self.temperature)

    def sharpen(self, denoiser: Denoiser, cell: Cell) -> Truncated:
        nucleus, temperature = cell.nucleus or self.nucleus, cell.temperature or self.temperature
        return Truncated(denoiser, temperature, nucleus.p, nucleus.convention)


# --- parts -------------------------------------------------------------------------------------


def draw(
    workspace: Workspace, cell: Cell, first: int, count: int, recorders: Sequence[Any] = ()
) -> Sample:
    """Texts from nothing along the path of a cell."""
    config, denoiser = workspace.config, workspace.model(cell.model).denoiser
    length = workspace.rows(0, 1).shape[1]
    return sample(
        config.samples.sharpen(denoiser, cell),
        cell.walk,
        State.masked(count, length, denoiser.config.embed_dim),
        budget=cell.budget,
        seed=config.seed,
        first_row=first,
        recorders=recorders,
    )


def _draw(workspace: Workspace, *, cell: Cell, first: int, count: int) -> pa.Table:
    workspace.model(cell.model)  # opened by now: that is no part of the seconds
    began = time.perf_counter()
    drawn = draw(workspace, cell, first, count)
    tokens_BL = drawn.tokens_BL.cpu()
    seconds_B = np.full(count, (time.perf_counter() - began) / count)
    table = texts(tokens_BL.numpy(), first, workspace.vocabulary)
    table = table.append_column("calls", pa.array(drawn.row_calls_B.numpy()))
    return table.append_column("seconds", pa.array(seconds_B))


def _read(workspace: Workspace, texts: Sequence[str], tokens_BL: np.ndarray) -> Columns:
    """What can be counted in each text by itself."""
    known_B, words_B = metrics.word_counts(tokens_BL, workspace.vocabulary, workspace.words)
    return {
        "known": known_B,
        "words": words_B,
        "entropy": metrics.entropies(tokens_BL),
        "repetition": metrics.repetitions(tokens_BL),
    }


def _distinct(workspace: Workspace, *, source: str, first: int) -> pa.Table:
    """The share of n-grams that are different, in one repeat of a source."""
    tokens_NL = tokens_of(workspace, source, first, workspace.config.samples.rows)
    return pa.table({f"distinct_{n}": [metrics.distinct(tokens_NL, n)] for n in NGRAMS})


# --- what the gate may compare -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class WordShare(OfTexts):
    """The share of words that occur in the corpus, over all words; higher is better."""

    kind: Literal["words"] = "words"

    sign: ClassVar[int] = 1

    def figures(self, survey: Survey, model: str, draws: Resamples) -> np.ndarray:
        read = survey.columns(f"parts/read/{self.source(survey, model)}")
        return ratios(read["known"], read["words"], draws.rows(len(read["words"])))


@dataclass(frozen=True, kw_only=True)
class EntropyGap(OfTexts):
    """How far the mean entropy of a text is from that of the references; lower is better."""

    kind: Literal["entropy"] = "entropy"

    sign: ClassVar[int] = -1

    def figures(self, survey: Survey, model: str, draws: Resamples) -> np.ndarray:
        texts_N = survey.columns(f"parts/read/{self.source(survey, model)}")["entropy"]
        references_M = survey.columns(f"parts/read/{REFERENCES}")["entropy"]
        ours_R = means(texts_N, draws.rows(len(texts_N)))
        return abs(ours_R - means(references_M, draws.references(len(references_M))))


# --- the question ------------------------------------------------------------------------------


class Texts(Question):
    """Owns the table of texts, into which other questions put columns of their own."""

    section, settings, gate_metrics = "samples", SamplesConfig, (WordShare, EntropyGap)
    title = "Texts"
    columns = (
        Column("words", "Words in corpus", ".3f"),
        *(Column(f"distinct_{n}", f"Distinct-{n}", ".3f") for n in NGRAMS),
        Column("repetition", "Repetition", ".3f"),
        Column("entropy", "Entropy", ".3f"),
    )
    merits = (
        Merit("words", "Words in corpus ↑", ".3f", better=1, bounds=(0, 1)),
        Merit("entropy", "Entropy of a text, nats", ".3f"),
    )

    def held_out_rows(self, config: Questions) -> Mapping[str, int]:
        return {"samples.rows": config.samples.rows}

    def prepare(self, workspace: Workspace, held_out: HeldOut) -> None:
        if not workspace.parts.present(WORDS):
            words = pa.table({"word": sorted(held_out.words)})
            workspace.parts.write(WORDS, 0, words, {})

    def of_model(self, survey: Survey, subject: Subject) -> Iterator[Part]:
        config, samples = survey.config, survey.config.samples
        every = dict.fromkeys(survey.walked, samples.rows * samples.repeats)
        for cell, rows in {**every, **survey.further}.items():
            if cell.model == subject.name:
                for first, count in chunks(rows, config.batch):
                    work = partial(_draw, cell=cell, first=first, count=count)
                    yield Part(group=f"samples/{cell.name}", first=first, work=work)

    def of_texts(self, survey: Survey, source: str, texts: int) -> Iterable[Part]:
        return parts_of_texts(f"parts/read/{source}", source, texts, _read)

    def of_corpus(self, survey: Survey, source: str, texts: int) -> Iterator[Part]:
        for first in repeats(survey, texts):
            work = partial(_distinct, source=source, first=first)
            yield Part(group=f"parts/whole/{source}", first=first, work=work)

    def of_source(self, survey: Survey, source: str) -> Row:
        read = survey.columns(f"parts/read/{source}")
        row = {
            **entries("words", metrics.ratio(read["known"], read["words"])),
            **entries("entropy", metrics.mean(read["entropy"])),
            **entries("repetition", metrics.mean(read["repetition"])),
        }
        if survey.parts.present(f"parts/whole/{source}"):
            whole = survey.columns(f"parts/whole/{source}")
            row |= {name: float(values.mean()) for name, values in whole.items()}
        return row

    def note(self, config: Questions) -> str:
        return (
            "Words in corpus: the share of words that occur in the training split. Repetition: the "
            f"share of {metrics.REPEATED}-grams of tokens that a text had before. Entropy: of the "
            f"tokens of a text, in nats. Seconds a text: of one process, {config.batch} at a time; "
            "the median."
        )

    def tables(self, survey: Survey) -> Mapping[str, Table]:
        """Every cell, what stands beside the models, and why other paths were not walked."""
        config = survey.config
        rows = [{"model": name, **_of_source(survey, name)} for name in config.beside]
        rows += [_of_cell(survey, cell) for cell in survey.walked]
        for model, paths, reason in survey.refused():
            rows.append({"model": model, "path": paths, SKIPPED: reason})
        samples = config.samples
        each = f"{samples.repeats} x " if samples.repeats > 1 else ""
        said = (
            f"{each}{samples.rows:,} texts each at temperature {samples.temperature:g} and "
            f"nucleus {samples.nucleus.p:g} ({samples.nucleus.convention})."
        )
        notes = filter(None, (question.note(config) for question in config.questions))
        own = (column for column in OWN if any(column.key in row for row in rows))
        asked = (column for question in config.questions for column in question.columns_in(config))
        columns = (*LABELS, *own, *CALLS, *asked, SECONDS)
        made = Table(title=self.title, note=" ".join([said, *notes]), columns=columns, rows=rows)
        return {"samples": made}

    def layouts(self, survey: Survey, tables: Mapping[str, Table]) -> Mapping[str, Table]:
        config = survey.config
        return layouts.of_texts(tables["samples"].rows, config.merits, config.published)

    def plots(self, survey: Survey, tables: Mapping[str, Table]) -> Iterator[Drawn]:
        """Every merit that was measured here against calls; of hybrid paths by split."""
        rows = tables["samples"].rows
        by_split = [row for row in rows if "split" in row]
        for merit in survey.config.merits:
            if not any(merit.key in row for row in rows):
                continue
            look = {"label": merit.title, "bounds": merit.bounds, "anchors": _anchors(rows, merit)}
            png = quality(rows, merit.key, **look)
            yield merit.plot, f"{merit.title} against calls", png
            if len({tuple(row["split"]) for row in by_split}) > 1:
                png = splits(by_split, merit.key, label=merit.title, show=merit.show)
                yield f"{merit.key}_by_split", f"{merit.title} of hybrid paths by split", png


def _of_cell(survey: Survey, cell: Cell) -> Row:
    drawn = survey.columns(f"samples/{cell.name}", "calls", "seconds")
    return {
        **labels(cell),
        **({"nucleus": cell.nucleus.p} if cell.nucleus else {}),
        "calls": float(drawn["calls"].mean()),
        **_of_source(survey, cell.name),
        # A network is compiled in its first part, which the median leaves out.
        "seconds": float(np.median(drawn["seconds"])),
    }


def _of_source(survey: Survey, source: str) -> dict[str, Any]:
    """What every question says of the texts of a source."""
    row: dict[str, Any] = {}
    for question in survey.config.questions:
        row |= question.of_source(survey, source)
    return row


def _anchors(rows: Rows, merit: Merit) -> dict[str, float]:
    """The merit of real text and of the unigram; the adversaries would bury the models' curves."""
    return {
        row["model"]: row[merit.key]
        for row in rows
        if row["model"] in (REAL, UNIGRAM) and merit.key in row
    }
