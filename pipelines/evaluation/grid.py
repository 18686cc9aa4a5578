"""The grid of temperatures of a frontier: its settings, its cells, and the figures of each curve.

Shapes: N texts, T temperatures of a curve (ascending), K figures, R resamples.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from dsl.truncation import Nucleus, require_temperature
from pipelines.evaluation.cells import REAL, Cell, labels, require_distinct
from pipelines.evaluation.curves import Crossing, crossing
from pipelines.evaluation.diversity import Kind
from pipelines.evaluation.gate import Resamples, ratios, require_resamples
from pipelines.evaluation.question import Questions
from pipelines.evaluation.survey import Survey

# A source beside the models whose name ends so is its namesake at that temperature, which is itself
# at 1.
TEMPERED = re.compile(r"(?P<name>.+)-(?P<temperature>\d+\.\d+)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class FrontierConfig:
    """Texts are drawn at all `temperatures`, and with each of the `nuclei` where there are any,
    otherwise with the nucleus that a path has anyway.

    `paths` and `budgets`: only these walks; all of them where none is named. `rows`: texts of every
    source, `samples.rows` where it is None. `diversity`: "entropy" of a text's tokens, or "ngram"
    of the texts as a whole; None to choose by the size of the vocabulary
    (`pipelines.evaluation.diversity.telling`). Intervals at `confidence` come from `resamples`.
    """

    temperatures: tuple[float, ...] = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
    nuclei: tuple[Nucleus, ...] = ()
    rows: int | None = None
    paths: tuple[str, ...] = ()
    budgets: tuple[int, ...] = ()
    diversity: Kind | None = None
    resamples: int = 500
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for temperature in self.temperatures:
            require_temperature(temperature)
        if len(self.temperatures) < 2:
            why = "the diversity of real text lies between two of them"
            raise ValueError(f"temperatures must hold at least two, since {why}")
        sizes = tuple(nucleus.p for nucleus in self.nuclei)
        require_distinct("temperatures", self.temperatures)
        require_distinct("nuclei", sizes)
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence lies between 0 and 1, got {self.confidence}")
        require_resamples(self.resamples)


class Curve(NamedTuple):
    """Sources that differ in their temperature alone, which ascends. A source of no temperature is
    a curve by itself. `name`: the cell of the table of texts that it belongs to, or its source."""

    name: str
    labels: Mapping[str, Any]
    sources: tuple[str, ...]
    temperatures: tuple[float, ...] = ()


class Measured(NamedTuple):
    """The figures of a curve in 1 + R resamples, the first of which is the texts as they are: at
    every temperature, and where it has the diversity of real text; bits per byte by judge."""

    curve: Curve
    diversity_TR: np.ndarray
    bits_TR: Mapping[str, np.ndarray]
    crossing: Crossing
    bits_R: Mapping[str, np.ndarray]


def texts_of(config: Questions) -> int:
    """How many texts of every source there are in a frontier."""
    return int(config.samples.rows if config.frontier.rows is None else config.frontier.rows)


def judges(config: Questions) -> dict[str, str]:
    """The folders of all judges' parts by name."""
    found = (question.judged(config) for question in config.questions)
    return {name: folder for by_name in found for name, folder in by_name.items()}


def group(source: str) -> str:
    """The group of parts that holds the diversity of a source's texts."""
    return f"parts/diversity/{source}"


def grid(
    config: Questions, walked: Sequence[Cell]
) -> dict[tuple[Cell, Nucleus | None], list[Cell]]:
    """The cells of each curve by its walk and nucleus, in the order of their temperatures.

    Where the texts of a walk have that temperature and nucleus anyway, they serve here too.
    """
    asked, samples = config.frontier, config.samples

    def at(walk: Cell, nucleus: Nucleus | None, temperature: float) -> Cell:
        same = (nucleus or samples.nucleus) == (walk.nucleus or samples.nucleus)
        if same and temperature == samples.temperature:
            return walk
        return replace(walk, nucleus=nucleus, temperature=temperature)

    return {
        (walk, nucleus): [at(walk, nucleus, t) for t in sorted(asked.temperatures)]
        for walk in walked
        if (not asked.paths or walk.path in asked.paths)
        and (not asked.budgets or walk.budget in asked.budgets)
        for nucleus in (asked.nuclei or (walk.nucleus,))
    }


def curves(survey: Survey) -> Iterator[Curve]:
    """Those of what stands beside the models, and of every walk."""
    yield from _beside(survey.config.beside)
    asked = survey.config.frontier
    for (walk, nucleus), cells in grid(survey.config, survey.walked).items():
        cut = {"p": nucleus.p} if nucleus and asked.nuclei else {}
        sources = tuple(cell.name for cell in cells)
        yield Curve(walk.name, {**labels(walk), **cut}, sources, tuple(sorted(asked.temperatures)))


def _beside(names: Sequence[str]) -> Iterator[Curve]:
    families: dict[str, dict[float, str]] = {}
    for name in names:
        if found := TEMPERED.fullmatch(name):
            families.setdefault(found["name"], {})[float(found["temperature"])] = name
    members = {source for family in families.values() for source in family.values()}
    for name in dict.fromkeys([*(name for name in names if name not in members), *families]):
        itself = {1.0: name} if name in names else {}
        temperatures, sources = zip(
            *sorted({**itself, **families.get(name, {})}.items()), strict=True
        )
        of_none = name not in families
        yield Curve(name, {"model": name}, sources, () if of_none else temperatures)


def measure(survey: Survey, wanted: Iterable[Curve], draws: Resamples) -> Iterator[Measured]:
    """The same rows are taken of every source in a resample, and of real text."""
    confidence = survey.config.frontier.confidence
    real_1R, _ = _figures(survey, (REAL,), draws)
    for curve in wanted:
        diversity_TR, bits_TR = _figures(survey, curve.sources, draws)
        found = crossing(diversity_TR, real_1R[0], confidence)
        bits_R = {name: found.of(values_TR) for name, values_TR in bits_TR.items()}
        yield Measured(curve, diversity_TR, bits_TR, found, bits_R)


def _figures(
    survey: Survey, sources: Sequence[str], draws: Resamples
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The diversity and, by judge, the bits per byte of each source, all ``[T, 1 + R]``."""
    texts, folders = texts_of(survey.config), judges(survey.config)
    parts_KN = [survey.columns(group(source))["diversity"] for source in sources]
    wholes_KN = [np.ones(texts) for _ in sources]
    for folder in folders.values():
        for source in sources:
            found = survey.columns(f"{folder}/{source}", "nats_N", "bytes_N")
            parts_KN.append(found["nats_N"][:texts] / np.log(2))
            wholes_KN.append(found["bytes_N"][:texts])
    parts_NK, wholes_NK = np.stack(parts_KN, 1), np.stack(wholes_KN, 1)
    diversity_TR, *bits = np.split(
        ratios(parts_NK, wholes_NK, draws.rows(texts)).T, 1 + len(folders)
    )
    return diversity_TR, dict(zip(folders, bits, strict=True))
