"""Masked diffusion that may take a token back (ReMDM, arXiv 2503.00307; 000 §4.8).

Shapes: B rows, L positions, N positions revealed by the last call.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from dsl.paths.clock import Clock
from dsl.paths.masked import ALPHA, require_alpha
from dsl.posterior import Posterior
from dsl.state import State, flat, send

# The chance that a token is masked again: one for all, or [B, L] in float64.
Chance = float | Tensor


class Step(NamedTuple):
    """One call as a rule sees it: the share revealed goes from ``now`` to ``later``."""

    now: float
    later: float
    eta: float
    doubt_BL: Tensor | None = None  # minus the probability a token had; -inf if not to be masked

    @property
    def most(self) -> float:
        """``sigma_max``: more re-masking than this could not be made up for by reveals."""
        return min(1.0, (1 - self.later) / self.now) if self.now > 0 else 1.0


def cap(step: Step) -> Chance:
    return min(step.eta, step.most)


def rescale(step: Step) -> Chance:
    return step.eta * step.most


def conf(step: Step) -> Chance:
    """``sigma_max`` shared out over a row, most to the tokens that were least sure."""
    assert step.doubt_BL is not None
    # A row with nothing to mask is 0/0 here: none of it is masked.
    return step.most * step.doubt_BL.softmax(1).nan_to_num(0.0)


def loop(step: Step) -> Chance:
    return min(step.eta, step.most) if step.now == step.later else 0.0


def forward_backward(step: Step) -> Chance:
    return min((step.later - step.now) / step.now, step.most) if step.now > 0 else step.most


def loop_shares(now: float, later: float) -> tuple[float, float]:
    """ReMDM-loop's own alpha: up to 0.9, hold while tokens are exchanged, then up to 1.

    A step that starts in one phase and ends in the next follows the first phase throughout, as in
    public ReMDM.
    """
    left = 1 - now
    # Both ramps have slope 2: 0.9 over the first 0.45 of the time, 0.1 over the last 0.05.
    if left > 0.55 + 1e-9:  # 1 - 9/20 is not 11/20 in floating point
        return now * 2.0, min(later * 2.0, 1.0)
    if left > 0.05 + 1e-9:
        return 0.9, 0.9
    return 1 - left * 2.0, 1 - (1 - later) * 2.0


class Rule(NamedTuple):
    """How often to mask again: ``sigma``, its published default ``eta`` (None where it takes none),
    its own schedule (None for that of `Masked`), and whether it needs the confidence of tokens."""

    sigma: Callable[[Step], Chance]
    eta: float | None = None
    shares: Callable[[float, float], tuple[float, float]] | None = None
    reads_confidence: bool = False


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "cap": Rule(cap, eta=0.008),
        "rescale": Rule(rescale, eta=0.015),
        "conf": Rule(conf, reads_confidence=True),
        "loop": Rule(loop, eta=0.02, shares=loop_shares),
        "forward_backward": Rule(forward_backward),
    }
)


class Memory(NamedTuple):
    """What rule ``conf`` remembers: minus each token's probability when it was revealed; which
    tokens were; and the posterior of the last call. The tensors lie on the CPU."""

    doubt_BL: Tensor
    revealed_BL: Tensor
    posterior: Posterior | None

    def update(self, state: State, posterior: Posterior) -> "Memory":
        """Look up the tokens that the last call drew, in the posterior it drew them from.

        Tokens that were there before the first call are looked up in its posterior instead.
        """
        revealed_BL = state.host.revealed_BL & ~state.host.frozen_BL
        at_N = flat(revealed_BL & ~self.revealed_BL)
        doubt_BL = self.doubt_BL.masked_fill(~revealed_BL, -torch.inf)
        if len(at_N):
            source = posterior if self.posterior is None else self.posterior
            tokens_N = state.tokens_BL.flatten()[send(at_N, state.tokens_BL.device)]
            doubt_BL.view(-1)[at_N] = -source.confidence_at(at_N, tokens_N).to(doubt_BL)
        return Memory(doubt_BL, revealed_BL, posterior)


@dataclass(frozen=True, kw_only=True)
class Remask:
    """Mask revealed tokens again with probability sigma, reveal the others that much more often.

    An unrevealed token is revealed with probability ``(alpha' - (1 - sigma) alpha) / (1 - alpha)``.
    With one sigma for all tokens, the expected share of revealed tokens follows the schedule of
    `Masked` (``loop``: its own). Under ``conf`` it lags behind: sigma is 0 at unrevealed tokens, so
    their reveals do not make up for what is masked. The rule defines sigma:

    ====================  ===========================================================
    ``cap``               ``min(eta, sigma_max)``, eta 0.008
    ``rescale``           ``eta sigma_max``, eta 0.015
    ``conf``              ``sigma_max softmax(-p)`` over the revealed tokens of a row, p the
                          probability a token had when it was revealed; tokens given at the
                          start have the confidence of the first posterior (004 fig. 3)
    ``loop``              as ``cap``, eta 0.02, while alpha is 0.9 for half of the calls; else 0
    ``forward_backward``  ``(alpha' - alpha) / alpha``, at most ``sigma_max``
    ====================  ===========================================================

    with ``sigma_max = min(1, (1 - alpha') / alpha)``. ``eta = None`` is the rule's published
    default. With eta 0, ``cap`` and ``rescale`` are `Masked`, draw for draw.

    Raises:
        ValueError: no such rule or alpha, or an eta or alpha that the rule does not take.
    """

    rule: Literal["cap", "rescale", "conf", "loop", "forward_backward"]
    eta: float | None = None
    alpha: Literal["linear", "cosine"] = "linear"
    kind: Literal["remask"] = "remask"

    finite_snr: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        require_alpha(self.alpha)
        rule = RULES[self.rule]
        if self.eta is not None and rule.eta is None:
            raise ValueError(f"rule {self.rule!r} has no eta; leave it out")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"eta is a probability, got {self.eta}")
        if rule.shares is not None and self.alpha != "linear":
            raise ValueError(f"rule {self.rule!r} has a schedule of its own; leave alpha out")

    def init(self, state: State) -> Memory | None:
        if not RULES[self.rule].reads_confidence:
            return None
        doubt_BL = torch.full_like(state.host.gamma_BL, -torch.inf, dtype=torch.float64)
        return Memory(doubt_BL, torch.zeros_like(state.host.frozen_BL), None)

    def target(
        self, state: State, posterior: Posterior, carry: Memory | None, clock: Clock
    ) -> tuple[Tensor, Memory | None]:
        if carry is not None:
            carry = carry.update(state, posterior)
        reveal, remask = self.chances(clock, None if carry is None else carry.doubt_BL)
        gamma_BL, revealed_BL = state.host.gamma_BL, state.host.revealed_BL
        uniform_BL = clock.uniform_like(gamma_BL)
        gamma_BL = gamma_BL.masked_fill(~revealed_BL & (uniform_BL < reveal), torch.inf)
        return gamma_BL.masked_fill(revealed_BL & (uniform_BL < remask), 0), carry

    def chances(self, clock: Clock, doubt_BL: Tensor | None = None) -> tuple[Chance, Chance]:
        """Chance of an unrevealed token to be revealed, and of a revealed one to be masked."""
        rule, alpha = RULES[self.rule], ALPHA[self.alpha]
        if rule.shares is None:
            now, later = alpha(clock.now), alpha(clock.next)
        else:
            now, later = rule.shares(clock.now, clock.next)
        eta = self.eta if self.eta is not None else rule.eta
        sigma = rule.sigma(Step(now, later, 0.0 if eta is None else eta, doubt_BL))
        return (later - (1 - sigma) * now) / (1 - now), sigma
