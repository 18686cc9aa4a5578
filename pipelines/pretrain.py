"""Train a baseline: a masked-diffusion model to fine-tune, or an autoregressive one to judge.

python pipelines/pretrain.py quickstart
python pipelines/pretrain.py owt objective=ar name=owt-ar workers.count=8 workers.gpu=true
python pipelines/pretrain.py owt init=runs/owt-mdlm name=owt-mdlm-longer train.steps=10000

`init` is any address that finetune's takes: the weights of a model of the same kind, to be trained
further with a fresh optimizer, as fine-tuning does.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from dsl.converter import ConverterConfig
from dsl.denoiser import BackboneShape, Denoiser, DenoiserConfig
from dsl.dit import DiTShape
from dsl.vocabulary import Vocabulary
from infra import tracking
from infra.errors import ConfigError
from infra.shards import Manifest, read_manifest
from pipelines import models, runs, verb
from pipelines.kinds import MDLM, PRETRAINED, ModelKind
from pipelines.models import SCRATCH, Model
from pipelines.training.launch import TrainingTask, plan
from pipelines.training.settings import RunConfig


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """`objective` decides the loss, and with it whether attention is causal.

    `mdlm_flat` is `mdlm` without the bound's weights: quicker at small batches (see
    `dsl.objective.MDLMObjective`). `backbone` is that of `init: scratch`; any other `init` brings
    its own, dropout included, and what is said here must agree with it.
    """

    init: str = SCRATCH
    objective: Literal[tuple(PRETRAINED)] = MDLM.name
    backbone: BackboneShape | None = None


# Of a checkpoint of the public code, whose table and converter come to nothing here.
HARD = ConverterConfig(embed_dim=1, mask_prior=1.0, skip=False)


def kind(config: PretrainConfig) -> ModelKind:
    """What the weights are trained for."""
    return PRETRAINED[config.objective]


def untrained(config: PretrainConfig, tokens: int) -> Denoiser:
    """The network of `scratch`, the same for the same seed.

    Its table and converter take no part in these objectives: the mask is hard, and no token is
    ever at a finite SNR.
    """
    torch.manual_seed(config.train.stream.seed)
    shape = config.backbone or DiTShape()
    backbone = shape.config(tokens, causal=kind(config).causal)
    return Denoiser(DenoiserConfig(backbone=backbone, **vars(HARD)))


def initial(config: PretrainConfig, manifest: Manifest, vocabulary: Vocabulary) -> Denoiser:
    """The denoiser that training starts from.

    Raises DataError where `init` speaks another vocabulary, ConfigError where it is of another
    kind.
    """
    if config.init == SCRATCH:
        return untrained(config, vocabulary.size)
    model = _given(config)
    models.require_same(model, vocabulary, "init")
    if model.kind != kind(config).name:
        made = kind(config).name
        why = f"{config.init} was trained as {model.kind}, and this objective makes {made}"
        raise ConfigError("init", why, "Give a model of the same kind, or another objective")
    return model.denoiser


def _given(config: PretrainConfig) -> Model:
    uri = tracking.locate(config.tracking, config.root)
    return models.load(config.init, converter=HARD, tracking_uri=uri, backbone=config.backbone)


def dry_run(config: PretrainConfig) -> dict[str, Any]:
    if config.init != SCRATCH:
        return plan(config, _given(config).denoiser)
    tokens = read_manifest(config.data).vocabulary.size
    with torch.device("meta"):
        return plan(config, untrained(config, tokens))


def execute(config: PretrainConfig) -> dict[str, Any]:
    task = TrainingTask(
        verb="pretrain",
        config=config,
        kind=kind(config).name,
        objective=kind(config).objectives[config.objective],
        initial=partial(initial, config),
        tags={} if config.init == SCRATCH else {"parent_model": config.init},
    )
    return runs.carry_out(task)


def main() -> int:
    return verb.run("pretrain", PretrainConfig, plan=dry_run, execute=execute, doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
