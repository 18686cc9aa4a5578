"""Train a baseline: a masked-diffusion model to fine-tune, or an autoregressive one to judge.

python pipelines/pretrain.py quickstart
python pipelines/pretrain.py owt objective=ar name=owt-ar workers.count=8 workers.gpu=true
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from dsl.denoiser import Denoiser, DenoiserConfig
from dsl.objective import ARObjective, MDLMObjective
from dsl.vocabulary import Vocabulary
from infra.shards import Manifest, read_manifest
from pipelines import verb
from pipelines.launch import RunConfig, launch, plan
from pipelines.models import BackboneConfig

OBJECTIVES = {
    "mdlm": MDLMObjective,
    "mdlm_flat": partial(MDLMObjective, weighting="flat"),
    "ar": ARObjective,
}


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """`objective` decides the loss, and with it whether attention is causal.

    `mdlm_flat` is `mdlm` without the bound's weights: quicker at small batches (see
    `dsl.objective.MDLMObjective`).
    """

    objective: Literal["mdlm", "mdlm_flat", "ar"] = "mdlm"
    backbone: BackboneConfig = field(default_factory=BackboneConfig)


def denoiser(config: PretrainConfig, tokens: int) -> Denoiser:
    """The untrained network, the same for the same seed.

    Its table and converter take no part in these objectives: the mask is hard, and no token is
    ever at a finite SNR.
    """
    torch.manual_seed(config.train.stream.seed)
    dit = config.backbone.dit(tokens, causal=config.objective == "ar")
    return Denoiser(DenoiserConfig(backbone=dit, embed_dim=1, mask_prior=1.0, skip=False))


def dry_run(config: PretrainConfig) -> dict[str, Any]:
    tokens = read_manifest(config.data).vocabulary.size
    with torch.device("meta"):
        return plan(config, denoiser(config, tokens))


def execute(config: PretrainConfig) -> dict[str, Any]:
    def initial(manifest: Manifest, vocabulary: Vocabulary) -> Denoiser:
        return denoiser(config, vocabulary.size)

    return launch(
        config,
        verb="pretrain",
        kind="ar" if config.objective == "ar" else "mdlm",
        objective=OBJECTIVES[config.objective],
        initial=initial,
        tags={},
    )


def main() -> int:
    return verb.run("pretrain", PretrainConfig, plan=dry_run, execute=execute, doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
