"""Several judges side by side, by names of your choice: bits per byte, in which judges with other
tokenizers compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np

from infra.errors import ConfigError
from pipelines.evaluation.gate import OfTexts, Resamples, ratios
from pipelines.evaluation.question import (
    Merit,
    Part,
    Question,
    Questions,
    entries,
    parts_of_texts,
    require_names,
)
from pipelines.evaluation.questions.judge import AnyJudge, Judged, bits_per_byte, judged
from pipelines.evaluation.survey import Survey
from pipelines.report import Column, Row


def _section(name: str) -> str:
    """The dotted path of a judge's settings."""
    return f"judges.{name}"


def _folder(name: str) -> str:
    return f"parts/judges/{name}"


def _group(name: str, source: str) -> str:
    return f"{_folder(name)}/{source}"


def _key(name: str) -> str:
    return f"bits_per_byte_{name}"


@dataclass(frozen=True, kw_only=True)
class JudgedBits(OfTexts):
    """Bits per byte of the texts for one of the `judges`; lower is better.

    They fall for texts that repeat themselves: guard them with `entropy`.
    """

    judge: str
    kind: Literal["judged_bits_per_byte"] = "judged_bits_per_byte"

    sign: ClassVar[int] = -1

    @property
    def label(self) -> str:
        return f"{super().label} by {self.judge}"

    def figures(self, survey: Survey, model: str, draws: Resamples) -> np.ndarray:
        group = _group(self.judge, self.source(survey, model))
        read = Judged(**survey.columns(group))
        bits_N = read.nats_N / np.log(2)
        return ratios(bits_N, read.bytes_N, draws.rows(len(bits_N)))

    def require(self, survey: Survey, candidate: str) -> None:
        super().require(survey, candidate)
        there = survey.config.judges or {}
        if self.judge not in there:
            why = f"asks for the judge {self.judge}, and there is none of that name"
            fix = f"Name one of: {', '.join(there)}" if there else "Give judges, too"
            raise ConfigError("gate", why, fix)


class Judges(Question):
    section, settings, optional = "judges", dict[str, AnyJudge], True
    reads_further = True
    gate_metrics = (JudgedBits,)

    def check(self, config: Questions) -> None:
        require_names(config.judges)

    def columns_in(self, config: Questions) -> tuple[Column, ...]:
        return tuple(Column(_key(name), _title(name), ".3f") for name in config.judges)

    def merits_in(self, config: Questions) -> tuple[Merit, ...]:
        return tuple(
            Merit(_key(name), f"{_title(name)} ↓", ".3f", better=-1) for name in config.judges or ()
        )

    def judged(self, config: Questions) -> Mapping[str, str]:
        return {name: _folder(name) for name in config.judges}

    def readers(self, config: Questions) -> Mapping[str, AnyJudge]:
        return {_section(name): judge for name, judge in config.judges.items()}

    def of_texts(self, survey: Survey, source: str, texts: int) -> Iterator[Part]:
        for name, judge in survey.config.judges.items():
            measure = partial(judged, _section(name), judge)
            yield from parts_of_texts(_group(name, source), source, texts, measure)

    def of_source(self, survey: Survey, source: str) -> Row:
        row: Row = {}
        for name in survey.config.judges:
            read = Judged(**survey.columns(_group(name, source)))
            row = {**row, **entries(_key(name), bits_per_byte(read))}
        return row

    def note(self, config: Questions) -> str:
        said = "; ".join(f"{name}, {judge.label}" for name, judge in config.judges.items())
        return f"Judges, in bits per byte of text: {said}."


def _title(name: str) -> str:
    return f"Bits per byte by {name}"
