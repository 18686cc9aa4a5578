"""The configuration of `benchmark`. Its defaults are the sizes that the bars are set at.

Shapes: V tokens, W backbone width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from dsl.denoiser import BackboneShape, Denoiser, DenoiserConfig
from dsl.dit import DiTShape
from pipelines.prepare import BPE, TokenizerFile
from pipelines.verb import RunSettings

Name = Literal["sampler", "train", "converter", "ingest", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Settings whose numbers are all positive."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Counts):
    """The size of the denoiser that is timed. By default DiT small over GPT-2's BPE."""

    backbone: BackboneShape = field(default_factory=DiTShape)
    tokens: int = 50257
    embed_dim: int = 64

    def dsl(self) -> DenoiserConfig:
        """As `finetune` makes it from an MDLM checkpoint."""
        dit = self.backbone.config(self.tokens, causal=False)
        return DenoiserConfig(backbone=dit, embed_dim=self.embed_dim, mask_prior=0.99)

    def mdlm(self) -> DenoiserConfig:
        """As `pretrain` makes it, whose tokens are never at a finite SNR."""
        dit = self.backbone.config(self.tokens, causal=False)
        return DenoiserConfig(backbone=dit, embed_dim=1, mask_prior=1.0, skip=False)


def build(config: DenoiserConfig, device: torch.device) -> Denoiser:
    """A denoiser with random weights.

    No layer is zero, as layers of a fresh network are, and the entropy of its posterior is that of
    a trained one: about 3 nats at V = 50257.
    """
    torch.manual_seed(0)
    with device:
        denoiser = Denoiser(config)
    weight_VW, _ = denoiser.backbone.head
    with torch.no_grad():
        for parameter in denoiser.backbone.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
        weight_VW.normal_(std=4 * weight_VW.shape[1] ** -0.5)
    return denoiser


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(Counts):
    """One call halfway through a budget of `budget` calls, with half of the tokens revealed."""

    rows: int = 1
    length: int = 1024
    budget: int = 1024
    nucleus: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nucleus > 1:
            raise ValueError(f"nucleus must lie in (0, 1], got {self.nucleus}")


@dataclass(frozen=True, kw_only=True)
class StepConfig(Counts):
    """One optimizer step on one microbatch of random tokens."""

    rows: int = 4
    length: int = 256


@dataclass(frozen=True, kw_only=True)
class EvidenceConfig(Counts):
    """The converter alone, on tokens that are all at a finite SNR."""

    positions: int = 1024


@dataclass(frozen=True, kw_only=True)
class IngestConfig(Counts):
    """What is read and prepared: shards of `rows` random rows, and `megabytes` of the text of
    `source`, which is repeated if it is shorter."""

    rows: int = 16_384
    length: int = 1024
    source: str = "cpython"
    text_field: str = "text"
    megabytes: int = 32
    vocabulary: BPE | TokenizerFile = field(default_factory=BPE)


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(Counts):
    """`texts` of 1 to `max_tokens` tokens, and the size of the GPT-2 with random weights that reads
    them. Our featurizer reads `batch` texts at a time."""

    width: int = 768
    blocks: int = 12
    heads: int = 12
    texts: int = 32
    max_tokens: int = 256
    batch: int = 8


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(RunSettings, Counts):
    """Which benchmarks run (`only`), the rounds that each procedure is timed for, and the threads
    of the CPU (None: torch's choice). `filled` is the step by which a GPU's utilisation is judged.
    """

    name: str = "benchmark"
    only: tuple[Name, ...] = ("sampler", "train", "converter")
    rounds: int = 5
    threads: int | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    train: StepConfig = field(default_factory=StepConfig)
    filled: StepConfig = field(default_factory=lambda: StepConfig(rows=64, length=1024))
    converter: EvidenceConfig = field(default_factory=EvidenceConfig)
    ingest: IngestConfig = field(default_factory=IngestConfig)
    evaluate: FeaturesConfig = field(default_factory=FeaturesConfig)

    def __post_init__(self) -> None:
        RunSettings.__post_init__(self)
        Counts.__post_init__(self)
        if not self.only:
            raise ValueError("only must name at least one benchmark")
