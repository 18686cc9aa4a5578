"""Temperature and nucleus: they sharpen the posterior, for draws and for x_hat alike.

Shapes: B rows, L positions, V tokens, D table dimension, N asked positions, R rows,
K likeliest tokens.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsl.posterior import Denoises, Posterior
from dsl.state import State, flat

Convention = Literal["keep", "drop"]

# How many likeliest tokens of a row are summed at first: most nuclei hold fewer. More on a GPU,
# because the CPU waits for it after each attempt, to know whether they sufficed.
FIRST = 256
FIRST_ON_GPU = 2048

# Values for which another thread is worth its start.
GRAIN = 2**18

# How many of a row's tokens stay, given the running sums of its probabilities from the likeliest
# down. `keep` (the common rule) keeps the token that crosses p, `drop` (public ReMDM) does not.
CONVENTIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "keep": lambda total_NK, p_N1: torch.searchsorted(total_NK, p_N1) + 1,
        "drop": lambda total_NK, p_N1: torch.searchsorted(total_NK, p_N1, right=True),
    }
)


class Kept(NamedTuple):
    """What a nucleus keeps of each row.

    ``size_N1``: how many of the likeliest tokens, in [1, V]. ``last_N1``: the log-probability of
    the last one kept. ``tied_N``: whether the next token may be as likely. ``ties``: whether any
    row is tied.
    """

    size_N1: Tensor
    last_N1: Tensor
    tied_N: Tensor
    ties: bool


@dataclass(frozen=True, kw_only=True)
class Nucleus:
    """The likeliest tokens of total probability about `p`, in (0, 1]; 1 is all of them.

    convention: whether the token with which the sum passes `p` is kept or dropped.
    """

    p: float = 1.0
    convention: Convention = "keep"

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"nucleus must lie in (0, 1], got {self.p}")
        if self.convention not in CONVENTIONS:
            known = ", ".join(CONVENTIONS)
            raise ValueError(f"convention must be one of {known}, got {self.convention!r}")

    def kept(self, log_probs_NV: Tensor) -> Kept:
        """What stays of each row of ``[N, V]`` log-probabilities."""
        likeliest, tokens = descending(log_probs_NV), log_probs_NV.shape[1]
        most = FIRST_ON_GPU if log_probs_NV.is_cuda else FIRST
        while True:
            most = min(most, tokens)
            sorted_NK = likeliest(most)
            # Fifty thousand float32 terms would blur where the sum crosses p.
            total_NK = sorted_NK.to(torch.float64, copy=True).exp_().cumsum_(-1)
            p_N1 = total_NK.new_full((len(total_NK), 1), self.p)
            size_N1 = CONVENTIONS[self.convention](total_NK, p_N1).clamp_(1, most)
            last_N1 = sorted_NK.gather(1, size_N1 - 1)
            tied_N = (sorted_NK.gather(1, size_N1.clamp_max(most - 1)) == last_N1).squeeze(1)
            # Both at once, because the CPU has to wait for a GPU to tell it.
            short, ties = torch.stack([(total_NK[:, -1] <= self.p).any(), tied_N.any()]).tolist()
            if most == tokens or not short:
                return Kept(size_N1, last_N1, tied_N, ties)
            most *= 8


class Truncated:
    """A denoiser whose every answer is sharpened: at a temperature, then cut to a nucleus.

    What is sharpened is the context's part of an answer, that is, what all other tokens say of
    one. The token's own evidence counts as it is: ``p(v | z) ∝ p(v | z_others) exp(<z_i, x_v>)``
    (003 A.1) becomes ``p'(v | z_others) exp(<z_i, x_v>)``, where p' has the temperature and
    the cut. That is the exact posterior under p'. So, along any path, tokens that are independent
    are drawn from p'. To sharpen the product instead would sharpen the noise in ``z_i`` as well,
    which the sampler itself has drawn. A masked token has no evidence: its answer is all context.
    A network without the skip (see `dsl.converter.ConverterConfig`) may count the evidence wrongly.
    Its context's part is then wrong too, and so are texts drawn through finite SNR.

    The cut leaves the likeliest tokens of total probability about ``nucleus`` (always at least
    one). The result is normalised again.

    Args:
        denoiser: the denoiser to sharpen.
        temperature: in [1e-37, 1e37]; below 1 is sharper.
        nucleus: p in (0, 1]; 1 cuts nothing.
        convention: ``"keep"`` the token with which the sum passes p, or ``"drop"`` it.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(
        self,
        denoiser: Denoises,
        temperature: float = 1.0,
        nucleus: float = 1.0,
        convention: Convention = "keep",
    ) -> None:
        require_temperature(temperature)
        self.denoiser = denoiser
        self.temperature = temperature
        self.nucleus = Nucleus(p=nucleus, convention=convention)

    @property
    def table_VD(self) -> Tensor:
        return self.denoiser.table_VD

    def __call__(self, state: State) -> Posterior:
        posterior = self.denoiser(state)
        if self.temperature == 1 and self.nucleus.p == 1:
            return posterior
        return TruncatedPosterior(self, posterior)

    def cut(self, scores_NV: Tensor) -> Tensor:
        """Log-probabilities ``[N, V]`` after temperature and nucleus, not normalised.

        scores_NV: log-probabilities, of which each row may be off by a constant.
        """
        log_probs_NV = scores_NV.log_softmax(-1)
        if self.temperature != 1:  # at 1e-37, scores that are not normalised would overflow
            log_probs_NV = (log_probs_NV / self.temperature).log_softmax(-1)
        if self.nucleus.p == 1:
            return log_probs_NV
        size_N1, last_N1, tied_N, ties = self.nucleus.kept(log_probs_NV)
        stays_NV = log_probs_NV >= last_N1
        # Of equally likely tokens at the cut, those of lower ids stay, as in a stable sort.
        if ties:
            tied_R = flat(tied_N)
            rows_RV, last_R1 = log_probs_NV[tied_R], last_N1[tied_R]
            likelier_RV, tied_RV = rows_RV > last_R1, rows_RV == last_R1
            room_R1 = size_N1[tied_R] - likelier_RV.sum(-1, keepdim=True)
            stays_NV[tied_R] = likelier_RV | (tied_RV & (tied_RV.cumsum(-1) <= room_R1))
        return torch.where(stays_NV, log_probs_NV, -torch.inf)


def descending(values_NV: Tensor) -> Callable[[int], Tensor]:
    """A function from K to the K largest values of each row, ``[N, K]``, in descending order."""
    if values_NV.device.type == "cpu":
        # numpy's sort is vectorised and keeps no indices: torch's takes ten times as long.
        sorted_NV = values_NV.detach().numpy().copy()
        threads = min(torch.get_num_threads(), 1 + sorted_NV.size // GRAIN)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(partial(np.ndarray.sort, axis=1), np.array_split(sorted_NV, threads)))
        return lambda most: torch.from_numpy(sorted_NV[:, -most:]).flip(1)
    return lambda most: values_NV.topk(most, sorted=True).values


def require_temperature(temperature: float) -> None:
    """ValueError unless float32 can hold it, its inverse, and log-probabilities divided by it."""
    if not 1e-37 <= temperature <= 1e37:
        raise ValueError(
            f"temperature must be positive and finite, within [1e-37, 1e37], got {temperature}"
        )


class TruncatedPosterior(Posterior):
    """A posterior, sharpened at the positions asked for."""

    by_row = ("posterior",)

    def __init__(self, options: Truncated, posterior: Posterior) -> None:
        super().__init__(posterior.state, posterior.table_VD)
        self.options = options
        self.posterior = posterior

    def _log_probs_unrevealed(self, at_N: Tensor) -> Tensor:
        return self._cut(at_N).log_softmax(-1)

    def _probs_unrevealed(self, at_N: Tensor) -> Tensor:
        return self._cut(at_N).softmax(-1)

    def _cut(self, at_N: Tensor) -> Tensor:
        """Sharpened log-probabilities ``[N, V]``, not normalised."""
        scores_NV = self.posterior._scores_unrevealed(at_N)
        if not self.state.host.evidence_BL.any():
            return self.options.cut(scores_NV)
        z_ND = self.state.z_BLD.flatten(0, 1)[at_N].to(scores_NV)
        # Of tokens without evidence z is 0, and so is this: their answer is the same to the last
        # bit as in a batch without evidence.
        own_NV = z_ND @ self.table_VD.to(scores_NV).T
        return self.options.cut(scores_NV - own_NV).add_(own_NV)
