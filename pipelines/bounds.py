"""Upper bounds on one number, -log P of held-out text in nats per token.

Training losses of different supports are means over different SNRs and cannot be compared; these
can: they use the same rows and the same noise, and bound the same number. Each looks at the states
that one family of samplers visits. The endpoint bound never sees finite SNR, and the hybrid bound
never sees masked and revealed tokens side by side. A model for both is judged by their mean, which
is an upper bound too. Which kind of model has which bound is said in `pipelines.kinds`.

Shapes: B rows, L positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from dsl import likelihood
from dsl.denoiser import Denoiser

SEED = 0  # of the noise, which is the same for every run

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
