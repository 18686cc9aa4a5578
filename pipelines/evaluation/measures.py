"""What is asked of a model about held-out rows: their likelihood, and the error state by state.

Every draw is keyed by (seed, row): no figure depends on how rows were batched.

Shapes: B rows of a batch, L positions, V tokens, A asked positions (flat, in [0, B·L)).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsl import likelihood
from dsl.converter import Reading
from dsl.denoiser import Denoiser
from dsl.evidence import evidence
from dsl.likelihood import Estimate, PathName
from dsl.noise import Draws, Stream
from dsl.posterior import Posterior
from dsl.state import State
from dsl.summary import log_prob_of, summarise
from pipelines.evaluation.settings import LikelihoodConfig, StatesConfig
from pipelines.kinds import KINDS

# --- likelihood --------------------------------------------------------------------------------


class View(NamedTuple):
    """One way to a likelihood; ``measure`` takes a denoiser, rows, and the first row's number."""

    name: str
    meaning: str
    measure: Callable[[Denoiser, Tensor, int], Estimate]
    gamma_star: float | None = None


def exact() -> View:
    return View("exact", "exact", lambda denoiser, tokens_BL, _: likelihood.ar(denoiser, tokens_BL))


def endpoints(config: LikelihoodConfig, seed: int) -> View:
    def measure(denoiser: Denoiser, tokens_BL: Tensor, first_row: int) -> Estimate:
        return likelihood.roar(
            denoiser, tokens_BL, samples=config.samples, seed=seed, first_row=first_row
        )

    return View("endpoint_bound", "upper bound, tokens revealed in random order", measure)


def integral(config: LikelihoodConfig, seed: int, contour: PathName) -> View:
    def measure(denoiser: Denoiser, tokens_BL: Tensor, first_row: int) -> Estimate:
        return likelihood.path_integral(
            denoiser,
            tokens_BL,
            gamma_max=config.gamma_max,
            steps=config.steps,
            seed=seed,
            path=contour,
            first_row=first_row,
        )

    name = "path_integral" if contour == "diffusion" else f"path_integral_{contour}"
    return View(name, f"estimate, no bound: stops at SNR {config.gamma_max:g}", measure)


def hybrid(config: LikelihoodConfig, seed: int, gamma_star: float) -> View:
    def measure(denoiser: Denoiser, tokens_BL: Tensor, first_row: int) -> Estimate:
        return likelihood.hybrid_bound(
            denoiser,
            tokens_BL,
            gamma_star=gamma_star,
            steps=config.steps,
            seed=seed,
            first_row=first_row,
        )

    meaning = f"upper bound, to SNR {gamma_star:g}"
    return View(f"hybrid_bound_{gamma_star:g}", meaning, measure, gamma_star)


def views(kind: str, config: LikelihoodConfig, seed: int) -> tuple[View, ...]:
    """The likelihoods that a model of a kind has."""
    by_name: Mapping[str, tuple[View, ...]] = {
        "exact": (exact(),),
        "endpoint_bound": (endpoints(config, seed),),
        "path_integral": tuple(integral(config, seed, contour) for contour in config.contours),
        "hybrid_bound": tuple(hybrid(config, seed, gamma_star) for gamma_star in config.gamma_star),
    }
    return tuple(view for name in KINDS[kind].views for view in by_name[name])


# --- the error, state by state -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Revealed:
    """A share of each row's tokens revealed, at random, and the others masked."""

    share: float

    @property
    def name(self) -> str:
        return f"revealed {self.share:g}"

    def gamma(self, rows: int, length: int, draws: Draws) -> Tensor:
        rank_BL = draws.uniform(rows, length, Stream.PATH).argsort(1).argsort(1)
        return torch.where(rank_BL < int(self.share * length), torch.inf, 0.0)


@dataclass(frozen=True, kw_only=True)
class AtSNR:
    """Every token at one SNR: the squared error is E(snr) of 003 eq. 3."""

    snr: float

    @property
    def name(self) -> str:
        return f"SNR {self.snr:g}"

    def gamma(self, rows: int, length: int, draws: Draws) -> Tensor:
        return torch.full((rows, length), self.snr)


Condition = Revealed | AtSNR


def slug(condition: Condition) -> str:
    """The name of a condition as that of a folder."""
    return condition.name.replace(" ", "-")


def conditions(kind: str, config: StatesConfig) -> tuple[Condition, ...]:
    """The states that a model of a kind was trained on."""
    revealed = tuple(Revealed(share=share) for share in config.revealed)
    noisy = tuple(AtSNR(snr=gamma) for gamma in config.gammas)
    found = KINDS[kind]
    return (() if found.causal else revealed) + (noisy if found.finite_snr else ())


class Errors(NamedTuple):
    """Per unrevealed token of each row, ``[B]``: cross-entropy in nats, ``|x - x_hat|²``."""

    nats_B: Tensor
    squared_B: Tensor


@torch.no_grad()
def errors(
    denoiser: Denoiser, tokens_BL: Tensor, condition: Condition, *, seed: int, first_row: int = 0
) -> Errors:
    """The errors of the unrevealed tokens, one denoiser call."""
    tokens_BL, state = _seen(denoiser, tokens_BL, condition, Draws(seed, first_row, 0))
    return Errors(*_errors_of(denoiser(state), tokens_BL, ~state.revealed_BL).double().cpu())


def _seen(
    denoiser: Denoiser, tokens_BL: Tensor, condition: Condition, draws: Draws
) -> tuple[Tensor, State]:
    """The rows on the denoiser's device, and their noisy state under the condition."""
    table_VD = denoiser.table_VD
    tokens_BL = tokens_BL.to(table_VD.device)
    gamma_BL = condition.gamma(*tokens_BL.shape, draws)
    return tokens_BL, evidence(table_VD, tokens_BL, gamma_BL, draws)


def _errors_of(posterior: Posterior, tokens_BL: Tensor, hidden_BL: Tensor) -> Tensor:
    """``[2, B]``: both errors from one projection onto the vocabulary."""
    table_VD = posterior.table_VD

    def both(log_probs_AV: Tensor, tokens_A: Tensor) -> Tensor:
        off_AD = table_VD[tokens_A] - log_probs_AV.exp().to(table_VD) @ table_VD
        return torch.stack([-log_prob_of(log_probs_AV, tokens_A), off_AD.square().sum(1)], dim=1)

    at_A = hidden_BL.flatten().nonzero().squeeze(1)
    errors_BL2 = table_VD.new_zeros(*tokens_BL.shape, 2)
    errors_BL2[hidden_BL] = summarise(posterior, both, at_A, tokens_BL.flatten()[at_A])
    return (errors_BL2.sum(1) / hidden_BL.sum(1, keepdim=True)).T


# --- what the backbone is given -----------------------------------------------------------------


def readings(kind: str, config: StatesConfig) -> tuple[AtSNR, ...]:
    """Where to look at the converter of a model of a kind, nothing known included."""
    return (
        tuple(AtSNR(snr=gamma) for gamma in (0.0, *config.gammas)) if KINDS[kind].finite_snr else ()
    )


@torch.no_grad()
def reading(
    denoiser: Denoiser, tokens_BL: Tensor, condition: AtSNR, *, seed: int, first_row: int = 0
) -> Reading:
    """What the converter takes the tokens for at an SNR, means over each row: ``[B]`` each."""
    tokens_BL, state = _seen(denoiser, tokens_BL, condition, Draws(seed, first_row, 0))
    z_ND = state.z_BLD.flatten(0, 1)
    read = denoiser.converter.read(z_ND, tokens_BL.flatten(), denoiser.table_VD)
    return Reading(*(value.view(tokens_BL.shape).double().mean(1).cpu() for value in read))
