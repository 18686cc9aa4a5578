"""Three views of one number: -log P(text), in nats per token.

Every estimate is a sum of independent terms, each unbiased for its own part, so it comes with a
standard error. Noise is keyed by (seed, row, step): a row's estimate is the same in any batch.

Shapes: B rows, L positions, V tokens, D table dimension, N asked positions (flat, in [0, B·L)),
G SNRs of a profile, T terms of an estimate.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from dsl.channel import observe
from dsl.denoiser import Denoiser
from dsl.noise import Draws, Stream
from dsl.objective import cross_entropy
from dsl.paths.grids import Grid, Information, named
from dsl.posterior import Denoises, Posterior
from dsl.state import flat, send, token_ids

PathName = Literal["diffusion", "left_to_right", "random_order", "staggered"]


@dataclass(frozen=True)
class Estimate:
    """Nats per token of each row, and the standard error of this estimate; both ``[B]`` float64.

    In expectation, the square of the standard error is the variance or more: it includes
    differences between the terms that are no noise.
    """

    mean_B: Tensor
    stderr_B: Tensor

    def corpus(self) -> tuple[float, float]:
        """Mean over rows of equal length, and its standard error as an estimate for all text
        like these rows (NaN for a single row). The latter includes ``stderr_B``.

        Raises:
            ValueError: there are no rows.
        """
        rows = len(self.mean_B)
        if rows == 0:
            raise ValueError("there is no mean of no rows: give at least one text")
        spread = self.mean_B.std().item() if rows > 1 else math.nan
        return self.mean_B.mean().item(), spread / math.sqrt(rows)


def perplexity(nats_per_token: float) -> float:
    """``exp`` of nats per token; infinite where that overflows."""
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf


@torch.no_grad()
def path_integral(
    denoiser: Denoises,
    tokens_BL: Tensor,
    *,
    gamma_max: float,
    steps: int,
    seed: int,
    path: PathName = "diffusion",
    grid: Grid | Literal["linear", "log"] = "log",
    first_row: int = 0,
) -> Estimate:
    """``1/2 ∫ E · dgamma`` from 0 to ``gamma_max`` for every token (003 eq. 3).

    For the exact posterior every path gives the same number. It falls short of -log P(x) by
    ``-E log P(x | z)`` at ``gamma_max`` (003 eq. 12), so it is an estimate from below and no
    bound; `hybrid_bound` adds what is missing. For a network, the spread between paths tells how
    far its errors are from those of any joint law.

    Args:
        steps: denoiser calls, at least 2: one at a random point of each of the ``steps`` pieces
            of the path, so the sum has no discretisation error.
        path: how SNR rises. "diffusion": all tokens together; "left_to_right" and
            "random_order": one token after the other, as autoregressive models do (003 eq. 4);
            "staggered": every token in a random stretch of its own. What is random is drawn anew
            for every call, which keeps the terms independent.
        grid: where the pieces of a token's rise end. Pieces of equal nats have the least
            variance, which is `Information` of a measured profile; a `Quantile` grid samples SNR
            from a log-normal.

    Raises:
        ValueError: ``gamma_max`` is not positive and finite or does not fit the grid, ``steps`` is
            below 2, ``path`` or ``grid`` has no such name, or the texts are not
            `dsl.state.token_ids`.
    """
    _require_finite_snr("gamma_max", gamma_max)
    _require_two("steps", steps)
    table_VD = denoiser.table_VD
    tokens_BL = token_ids(tokens_BL, table_VD)
    rows, length = tokens_BL.shape
    if path not in _PATHS:
        raise ValueError(f"path must be one of {', '.join(_PATHS)}, got {path!r}")
    knots = [named(grid).gamma(step / steps, gamma_max) for step in range(steps + 1)]
    knots_K = torch.tensor(knots, dtype=torch.float64)
    terms = []
    for step in range(steps):
        draws = Draws(seed, first_row, step)
        window = _PATHS[path](rows, length, Draws(seed, first_row, steps + step))
        low_BL, high_BL = (_risen(knots_K, time / steps, *window) for time in (step, step + 1))
        along_B1 = draws.uniform(rows, 1, Stream.PATH)
        rise_BL = high_BL - low_BL
        state = observe(table_VD, tokens_BL, low_BL + along_B1 * rise_BL, draws)
        error_BL = _squared_error(denoiser(state), tokens_BL, rise_BL > 0)
        terms.append((error_BL * send(rise_BL, error_BL.device)).sum(1) / 2)
    return _sum(terms, length)


@torch.no_grad()
def hybrid_bound(
    denoiser: Denoises,
    tokens_BL: Tensor,
    *,
    gamma_star: float,
    steps: int,
    seed: int,
    grid: Grid | Literal["linear", "log"] = "log",
    first_row: int = 0,
) -> Estimate:
    """The path integral to ``gamma_star`` plus ``-E sum_i log q(x_i | z)`` there (003 eq. 5, 13).

    An upper bound on -log P(x), in expectation over texts. The last term is factorised and so
    exceeds the joint one by the total correlation that is left at ``gamma_star``: the less is left,
    the tighter the bound. Costs ``2 * steps`` denoiser calls. Choose ``gamma_star`` on validation
    text, never per example.

    Raises:
        ValueError: as `path_integral`, of ``gamma_star``.
    """
    _require_finite_snr("gamma_star", gamma_star)
    integral = path_integral(
        denoiser,
        tokens_BL,
        gamma_max=gamma_star,
        steps=steps,
        seed=seed,
        grid=grid,
        first_row=first_row,
    )
    table_VD = denoiser.table_VD
    tokens_BL = token_ids(tokens_BL, table_VD)
    gamma_BL = torch.full(tokens_BL.shape, gamma_star, dtype=torch.float64)
    everywhere_BL = torch.ones(tokens_BL.shape, dtype=torch.bool)
    terms = []
    for step in range(steps):
        # The noise of the integral is keyed by the steps below `steps`.
        state = observe(table_VD, tokens_BL, gamma_BL, Draws(seed, first_row, steps + 1 + step))
        terms.append(_nats(denoiser(state), tokens_BL, everywhere_BL).sum(1) / steps)
    rest = _sum(terms, tokens_BL.shape[1])
    return Estimate(integral.mean_B + rest.mean_B, integral.stderr_B.hypot(rest.stderr_B))


@torch.no_grad()
def roar(
    denoiser: Denoises, tokens_BL: Tensor, *, samples: int, seed: int, first_row: int = 0
) -> Estimate:
    """``-E log P(s_i | s_A)``: k ~ U{0..L-1}, A a random subset of size k, i outside A (000 §4.4).

    Exact in expectation where the conditionals are exact. For a network, an upper bound of the
    model that draws tokens in random order. All i outside A are used at once. One denoiser call per
    sample. The samples of a row spread their k evenly over its range.

    Raises:
        ValueError: ``samples`` is below 2, the backbone is causal, or the texts are not
            `dsl.state.token_ids`.
    """
    _require_two("samples", samples)
    if isinstance(denoiser, Denoiser) and denoiser.config.backbone.causal:
        raise ValueError("the backbone is causal, so it has seen no masked tokens; use ar")
    table_VD = denoiser.table_VD
    tokens_BL = token_ids(tokens_BL, table_VD)
    rows, length = tokens_BL.shape
    terms = []
    for step in range(samples):
        draws = Draws(seed, first_row, step)
        uniform = draws.uniform(rows, length + 1, Stream.PATH)
        size_B1 = ((step + uniform[:, -1:]) / samples * length).long()
        hidden_BL = _ranks(uniform[:, :length]) >= size_B1
        gamma_BL = torch.where(hidden_BL, 0.0, torch.inf)
        state = observe(table_VD, tokens_BL, gamma_BL, draws)
        nats_BL = _nats(denoiser(state), tokens_BL, hidden_BL)
        nats_B = nats_BL.sum(1) / send(hidden_BL.sum(1), nats_BL.device)
        terms.append(nats_B * length / samples)
    return _sum(terms, length)


@torch.no_grad()
def ar(denoiser: Denoiser, tokens_BL: Tensor) -> Estimate:
    """``-log P(text)`` of a causal denoiser, exact, in one call.

    Raises:
        ValueError: the backbone is not causal, or the texts are not `dsl.state.token_ids`.
    """
    if not denoiser.config.backbone.causal:
        raise ValueError(
            "the backbone is not causal, so one call does not give every p(s_i | s_<i); use roar, "
            "path_integral or hybrid_bound"
        )
    table_VD = denoiser.table_VD
    tokens_BL = token_ids(tokens_BL, table_VD)
    revealed_BL = torch.full(tokens_BL.shape, torch.inf)
    state = observe(table_VD, tokens_BL, revealed_BL, Draws(0, 0, 0))
    at_N = torch.arange(tokens_BL.numel())
    _, nats_N = cross_entropy(denoiser, state, tokens_BL, at_N)
    mean_B = nats_N.double().view(tokens_BL.shape).mean(1).cpu()
    return Estimate(mean_B, torch.zeros_like(mean_B))


@dataclass(frozen=True)
class Profile:
    """``E(gamma)``, the mean squared error per token by SNR, in [0, 4]; ``[G, B]`` by row."""

    gammas: tuple[float, ...]
    error_GB: Tensor

    @property
    def mean_G(self) -> Tensor:
        return self.error_GB.mean(1)

    def information(self) -> Information:
        """The grid of equal nats: ``1/2 E`` integrated by trapezoids (003 eq. 3).

        For the exact posterior E falls with SNR, so rises, which are noise, are levelled first.
        """
        error = _falling(self.mean_G.tolist())
        # Never exactly 0, even where measured so: the grid's nats must increase to the end. With no
        # error anywhere, equal steps of nats are equal steps of SNR.
        floor = 1e-6 * error[0] or 1.0
        error = [max(value, floor) for value in error]
        nats = [0.0]
        for (low, high), (left, right) in zip(pairwise(self.gammas), pairwise(error), strict=True):
            nats.append(nats[-1] + (high - low) * (left + right) / 4)
        return Information(gammas=self.gammas, nats=tuple(nats))


@torch.no_grad()
def profile(
    denoiser: Denoises, tokens_BL: Tensor, gammas: Sequence[float], *, seed: int, first_row: int = 0
) -> Profile:
    """The error field on the diffusion path, measured at ``gammas``: one denoiser call each.

    Raises:
        ValueError: ``gammas`` do not increase from 0, are not finite, or are fewer than two; or
            the texts are not `dsl.state.token_ids`, or there are none.
    """
    rises = all(low < high for low, high in pairwise(gammas))  # not so beside a NaN
    if len(gammas) < 2 or gammas[0] != 0 or not rises or math.isinf(gammas[-1]):
        raise ValueError(
            f"gammas must be at least two, finite and increase from 0, got {list(gammas)}"
        )
    table_VD = denoiser.table_VD
    tokens_BL = token_ids(tokens_BL, table_VD)
    if len(tokens_BL) == 0:
        raise ValueError("there is no profile of no rows: give at least one text")
    everywhere_BL = torch.ones(tokens_BL.shape, dtype=torch.bool)
    errors = []
    for step, gamma in enumerate(gammas):
        gamma_BL = torch.full(tokens_BL.shape, gamma, dtype=torch.float64)
        state = observe(table_VD, tokens_BL, gamma_BL, Draws(seed, first_row, step))
        errors.append(_squared_error(denoiser(state), tokens_BL, everywhere_BL).mean(1))
    return Profile(tuple(gammas), torch.stack(errors).cpu())


def _diffusion(rows: int, length: int, draws: Draws) -> tuple[Tensor, Tensor]:
    start_BL = torch.zeros(rows, length, dtype=torch.float64)
    return start_BL, start_BL + 1


def _left_to_right(rows: int, length: int, draws: Draws) -> tuple[Tensor, Tensor]:
    rank_BL = torch.arange(length, dtype=torch.float64).expand(rows, -1)
    return rank_BL / length, (rank_BL + 1) / length


def _random_order(rows: int, length: int, draws: Draws) -> tuple[Tensor, Tensor]:
    rank_BL = _ranks(draws.uniform(rows, length, Stream.PATH)).double()
    return rank_BL / length, (rank_BL + 1) / length


def _staggered(rows: int, length: int, draws: Draws) -> tuple[Tensor, Tensor]:
    start_BL, span_BL = draws.uniform(rows, 2 * length, Stream.PATH).chunk(2, dim=1)
    span_BL = (1 + span_BL) / 4
    start_BL = start_BL * (1 - span_BL)
    return start_BL, start_BL + span_BL


# When each token's SNR begins and ends its rise, in [0, 1].
_PATHS: Mapping[str, Callable[[int, int, Draws], tuple[Tensor, Tensor]]] = MappingProxyType(
    {
        "diffusion": _diffusion,
        "left_to_right": _left_to_right,
        "random_order": _random_order,
        "staggered": _staggered,
    }
)


def _risen(knots_K: Tensor, time: float, start_BL: Tensor, stop_BL: Tensor) -> Tensor:
    """SNR ``[B, L]`` at a time in [0, 1], float64 on the CPU, of tokens that rise through all knots
    between their own start and stop, linearly between two."""
    pieces = len(knots_K) - 1
    share_BL = ((time - start_BL) / (stop_BL - start_BL)).clamp(0, 1) * pieces
    piece_BL = share_BL.long().clamp_max(pieces - 1)
    return knots_K[piece_BL].lerp(knots_K[piece_BL + 1], share_BL - piece_BL)


def _require_finite_snr(name: str, gamma: float) -> None:
    if not 0 < gamma < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {gamma}")


def _require_two(name: str, terms: int) -> None:
    if terms < 2:
        raise ValueError(f"{name} must be at least 2, got {terms}: one term has no standard error")


def _ranks(keys_BL: Tensor) -> Tensor:
    return keys_BL.argsort(1).argsort(1)


def _squared_error(posterior: Posterior, tokens_BL: Tensor, at_BL: Tensor) -> Tensor:
    """``|x - x_hat|²`` at ``at_BL`` and 0 elsewhere, ``[B, L]`` float64."""
    at_N = flat(at_BL)
    there_N = send(at_N, tokens_BL.device)
    x_ND = posterior.table_VD[tokens_BL.flatten()[there_N]]
    error_BL = torch.zeros(tokens_BL.shape, dtype=torch.float64, device=tokens_BL.device)
    error_N = (x_ND - posterior.mean_at(at_N)).double().square().sum(1)
    error_BL.view(-1)[there_N] = error_N
    return error_BL


def _nats(posterior: Posterior, tokens_BL: Tensor, at_BL: Tensor) -> Tensor:
    """``-log p(token | state)`` at ``at_BL`` and 0 elsewhere, ``[B, L]`` float64."""
    at_N = flat(at_BL)
    there_N = send(at_N, tokens_BL.device)
    tokens_N = tokens_BL.flatten()[there_N]
    nats_BL = torch.zeros(tokens_BL.shape, dtype=torch.float64, device=tokens_BL.device)
    nats_BL.view(-1)[there_N] = -posterior.summarise(log_prob_of, at_N, tokens_N).double()
    return nats_BL


def log_prob_of(log_probs_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """``log p`` of one token per position."""
    return log_probs_NV.gather(1, tokens_N[:, None]).squeeze(1)


def _sum(terms: Sequence[Tensor], length: int) -> Estimate:
    """The sum of independent terms ``[B]`` over neighbouring parts of a path, per token.

    Each part is sampled once, so its variance is estimated from the difference between neighbours.
    In expectation, half the square of a difference is the mean of the two variances, plus half the
    squared difference of the two expectations. The last term and the first count as neighbours, so
    that every variance counts once.
    """
    terms_TB = torch.stack(list(terms))
    around_TB = torch.cat([terms_TB, terms_TB[:1]])
    variance_B = around_TB.diff(dim=0).square().sum(0) / 2
    return Estimate((terms_TB.sum(0) / length).cpu(), (variance_B.sqrt() / length).cpu())


def _falling(values: list[float]) -> list[float]:
    """The closest non-increasing sequence in least squares (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] < mean:
            before, size = pools.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]
