"""Recorders watch a sample being made (004 figure 2). Each serves one call of `dsl.sample`.

Lists hold one number per step of the path; shares are of the tokens that are not frozen.

Shapes: B rows, L positions, T steps, N unrevealed positions.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsl.paths.clock import Clock
from dsl.posterior import Posterior
from dsl.state import State, flat
from dsl.truncation import Nucleus


def _lists(*names: str) -> dict[str, list[float]]:
    return {name: [] for name in names}


def _share(part_BL: Tensor, whole_BL: Tensor) -> float:
    """The share of the whole that is in the part; 0 of an empty whole."""
    return int((part_BL & whole_BL).sum()) / max(int(whole_BL.sum()), 1)


@dataclass(kw_only=True)
class Schedule:
    """Masking and reveal schedule: the shares ``masked``, ``evidence`` and ``revealed`` that each
    step leaves (they sum to 1 unless all is frozen), and ``reveals``, the share that it revealed.
    """

    name: str = "schedule"
    _seen: dict[str, list[float]] = field(
        init=False, default_factory=lambda: _lists("masked", "evidence", "revealed", "reveals")
    )

    def observe(self, clock: Clock, before: State, posterior: Posterior, after: State) -> None:
        now = after.host
        shares = {
            "masked": now.masked_BL,
            "evidence": now.evidence_BL,
            "revealed": now.revealed_BL,
            "reveals": now.revealed_BL & ~before.host.revealed_BL,
        }
        for name, part_BL in shares.items():
            self._seen[name].append(_share(part_BL, ~now.frozen_BL))

    def result(self) -> dict[str, list[float]]:
        return self._seen


@dataclass(kw_only=True)
class Rewrites:
    """How many tokens a path masks again, and how many change by it.

    At each step, ``remasked`` is the share of revealed tokens whose SNR falls below infinity, and
    ``rewritten`` the share of all tokens that are revealed as another token than the last time, or
    than the one revealed at the start (soft evidence has no token to differ from).
    ``rewrites_per_token`` is the sum of ``rewritten``.
    """

    name: str = "rewrites"
    _last_BL: Tensor | None = field(init=False, default=None)
    _remasked: list[float] = field(init=False, default_factory=list)
    _rewritten: list[float] = field(init=False, default_factory=list)

    def observe(self, clock: Clock, before: State, posterior: Posterior, after: State) -> None:
        if self._last_BL is None:
            self._last_BL = before.tokens_BL.masked_fill(~before.revealed_BL, -1)
        shown_BL = before.revealed_BL & ~before.frozen_BL
        self._remasked.append(_share(~after.revealed_BL, shown_BL))
        fresh_BL = after.revealed_BL & ~before.revealed_BL
        other_BL = fresh_BL & (self._last_BL >= 0) & (self._last_BL != after.tokens_BL)
        self._rewritten.append(_share(other_BL, ~after.frozen_BL))
        self._last_BL = torch.where(fresh_BL, after.tokens_BL, self._last_BL)

    def result(self) -> dict[str, Any]:
        return {
            "remasked": self._remasked,
            "rewritten": self._rewritten,
            "rewrites_per_token": math.fsum(self._rewritten),
        }


@dataclass(kw_only=True)
class Sharpening:
    """How sure the posterior is of unrevealed tokens: means over them of ``max_prob``, of
    ``nucleus_size`` (how many of the likeliest tokens reach ``top_p``) and of ``entropy`` in nats.

    NaN for a step that starts with everything revealed. This recorder reads the posterior at every
    step, so a step that would have cost no denoiser call may now cost one.

    Raises:
        ValueError: ``top_p`` lies outside (0, 1].
    """

    top_p: float = 0.9
    name: str = "sharpening"
    _seen: dict[str, list[float]] = field(
        init=False, default_factory=lambda: _lists("max_prob", "nucleus_size", "entropy")
    )

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")

    def observe(self, clock: Clock, before: State, posterior: Posterior, after: State) -> None:
        at_N = flat(~before.host.revealed_BL)
        if len(at_N) == 0:
            for values in self._seen.values():
                values.append(math.nan)
            return
        found_N3 = posterior.summarise(partial(_sharpness, p=self.top_p), at_N)
        for values, value in zip(self._seen.values(), found_N3.mean(0).tolist(), strict=True):
            values.append(value)

    def result(self) -> dict[str, list[float]]:
        return self._seen


@dataclass(kw_only=True)
class Trajectory:
    """Every state on the way: ``gamma_TBL`` and ``tokens_TBL``, T + 1 of each with the start,
    on the CPU. Tokens are ids where revealed and 0 elsewhere."""

    name: str = "trajectory"
    _states: list[tuple[Tensor, Tensor]] = field(init=False, default_factory=list)

    def observe(self, clock: Clock, before: State, posterior: Posterior, after: State) -> None:
        for state in (before, after) if not self._states else (after,):
            self._states.append((state.gamma_BL.cpu(), state.tokens_BL.cpu()))

    def result(self) -> dict[str, Tensor]:
        gamma, tokens = zip(*self._states, strict=True)
        return {"gamma_TBL": torch.stack(gamma), "tokens_TBL": torch.stack(tokens)}


def _sharpness(log_probs_NV: Tensor, p: float) -> Tensor:
    """What `Sharpening` records, ``[N, 3]`` float64: all of one answer of the costly head."""
    entropy_N = torch.special.entr(log_probs_NV.exp()).sum(1)
    columns = max_prob(log_probs_NV), nucleus_size(log_probs_NV, p), entropy_N
    return torch.stack([column_N.double() for column_N in columns], dim=1)


def max_prob(log_probs_NV: Tensor) -> Tensor:
    """Probability of the likeliest token, in [1/V, 1]."""
    return log_probs_NV.amax(1).exp()


def nucleus_size(log_probs_NV: Tensor, p: float) -> Tensor:
    """How many of the likeliest tokens together reach probability ``p``, in [1, V]."""
    return Nucleus(p=p).kept(log_probs_NV).size_N1.squeeze(1)
