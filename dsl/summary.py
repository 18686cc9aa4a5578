"""What a posterior says, one number a position, without ever holding positions x vocabulary.

Shapes: N asked positions (flat, in [0, B·L)), V tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dsl.posterior import Posterior, spans


def summarise(
    posterior: Posterior, function: Callable[..., Tensor], at_N: Tensor, *with_N: Tensor
) -> Tensor:
    """``function(log_probs_NV, *with_N)`` at flat positions ``at_N``, a bounded chunk at a time.

    Anything in ``with_N`` is cut along with the positions; what the function answers for the
    chunks is joined along its first dimension.
    """
    answers = []
    # At least one chunk: the answer for no positions has a dtype and a device too.
    for span in spans(max(len(at_N), 1), len(posterior.table_VD)):
        at, *rest = (column_N[span] for column_N in (at_N, *with_N))
        answers.append(function(posterior.log_probs_at(at), *rest))
    return torch.cat(answers)


def log_prob_of(log_probs_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """``log p`` of one token per position."""
    return log_probs_NV.gather(1, tokens_N[:, None]).squeeze(1)


def max_prob(log_probs_NV: Tensor) -> Tensor:
    """Probability of the likeliest token, in [1/V, 1]."""
    return log_probs_NV.amax(1).exp()


def nucleus_size(log_probs_NV: Tensor, p: float) -> Tensor:
    """How many of the likeliest tokens together reach probability ``p``, in [1, V]."""
    cumulative_NV = log_probs_NV.exp().sort(1, descending=True).values.cumsum(1)
    # One token more than fall short of p, unless rounding keeps all V of them short of it.
    size_N: Tensor = 1 + (cumulative_NV[:, :-1] < p).sum(1)
    return size_N
