"""How sure a model is of the rest of a half-finished text of its own, beside a real one with as
much revealed ("posterior sharpening", 004 fig. 2c).

A half-finished text is one that the model has drawn, of which a share of tokens is hidden again at
random. So a path through finite SNR can be asked like any other, the token that the model drew
itself is known, and the exact posterior answers alike for both: its texts are distributed like real
ones, and so are these with the same tokens hidden. The states in the middle of a walk would differ
from real text by the path's own error, too.

The model itself is asked, without the temperature and nucleus that its texts were drawn with. Where
these make its texts sharper, it finds them less surprising than real ones.

Shapes: B rows, L positions, V tokens, A asked positions (flat, in [0, B·L)), N texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dsl.denoiser import Denoiser
from dsl.likelihood import log_prob_of
from infra.config import at_least
from pipelines.evaluation.cells import REAL, Cell, labels, longest, require_distinct
from pipelines.evaluation.conditions import Revealed, shown
from pipelines.evaluation.metrics import Score, mean
from pipelines.evaluation.parts import chunks
from pipelines.evaluation.question import (
    Columns,
    Drawn,
    Part,
    Question,
    entries,
    tokens_of,
)
from pipelines.evaluation.questions.states import mean_hidden
from pipelines.evaluation.questions.texts import LABELS
from pipelines.evaluation.survey import Survey
from pipelines.evaluation.workspace import Workspace
from pipelines.report import Column, Row, Rows, Table
from pipelines.report.drawing import curve, groups, panels, styles

LATER = 2**32 - 1  # the last step: what is hidden does not depend on how a text was drawn
WAYS = {"entropy": "entropy", "nats": "cross-entropy"}


@dataclass(frozen=True, kw_only=True)
class DraftsConfig:
    """These shares of tokens stay revealed, in at most `rows` texts of each model on each path at
    its most calls. It costs one denoiser call for each share."""

    revealed: tuple[float, ...] = (0.25, 0.5, 0.75)
    rows: int = 256

    def __post_init__(self) -> None:
        if not self.revealed or not all(0 < share < 1 for share in self.revealed):
            raise ValueError(f"revealed holds shares in (0, 1), got {list(self.revealed)}")
        require_distinct("revealed", self.revealed)
        at_least(2, self, "rows")


@torch.no_grad()
def sureness(
    denoiser: Denoiser, tokens_BL: Tensor, *, revealed: float, seed: int, first_row: int = 0
) -> Columns:
    """Means over the hidden tokens of each text, one denoiser call: the ``entropy`` of the
    posterior and the cross-entropy of the tokens that stood there, in ``nats``."""
    how = {"seed": seed, "first_row": first_row, "step": LATER}
    tokens_BL, state = shown(denoiser, tokens_BL, Revealed(share=revealed), **how)
    hidden_BL = state.masked_BL
    both_2B = mean_hidden(denoiser(state), _both, tokens_BL[hidden_BL], hidden_BL).double().cpu()
    return dict(zip(WAYS, both_2B.numpy(), strict=True))


def _both(log_probs_AV: Tensor, tokens_A: Tensor) -> Tensor:
    entropy_A = torch.special.entr(log_probs_AV.exp()).sum(1)
    return torch.stack([entropy_A, -log_prob_of(log_probs_AV, tokens_A)], dim=1)


def _measured(
    workspace: Workspace, *, model: str, source: str, revealed: float, first: int, count: int
) -> pa.Table:
    tokens_BL = torch.from_numpy(tokens_of(workspace, source, first, count))
    how = {"revealed": revealed, "seed": workspace.config.seed, "first_row": first}
    return pa.table(dict(sureness(workspace.model(model).denoiser, tokens_BL, **how)))


def _group(model: str, source: str, share: float) -> str:
    return f"parts/drafts/{model}/{source}/{share:g}"


class Drafts(Question):
    section, settings, optional = "drafts", DraftsConfig, True
    title = "Half-finished texts of its own"

    def of_texts(self, survey: Survey, source: str, texts: int) -> Iterator[Part]:
        config = survey.config
        asked = (model for model, sources in _asked(survey).items() if source in sources)
        for model in asked:
            for share in config.drafts.revealed:
                for first, count in chunks(min(texts, config.drafts.rows), config.batch):
                    where = {"model": model, "source": source, "first": first, "count": count}
                    work = partial(_measured, revealed=share, **where)
                    yield Part(group=_group(model, source, share), first=first, work=work)

    def tables(self, survey: Survey) -> Mapping[str, Table]:
        rows = list(_rows(survey))
        split = (Column("split", "Split"),) if any("split" in row for row in rows) else ()
        made = Table(
            title=self.title,
            note="Tokens are hidden again at random in texts that a model has drawn, and in real "
            f"ones (path {REAL}). Entropy of the model's posterior at hidden tokens and "
            "cross-entropy of the tokens that stood there, in nats per token; overconfident by: "
            "the latter less the former. Less: how much less than of real texts. ± is one "
            "standard error over texts. A model that sees no masks is left out.",
            columns=(
                *(*LABELS, *split, Column("budget", "Budget"), Column("state", "State")),
                Column("entropy", "Entropy", ".4f"),
                Column("entropy_less", "Less", ".4f"),
                Column("nats", "Cross-entropy", ".4f"),
                Column("nats_less", "Less", ".4f"),
                Column("overconfidence", "Overconfident by", ".4f"),
            ),
            rows=rows,
        )
        return {"drafts": made}

    def plots(self, survey: Survey, tables: Mapping[str, Table]) -> Iterator[Drawn]:
        yield "drafts", "How sure a model is of its own texts", _plot(tables["drafts"].rows)


def _asked(survey: Survey) -> dict[str, dict[str, Cell | None]]:
    """By model that sees masks: real text, and its own texts by their source."""
    models = (name for name, kind in survey.kinds.items() if not kind.causal)
    own: dict[str, dict[str, Cell | None]] = {model: {REAL: None} for model in models}
    for cell in longest(survey.walked):
        if cell.model in own:
            own[cell.model][cell.name] = cell
    return own


def _rows(survey: Survey) -> Iterator[Row]:
    for model, sources in _asked(survey).items():
        for share in survey.config.drafts.revealed:
            real = survey.columns(_group(model, REAL, share))
            for source, cell in sources.items():
                found = survey.columns(_group(model, source, share))
                row: dict[str, Any] = labels(cell) if cell else {"model": model, "path": REAL}
                row |= {"state": Revealed(share=share).name, "revealed": share}
                for way in WAYS:
                    row |= entries(way, mean(found[way]))
                    row |= _less(way, real[way], found[way]) if cell else {}
                yield row | entries("overconfidence", mean(found["nats"] - found["entropy"]))


def _less(way: str, real_N: np.ndarray, own_N: np.ndarray) -> dict[str, float]:
    """How much less the one mean is than the other, of texts that have nothing in common."""
    real, own = mean(real_N), mean(own_N)
    less = Score(real.value - own.value, math.hypot(real.stderr, own.stderr))
    return entries(f"{way}_less", less)


def _plot(rows: Rows) -> bytes | None:
    """Entropy and cross-entropy against the share revealed, a panel of each for each model."""
    if not rows:
        return None
    by_model = groups(rows, lambda row: row["model"])
    lines = styles(row["path"] for row in rows)
    titles = [f"{model}: {title}" for model in by_model for title in WAYS.values()]
    made = panels(titles, width=4.0, columns=len(WAYS), beside=1.5)
    panel = iter(made.axes)
    for of_model in by_model.values():
        for way in WAYS:
            axes = next(panel)
            for path, part in groups(of_model, lambda row: row["path"]).items():
                curve(axes, part, "revealed", way, label=path, **lines[path])
            axes.set(xlabel="share of the tokens revealed", ylabel="nats per hidden token")
            axes.grid(alpha=0.3)
    made.legend()
    return made.png()
