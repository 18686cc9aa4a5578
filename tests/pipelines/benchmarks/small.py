"""A benchmark so small that all of it takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsl.denoiser import Denoiser, DenoiserConfig
from dsl.dit import DiTShape
from infra import config
from pipelines.benchmarks import settings
from pipelines.benchmarks.settings import BenchmarkConfig, ModelConfig

MODEL = ModelConfig(
    backbone=DiTShape(width=16, blocks=1, heads=2, cond_dim=4), tokens=40, embed_dim=8
)
SIZES = (
    "rounds=2", "model.backbone.width=16", "model.backbone.blocks=1", "model.backbone.heads=2",
    "model.backbone.cond_dim=4", "model.tokens=40", "model.embed_dim=8",
    "sampler.length=16", "sampler.budget=16", "train.rows=2", "train.length=16",
    "converter.positions=8", "ingest.rows=512", "ingest.length=16",
    "ingest.megabytes=1", "evaluate.width=16", "evaluate.blocks=1", "evaluate.heads=2",
    "evaluate.texts=4", "evaluate.max_tokens=12", "evaluate.batch=2",
    "tracking.uri=http://127.0.0.1:9",  # nothing answers there
)  # fmt: skip


def benchmark(*argv: str) -> BenchmarkConfig:
    return config.load(
        BenchmarkConfig, verb="benchmark", argv=[*SIZES, *argv], presets=Path("nowhere")
    )


def denoiser(of: DenoiserConfig) -> Denoiser:
    return settings.build(of, torch.device("cpu"))


def by_key(rows: Any) -> dict[str, Any]:
    return {row["key"]: row for row in rows}


def in_this_process(procedure: Callable[..., object], *arguments: Any) -> float:
    """In place of `measure.peak_gib`, which starts a process for each procedure."""
    procedure(*arguments)
    return 1.0
