"""How much worse a model predicts masked tokens when some of the visible ones are wrong.

Half of each row is visible and half masked. A share of the visible tokens is replaced by other
tokens, and the rise of the cross-entropy at the masked positions is measured. The comparison is
paired: the same rows and masks with and without; a larger share replaces the same tokens and more.

Shapes: B rows, L positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dsl.channel import observe
from dsl.denoiser import Denoiser
from dsl.noise import Draws, Stream
from pipelines.evaluation.cells import require_distinct
from pipelines.evaluation.conditions import Revealed, shown
from pipelines.evaluation.metrics import mean
from pipelines.evaluation.question import (
    Columns,
    Drawn,
    OfRows,
    Questions,
    RowQuestion,
    entries,
)
from pipelines.evaluation.questions.states import mean_errors
from pipelines.evaluation.subjects import Subject
from pipelines.evaluation.survey import Survey
from pipelines.kinds import ModelKind
from pipelines.report import Column, Row, Table
from pipelines.report.plots import by_model

VISIBLE = Revealed(share=0.5)


@dataclass(frozen=True, kw_only=True)
class RobustnessConfig:
    """The shares of the visible tokens that are `replaced`, on the rows of the likelihood; none
    leaves the question out. It costs one denoiser call a row more than there are shares."""

    replaced: tuple[float, ...] = (0.1, 0.2, 0.4)

    def __post_init__(self) -> None:
        if not all(0 < share <= 1 for share in self.replaced):
            raise ValueError(f"replaced holds shares in (0, 1], got {list(self.replaced)}")
        require_distinct("replaced", self.replaced)


def replace(tokens_BL: Tensor, visible_BL: Tensor, share: float, size: int, draws: Draws) -> Tensor:
    """The tokens ``[B, L]``, of which this share of each row's visible ones, to the nearest whole
    number, are other tokens: uniformly random of the ``size - 1`` that they are not."""
    rows, length = tokens_BL.shape
    order_BL = draws.uniform(rows, length, Stream.PATH).to(tokens_BL.device)
    rank_BL = order_BL.masked_fill(~visible_BL, 2).argsort(1).argsort(1)
    wrong_BL = rank_BL < (share * visible_BL.sum(1, keepdim=True)).round()
    ahead_BL = draws.uniform(rows, length, Stream.TOKEN).to(tokens_BL.device) * (size - 1)
    return torch.where(wrong_BL, (tokens_BL + 1 + ahead_BL.long()) % size, tokens_BL)


@torch.no_grad()
def nats(
    denoiser: Denoiser, tokens_BL: Tensor, *, replaced: float, seed: int, first_row: int = 0
) -> Columns:
    """Cross-entropy per masked token of each row, ``[B]``, with this share of tokens replaced."""
    tokens_BL, state = shown(denoiser, tokens_BL, VISIBLE, seed=seed, first_row=first_row)
    draws, size = Draws(seed, first_row, 1), len(denoiser.table_VD)
    seen_BL = replace(tokens_BL, state.revealed_BL, replaced, size, draws)
    seen = observe(denoiser.table_VD, seen_BL, state.gamma_BL, draws)
    nats_B, _ = mean_errors(denoiser(seen), tokens_BL, state.masked_BL).double().cpu()
    return {"nats": nats_B.numpy()}


def _state(share: float) -> str:
    return f"replaced {share:g}"


class Robustness(RowQuestion):
    section, settings = "robustness", RobustnessConfig
    name, title = "robustness", "Robustness to wrong tokens"
    text = (
        "Half of the tokens are visible, and a share of those is replaced at random: cross-entropy "
        "in nats per masked token, and its rise over none replaced; ± is one standard error over "
        "rows. A model that sees no masks is left out."
    )
    table = (
        Column("model", "Model"),
        Column("state", "State"),
        Column("nats", "Cross-entropy", ".4f"),
        Column("rise", "Rise", ".4f"),
    )

    def asked(self, config: Questions, kind: ModelKind) -> Mapping[str, OfRows]:
        shares = config.robustness.replaced
        if kind.causal or not shares:
            return {}
        return {
            _state(share): partial(nats, replaced=share, seed=config.seed)
            for share in (0.0, *shares)
        }

    def rows(self, survey: Survey, subject: Subject) -> Iterator[Row]:
        found = [columns["nats"] for columns in self.found(survey, subject).values()]
        shares = (0.0, *survey.config.robustness.replaced) if found else ()
        for share, nats_N in zip(shares, found, strict=True):
            row = {"model": subject.name, "state": _state(share), "replaced": share}
            rise = entries("rise", mean(nats_N - found[0])) if share else {}
            yield {**row, **entries("nats", mean(nats_N)), **rise}

    def plots(self, survey: Survey, tables: Mapping[str, Table]) -> Iterator[Drawn]:
        across, up = "share of the visible tokens replaced", "rise, nats per masked token"
        png = by_model(tables["robustness"].rows, [("replaced", across, "rise", up)])
        yield "robustness", self.title, png
