"""The frontier: quality against diversity over a grid of temperatures; and the headline: a judge's
bits per byte at the diversity of real text.

Shapes: N texts, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from infra.errors import ConfigError
from pipelines.evaluation.cells import REAL, UNIGRAM, Cell
from pipelines.evaluation.diversity import DIVERSITIES, LEAST, Kind, telling
from pipelines.evaluation.gate import OfTexts, Resamples, percentiles
from pipelines.evaluation.grid import (
    FrontierConfig,
    Measured,
    curves,
    grid,
    group,
    judges,
    measure,
    texts_of,
)
from pipelines.evaluation.held_out import HeldOut
from pipelines.evaluation.question import (
    CONFIDENCE,
    Drawn,
    Merit,
    Part,
    Question,
    Questions,
    require_paths,
    tokens_of,
)
from pipelines.evaluation.questions.texts import LABELS
from pipelines.evaluation.survey import Survey
from pipelines.evaluation.workspace import Workspace
from pipelines.report import STDERR, Column, Row, Table
from pipelines.report.plots import frontier

# Of some curves only.
OWN = (Column("split", "Split"), Column("budget", "Budget"), Column("p", "Nucleus"))
HEADLINE = (
    Column("reached", "Reached"),
    Column("at", "at temperature", ".2f"),
    Column("lost", "Resamples lost"),
)
POINT = (Column("temperature", "Temperature", "g"), Column("diversity", "Diversity", ".3f"))


def _diversity(workspace: Workspace, *, source: str, kind: Kind) -> pa.Table:
    tokens_NL = tokens_of(workspace, source, 0, texts_of(workspace.config))
    return pa.table({"diversity": DIVERSITIES[kind].of(tokens_NL, workspace.vocabulary.size)})


# --- what the gate may compare -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Headline(OfTexts):
    """Bits per byte for a judge at the diversity of real text; lower is better. `judge` is a name
    among `judges`, or "judge" for the one of that section.

    The unigram, which stands for a champion where there is none, has no temperature and counts with
    its bits as they are.
    """

    judge: str = "judge"
    kind: Literal["headline"] = "headline"

    sign: ClassVar[int] = -1

    @property
    def label(self) -> str:
        return f"{super().label} by {self.judge}"

    def figures(self, survey: Survey, model: str, draws: Resamples) -> np.ndarray:
        source = self.source(survey, model)
        wanted = (curve for curve in curves(survey) if curve.name == source)
        (found,) = measure(survey, wanted, draws)
        return found.bits_TR[self.judge][0] if source == UNIGRAM else found.bits_R[self.judge]

    def require(self, survey: Survey, candidate: str) -> None:
        source, config = self.source(survey, candidate), survey.config
        if config.frontier is None:
            raise ConfigError(
                "gate", "asks for a headline, and there is none", "Give frontier, too"
            )
        if self.judge not in judges(config):
            why = f"asks for the judge {self.judge}, and there is none of that name"
            raise ConfigError("gate", why, f"Name one of: {', '.join(judges(config))}")
        found = sum(curve.name == source for curve in curves(survey))
        if found != 1:
            why = f"the frontier has {found} curves along {self.path} with {self.budget} calls"
            fix = (
                "Have frontier.paths and frontier.budgets hold them, and at most one of the nuclei"
            )
            raise ConfigError("gate", why, fix)


# --- the question --------------------------------------------------------------------------------


class Frontier(Question):
    section, settings, optional = "frontier", FrontierConfig, True
    title = "Frontier"
    gate_metrics = (Headline,)
    reads_further = True

    def check(self, config: Questions) -> None:
        names = [name for question in config.questions for name in question.judged(config)]
        if not names:
            why = "without a judge there is no quality to set against diversity"
            raise ConfigError("frontier", why, "Give a judge, too, such as judge.kind=ngram")
        if len(set(names)) < len(names):
            why = "a judge of judges has the name of the one in judge"
            raise ConfigError("judges", why, "Choose another name")
        require_paths("frontier.paths", config.frontier.paths, config)
        texts, there = texts_of(config), config.samples.rows
        if not LEAST <= texts <= there:
            why = f"{texts} texts at each temperature, where samples.rows is {there}"
            fix = f"Take at least {LEAST}, and no more than samples.rows, as there is real text"
            raise ConfigError("frontier.rows", why, fix)

    def require(self, config: Questions, held_out: HeldOut, uri: str) -> None:
        asked, length = config.frontier, held_out.manifest.length
        walks = (config.paths[name].walks(length) for name in asked.paths or config.paths)
        there = {budget for _, budget in chain.from_iterable(walks)}
        if unknown := set(asked.budgets) - there:
            why = f"no path of the frontier is walked with {min(unknown)} calls"
            fix = f"Name some of: {', '.join(map(str, sorted(there)))}"
            raise ConfigError("frontier.budgets", why, fix)

    def cells(self, config: Questions, walked: Sequence[Cell]) -> Mapping[Cell, int]:
        every = chain.from_iterable(grid(config, walked).values())
        return {cell: texts_of(config) for cell in every if cell not in walked}

    def of_corpus(self, survey: Survey, source: str, texts: int) -> Iterable[Part]:
        if any(source in curve.sources for curve in curves(survey)):
            work = partial(_diversity, source=source, kind=_kind(survey))
            yield Part(group=group(source), first=0, work=work)

    def merits_in(self, config: Questions) -> tuple[Merit, ...]:
        if config.frontier is None:
            return ()
        stated = config.frontier.confidence == CONFIDENCE
        return tuple(
            Merit(
                _headline(name),
                f"{_title(name)} ↓",
                ".3f",
                better=-1,
                own_plot=_key(name),
                ahead=f"ahead_{name}" if stated else "",
                unranked="No walk of the frontier is as diverse as real text, so none ranks first: "
                "widen frontier.temperatures.",
            )
            for name in judges(config)
        )

    def tables(self, survey: Survey) -> Mapping[str, Table]:
        config, asked = survey.config, survey.config.frontier
        draws = Resamples(config.seed, asked.resamples)
        measured = list(measure(survey, curves(survey), draws))
        heads = [
            _head(found, asked.confidence)
            | _below(found, measured)
            | _ahead(found, measured, asked.confidence)
            for found in measured
        ]
        own = (column for column in OWN if any(column.key in row for row in heads))
        walk, names = (*LABELS, *own), judges(config)
        bits = tuple(Column(_key(name), f"Bits per byte by {name}", ".3f") for name in names)
        return {
            "headline": Table(
                title="Bits per byte at the diversity of real text",
                note="Interpolated linearly between the two temperatures that bracket it; lower is "
                "better. Where several neighbouring pairs bracket it, the hottest pair counts "
                "whose hotter member has the more diverse texts. What has a single temperature "
                "counts where its diversity cannot be told apart from that of real text. "
                f"Intervals at {100 * asked.confidence:g}% from "
                f"{asked.resamples:,} resamples of the same rows of all texts. In a resample that "
                "is lost the diversity is not reached: its value counts as the least at the lower "
                "end of the interval and as the greatest at the upper one. Below every model: of "
                "the resamples in which every model has a headline, the share in which what no "
                "model has written has none, or a worse one than the best walk of each model; not "
                "given where a model has no headline. Ahead: bits per byte fewer than the best "
                "walk of the first model in as many calls, which is chosen anew in each resample. "
                "The other walk is not: the best of many walks against one is found ahead too "
                "often, of six that are no better in more than 45 of 300 simulated cases; against "
                "four, in fewer than 5.",
                columns=(*walk, *HEADLINE, *chain.from_iterable(map(_headline_columns, names))),
                rows=heads,
            ),
            "frontier": Table(
                title="Quality against diversity",
                note=f"{texts_of(config):,} texts of every source. Diversity: "
                f"{DIVERSITIES[_kind(survey)].note}. Bits per byte: lower is better.",
                columns=(*walk, *POINT, *bits),
                rows=list(chain.from_iterable(map(_points, measured))),
            ),
        }

    def plots(self, survey: Survey, tables: Mapping[str, Table]) -> Iterator[Drawn]:
        """One for each judge."""
        rows, across = tables["frontier"].rows, DIVERSITIES[_kind(survey)].title
        for name in judges(survey.config):
            label = f"bits per byte by {name}"
            caption = (
                f"Quality, in {label}, against diversity by temperature. The headline is where a "
                "curve crosses the dotted line, and the star is real text."
            )
            png = frontier(rows, _key(name), across=across, label=label, goal=REAL)
            yield _key(name), caption, png


def _kind(survey: Survey) -> Kind:
    size, length = survey.held_out.vocabulary.size, survey.held_out.manifest.length
    return survey.config.frontier.diversity or telling(size, length)


def _points(found: Measured) -> Iterator[Row]:
    """The rows of a curve in the table of the frontier."""
    for number, _ in enumerate(found.curve.sources):
        row: dict[str, Any] = {**found.curve.labels}
        if found.curve.temperatures:
            row["temperature"] = found.curve.temperatures[number]
        row |= _entries("diversity", found.diversity_TR[number])
        for name, bits_TR in found.bits_TR.items():
            row |= _entries(_key(name), bits_TR[number])
        yield row


def _head(found: Measured, confidence: float) -> Row:
    """The row of a curve in the table of the headline."""
    place, temperatures = found.crossing, found.curve.temperatures
    row = {**found.curve.labels, "reached": place.said, "lost": place.lost}
    if place.reached and temperatures:
        temperatures_TR = np.array(temperatures)[:, None] + 0 * found.diversity_TR
        row["at"] = float(place.of(temperatures_TR)[0])
    for name, bits_R in found.bits_R.items():
        if math.isfinite(bits_R[0]):
            key, (low, high) = _headline(name), percentiles(bits_R[1:], confidence)
            row |= {key: float(bits_R[0]), **_ends(key, low, high)}
            if math.isfinite(high - low):
                found_R = bits_R[1:][np.isfinite(bits_R[1:])]
                row[key + STDERR] = float(found_R.std())
    return row


def _below(found: Measured, measured: Sequence[Measured]) -> Row:
    """By judge, of the resamples in which every model has a headline, the share in which a source
    that no model has written has none, or a worse one than the best walk of every model. Nothing
    for a walk, for real text, and where a model has no headline."""
    walks = [other for other in measured if "path" in other.curve.labels]
    if not walks or "path" in found.curve.labels or found.curve.name == REAL:
        return {}
    row: Row = {}
    for name, bits_R in found.bits_R.items():
        worst_R = np.max(list(_best(walks, name).values()), axis=0)
        known_R = np.isfinite(worst_R)
        if known_R[0] and known_R[1:].any():
            below_R = np.isnan(bits_R) | (bits_R > worst_R)
            row[f"below_{name}"] = float(below_R[1:][known_R[1:]].mean())
    return row


def _ahead(found: Measured, measured: Sequence[Measured], confidence: float) -> Row:
    """By judge, how many bits fewer a walk has than the best walk of the first model in as many
    calls. Nothing for that model itself, for other sources, and where either has no headline.

    The walk of the first model is chosen anew in every resample, and the other one is not. Whoever
    takes the best of many of these rows finds it ahead too often where the first model has few
    walks: of six walks like its only one, in more than 45 of 300 simulated cases, and of six like
    its four in fewer than 5, at 95 % (`tests/pipelines/evaluation/test_frontier.py`)."""
    walks = [other for other in measured if "path" in other.curve.labels]
    labels = found.curve.labels
    if "path" not in labels or labels["model"] == (first := walks[0].curve.labels["model"]):
        return {}
    asked = (first, labels["budget"])
    rivals = [w for w in walks if (w.curve.labels["model"], w.curve.labels["budget"]) == asked]
    if not rivals:
        return {}
    row: Row = {}
    for name, bits_R in found.bits_R.items():
        best_R = _best(rivals, name)[first]
        with np.errstate(invalid="ignore"):
            ahead_R = np.where(np.isfinite(best_R), best_R, np.nan) - bits_R
        if math.isfinite(ahead_R[0]):
            key, (low, high) = f"ahead_{name}", percentiles(ahead_R[1:], confidence)
            row |= {key: float(ahead_R[0]), **_ends(key, low, high)}
    return row


def _ends(key: str, low: float, high: float) -> Row:
    """The ends of a figure's interval, and what the tables show of them."""
    shown = f"{low:.3f} to {high:.3f}" if math.isfinite(high - low) else "unbounded"
    return {f"{key}_low": low, f"{key}_high": high, f"{key}_interval": shown}


def _best(walks: Iterable[Measured], judge: str) -> dict[str, np.ndarray]:
    """The least bits per byte of each model's walks in every resample, infinite where none of them
    reaches the diversity of real text."""
    best: dict[str, np.ndarray] = {}
    for walk in walks:
        walk_R = np.nan_to_num(walk.bits_R[judge], nan=np.inf)
        model = walk.curve.labels["model"]
        best[model] = np.minimum(best.get(model, np.inf), walk_R)
    return best


def _entries(key: str, values_R: np.ndarray) -> dict[str, float]:
    """A figure of the texts as they are, and its standard error over resamples."""
    return {key: float(values_R[0]), key + STDERR: float(values_R[1:].std())}


def _headline_columns(name: str) -> tuple[Column, ...]:
    key = _headline(name)
    return (
        Column(key, f"Bits per byte by {name}", ".3f"),
        Column(f"{key}_interval", "Interval"),
        Column(f"below_{name}", "Below every model", ".3f"),
        Column(f"ahead_{name}", "Ahead", ".3f"),
        Column(f"ahead_{name}_interval", "Interval"),
    )


def _headline(name: str) -> str:
    return f"headline_{name}"


def _title(name: str) -> str:
    return f"Bits per byte by {name} at the diversity of real text"


def _key(name: str) -> str:
    return f"frontier_{name}"
