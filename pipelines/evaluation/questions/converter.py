"""How much of the evidence the converter lets through to the backbone, at each SNR of the states.

Shapes: B rows of a task, L positions, D table dimension, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from dsl.denoiser import Denoiser
from pipelines.evaluation.conditions import AtSNR, shown, slug
from pipelines.evaluation.evaluation import Evaluation
from pipelines.evaluation.metrics import mean
from pipelines.evaluation.question import Columns, Drawn, Question, Task, entries, tasks_of_rows
from pipelines.evaluation.subjects import Subject
from pipelines.report import Column, Table
from pipelines.report.plots import CONVERTER, by_snr

TABLE = (
    Column("model", "Model"),
    Column("state", "State"),
    Column("converter_entropy", "Entropy, nats", ".3f"),
    Column("mask_weight", "Weight of [MASK]", ".4f"),
    Column("token_weight", "Weight of the token", ".4f"),
)


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


def _conditions(evaluation: Evaluation, subject: Subject) -> tuple[AtSNR, ...]:
    gammas = (0.0, *evaluation.config.states.gammas) if subject.trained_as.finite_snr else ()
    return tuple(AtSNR(snr=gamma) for gamma in gammas)


def _group(model: str, condition: AtSNR) -> str:
    return f"parts/converter/{model}/{slug(condition)}"


class Converter(Question):
    def of_model(self, evaluation: Evaluation, subject: Subject) -> Iterator[Task]:
        for condition in _conditions(evaluation, subject):
            measure = partial(reading, condition=condition, seed=evaluation.config.seed)
            group = _group(subject.name, condition)
            yield from tasks_of_rows(evaluation, subject.name, group, measure)

    def tables(self, evaluation: Evaluation) -> Mapping[str, Table]:
        rows = []
        for subject in evaluation.subjects:
            for condition in _conditions(evaluation, subject):
                read = evaluation.columns(_group(subject.name, condition))
                row = {
                    "model": subject.name,
                    "state": condition.name,
                    "gamma": condition.snr,
                    **entries("converter_entropy", mean(read["entropy"])),
                    **entries("mask_weight", mean(read["mask"])),
                    **entries("token_weight", mean(read["token"])),
                }
                rows.append(row)
        made = Table(
            title="What the converter gives to the backbone",
            note="Of the mixture of input embeddings at each token: the entropy of its weights, "
            "the weight of [MASK], which hides evidence, and that of the token which is there.",
            columns=TABLE,
            rows=rows,
        )
        return {"converter": made}

    def plots(self, evaluation: Evaluation, tables: Mapping[str, Table]) -> Iterable[Drawn]:
        png = by_snr(tables["converter"].rows, CONVERTER)
        return [("converter", "What the converter gives to the backbone", png)]
