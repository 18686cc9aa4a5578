"""The likelihood of a text under an unmasking sampler: the probability that it draws this text.

A path that reveals every token once, and chooses by the posterior alone where to reveal next, draws
each text in one order. The probability of the text is then the product of the probabilities of its
reveals (arXiv 2603.01367): exactly the sampler's law, neither a bound nor an integral.

Shapes: B rows, L positions, N asked positions (flat, in [0, B·L)), R rows.
"""

import torch
from torch import Tensor

from dsl.likelihood import Estimate, log_prob_of
from dsl.paths import Hybrid, Path, Remask
from dsl.posterior import Denoises, Posterior
from dsl.sampling import sample
from dsl.state import State, send, token_ids


def estimate(
    denoiser: Denoises, tokens_BL: Tensor, path: Path, *, budget: int, seed: int, first_row: int = 0
) -> Estimate:
    """``-log P(text)`` under `dsl.sample` along ``path``, in nats per token.

    Exact where the path is deterministic (`Order` by keys or from left to right, `EntropyBounded`).
    A path that draws its order (`Masked`, `Order("random")`) is a mixture over orders: the order
    that the key (seed, row) draws gives an upper bound in expectation. The standard error is 0 for
    both: it does not count the choice of the order.

    Args:
        tokens_BL: the texts, ids in [0, V).
        budget: denoiser calls, as for `dsl.sample`. Tokens that one call reveals are drawn
            independently, and the probability counts them so.

    Raises:
        ValueError: the path passes through finite SNR, or may hide a token that it has revealed,
            or the texts are not `dsl.state.token_ids`.
    """
    stages = path.stages if isinstance(path, Hybrid) else [path]
    if path.finite_snr:
        raise ValueError("the path passes through finite SNR, whose noise has no likelihood")
    # Refused by its type: a run of it may, but need not, hide a token again.
    if any(isinstance(stage, Remask) for stage in stages):
        raise ValueError("the path may reveal a token twice, so its texts have no single order")
    told = _Told(denoiser, tokens_BL)
    rows, length = tokens_BL.shape
    start = State.masked(rows, length, denoiser.table_VD.shape[1])
    sample(told, path, start, budget=budget, seed=seed, first_row=first_row)
    return Estimate(told.nats_BL.mean(1).cpu(), torch.zeros(rows, dtype=torch.float64))


class _Told:
    """A denoiser whose draws are always the tokens of a given text. It records their nats."""

    def __init__(self, denoiser: Denoises, tokens_BL: Tensor) -> None:
        self.denoiser = denoiser
        self.tokens_BL = token_ids(tokens_BL, denoiser.table_VD)
        # Not zeros_like, which keeps the strides of transposed tokens: it would have no flat view.
        self.nats_BL = torch.zeros(
            tokens_BL.shape, dtype=torch.float64, device=denoiser.table_VD.device
        )
        self.drawn_BL = torch.zeros(tokens_BL.shape, dtype=torch.bool)

    @property
    def table_VD(self) -> Tensor:
        return self.denoiser.table_VD

    def __call__(self, state: State) -> Posterior:
        return _ToldPosterior(self, self.denoiser(state))

    def draw(self, posterior: Posterior, at_N: Tensor) -> Tensor:
        if (posterior.state.host.gamma_BL.flatten()[at_N] != 0).any():
            raise ValueError("the path passes through finite SNR, whose noise has no likelihood")
        if self.drawn_BL.flatten()[at_N].any():
            raise ValueError("the path reveals a token twice, so its texts have no single order")
        there_N = send(at_N, self.tokens_BL.device)
        tokens_N = self.tokens_BL.flatten()[there_N]
        log_probs_N = posterior.summarise(log_prob_of, at_N, tokens_N)
        self.nats_BL.view(-1)[there_N] = -log_probs_N.double()
        self.drawn_BL.view(-1)[at_N] = True
        return tokens_N


class _ToldPosterior(Posterior):
    """A posterior with unchanged probabilities that draws the tokens of a given text."""

    by_row = ("posterior",)

    def __init__(self, told: _Told, posterior: Posterior) -> None:
        super().__init__(posterior.state, posterior.table_VD)
        self.told = told
        self.posterior = posterior

    def _log_probs_unrevealed(self, at_N: Tensor) -> Tensor:
        return self.posterior._log_probs_unrevealed(at_N)

    def _probs_unrevealed(self, at_N: Tensor) -> Tensor:
        return self.posterior._probs_unrevealed(at_N)

    def draw(self, at_N: Tensor, uniform_N: Tensor) -> Tensor:
        return self.told.draw(self.posterior, at_N)
