"""What a measurement is: the base class of the questions that an evaluation asks.

Each question is one file in `pipelines/evaluation/questions` and one entry in the list there. The
file holds its settings, its parts, what it computes, its tables and plots, and what the gate may
compare. Of the rest, the page alone knows a question by name: which figures the adversaries fool,
it can say only once all questions have answered.

Shapes: B rows of a part, L positions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from infra.errors import ConfigError, nearest
from pipelines.evaluation.cells import Cell
from pipelines.evaluation.metrics import Score
from pipelines.evaluation.parts import chunks, matrix
from pipelines.kinds import ModelKind
from pipelines.report import STDERR, Column, Row, Table

if TYPE_CHECKING:
    from pipelines.evaluation.held_out import HeldOut
    from pipelines.evaluation.readers import Reader
    from pipelines.evaluation.subjects import Subject
    from pipelines.evaluation.survey import Survey
    from pipelines.evaluation.workspace import Workspace

# A `pipelines.evaluation.settings.Questions`, which is made of the questions and imports them.
Questions = Any
# Several together name a figure, of which MLflow takes 250 characters.
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")
TEXTS = 1024  # of one part: reading is quick, and every part has a fixed cost
Drawn = tuple[str, str, bytes | None]  # a plot's name, caption and PNG; None where nothing is shown
Columns = Mapping[str, Any]  # of a part: values by name, one for each row


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part to be made: its place, which is number ``first`` of ``group``, and how its table is
    made: a pure function of the configuration, the models, and the parts of earlier stages, but for
    the seconds that it took.
    """

    group: str
    first: int
    work: Callable[[Workspace], pa.Table]


CONFIDENCE = 0.95  # of the intervals in a verdict


class Merit(NamedTuple):
    """A figure that texts are compared by, under `key` in the table of texts.

    better: +1 where more is better, -1 where less is, 0 where neither is. bounds: of its axis.
    published: the papers' table of it by budget. plot: the name of its plot, which is against calls
    unless `own_plot` names another. ahead: the key of how far a walk is ahead of the best one that
    the model to beat has in as many calls; its interval at CONFIDENCE is under `…_low`, `…_high`.
    unranked: of a figure of equally diverse texts, what the verdict says where no walk has it;
    where there are such figures, walks rank by no other.
    """

    key: str
    title: str
    show: str
    better: int = 0
    bounds: tuple[float, float] | None = None
    published: str = ""
    own_plot: str = ""
    ahead: str = ""
    unranked: str = ""

    @property
    def plot(self) -> str:
        return self.own_plot or f"{self.key}_by_calls"


class Question:
    """A measurement. Its methods ask for nothing and say nothing unless they are overridden.

    section: its key in the configuration, where it has one, of type `settings`. optional: asked
    only where that section is given. gate_metrics: what the gate may compare, see
    `pipelines.evaluation.gate.Metric`. columns, merits: of the table of texts, where the
    configuration does not name them. title: heads its tables and plots on the page.
    reads_further: is also asked about the texts of the cells that questions ask for (`cells`).
    """

    section: ClassVar[str] = ""
    settings: ClassVar[Any] = None
    optional: ClassVar[bool] = False
    title: ClassVar[str] = ""
    gate_metrics: ClassVar[tuple[type, ...]] = ()
    columns: ClassVar[tuple[Column, ...]] = ()
    merits: ClassVar[tuple[Merit, ...]] = ()
    reads_further: ClassVar[bool] = False

    # --- before the first part ---

    def check(self, config: Questions) -> None:
        """ValueError for settings that do not go together."""

    def held_out_rows(self, config: Questions) -> Mapping[str, int]:
        """How many rows of the split it needs, by the dotted key that says so."""
        return {}

    def beside(self, config: Questions) -> tuple[str, ...]:
        """The sources of texts that its `prepare` writes, to stand beside the models."""
        return ()

    def readers(self, config: Questions) -> Mapping[str, Reader]:
        """What it has read the texts of the models, by the dotted key that says so."""
        return {}

    def cells(self, config: Questions, walked: Sequence[Cell]) -> Mapping[Cell, int]:
        """Cells beyond those that are walked for all questions, and how many texts of each are to
        be drawn. Their texts stand in no table of texts."""
        return {}

    def judged(self, config: Questions) -> Mapping[str, str]:
        """Where its judges keep what they say of each text: a folder by the judge's name. The group
        of a source lies in it, with columns `nats_N` and `bytes_N`."""
        return {}

    def require(self, config: Questions, held_out: HeldOut, uri: str) -> None:
        """A `Problem` for settings that this data, or its readers, cannot meet; `uri` of the
        registry. Nothing has been written yet."""
        for key, reader in self.readers(config).items():
            how = {"converter": config.converter, "trust_remote_code": config.trust_remote_code}
            reader.check(key, uri, **how)
            reader.check_data(key, held_out)

    def prepare(self, workspace: Workspace, held_out: HeldOut) -> None:
        """Write the parts that need the training split, as far as they are not there. They follow
        from the configuration and the data alone."""
        if any(reader.reads_training for reader in self.readers(workspace.config).values()):
            workspace.keep_training(held_out.training_RL)

    # --- the work, in three stages: a stage may read the parts of those before it ---

    def of_model(self, survey: Survey, subject: Subject) -> Iterable[Part]:
        """What to ask of one model."""
        return ()

    def of_texts(self, survey: Survey, source: str, texts: int) -> Iterable[Part]:
        """What to ask about each text of a source by itself."""
        return ()

    def of_corpus(self, survey: Survey, source: str, texts: int) -> Iterable[Part]:
        """What to ask about many texts of a source together."""
        return ()

    # --- the report ---

    def columns_in(self, config: Questions) -> tuple[Column, ...]:
        """Its columns of the table of texts."""
        return self.columns

    def merits_in(self, config: Questions) -> tuple[Merit, ...]:
        """What texts can be compared by, measured here or not."""
        return self.merits

    def of_source(self, survey: Survey, source: str) -> Row:
        """The entries of a source in the table of texts, under the keys of `columns_in`."""
        return {}

    def note(self, config: Questions) -> str:
        """What a reader of the table of texts must know of these columns."""
        return ""

    def tables(self, survey: Survey) -> Mapping[str, Table]:
        """Tables of its own, by name. Their numbers are logged as metrics."""
        return {}

    def layouts(self, survey: Survey, tables: Mapping[str, Table]) -> Mapping[str, Table]:
        """Its tables (those that `tables` gave) with the papers' rows below, where the
        configuration asks for these; not logged again."""
        return {}

    def plots(self, survey: Survey, tables: Mapping[str, Table]) -> Iterable[Drawn]:
        """Plots of its tables."""
        return ()

    def films(self, survey: Survey) -> Mapping[Cell, str]:
        """Films of texts as they are drawn: `pipelines.film.Film.result` as JSON."""
        return {}

    def facts(self, survey: Survey) -> Mapping[str, Any]:
        """Entries of the report's JSON beside the tables."""
        return {}


# --- on held-out rows ----------------------------------------------------------------------------

# (denoiser, tokens [B, L], first_row=number of the first) -> columns of B values
OfRows = Callable[..., Columns]


class RowQuestion(Question):
    """A measurement of every model on the held-out rows of the likelihood, with its own table.

    name: of the table, and of the folder of its parts. text, table: what explains and makes up
    the table, which `title` heads.
    """

    name: ClassVar[str]
    text: ClassVar[str]
    table: ClassVar[tuple[Column, ...]]

    def asked(self, config: Questions, kind: ModelKind) -> Mapping[str, OfRows]:
        """What to measure of a kind of model, by a name for it; "" where that is one thing."""
        return {}

    def rows(self, survey: Survey, subject: Subject) -> Iterable[Row]:
        """What the table says of a model."""
        return ()

    def asked_rows(self, config: Questions, asked: str) -> int:
        """How many rows one of the things asked is measured on."""
        rows: int = config.likelihood.rows
        return rows

    def found(self, survey: Survey, subject: Subject) -> dict[str, dict[str, np.ndarray]]:
        """The columns of each of the things asked of a model, each ``[N]``."""
        asked = self.asked(survey.config, subject.trained_as)
        return {name: survey.columns(self.group(subject.name, name)) for name in asked}

    def of_model(self, survey: Survey, subject: Subject) -> Iterator[Part]:
        config = survey.config
        for asked, measure in self.asked(config, subject.trained_as).items():
            for first, count in chunks(self.asked_rows(config, asked), config.batch):
                rows = {"model": subject.name, "first": first, "count": count}
                work = partial(_of_rows, measure=measure, **rows)
                yield Part(group=self.group(subject.name, asked), first=first, work=work)

    def tables(self, survey: Survey) -> Mapping[str, Table]:
        rows = [row for subject in survey.subjects for row in self.rows(survey, subject)]
        return {self.name: Table(title=self.title, note=self.text, columns=self.table, rows=rows)}

    def group(self, model: str, asked: str = "") -> str:
        """The group of the parts of one of the things asked."""
        names = ("parts", self.name, model, asked.replace(" ", "-"))
        return "/".join(filter(None, names))


def _of_rows(
    workspace: Workspace, *, model: str, first: int, count: int, measure: OfRows
) -> pa.Table:
    denoiser, tokens_BL = workspace.model(model).denoiser, workspace.rows(first, count)
    return pa.table(dict(measure(denoiser, tokens_BL, first_row=first)))


# --- on texts ------------------------------------------------------------------------------------

# (workspace, texts, their tokens [B, L]) -> columns of B values
OfTexts = Callable[["Workspace", Sequence[str], np.ndarray], Columns]


def parts_of_texts(group: str, source: str, texts: int, measure: OfTexts) -> Iterator[Part]:
    """Measure all texts of a source, some at a time."""
    for first, count in chunks(texts, TEXTS):
        work = partial(_of_texts, source=source, first=first, count=count, measure=measure)
        yield Part(group=group, first=first, work=work)


def tokens_of(workspace: Workspace, source: str, first: int, count: int) -> np.ndarray:
    """Tokens of texts of a source, ``[B, L]`` int64."""
    table = workspace.parts.rows(f"samples/{source}", first, count, ["tokens"])
    return matrix(table["tokens"], np.int64)


def repeats(survey: Survey, texts: int) -> range:
    """The first row of each full repeat among the texts of a source."""
    size = survey.config.samples.rows
    return range(0, texts - size + 1, size)


def _of_texts(
    workspace: Workspace, *, source: str, first: int, count: int, measure: OfTexts
) -> pa.Table:
    table = workspace.parts.rows(f"samples/{source}", first, count, ["text", "tokens"])
    tokens_BL = matrix(table["tokens"], np.int64)
    return pa.table(dict(measure(workspace, table["text"].to_pylist(), tokens_BL)))


# --- entries of tables, and names ---------------------------------------------------------------


def entries(key: str, score: Score) -> dict[str, float]:
    """A figure and its standard error, as a table holds them."""
    return {key: score.value, key + STDERR: score.stderr}


def require_paths(key: str, asked: Iterable[str], config: Questions) -> None:
    """ConfigError where the setting under a dotted key names a path that there is not."""
    if unknown := [path for path in asked if path not in config.paths]:
        near = nearest(unknown[0], config.paths)
        fix = f"Did you mean {near}?" if near else f"Name some of: {', '.join(config.paths)}"
        raise ConfigError(key, f"no path is named {unknown[0]}", fix)


def require_names(names: Iterable[str]) -> None:
    """ValueError for a name that folders and figures cannot bear."""
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(f"names must be at most 64 letters, digits, _ . -, got {name!r}")
