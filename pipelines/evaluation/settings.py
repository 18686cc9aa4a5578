"""The configuration of `evaluate`, section by section."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from dsl.denoiser import Denoiser
from dsl.likelihood import PathName
from dsl.truncation import Nucleus, Truncated, require_temperature
from infra.pool import PoolConfig
from pipelines.evaluation.cells import PathConfig
from pipelines.evaluation.features import AnyFeaturizer
from pipelines.evaluation.gate import GateConfig
from pipelines.evaluation.judge import AnyJudge
from pipelines.evaluation.mauve import LEAST, MauveConfig
from pipelines.evaluation.published import Published
from pipelines.models import ConverterConfig
from pipelines.verb import TrackingConfig

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
# What stands beside the models: independent tokens, held-out text, and more of it to compare with.
UNIGRAM, REAL, REFERENCES = "unigram", "real", "references"
CHAMPION = "champion"


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


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """`rows` texts for each model, path and budget, at one temperature and nucleus for all.

    `repeats`: all of it so many times, with other noise, for the spread of what is measured on
    texts as a whole. `traced` of them are also watched step by step.
    """

    rows: int = 256
    repeats: int = 1
    traced: int = 16
    temperature: float = 1.0
    nucleus: Nucleus = field(default_factory=Nucleus)

    def __post_init__(self) -> None:
        for name, least in (("rows", 2), ("repeats", 1), ("traced", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        require_temperature(self.temperature)

    def sharpen(self, denoiser: Denoiser, nucleus: Nucleus | None) -> Truncated:
        nucleus = nucleus or self.nucleus
        return Truncated(denoiser, self.temperature, nucleus.p, nucleus.convention)


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What is asked of models, whichever they are; `paths` go by names of your choice.

    At most `corpus_rows` rows of the training split say which words there are and how frequent
    tokens are. `batch` rows at a time share a denoiser call, and are what a kill can lose. `mauve`
    and `judge` are left out where they are not given.
    """

    paths: dict[str, PathConfig] = field(default_factory=dict)
    split: Literal["validation", "test"] = "test"
    seed: int = 0
    batch: int = 64
    corpus_rows: int = 20_000
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    states: StatesConfig = field(default_factory=StatesConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    mauve: MauveConfig | None = None
    judge: AnyJudge | None = None
    workers: PoolConfig = field(default_factory=PoolConfig)

    def __post_init__(self) -> None:
        require_names(self.paths)
        for name in ("batch", "corpus_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must lie in [0, 2^64), got {self.seed}")
        if self.mauve and self.samples.rows < LEAST:
            raise ValueError(
                f"MAUVE says nothing below {LEAST} texts, and samples.rows is {self.samples.rows}; "
                "raise it or leave mauve out"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Questions):
    """`models` go by names of your choice; every model walks every path it can.

    `data` are the shards of `prepare`. `gate` is left out where it is not given.
    """

    name: str
    data: str
    models: dict[str, str]
    root: str = "runs"
    existing: Literal["resume", "restart"] = "resume"
    gate: GateConfig | None = None
    published: tuple[Published, ...] = ()
    converter: ConverterConfig = field(default_factory=ConverterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_names([self.name, *self.models])
        if not self.models:
            raise ValueError("models must name at least one model")
        if taken := self.models.keys() & {UNIGRAM, REAL, REFERENCES, CHAMPION}:
            raise ValueError(f"no model may be named {min(taken)}: that is a row of its own")
        if self.gate and self.gate.model not in self.models:
            raise ValueError(f"gate.model is {self.gate.model}, which is none of the models")

    @property
    def readers(self) -> tuple[AnyFeaturizer | AnyJudge, ...]:
        """The models that read the texts of the others."""
        featurizer = (self.mauve.featurizer,) if self.mauve else ()
        return featurizer + ((self.judge,) if self.judge else ())


def require_names(names: Iterable[str]) -> None:
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(f"names must be letters, digits, _ . - only, got {name!r}")
