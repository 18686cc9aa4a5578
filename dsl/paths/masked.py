"""Masked diffusion: tokens jump from gamma 0 to infinity and stay (MDLM ancestral sampling).

Shapes: B rows, L positions.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dsl.paths.clock import Clock
from dsl.posterior import Posterior
from dsl.state import State

# Share of tokens revealed at a time in [0, 1]; from 0 to 1, increasing.
ALPHA: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        "linear": lambda time: time,
        "cosine": lambda time: 1 - math.cos(math.pi / 2 * time),
    }
)


def require_alpha(alpha: str) -> None:
    """ValueError unless there is such a schedule."""
    if alpha not in ALPHA:
        raise ValueError(f"alpha must be one of {', '.join(ALPHA)}, got {alpha!r}")


@dataclass(frozen=True, kw_only=True)
class Masked:
    """Reveal each unrevealed token with probability ``(alpha' - alpha) / (1 - alpha)``.

    Tokens that are not revealed keep their SNR: masked ones stay masked, soft evidence stays as
    it is. The path does not read the posterior, so logits are computed only where tokens are drawn.
    """

    alpha: Literal["linear", "cosine"] = "linear"
    kind: Literal["masked"] = "masked"

    finite_snr: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_alpha(self.alpha)

    def init(self, state: State) -> None:
        return None

    def target(
        self, state: State, posterior: Posterior, carry: None, clock: Clock
    ) -> tuple[Tensor, None]:
        now, later = ALPHA[self.alpha](clock.now), ALPHA[self.alpha](clock.next)
        gamma_BL = state.host.gamma_BL
        reveal_BL = clock.uniform_like(gamma_BL) < (later - now) / (1 - now)
        return gamma_BL.masked_fill(reveal_BL, torch.inf), None
