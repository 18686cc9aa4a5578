"""The error of each model in the states that it was trained on: masked and revealed tokens side by
side, and evidence at one SNR.

Shapes: B rows of a part, L positions, V tokens, A asked positions (flat, in [0, B·L)), K figures of
each, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsl.denoiser import Denoiser
from dsl.likelihood import Profile, log_prob_of
from dsl.posterior import Posterior
from infra.config import to_tree
from pipelines.evaluation.cells import require_distinct
from pipelines.evaluation.conditions import AtSNR, Condition, Revealed, shown
from pipelines.evaluation.metrics import mean
from pipelines.evaluation.question import (
    Columns,
    Drawn,
    OfRows,
    Questions,
    RowQuestion,
    entries,
)
from pipelines.evaluation.subjects import Subject
from pipelines.evaluation.survey import Survey
from pipelines.kinds import ModelKind
from pipelines.report import SKIPPED, Column, Row, Table
from pipelines.report.plots import ERRORS, by_snr


@dataclass(frozen=True, kw_only=True)
class StatesConfig:
    """Where errors are measured, on the rows of the likelihood: at these shares of tokens revealed
    (the rest masked), and with every token at one of these SNRs; there calibration and the
    converter, too."""

    revealed: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 0.9)
    gammas: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

    def __post_init__(self) -> None:
        if not all(0 <= share < 1 for share in self.revealed):
            raise ValueError(f"revealed holds shares in [0, 1), got {list(self.revealed)}")
        if not all(0 < gamma < math.inf for gamma in self.gammas):
            raise ValueError(f"gammas holds positive, finite SNRs, got {list(self.gammas)}")
        require_distinct("revealed", self.revealed)
        require_distinct("gammas", self.gammas)


def conditions(kind: ModelKind, config: StatesConfig) -> tuple[Condition, ...]:
    """The states that a model of a kind was trained on."""
    revealed = () if kind.causal else tuple(Revealed(share=share) for share in config.revealed)
    noisy = tuple(AtSNR(snr=gamma) for gamma in config.gammas) if kind.finite_snr else ()
    return revealed + noisy


@torch.no_grad()
def errors(
    denoiser: Denoiser, tokens_BL: Tensor, *, condition: Condition, seed: int, first_row: int = 0
) -> Columns:
    """Means over the unrevealed tokens of each row, one denoiser call: the cross-entropy in
    ``nats``, and ``squared``, which is ``|x - x_hat|²`` and E(SNR) of 003 eq. 3 at one SNR."""
    tokens_BL, state = shown(denoiser, tokens_BL, condition, seed=seed, first_row=first_row)
    nats_B, squared_B = mean_errors(denoiser(state), tokens_BL, ~state.revealed_BL).double().cpu()
    return {"nats": nats_B.numpy(), "squared": squared_B.numpy()}


def mean_errors(posterior: Posterior, tokens_BL: Tensor, hidden_BL: Tensor) -> Tensor:
    """``[2, B]``: cross-entropy and squared error, means over the hidden tokens of each row."""
    table_VD = posterior.table_VD

    def both(log_probs_AV: Tensor, tokens_A: Tensor) -> Tensor:
        off_AD = table_VD[tokens_A] - log_probs_AV.exp().to(table_VD) @ table_VD
        return torch.stack([-log_prob_of(log_probs_AV, tokens_A), off_AD.square().sum(1)], dim=1)

    return mean_hidden(posterior, both, tokens_BL[hidden_BL], hidden_BL)


def mean_hidden(
    posterior: Posterior,
    function: Callable[[Tensor, Tensor], Tensor],
    given_A: Tensor,
    hidden_BL: Tensor,
) -> Tensor:
    """What ``function`` of log-probabilities ``[A, V]`` and of what is given of the hidden tokens,
    ``[A, …]``, answers, ``[A, K]``, as means over those of each row, ``[K, B]``; from one
    projection onto the vocabulary.
    """
    at_A = hidden_BL.flatten().nonzero().squeeze(1)
    values_AK = posterior.summarise(function, at_A, given_A)
    values_BLK = values_AK.new_zeros(*hidden_BL.shape, values_AK.shape[1])
    values_BLK[hidden_BL] = values_AK
    return (values_BLK.sum(1) / hidden_BL.sum(1, keepdim=True)).T


class States(RowQuestion):
    section, settings = "states", StatesConfig
    name, title = "states", "Error by state"
    text = (
        "Per unrevealed token of the same rows: cross-entropy in nats, and |x - x̂|², which is "
        "E(SNR) where every token has one SNR."
    )
    table = (
        Column("model", "Model"),
        Column("state", "State"),
        Column("nats", "Cross-entropy", ".4f"),
        Column("squared_error", "Squared error", ".4f"),
    )

    def asked(self, config: Questions, kind: ModelKind) -> Mapping[str, OfRows]:
        return {
            condition.name: partial(errors, condition=condition, seed=config.seed)
            for condition in conditions(kind, config.states)
        }

    def rows(self, survey: Survey, subject: Subject) -> Iterator[Row]:
        name, kind = subject.name, subject.trained_as
        asked = conditions(kind, survey.config.states)
        for condition, found in zip(asked, self.found(survey, subject).values(), strict=True):
            # Distances in a table that was never trained would mean nothing.
            squared = entries("squared_error", mean(found["squared"])) if kind.finite_snr else {}
            row = {"model": name, "state": condition.name, **condition.place}
            yield {**row, **entries("nats", mean(found["nats"])), **squared}
        if kind.causal:
            why = f"{kind.name} sees the tokens before, no others"
            yield {"model": name, "state": "any", SKIPPED: why}
        elif not kind.finite_snr:
            yield {"model": name, "state": "SNR > 0", SKIPPED: f"{kind.name} was not trained on it"}

    def plots(self, survey: Survey, tables: Mapping[str, Table]) -> Iterable[Drawn]:
        return [("snr", "Error over SNR", by_snr(tables["states"].rows, ERRORS))]

    def facts(self, survey: Survey) -> Mapping[str, Any]:
        """By model, how many nats lie below which SNR: a support, a grid or a proposal that can be
        copied into a configuration (003 eq. 3)."""
        config, made = survey.config.states, {}
        gammas = sorted(config.gammas)
        places = (Revealed(share=0.0), *(AtSNR(snr=gamma) for gamma in gammas))
        for subject in survey.subjects:
            if subject.trained_as.finite_snr and gammas and 0.0 in config.revealed:
                groups = (self.group(subject.name, place.name) for place in places)
                found = np.stack([survey.columns(group)["squared"] for group in groups])
                profile = Profile((0.0, *gammas), torch.from_numpy(found))
                made[subject.name] = to_tree(profile.information())
        return {"information": made}
