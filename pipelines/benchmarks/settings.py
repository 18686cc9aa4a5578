"""The configuration of `benchmark`. Its defaults are the sizes that the bars are set at.

Shapes: V tokens, W backbone width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

import torch

from dsl.denoiser import BackboneShape, Denoiser, DenoiserConfig
from dsl.dit import DiTShape
from infra.tracking import TrackingConfig
from pipelines.prepare import BPE, File

Name = Literal["sampler", "train", "converter", "ingest", "startup", "evaluate", "paper"]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Settings whose numbers are all positive."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Counts):
    """The denoiser that is timed, with random weights. By default DiT small over GPT-2's BPE."""

    backbone: BackboneShape = field(default_factory=DiTShape)
    tokens: int = 50257
    embed_dim: int = 64

    def dsl(self) -> DenoiserConfig:
        """As `finetune` makes it from an MDLM checkpoint."""
        dit = self.backbone.config(self.tokens, causal=False)
        return DenoiserConfig(backbone=dit, embed_dim=self.embed_dim, mask_prior=0.99)

    def mdlm(self) -> DenoiserConfig:
        """As `pretrain` makes it: no token is ever at a finite SNR."""
        dit = self.backbone.config(self.tokens, causal=False)
        return DenoiserConfig(backbone=dit, embed_dim=1, mask_prior=1.0, skip=False)


def build(config: DenoiserConfig, device: torch.device) -> Denoiser:
    """A denoiser that is not the identity, as a fresh one is, and whose posterior is about as
    sharp as a trained one's: some 3 nats at V = 50257."""
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
    """One call in the middle of a run of `budget` calls, half of the tokens revealed."""

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
    """Shards of random tokens: `rows` of them, and four times as many; a synthetic manifest of
    `shards` files; and `megabytes` of the text of `source`, repeated if need be, to tokenize."""

    rows: int = 16_384
    length: int = 1024
    shards: int = 10_000
    source: str = "cpython"
    text_field: str = "text"
    megabytes: int = 32
    vocabulary: BPE | File = field(default_factory=BPE)


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(Counts):
    """Texts of 1 to `max_tokens` tokens for a GPT-2 of this size with random weights, `batch` at
    a time in our featurizer."""

    width: int = 768
    blocks: int = 12
    heads: int = 12
    texts: int = 32
    max_tokens: int = 256
    batch: int = 8


@dataclass(frozen=True, kw_only=True)
class PaperConfig(Counts):
    """What is assumed of `gpus` GPUs: an H100 each, eight to a node and its NVLink, the network
    and one object store between the nodes.

    `latency_us` is one hop of a ring. `rows` of `length` tokens are on a GPU at a time, `lanes` of
    them to an optimizer step. `store_gbytes` is what the store takes and gives, of one node.
    """

    gpus: tuple[int, ...] = (1, 8, 64, 1024)
    tflops: float = 989.0
    mfu: float = 0.4
    nvlink_gbytes: float = 450.0
    network_gbits: float = 400.0
    latency_us: float = 2.0
    store_gbytes: float = 2.0
    rows: int = 8
    lanes: int = 1
    length: int = 1024
    checkpoint_every: int = 500
    trials: int = 64
    trial_steps: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gpus or min(self.gpus) < 1:
            raise ValueError(f"gpus are numbers of GPUs, got {list(self.gpus)}")
        if self.mfu > 1:
            raise ValueError(f"mfu is a share, got {self.mfu}")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(Counts):
    """`only` these benchmarks, each procedure timed in `rounds` rounds.

    `threads` of the CPU; None leaves torch's choice.
    """

    name: str = "benchmark"
    root: str = "runs"
    existing: Literal["resume", "restart"] = "resume"
    only: tuple[Name, ...] = ("sampler", "train", "converter", "startup", "paper")
    rounds: int = 5
    threads: int | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    train: StepConfig = field(default_factory=StepConfig)
    converter: EvidenceConfig = field(default_factory=EvidenceConfig)
    ingest: IngestConfig = field(default_factory=IngestConfig)
    evaluate: FeaturesConfig = field(default_factory=FeaturesConfig)
    paper: PaperConfig = field(default_factory=PaperConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise ValueError(f"name must be letters, digits, _ . - only, got {self.name!r}")
        if not self.only:
            raise ValueError("only must name at least one benchmark")
        super().__post_init__()
