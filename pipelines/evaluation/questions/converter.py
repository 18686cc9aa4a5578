"""How much of the evidence the converter lets through to the backbone, at each SNR of the states.

Shapes: B rows of a part, L positions, D table dimension, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from dsl.denoiser import Denoiser
from pipelines.evaluation.conditions import AtSNR, shown
from pipelines.evaluation.metrics import mean
from pipelines.evaluation.question import Columns, Drawn, OfRows, Questions, RowQuestion, entries
from pipelines.evaluation.subjects import Subject
from pipelines.evaluation.survey import Survey
from pipelines.kinds import ModelKind
from pipelines.report import Column, Row, Table
from pipelines.report.plots import CONVERTER, by_snr


@torch.no_grad()
def reading(
    denoiser: Denoiser, tokens_BL: Tensor, *, condition: AtSNR, seed: int, first_row: int = 0
) -> Columns:
    """What the converter takes the tokens for, means over each row: the ``entropy`` of its
    weights in nats, and the weights of [MASK] (``mask``) and of the true ``token``."""
    tokens_BL, state = shown(denoiser, tokens_BL, condition, seed=seed, first_row=first_row)
    z_ND = state.z_BLD.flatten(0, 1)
    read = denoiser.converter.read(z_ND, tokens_BL.flatten(), denoiser.table_VD)
    found = {"entropy": read.entropy_N, "mask": read.mask_N, "token": read.token_N}
    return {
        name: value_N.view(tokens_BL.shape).double().mean(1).cpu().numpy()
        for name, value_N in found.items()
    }


class Converter(RowQuestion):
    name, title = "converter", "What the converter gives to the backbone"
    text = (
        "Of the mixture of input embeddings at each token: the entropy of its weights, the weight "
        "of [MASK], which hides evidence, and that of the token which is there."
    )
    table = (
        Column("model", "Model"),
        Column("state", "State"),
        Column("converter_entropy", "Entropy, nats", ".3f"),
        Column("mask_weight", "Weight of [MASK]", ".4f"),
        Column("token_weight", "Weight of the token", ".4f"),
    )

    def asked(self, config: Questions, kind: ModelKind) -> Mapping[str, OfRows]:
        return {
            condition.name: partial(reading, condition=condition, seed=config.seed)
            for condition in _conditions(config, kind)
        }

    def rows(self, survey: Survey, subject: Subject) -> Iterator[Row]:
        asked = _conditions(survey.config, subject.trained_as)
        for condition, read in zip(asked, self.found(survey, subject).values(), strict=True):
            yield {
                "model": subject.name,
                "state": condition.name,
                "gamma": condition.snr,
                **entries("converter_entropy", mean(read["entropy"])),
                **entries("mask_weight", mean(read["mask"])),
                **entries("token_weight", mean(read["token"])),
            }

    def plots(self, survey: Survey, tables: Mapping[str, Table]) -> Iterable[Drawn]:
        png = by_snr(tables["converter"].rows, CONVERTER)
        return [("converter", self.title, png)]


def _conditions(config: Questions, kind: ModelKind) -> list[AtSNR]:
    gammas = (0.0, *config.states.gammas) if kind.finite_snr else ()
    return [AtSNR(snr=gamma) for gamma in gammas]
