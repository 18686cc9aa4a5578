"""An evaluation under way: what is asked of which models, and the parts that answer it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from infra.errors import ConfigError
from pipelines.evaluation.cells import REFERENCES, UNIGRAM, Cell, cells
from pipelines.evaluation.held_out import HeldOut
from pipelines.evaluation.parts import Parts
from pipelines.evaluation.subjects import Subject
from pipelines.kinds import ModelKind

if TYPE_CHECKING:
    from pipelines.evaluation.question import Question
    from pipelines.evaluation.settings import EvaluateConfig, Questions


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Which models walk which paths, the rows that they are asked about, and what was found.

    readers: the models of our own that read their texts.
    """

    config: EvaluateConfig
    parts: Parts
    held_out: HeldOut
    subjects: Sequence[Subject]
    readers: Sequence[Subject]

    @cached_property
    def kinds(self) -> Mapping[str, ModelKind]:
        """What each model was trained on, by its name."""
        return {subject.name: subject.trained_as for subject in self.subjects}

    @cached_property
    def walked(self) -> tuple[Cell, ...]:
        """Every model on every path that it can walk."""
        return tuple(cell for cell, refusal in self._cells() if refusal is None)

    @cached_property
    def further(self) -> Mapping[Cell, int]:
        """How many texts are drawn along cells that stand in no table of texts."""
        return further(self.config, self.walked)

    @property
    def sources(self) -> tuple[str, ...]:
        """What the table of texts is about: all that stands beside the models, and every cell."""
        return (*self.config.beside, REFERENCES, *(cell.name for cell in self.walked))

    def read_by(self, question: Question) -> tuple[str, ...]:
        """The sources whose texts a question is asked about."""
        more = (cell.name for cell in self.further) if question.reads_further else ()
        return (*self.sources, *more)

    def refused(self) -> Iterator[tuple[str, str, str]]:
        """(model, paths, reason) for the paths that a model cannot walk, one for each reason."""
        reasons: dict[tuple[str, str], dict[str, None]] = {}
        for cell, refusal in self._cells():
            if refusal is not None:
                reasons.setdefault((cell.model, refusal), {})[cell.path] = None
        for (model, reason), paths in reasons.items():
            yield model, ", ".join(paths), reason

    def source(self, model: str, path: str, budget: int) -> str:
        """The texts of a model at a path and budget; ConfigError unless that is one cell."""
        if model == UNIGRAM:
            return UNIGRAM
        fitting = [c for c in self.walked if (c.model, c.path, c.budget) == (model, path, budget)]
        if len(fitting) != 1:
            there = ", ".join(f"{c.path} {c.budget}" for c in self.walked if c.model == model)
            raise ConfigError(
                "gate",
                f"{len(fitting)} walks of {model} along {path} with {budget} calls",
                f"Name one of: {there}; give one of several splits a path of its own",
            )
        return fitting[0].name

    def columns(self, group: str, *names: str) -> dict[str, np.ndarray]:
        """The columns of all parts of a group (these, or every one), each ``[N]``."""
        table = self.parts.read(group, names or None)
        return {name: table[name].to_numpy() for name in table.column_names}

    def texts(self, source: str, rows: int) -> list[str]:
        """The first texts of a source."""
        return self.parts.read(f"samples/{source}", ["text"])["text"][:rows].to_pylist()

    def count(self, source: str) -> int:
        """How many texts of a source there are."""
        return len(self.parts.read(f"samples/{source}", ["row"]))

    def _cells(self) -> Iterator[tuple[Cell, str | None]]:
        length = self.held_out.manifest.length
        for cell in cells(self.kinds, self.config.paths, length):
            yield cell, self.kinds[cell.model].refusal(cell.walk, cell.budget, length)


def further(config: Questions, walked: Sequence[Cell]) -> dict[Cell, int]:
    """How many texts questions want along cells beyond those that are walked for all of them."""
    wanted: dict[Cell, int] = {}
    for question in config.questions:
        for cell, rows in question.cells(config, walked).items():
            wanted[cell] = max(rows, wanted.get(cell, 0))
    return wanted
