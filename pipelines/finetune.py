"""Turn a masked-diffusion model into a denoiser for every SNR, and register it.

    python pipelines/finetune.py quickstart
    python pipelines/finetune.py owt init=s3://bucket/mdlm-owt workers.count=2 workers.gpu=true

`init` is an MDLM checkpoint (a Hugging Face folder or a Lightning file), a run directory, a model
folder, `models:/name@alias`, or `scratch`. A model that already has a trained table and converter
keeps them; any other gets fresh ones as `converter` says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from dsl.converter import ConverterConfig
from dsl.denoiser import Denoiser, DenoiserConfig
from dsl.objective import DSLObjective
from dsl.support import Mixed, Support
from dsl.vocabulary import Vocabulary
from infra.errors import ConfigError
from pipelines import models, runs, verb
from pipelines.kinds import DSL, KINDS
from pipelines.models import SCRATCH
from pipelines.training.launch import TrainingTask, given, plan, scratch
from pipelines.training.settings import RunConfig, TrainingConfig
from pipelines.training.worker import Assignment


@dataclass(frozen=True, kw_only=True)
class Recipe(TrainingConfig):
    """`support` is what SNR the training rows see. `freeze_table` trains all but the table, whose
    related rows long training can pull together."""

    support: Support = field(default_factory=Mixed)
    converter: ConverterConfig = field(default_factory=ConverterConfig)
    freeze_table: bool = False


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Recipe, RunConfig):
    """A recipe, and the run that follows it."""


def initial(config: FinetuneConfig, vocabulary: Vocabulary) -> Denoiser:
    """The denoiser that training starts from, the same for the same seed.

    Raises DataError where `init` speaks another vocabulary, ConfigError where it is causal.
    """
    if config.init == SCRATCH:
        return scratch(config, config.converter, vocabulary.size, causal=False)
    torch.manual_seed(config.train.stream.seed)
    model = given(config, config.converter)
    models.require_same(model, vocabulary, "init")
    if KINDS[model.kind].causal:
        raise ConfigError("init", f"{config.init} is autoregressive", "Give a masked model")
    if KINDS[model.kind].finite_snr:
        return model.denoiser
    backbone = model.denoiser.backbone
    whole = DenoiserConfig(backbone=model.denoiser.config.backbone, **vars(config.converter))
    return Denoiser(whole, backbone)


def objective(denoiser: Denoiser, *, recipe: Recipe) -> DSLObjective:
    """The loss of a recipe, with what it freezes."""
    denoiser.table.requires_grad_(not recipe.freeze_table)
    return DSLObjective(denoiser, recipe.support)


def dry_run(config: FinetuneConfig) -> dict[str, Any]:
    return plan(config, config.converter, partial(objective, recipe=config), causal=False)


def execute(
    config: FinetuneConfig,
    *,
    parent: str | None = None,
    start: Callable[[Assignment], None] | None = None,
) -> dict[str, Any]:
    """Train. parent: id of the MLflow run to show this one under. start: as TrainingTask has it."""
    task = TrainingTask(
        verb="finetune",
        config=config,
        kind=DSL.name,
        objective=partial(objective, recipe=config),
        initial=partial(initial, config),
        tags={"parent_model": config.init},
        parent=parent,
        start=start,
    )
    return runs.carry_out(task)


def main() -> int:
    return verb.run("finetune", FinetuneConfig, plan=dry_run, execute=execute, doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
