"""What SNR a training row sees: endpoints, a spread of finite SNR, or some rows of each.

Every `sample` returns ``gamma_BL`` in [0, inf], float32, on the generator's device. Each row by
itself has exactly the law that its class states. Draws of one number per row are stratified over
the rows of a call: the mean loss of a batch stays unbiased, with less variance. `shares` are
expected shares of all tokens.

Shapes: B rows, L positions.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dsl.paths.grids import Information


class Shares(NamedTuple):
    """Of all tokens, in [0, 1]: ``predicted`` ones, which are not revealed, and those with
    ``evidence``, at a finite SNR above 0."""

    predicted: float
    evidence: float


EVIDENCE = Shares(1.0, 1.0)


def stratified(rows: int, generator: torch.Generator) -> Tensor:
    """``[B]`` float64, each uniform on [0, 1), together one point per interval of length 1/B."""
    device = generator.device
    shift = torch.rand((), generator=generator, dtype=torch.float64, device=device)
    return (shift + torch.arange(rows, dtype=torch.float64, device=device) / rows) % 1


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Roar:
    """The endpoint branch (000 §4.5): k ~ U{0..L-1} positions revealed, the rest masked.

    The defaults are the atomic endpoints {0, inf}, which is what endpoint samplers feed. The
    smoothed endpoints of 004 fig. 4 give every masked position its own U(0, ``gamma_min``) and
    every revealed one its own U(``c * gamma_max``, ``gamma_max``); 100 is the finite
    ``gamma_max`` of the papers.

    Raises:
        ValueError: unless 0 <= gamma_min < inf, 0 < c <= 1 and gamma_min < gamma_max <= inf.
    """

    kind: Literal["roar"] = "roar"
    gamma_min: float = 0.0
    c: float = 1.0
    gamma_max: float = math.inf

    def __post_init__(self) -> None:
        _require(0 <= self.gamma_min < math.inf, "gamma_min", self.gamma_min, "in [0, inf)")
        _require(0 < self.c <= 1, "c", self.c, "in (0, 1]")
        _require(self.gamma_max > self.gamma_min, "gamma_max", self.gamma_max, "above gamma_min")

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Tensor:
        """``gamma_BL``; the revealed positions of a row are a uniformly random subset."""
        device = generator.device
        revealed_B1 = (length * stratified(rows, generator)).long()[:, None]
        order_BL, uniform_BL = torch.rand(
            (2, rows, length), generator=generator, dtype=torch.float64, device=device
        )
        high_BL = self.gamma_max * (self.c + (1 - self.c) * uniform_BL)
        low_BL = self.gamma_min * uniform_BL
        return torch.where(order_BL.argsort(-1) < revealed_B1, high_BL, low_BL).float()

    def shares(self, length: int) -> Shares:
        """On rows of ``length`` tokens."""
        low = (length + 1) / (2 * length)
        finite = math.isfinite(self.gamma_max)
        evidence = low * (self.gamma_min > 0) + (1 - low) * finite
        return Shares(1.0 if finite else low, evidence)


@dataclass(frozen=True, kw_only=True)
class LogNormal:
    """The continuous branch (003 C.2): log gamma ~ N(mu, sigma²), one draw per sequence or token.

    ``gamma_max`` clamps the upper tail. The defaults suit a table of D = 64 on OpenWebText.

    Raises:
        ValueError: unless mu is finite, 0 <= sigma < inf, gamma_max > 0 and ``per`` is known.
    """

    kind: Literal["lognormal"] = "lognormal"
    mu: float = 2.69
    sigma: float = 1.41
    per: Literal["sequence", "token"] = "sequence"
    gamma_max: float = math.inf

    def __post_init__(self) -> None:
        _require(math.isfinite(self.mu), "mu", self.mu, "finite")
        _require(0 <= self.sigma < math.inf, "sigma", self.sigma, "in [0, inf)")
        _require(self.per in ("sequence", "token"), "per", self.per, "'sequence' or 'token'")
        _require(self.gamma_max > 0, "gamma_max", self.gamma_max, "above 0")

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Tensor:
        """``gamma_BL``; constant along L when drawn per sequence."""
        quantile_BL = (
            stratified(rows, generator)[:, None].expand(rows, length)
            if self.per == "sequence"
            else torch.rand(
                (rows, length), generator=generator, dtype=torch.float64, device=generator.device
            )
        )
        normal_BL: Tensor = torch.special.ndtri(quantile_BL)
        return (self.mu + self.sigma * normal_BL).exp().clamp(max=self.gamma_max).float()

    def shares(self, length: int) -> Shares:
        return EVIDENCE


@dataclass(frozen=True, kw_only=True)
class InformationUniform:
    """The continuous branch without free parameters: SNRs at equal steps of nats (003 eq. 3).

    ``profile`` is the measured ``1/2 ∫ E dgamma`` of a denoiser. Each row draws a share uniform on
    [0, 1). All its tokens get the SNR below which that share of the nats up to ``gamma_max`` lies.

    Raises:
        ValueError: ``gamma_max`` is not above 0, or the profile ends below it.
    """

    profile: Information
    gamma_max: float
    kind: Literal["information"] = "information"

    def __post_init__(self) -> None:
        _require(self.gamma_max > 0, "gamma_max", self.gamma_max, "above 0")
        self.profile.gamma(1.0, self.gamma_max)

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Tensor:
        """``gamma_BL``; constant along L."""
        shares = stratified(rows, generator).tolist()
        gamma = [self.profile.gamma(share, self.gamma_max) for share in shares]
        return torch.tensor(gamma, device=generator.device)[:, None].expand(rows, length)

    def shares(self, length: int) -> Shares:
        return EVIDENCE


Continuous = LogNormal | InformationUniform


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """Both branches (000 §4.5): each row is a ROAR row with probability ``roar_share``.

    Raises:
        ValueError: unless 0 <= roar_share <= 1.
    """

    kind: Literal["mixed"] = "mixed"
    roar: Roar = field(default_factory=Roar)
    continuous: Continuous = field(default_factory=LogNormal)
    roar_share: float = 0.25

    def __post_init__(self) -> None:
        _require(0 <= self.roar_share <= 1, "roar_share", self.roar_share, "in [0, 1]")

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Tensor:
        """``gamma_BL``; the number of ROAR rows is within one of ``B * roar_share``.

        The branches' losses differ severalfold, so a number that varied freely between batches
        would be most of their variance.
        """
        device = generator.device
        rounding = torch.rand((), generator=generator, dtype=torch.float64, device=device)
        roar_rows = math.floor(rows * self.roar_share + rounding.item())
        gamma_BL = torch.cat(
            [
                self.roar.sample(roar_rows, length, generator),
                self.continuous.sample(rows - roar_rows, length, generator),
            ]
        )
        return gamma_BL[torch.randperm(rows, generator=generator, device=device)]

    def shares(self, length: int) -> Shares:
        """On rows of ``length`` tokens."""
        both = zip(self.roar.shares(length), self.continuous.shares(length), strict=True)
        return Shares(*(self.roar_share * a + (1 - self.roar_share) * b for a, b in both))


Support = Roar | LogNormal | InformationUniform | Mixed
