"""The kinds of model: what each was trained on, and so what may be asked of it.

One row of `KINDS` is all that the pipelines know of a kind. Its name is written beside the weights
(as `objective`), and is what `pretrain objective=…` is given.

Bounds are upper bounds on one number, -log P of held-out text in nats per token. Training losses of
different supports are means over different SNRs and cannot be compared; these can: they use the
same rows and the same noise, and bound the same number. Each looks at the states that one family
of samplers visits. The endpoint bound never sees finite SNR, and the hybrid bound never sees masked
and revealed tokens side by side. A model for both is judged by their mean, which is an upper bound
too.

Shapes: B rows, L positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from dsl import likelihood
from dsl.denoiser import Denoiser
from dsl.objective import ARObjective, DSLObjective, MDLMObjective, Objective
from dsl.paths import LEFT_TO_RIGHT, AnyPath

SEED = 0  # of the noise of bounds, which is the same for every run

View = Literal["exact", "endpoint_bound", "path_integral", "hybrid_bound", "unmasking"]
# (denoiser, tokens_BL, samples, number of the first row) -> nats per token
Bound = Callable[[Denoiser, Tensor, int, int], float]
Bounds = Mapping[str, Bound]


def endpoint(denoiser: Denoiser, tokens_BL: Tensor, samples: int, first_row: int) -> float:
    """`dsl.likelihood.roar`: one token after the other revealed, in random order (000 §4.4)."""
    estimate = likelihood.roar(denoiser, tokens_BL, samples=samples, seed=SEED, first_row=first_row)
    return estimate.mean_B.mean().item()


def hybrid(denoiser: Denoiser, tokens_BL: Tensor, samples: int, first_row: int) -> float:
    """`dsl.likelihood.hybrid_bound`: all tokens' SNR raised to `gamma_star` (003 eq. 13)."""
    estimate = likelihood.hybrid_bound(
        denoiser,
        tokens_BL,
        gamma_star=gamma_star(denoiser.config.backbone.tokens),
        steps=samples,
        seed=SEED,
        first_row=first_row,
    )
    return estimate.mean_B.mean().item()


def gamma_star(tokens: int) -> float:
    """Where 003 ends its integrals over SNR for a vocabulary: 30 for text8's 35 ids, as ln V."""
    return 30 * math.log(tokens) / math.log(35)


@dataclass(frozen=True, kw_only=True)
class ModelKind:
    """What a model was trained on.

    causal: it sees the tokens before a position and no others; any other kind takes every mixture
        of masked and revealed tokens.
    finite_snr: it was trained on evidence at finite SNR, so its table and converter mean something.
    views: the ways to its likelihood, see `pipelines.evaluation.questions.likelihood`.
    bounds: what validation measures while it is trained. A causal model's loss is -log P itself.
    objectives: the losses that make such a model, by the names that configurations use.
    """

    name: str
    views: tuple[View, ...]
    objectives: Mapping[str, Callable[[Denoiser], Objective]]
    bounds: Bounds = field(default_factory=dict)
    causal: bool = False
    finite_snr: bool = False

    def refusal(self, path: AnyPath, budget: int, length: int) -> str | None:
        """Why such a model cannot walk a path on rows of ``length`` tokens; None where it can."""
        if self.causal and (path != LEFT_TO_RIGHT or budget < length):
            return f"{self.name} takes order left_to_right and {length} calls, nothing else"
        if path.finite_snr and not self.finite_snr:
            return f"{self.name} was not trained on finite SNR"
        return None


MDLM = ModelKind(
    name="mdlm",
    views=("endpoint_bound", "unmasking"),
    objectives={"mdlm": MDLMObjective, "mdlm_flat": partial(MDLMObjective, weighting="flat")},
    bounds={"endpoint_bound": endpoint},
)
AR = ModelKind(name="ar", views=("exact",), objectives={"ar": ARObjective}, causal=True)
DSL = ModelKind(
    name="dsl",
    views=("endpoint_bound", "path_integral", "hybrid_bound", "unmasking"),
    objectives={"dsl": DSLObjective},
    bounds={"endpoint_bound": endpoint, "hybrid_bound": hybrid},
    finite_snr=True,
)

KINDS = MappingProxyType({kind.name: kind for kind in (MDLM, AR, DSL)})
# By the objectives that `pretrain` offers: those of the kinds that need no fine-tuning.
PRETRAINED = MappingProxyType(
    {name: kind for kind in KINDS.values() if not kind.finite_snr for name in kind.objectives}
)
