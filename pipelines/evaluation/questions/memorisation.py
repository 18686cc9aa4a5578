"""Memorisation: how much of the texts stands word for word in the training split.

Exact, over all rows of that split which an evaluation looks at. Real text beside the models says
what share comes of itself.

Shapes: N texts, L positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from infra.config import at_least
from pipelines.evaluation.cells import REAL
from pipelines.evaluation.copies import share_copied
from pipelines.evaluation.held_out import HeldOut
from pipelines.evaluation.metrics import mean
from pipelines.evaluation.question import (
    Columns,
    Merit,
    Part,
    Question,
    Questions,
    entries,
    parts_of_texts,
)
from pipelines.evaluation.survey import Survey
from pipelines.evaluation.workspace import Workspace
from pipelines.report import Column, Row

BEYOND = 3.0  # standard errors above real text, from which on texts are flagged


@dataclass(frozen=True, kw_only=True)
class MemorisationConfig:
    """A text's stretches of `stretch` tokens are looked up; where rows are shorter than that,
    stretches of half a row."""

    stretch: int = 32

    def __post_init__(self) -> None:
        at_least(1, self, "stretch")

    def size(self, length: int) -> int:
        """Tokens of a stretch, in rows of so many."""
        return self.stretch if length >= self.stretch else max(1, length // 2)


def _copied(workspace: Workspace, texts: Sequence[str], tokens_NL: np.ndarray) -> Columns:
    """Of each text: the longest copy in tokens, and the share of its stretches that are copies."""
    longest_NL = workspace.copies.longest(tokens_NL)
    size = workspace.config.memorisation.size(tokens_NL.shape[1])
    return {"longest": longest_NL.max(1), "share": share_copied(longest_NL, size)}


def _group(source: str) -> str:
    return f"parts/copied/{source}"


class Memorisation(Question):
    section, settings, optional = "memorisation", MemorisationConfig, True
    title = "Memorisation"
    columns = (
        Column("longest_copy", "Longest copy", ".1f"),
        Column("longest_copy_of_all", "of all texts"),
        Column("copied", "Copied", ".4f"),
        Column("memorised", "Memorised"),
    )
    merits = (
        Merit("longest_copy", "Longest copy of a text, tokens", ".1f"),
        Merit("copied", "Share copied from the training split", ".4f", bounds=(0, 1)),
    )

    def prepare(self, workspace: Workspace, held_out: HeldOut) -> None:
        workspace.keep_training(held_out.training_RL)

    def of_texts(self, survey: Survey, source: str, texts: int) -> Iterable[Part]:
        return parts_of_texts(_group(source), source, texts, _copied)

    def of_source(self, survey: Survey, source: str) -> Row:
        found, real = (survey.columns(_group(name)) for name in (source, REAL))
        share, by_itself = mean(found["share"]), mean(real["share"])
        error = math.hypot(share.stderr, by_itself.stderr)
        return {
            **entries("longest_copy", mean(found["longest"])),
            "longest_copy_of_all": int(found["longest"].max()),
            **entries("copied", share),
            "memorised": "yes" if share.value - by_itself.value > BEYOND * error else "no",
        }

    def note(self, config: Questions) -> str:
        return (
            f"Copied: the share of stretches of {config.memorisation.stretch} tokens (of half a "
            f"row where rows are shorter) that stand in the first {config.corpus_rows:,} rows of "
            "the training split. Longest copy: of a text, in tokens. Memorised: copied by more "
            f"than {BEYOND:g} standard errors above real text."
        )
