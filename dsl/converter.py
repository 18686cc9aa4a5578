"""From a noisy token to what a transformer can read: a soft mixture of input embeddings.

Shapes: B rows, L positions, D table dimension, V tokens, U = V + 1 slots (the last is [MASK]),
W backbone width, N positions that need a softmax.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsl.posterior import CHUNK_ELEMENTS
from dsl.state import State

# The largest float below one. Its logit, 36.7, gives the mask slot probability 1 exactly in
# float32, yet stays finite: strong evidence can still be heard, and nothing is ever NaN.
HARD_MASK = 1 - 2**-53


class Reading(NamedTuple):
    """What a converter takes tokens for, ``[N]`` each.

    ``entropy_N``: of the weights of its slots, in nats, in [0, log U]; ``mask_N``: the weight of
    [MASK], in [0, 1]: evidence that is not heard; ``token_N``: the weight of the token itself.
    """

    entropy_N: Tensor
    mask_N: Tensor
    token_N: Tensor


class Converter(nn.Module):
    """``m = sum_u softmax_u(beta <z, x_u> + b_u) w_u`` (000 §4.6; 003 eq. 6 and 23).

    The slots are the V tokens and [MASK], whose key is zero. With beta = 1, b the log unigram
    probabilities and the mask slot closed (b = -inf), the weights are exactly the Bayes posterior
    of a token seen alone.

    ``beta`` and all biases train. The token biases start at zero and the mask bias where the
    mask slot has probability ``mask_prior`` at z = 0: it is a start like the others, so evidence
    that a large prior hides at first can be uncovered by training.

    Args:
        beta: starting scale, positive; None is 1/sqrt(D), from which 003 B.1 starts.
        mask_prior: in (0, 1]. At 1 (hard mask) a masked token is the mask row, as in MDLM.
    """

    def __init__(self, tokens: int, dim: int, *, beta: float | None, mask_prior: float) -> None:
        super().__init__()
        # One-element vectors, because FSDP cannot shard a scalar.
        self.beta = nn.Parameter(torch.full((1,), float(dim**-0.5 if beta is None else beta)))
        self.bias_U = nn.Parameter(torch.zeros(tokens + 1))
        with torch.no_grad():
            self.bias_U[-1] = mask_bias(tokens, mask_prior)

    def forward(self, state: State, table_VD: Tensor, values_UW: Tensor) -> Tensor:
        """Backbone inputs ``[B, L, W]``.

        Masked positions share one vector and revealed ones read a row, so only evidence pays for
        the vocabulary, in chunks that the backward pass recomputes: B·L·V never exists.
        """
        at = state.evidence_BL.nonzero(as_tuple=True)
        evidence_ND = state.z_BLD[at]
        # A masked token is z = 0: its mixture rides along as the first row. Being always there,
        # it also gives every parameter a gradient in batches without evidence.
        z_ND = torch.cat([evidence_ND.new_zeros(1, evidence_ND.shape[1]), evidence_ND])
        size = max(1, CHUNK_ELEMENTS // len(values_UW))
        mixed_NW = torch.cat(
            [
                self._mix(z_ND[start : start + size], table_VD, values_UW)
                for start in range(0, len(z_ND), size)
            ]
        )
        inputs_BLW = torch.where(
            state.revealed_BL[..., None], F.embedding(state.tokens_BL, values_UW), mixed_NW[0]
        )
        evidence_NW = mixed_NW[1:].to(inputs_BLW.dtype)
        return inputs_BLW.index_put(at, evidence_NW)

    @torch.no_grad()
    def read(self, z_ND: Tensor, tokens_N: Tensor, table_VD: Tensor) -> Reading:
        """What evidence ``z_ND`` of the tokens ``tokens_N`` is taken for, a chunk at a time."""
        size = max(1, CHUNK_ELEMENTS // len(self.bias_U))
        chunks = zip(torch.split(z_ND, size), torch.split(tokens_N, size), strict=True)
        read = [
            _reading(weights(z_ND, self.beta, self.bias_U, table_VD), tokens_N)
            for z_ND, tokens_N in chunks
        ]
        return Reading(*torch.cat(read, dim=1))

    def _mix(self, z_ND: Tensor, table_VD: Tensor, values_UW: Tensor) -> Tensor:
        arguments = (z_ND, self.beta, self.bias_U, table_VD, values_UW)
        if not torch.is_grad_enabled():
            return mixture(*arguments)
        mixed_NW: Tensor = checkpoint(
            mixture, *arguments, use_reentrant=False, preserve_rng_state=False
        )
        return mixed_NW


def mixture(
    z_ND: Tensor, beta: Tensor, bias_U: Tensor, table_VD: Tensor, values_UW: Tensor
) -> Tensor:
    """Mixtures ``[N, W]``: scores and softmax in the table's precision, values in their own."""
    return weights(z_ND, beta, bias_U, table_VD).to(values_UW.dtype) @ values_UW


def weights(z_ND: Tensor, beta: Tensor, bias_U: Tensor, table_VD: Tensor) -> Tensor:
    """``softmax_u(beta <z, x_u> + b_u)``, ``[N, U]``, in the table's precision."""
    # Scores reach hundreds; bf16 would round them by whole nats.
    with torch.autocast(z_ND.device.type, enabled=False):
        scores_NV = F.linear(beta.to(table_VD) * z_ND.to(table_VD), table_VD)
        weights_NU: Tensor = (F.pad(scores_NV, (0, 1)) + bias_U.to(table_VD)).softmax(-1)
    return weights_NU


def mask_bias(tokens: int, mask_prior: float) -> float:
    """The mask slot's bias that gives it probability ``mask_prior`` beside V biases of zero.

    ``logsumexp(0) + logit(mask_prior)``, in Python floats because 1 - 1e-9 is 1 in float32: log V
    for 1/2, 15.42 for 0.99 and V = 50257.

    Raises:
        ValueError: ``mask_prior`` outside (0, 1].
    """
    if not 0 < mask_prior <= 1:
        raise ValueError(f"mask_prior {mask_prior} must lie in (0, 1]; 1 is a hard mask")
    prior = min(mask_prior, HARD_MASK)
    return math.log(tokens) + math.log(prior) - math.log1p(-prior)


def _reading(weights_NU: Tensor, tokens_N: Tensor) -> Tensor:
    entropy_N = -torch.xlogy(weights_NU, weights_NU).sum(1)
    token_N = weights_NU.gather(1, tokens_N[:, None]).squeeze(1)
    return torch.stack([entropy_N, weights_NU[:, -1], token_N])
