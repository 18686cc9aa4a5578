"""What is asked of a model: the likelihood of held-out rows, its error state by state, and texts.

Every draw is keyed by (seed, row): no figure depends on how rows were batched.

Shapes: B rows of a batch, N rows, L positions, V tokens, A asked positions (flat, in [0, B·L)).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsl import likelihood
from dsl.denoiser import Denoiser
from dsl.evidence import evidence
from dsl.likelihood import Estimate, PathName
from dsl.noise import Draws, Stream
from dsl.paths import AnyPath, Hybrid, SecondOrder, SentenceSDE, TokenSDE
from dsl.paths.defaults import LEFT_TO_RIGHT, choose
from dsl.posterior import Posterior
from dsl.sampling import sample
from dsl.state import State
from dsl.summary import log_prob_of, summarise
from dsl.truncation import Truncated
from pipelines.generate import Nucleus

CONTINUOUS = (SentenceSDE, TokenSDE, SecondOrder)


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """How long to look at `rows` held-out rows.

    `samples`: denoiser calls for the bound at the endpoints. `steps`: calls for each integral
    over SNR. The path integral goes to `gamma_max` along each of the `contours`: the exact
    posterior gives one number on all of them, so their spread says how far a model is from being
    one. The hybrid bound is taken at every `gamma_star`: choose the best with `split=validation`
    and report that one, not the minimum, on the test split.
    """

    rows: int = 256
    samples: int = 16
    steps: int = 32
    gamma_max: float = 100.0
    gamma_star: tuple[float, ...] = (100.0,)
    contours: tuple[PathName, ...] = ("diffusion",)

    def __post_init__(self) -> None:
        for name, least in (("rows", 2), ("samples", 2), ("steps", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for gamma in (self.gamma_max, *self.gamma_star):
            if not 0 < gamma < math.inf:
                raise ValueError(f"gamma_max and gamma_star must be positive, got {gamma}")


@dataclass(frozen=True, kw_only=True)
class StatesConfig:
    """Where the error is measured: at these shares of tokens revealed (the rest masked), and with
    every token at one of these SNRs."""

    revealed: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 0.9)
    gammas: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

    def __post_init__(self) -> None:
        if not all(0 <= share < 1 for share in self.revealed):
            raise ValueError(f"revealed holds shares in [0, 1), got {list(self.revealed)}")
        if not all(0 < gamma < math.inf for gamma in self.gammas):
            raise ValueError(f"gammas holds positive, finite SNRs, got {list(self.gammas)}")


@dataclass(frozen=True, kw_only=True)
class PathConfig:
    """A path, and the budgets in denoiser calls to walk it with.

    No budgets: the one that `generate` would take, which is the sum of a hybrid's split and one
    call a token for any other path.
    """

    path: AnyPath
    budgets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for budget in self.budgets:
            if budget < 1:
                raise ValueError(f"budgets must be at least one call, got {budget}")
            choose(self.path, budget, length=1, causal=False)  # refuses another sum than the split

    def calls(self, length: int) -> tuple[int, ...]:
        """The budgets for texts of ``length`` tokens."""
        return self.budgets or choose(self.path, None, length=length, causal=False)[1:]


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """`rows` texts for each model, path and budget, at one temperature and nucleus for all."""

    rows: int = 256
    temperature: float = 1.0
    nucleus: Nucleus = field(default_factory=Nucleus)

    def __post_init__(self) -> None:
        if self.rows < 2:
            raise ValueError(f"rows must be at least 2, got {self.rows}")
        self.sharpen(None)  # refuses what lies outside its range, before a model is loaded

    def sharpen(self, denoiser: Denoiser | None) -> Truncated:
        return Truncated(denoiser, self.temperature, self.nucleus.p, self.nucleus.convention)


# --- likelihood --------------------------------------------------------------------------------


class View(NamedTuple):
    """One way to a likelihood; ``measure`` takes a denoiser, rows, and the first row's number."""

    name: str
    meaning: str
    measure: Callable[[Denoiser, Tensor, int], Estimate]


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

    return View(f"hybrid_bound_{gamma_star:g}", f"upper bound, to SNR {gamma_star:g}", measure)


def views(kind: str, config: LikelihoodConfig, seed: int) -> tuple[View, ...]:
    """The likelihoods that a model of a kind has."""
    by_kind: Mapping[str, tuple[View, ...]] = {
        "ar": (exact(),),
        "mdlm": (endpoints(config, seed),),
        "dsl": (
            endpoints(config, seed),
            *(integral(config, seed, contour) for contour in config.contours),
            *(hybrid(config, seed, gamma_star) for gamma_star in config.gamma_star),
        ),
    }
    return by_kind[kind]


def nats(view: View, denoiser: Denoiser, tokens_NL: Tensor, *, batch: int) -> np.ndarray:
    """Nats per token of each row, ``[N]``."""
    parts = [
        view.measure(denoiser, tokens_NL[rows], rows.start).mean_B
        for rows in spans(len(tokens_NL), batch)
    ]
    return torch.cat(parts).numpy()


# --- the error, state by state -----------------------------------------------------------------


class Errors(NamedTuple):
    """Per unrevealed token of each row, ``[N]``: cross-entropy in nats, ``|x - x_hat|²``."""

    nats_N: np.ndarray
    squared_N: np.ndarray


def errors_revealed(
    denoiser: Denoiser, tokens_NL: Tensor, share: float, *, seed: int, batch: int
) -> Errors:
    """With ``share`` of each row's tokens revealed, at random, and the others masked."""

    def gamma(rows: int, length: int, draws: Draws) -> Tensor:
        rank_BL = draws.uniform(rows, length, Stream.PATH).argsort(1).argsort(1)
        return torch.where(rank_BL < int(share * length), torch.inf, 0.0)

    return _errors(denoiser, tokens_NL, gamma, seed, batch)


def errors_at(
    denoiser: Denoiser, tokens_NL: Tensor, gamma: float, *, seed: int, batch: int
) -> Errors:
    """With every token at SNR ``gamma``: the second is E(gamma) of 003 eq. 3."""

    def constant(rows: int, length: int, draws: Draws) -> Tensor:
        return torch.full((rows, length), gamma)

    return _errors(denoiser, tokens_NL, constant, seed, batch)


@torch.no_grad()
def _errors(
    denoiser: Denoiser,
    tokens_NL: Tensor,
    gamma: Callable[[int, int, Draws], Tensor],
    seed: int,
    batch: int,
) -> Errors:
    parts = []
    for rows in spans(len(tokens_NL), batch):
        table_VD = denoiser.table_VD
        tokens_BL = tokens_NL[rows].to(table_VD.device)
        draws = Draws(seed, rows.start, 0)
        state = evidence(table_VD, tokens_BL, gamma(*tokens_BL.shape, draws), draws)
        parts.append(_errors_of(denoiser(state), tokens_BL, ~state.revealed_BL))
    nats_N, squared_N = torch.cat(parts, dim=1).double().cpu().numpy()
    return Errors(nats_N, squared_N)


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


# --- texts -------------------------------------------------------------------------------------


class Texts(NamedTuple):
    """Sampled rows and what they cost; ``calls`` of the batch that took most."""

    tokens_NL: np.ndarray
    calls: int
    seconds: float


def draw(
    denoiser: Denoiser,
    path: AnyPath,
    *,
    budget: int,
    length: int,
    config: SamplesConfig,
    seed: int,
    batch: int,
) -> Texts:
    """``config.rows`` texts from nothing, along a path."""
    sharpened = config.sharpen(denoiser)
    began, tokens, calls = time.perf_counter(), [], 0
    for rows in spans(config.rows, batch):
        state = State.masked(rows.stop - rows.start, length, denoiser.config.embed_dim)
        drawn = sample(sharpened, path, state, budget=budget, seed=seed, first_row=rows.start)
        tokens.append(drawn.tokens_BL.cpu())
        calls = max(calls, drawn.calls)
    return Texts(torch.cat(tokens).numpy(), calls, time.perf_counter() - began)


def refusal(kind: str, path: AnyPath, budget: int, length: int) -> str | None:
    """Why a model of this kind cannot walk a path; None where it can."""
    return REFUSALS[kind](path, budget, length)


def _of_mdlm(path: AnyPath, budget: int, length: int) -> str | None:
    stages: list[AnyPath] = [path]
    if isinstance(path, Hybrid):
        stages = [
            s for s, calls in zip((path.first, path.second), path.split, strict=True) if calls
        ]
    if any(isinstance(stage, CONTINUOUS) for stage in stages):
        return "mdlm was not trained on finite SNR"
    return None


def _of_ar(path: AnyPath, budget: int, length: int) -> str | None:
    if path == LEFT_TO_RIGHT and budget >= length:
        return None
    return f"ar takes order left_to_right and {length} calls, nothing else"


REFUSALS: Mapping[str, Callable[[AnyPath, int, int], str | None]] = {
    "dsl": lambda path, budget, length: None,
    "mdlm": _of_mdlm,
    "ar": _of_ar,
}


def spans(rows: int, batch: int) -> Iterator[slice]:
    """Rows in batches, the last of which may be smaller."""
    return (slice(first, min(first + batch, rows)) for first in range(0, rows, batch))
