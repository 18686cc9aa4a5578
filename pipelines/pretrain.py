"""Train a baseline: a masked-diffusion model to fine-tune, or an autoregressive one to judge.

    python pipelines/pretrain.py quickstart
    python pipelines/pretrain.py owt objective=ar name=owt-ar register=ar-owt
    python pipelines/pretrain.py owt init=runs/owt-mdlm name=owt-longer register=owt-longer \\
        train.steps=10000

`init` is any address that finetune's takes: the weights of a model of the same kind, to be trained
further with a fresh optimizer, as fine-tuning does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from dsl.converter import ConverterConfig
from dsl.denoiser import Denoiser
from dsl.objective import Objective
from dsl.vocabulary import Vocabulary
from infra.errors import ConfigError
from pipelines import models, runs, verb
from pipelines.kinds import MDLM, PRETRAINED, ModelKind
from pipelines.models import SCRATCH
from pipelines.training.launch import TrainingTask, given, plan, scratch
from pipelines.training.settings import RunConfig


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """`objective` decides the loss, and with it whether attention is causal.

    `mdlm_flat` is `mdlm` without the bound's weights: quicker at small batches (see
    `dsl.objective.MDLMObjective`).
    """

    init: str = SCRATCH
    objective: Literal[tuple(PRETRAINED)] = MDLM.name


# Table and converter take no part in these objectives: the mask is hard, and no token is ever at a
# finite SNR.
HARD = ConverterConfig(embed_dim=1, mask_prior=1.0, skip=False)


def kind(config: PretrainConfig) -> ModelKind:
    """What the weights are trained for."""
    return PRETRAINED[config.objective]


def _objective(config: PretrainConfig) -> Callable[[Denoiser], Objective]:
    return kind(config).objectives[config.objective]


def initial(config: PretrainConfig, vocabulary: Vocabulary) -> Denoiser:
    """The denoiser that training starts from.

    Raises DataError where `init` speaks another vocabulary, ConfigError where it is of another
    kind.
    """
    if config.init == SCRATCH:
        return scratch(config, HARD, vocabulary.size, causal=kind(config).causal)
    model = given(config, HARD)
    models.require_same(model, vocabulary, "init")
    if model.kind != kind(config).name:
        made = kind(config).name
        why = f"{config.init} was trained as {model.kind}, and this objective makes {made}"
        raise ConfigError("init", why, "Give a model of the same kind, or another objective")
    return model.denoiser


def dry_run(config: PretrainConfig) -> dict[str, Any]:
    return plan(config, HARD, _objective(config), causal=kind(config).causal)


def execute(config: PretrainConfig) -> dict[str, Any]:
    task = TrainingTask(
        verb="pretrain",
        config=config,
        kind=kind(config).name,
        objective=_objective(config),
        initial=partial(initial, config),
        tags={} if config.init == SCRATCH else {"parent_model": config.init},
    )
    return runs.carry_out(task)


def main() -> int:
    return verb.run("pretrain", PretrainConfig, plan=dry_run, execute=execute, doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
