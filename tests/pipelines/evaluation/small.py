"""Networks and shards so small that an evaluation of them takes seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dsl import DenoiserConfig, DiTConfig
from dsl.denoiser import Denoiser
from dsl.vocabulary import Vocabulary
from pipelines.evaluation import held_out
from pipelines.kinds import KINDS
from pipelines.models import Model

LENGTH = 32


def network(tokens: int, *, causal: bool = False, uniform: bool = False) -> Denoiser:
    """A fresh head is zero, so without the skip its posterior is uniform whatever the state."""
    torch.manual_seed(0)
    backbone = DiTConfig(
        tokens=tokens, width=16, blocks=1, heads=2, cond_dim=8, dropout=0.0, causal=causal
    )
    denoiser = Denoiser(DenoiserConfig(backbone=backbone, embed_dim=8, skip=not uniform))
    if not uniform:
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return denoiser.eval()


def own(kind: str) -> Model:
    """A model of 28 characters, as `pipelines.models.load` answers."""
    denoiser = network(28, causal=KINDS[kind].causal)
    return Model(
        denoiser=denoiser, vocabulary=Vocabulary.char(), kind=kind, length=12, address=kind
    )


def rows_of(world: Path, rows: int) -> np.ndarray:
    """The first rows that an evaluation of the shards in `world` asks about."""
    return held_out.read(
        str(world / "data/shards"), "validation", rows, corpus_rows=100, seed=0
    ).rows_NL
