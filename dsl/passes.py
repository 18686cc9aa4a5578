"""Functions of ``[C, P]`` scores of all tokens, which take gigabytes on a GPU.

Uncompiled, every operation here passes over the whole memory of its arguments and result. A
compiled function reads its arguments once and writes its result once.

Shapes: C positions of a chunk, P padded tokens, Q pieces of R tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsl.narrow import ROWS


def log_sums(scores_CP: Tensor) -> Tensor:
    """``log sum exp``, ``[C]``, joined from pieces of 64 tokens; P is a multiple of 64."""
    positions, tokens = scores_CP.shape
    pieces_CQR = scores_CP.view(positions, tokens // ROWS, ROWS)
    peak_CQ = pieces_CQR.amax(2)
    sum_CQ = (pieces_CQR - peak_CQ[..., None]).exp().sum(2)
    return (peak_CQ + sum_CQ.log()).logsumexp(1)


def softmax(scores_CP: Tensor, log_sum_C: Tensor) -> Tensor:
    """``[C, P]`` softmax in bfloat16, given `log_sums`."""
    return (scores_CP - log_sum_C[:, None]).exp().bfloat16()


def errors(scores_CP: Tensor, log_sum_C: Tensor, tokens_C: Tensor, grad_C: Tensor) -> Tensor:
    """``[C, P]`` gradient of the scores in bfloat16, given that of ``-log softmax`` at the tokens.

    The product is rounded once. ``grad`` rounded by itself, 1/600 for example, would have the same
    relative error at all positions, which would not average out.
    """
    own_CP = torch.arange(scores_CP.shape[1], device=scores_CP.device) == tokens_C[:, None]
    error_CP = (scores_CP - log_sum_C[:, None]).exp() - own_CP.to(scores_CP.dtype)
    return (error_CP * grad_C[:, None]).bfloat16()


def softmax_gradients(
    scores_CP: Tensor, log_sum_C: Tensor, grad_CP: Tensor, mean_C: Tensor
) -> tuple[Tensor, Tensor]:
    """The softmax again, and the gradient of the scores, both ``[C, P]`` in bfloat16.

    ``grad_CP`` is the gradient of the softmax and ``mean_C`` its mean, weighted by the softmax. The
    gradient of a score is weight (grad - mean). Where one token has nearly all the weight the two
    nearly cancel, so they are subtracted before anything is rounded.
    """
    weights_CP = (scores_CP - log_sum_C[:, None]).exp()
    return weights_CP.bfloat16(), (weights_CP * (grad_CP - mean_C[:, None])).bfloat16()


@dataclass(frozen=True)
class Passes:
    """The functions of this module, as they are written or compiled."""

    log_sums: Callable[[Tensor], Tensor] = log_sums
    softmax: Callable[[Tensor, Tensor], Tensor] = softmax
    errors: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = errors
    softmax_gradients: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = (
        softmax_gradients
    )

    def compiled(self) -> "Passes":
        return Passes(**{name: torch.compile(function) for name, function in vars(self).items()})


PLAIN = Passes()
