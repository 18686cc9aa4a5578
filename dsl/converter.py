"""From a noisy token to what a transformer can read: a soft mixture of input embeddings.

Shapes: B rows, L positions, D table dimension, V tokens, U = V + 1 slots (the last is [MASK]),
W backbone width, N positions that need a softmax, K = D + 1, P = U padded, A columns of joined
factors.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsl import narrow
from dsl.chunks import spans
from dsl.passes import PLAIN, Passes
from dsl.state import State, send

# The largest float below one. Its logit, 36.7, gives the mask slot probability 1 exactly in
# float32, yet stays finite: strong evidence still outweighs it, and nothing is ever NaN.
HARD_MASK = 1 - 2**-53


@dataclass(frozen=True, kw_only=True)
class ConverterConfig:
    """The token table's dimension and where the converter starts (see `Converter`).

    ``embed_dim`` is D; 003 grows it as 16 ln V / ln 35. The default ``mask_prior`` suits weights
    of a masked model.

    ``skip`` adds each token's own evidence to its logits. The exact posterior is
    ``p(s_i = v | z) ∝ p(s_i = v | z_others) exp(<z_i, x_v>)`` (003 A.1), so the network is left
    with the context and need not learn to copy. A masked token has no evidence: nothing is added.
    A temperature or nucleus on a path through finite SNR relies on the skip (`dsl.truncation`).

    Raises:
        ValueError: ``embed_dim`` below 1, ``beta`` not in (0, inf), ``mask_prior`` not in (0, 1].
    """

    embed_dim: int = 64
    beta: float | None = None
    mask_prior: float = 0.99
    skip: bool = True

    def __post_init__(self) -> None:
        if self.embed_dim < 1:
            raise ValueError(f"embed_dim {self.embed_dim} must be at least 1")
        if self.beta is not None and not 0 < self.beta < math.inf:
            raise ValueError(f"beta {self.beta} must be positive, or None for 1/sqrt(embed_dim)")
        mask_bias(1, self.mask_prior)  # raises outside (0, 1]


class Reading(NamedTuple):
    """What a converter's weights say of given evidence, ``[N]`` each.

    ``entropy_N``: their entropy in nats, in [0, log U]; ``mask_N``: the weight of [MASK], in
    [0, 1], which hides the evidence; ``token_N``: the weight of the true token.
    """

    entropy_N: Tensor
    mask_N: Tensor
    token_N: Tensor


class Converter(nn.Module):
    """``m = sum_u softmax_u(beta <z, x_u> + b_u) w_u`` (000 §4.6; 003 eq. 6 and 23).

    The slots are the V tokens and [MASK], whose key is zero. With beta = 1, b the log unigram
    probabilities and the mask slot closed (b = -1e4; `save` refuses -inf), the weights are exactly
    the Bayes posterior of a token seen alone.

    ``beta`` and all biases train. The token biases start at zero and the mask bias where the
    mask slot has probability ``mask_prior`` at z = 0. It is a starting value: training can
    uncover evidence that a large prior hides at first.

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

    def forward(
        self, state: State, table_VD: Tensor, values_UW: Tensor, passes: Passes = PLAIN
    ) -> Tensor:
        """Backbone inputs ``[B, L, W]``, given the input rows ``[U, W]`` of the slots.

        All masked positions share one mixture, and a revealed one is a row. Only positions with
        evidence need a softmax over the slots. It is made in chunks, and again in the backward
        pass, so nothing of size B·L·V exists.
        """
        found = state.host.evidence_BL.nonzero(as_tuple=True)
        at = tuple(send(index_N, state.z_BLD.device) for index_N in found)
        evidence_ND = state.z_BLD[at]
        # A masked token is z = 0: its mixture is computed as the first row. As it is always there,
        # every parameter has a gradient in batches without evidence too.
        z_ND = torch.cat([evidence_ND.new_zeros(1, evidence_ND.shape[1]), evidence_ND])
        values_UW = in_compute_dtype(values_UW)
        # Without gradients to come, also in forward-mode derivatives, the plain formula will do.
        mix = mixture
        if torch.is_grad_enabled():
            mix = NarrowMixture.apply if values_UW.dtype == torch.bfloat16 else Mixture.apply
        mixed_NW = mix(*self.asked(z_ND, table_VD), values_UW, passes)
        inputs_BLW = torch.where(
            state.revealed_BL[..., None], F.embedding(state.tokens_BL, values_UW), mixed_NW[0]
        )
        evidence_NW = mixed_NW[1:].to(inputs_BLW.dtype)
        return inputs_BLW.index_put(at, evidence_NW)

    def asked(self, z_ND: Tensor, table_VD: Tensor) -> tuple[Tensor, Tensor]:
        """``query_NK, key_UK``, whose `weights` are the converter's for this evidence; K = D + 1.

        In the table's precision: scores reach hundreds, which bfloat16 would round to whole nats.
        """
        query_ND = self.beta.to(table_VD) * z_ND.to(table_VD)
        key_UD = F.pad(table_VD, (0, 0, 0, 1))  # [MASK]'s is zero
        return biased(query_ND, key_UD, self.bias_U)

    @torch.no_grad()
    def read(self, z_ND: Tensor, tokens_N: Tensor, table_VD: Tensor) -> Reading:
        """The weights for evidence ``z_ND`` of the tokens ``tokens_N``, a chunk at a time."""
        query_NK, key_UK = self.asked(z_ND, table_VD)
        read = [
            _reading(weights(query_NK[span], key_UK), tokens_N[span])
            for span in _spans(query_NK, key_UK)
        ]
        return Reading(*torch.cat(read, dim=1))


def biased(query_ND: Tensor, key_UD: Tensor, bias_U: Tensor) -> tuple[Tensor, Tensor]:
    """``[N, D + 1]`` and ``[U, D + 1]``, whose products are ``<query, key_u> + b_u``.

    The bias is a further dimension, in which all queries are 1. To add it separately would cost one
    more pass over N·U numbers.
    """
    return (
        torch.cat([query_ND, query_ND.new_ones(len(query_ND), 1)], dim=1),
        torch.cat([key_UD, bias_U.to(key_UD)[:, None]], dim=1),
    )


def mixture(query_NK: Tensor, key_UK: Tensor, values_UW: Tensor, passes: Passes = PLAIN) -> Tensor:
    """``softmax(query key^T) values``, ``[N, W]``: attention of N positions to U slots.

    Computed in chunks: the weights of only one exist at a time. Scores are as exact as the queries,
    or nearly so where values are in bfloat16 (`dsl.narrow`); the other product has the values'
    dtype.
    """
    with _without_autocast(query_NK):
        if values_UW.dtype == torch.bfloat16:
            return _narrow_mixture(query_NK, key_UK, values_UW, passes)[0].to(values_UW)
        chunks = [
            weights(query_NK[span], key_UK).to(values_UW.dtype) @ values_UW
            for span in _spans(query_NK, key_UK)
        ]
    return torch.cat(chunks)


class Mixture(torch.autograd.Function):
    """`mixture`, whose backward pass computes the weights again, a chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any, query_NK: Tensor, key_UK: Tensor, values_UW: Tensor, _: Passes = PLAIN
    ) -> Tensor:
        ctx.save_for_backward(query_NK, key_UK, values_UW)
        return mixture(query_NK, key_UK, values_UW)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NW: Tensor) -> tuple[Tensor | None, ...]:
        query_NK, key_UK, values_UW = ctx.saved_tensors
        query_grad_NK, key_grad_UK = torch.empty_like(query_NK), torch.zeros_like(key_UK)
        values_grad_UW = None
        if ctx.needs_input_grad[2]:  # summed in float32, even for values in float16
            values_grad_UW = torch.zeros_like(values_UW, dtype=query_NK.dtype)
        with _without_autocast(query_NK):
            for span in _spans(query_NK, key_UK):
                weights_NU = weights(query_NK[span], key_UK)
                if values_grad_UW is not None:
                    values_grad_UW.addmm_(weights_NU.T, grad_NW[span].to(query_NK.dtype))
                # Of a softmax, weight (grad - mean), where the mean is sum_u weight_u grad_u.
                scores_grad_NU = (grad_NW[span] @ values_UW.T).to(query_NK.dtype)
                scores_grad_NU.mul_(weights_NU)
                mean_N1 = scores_grad_NU.sum(1, keepdim=True)
                scores_grad_NU.addcmul_(weights_NU, mean_N1, value=-1)
                query_grad_NK[span] = scores_grad_NU @ key_UK
                key_grad_UK.addmm_(scores_grad_NU.T, query_NK[span])
        if values_grad_UW is not None:
            values_grad_UW = values_grad_UW.to(values_UW.dtype)
        return query_grad_NK, key_grad_UK, values_grad_UW, None


class NarrowMixture(torch.autograd.Function):
    """`Mixture` of values in bfloat16, see `dsl.narrow`."""

    @staticmethod
    def forward(
        ctx: Any, query_NK: Tensor, key_UK: Tensor, values_UW: Tensor, passes: Passes = PLAIN
    ) -> Tensor:
        ctx.passes = passes
        with _without_autocast(query_NK):
            mixed_NW, log_sum_N = _narrow_mixture(query_NK, key_UK, values_UW, passes)
        ctx.save_for_backward(query_NK, key_UK, values_UW, mixed_NW, log_sum_N)
        return mixed_NW.to(values_UW)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NW: Tensor) -> tuple[Tensor | None, ...]:
        query_NK, key_UK, values_UW, mixed_NW, log_sum_N = ctx.saved_tensors
        slots, columns = key_UK.shape
        values_PW = narrow.padded(values_UW)
        query_grad_NK = torch.empty_like(query_NK)
        values_grad_PW = None
        if ctx.needs_input_grad[2]:
            values_grad_PW = torch.zeros_like(values_PW, dtype=torch.float32)
        with _without_autocast(query_NK):
            query_NA, key_PA = narrow.queries(query_NK), narrow.keys(key_UK)
            # Of the score's gradients, bfloat16 factors are as exact as those of the network.
            left_NK, right_PK = (
                narrow.beside(query_NK.bfloat16()),
                narrow.beside(narrow.padded(key_UK).bfloat16()),
            )
            key_grad_PK = torch.zeros_like(right_PK, dtype=torch.float32)
            # sum_u weight_u grad_u, the mean gradient of the weights, equals <grad, mixture>: one
            # number per position, for which no scores are read.
            mean_N = (grad_NW * mixed_NW).sum(1)
            for span in _spans(query_NK, key_UK):
                weights_NP, grad_NP = ctx.passes.softmax_gradients(
                    narrow.product(query_NA[span], key_PA.T),
                    log_sum_N[span],
                    narrow.product(grad_NW[span], values_PW.T),
                    mean_N[span],
                )
                if values_grad_PW is not None:
                    values_grad_PW += narrow.product(weights_NP.T, grad_NW[span])
                del weights_NP
                query_grad_NK[span] = narrow.product(grad_NP, right_PK)[:, :columns]
                key_grad_PK += narrow.product(grad_NP.T, left_NK[span])
        values_grad_UW = None if values_grad_PW is None else values_grad_PW[:slots].to(values_UW)
        return query_grad_NK, key_grad_PK[:slots, :columns].to(key_UK), values_grad_UW, None


def _narrow_mixture(
    query_NK: Tensor, key_UK: Tensor, values_UW: Tensor, passes: Passes
) -> tuple[Tensor, Tensor]:
    """The mixture ``[N, W]`` in float32, and ``[N]`` the log-sum-exp of its scores.

    The mixture is divided by the sum of its rounded weights, so that the rounding of a weight near
    1 cancels. The gradient of the scores is made from the mixture. It nearly vanishes there, and
    would drown in that rounding.
    """
    # With a column of ones, whose product is the sum of the weights.
    width, ones_U1 = values_UW.shape[1], values_UW.new_ones(len(values_UW), 1)
    values_PA = narrow.padded(narrow.beside(values_UW, ones_U1))
    query_NA, key_PA = narrow.queries(query_NK), narrow.keys(key_UK)
    mixed, sums = [], []
    for span in _spans(query_NK, key_UK):
        scores_NP = narrow.product(query_NA[span], key_PA.T)
        sums.append(passes.log_sums(scores_NP))
        weights_NP = passes.softmax(scores_NP, sums[-1])
        mixed_NA = narrow.product(weights_NP, values_PA)
        mixed.append(mixed_NA[:, :width] / mixed_NA[:, width, None])
        del scores_NP, weights_NP
    return torch.cat(mixed), torch.cat(sums)


def weights(query_NK: Tensor, key_UK: Tensor) -> Tensor:
    """``softmax_u <query, key_u>``, ``[N, U]``."""
    return (query_NK @ key_UK.T).softmax(-1)


def _spans(query_NK: Tensor, key_UK: Tensor) -> list[slice]:
    return spans(len(query_NK), len(key_UK), query_NK.device)


def in_compute_dtype(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that autocast gives to products, or in its own."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


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


def _without_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _reading(weights_NU: Tensor, tokens_N: Tensor) -> Tensor:
    entropy_N = -torch.xlogy(weights_NU, weights_NU).sum(1)
    token_N = weights_NU.gather(1, tokens_N[:, None]).squeeze(1)
    return torch.stack([entropy_N, weights_NU[:, -1], token_N])
