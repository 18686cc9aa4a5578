"""The cross-entropy of the vocabulary projection, without the logits of all positions at once.

Shapes: N positions, C positions of a chunk, W backbone width, V tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsl.chunks import spans


def nats(hidden_NW: Tensor, weight_VW: Tensor, bias_V: Tensor, tokens_N: Tensor) -> Tensor:
    """``-log softmax(hidden @ weight.T + bias)`` at the tokens, ``[N]``, float32 or better.

    Products are computed in the dtype of the hidden states, which need not be that of the head:
    under autocast it is not. Softmax, sums over chunks and the result are float32 or better. The
    logits are computed again in the backward pass, which can be taken once.
    """
    found: Tensor = _Nats.apply(hidden_NW, weight_VW, bias_V, tokens_N)  # type: ignore[no-untyped-call]
    return found


class _Nats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NW: Tensor, weight_VW: Tensor, bias_V: Tensor, tokens_N: Tensor
    ) -> Tensor:
        wide = torch.promote_types(hidden_NW.dtype, torch.float32)
        log_sum_N = hidden_NW.new_empty(len(hidden_NW), dtype=wide)
        nats_N = torch.empty_like(log_sum_N)
        with torch.autocast(hidden_NW.device.type, enabled=False):
            cast_VW = weight_VW.to(hidden_NW.dtype)
            for chunk in _chunks(hidden_NW, weight_VW):
                log_sum_N[chunk], told_C = _scores(
                    hidden_NW[chunk], cast_VW, bias_V, tokens_N[chunk, None]
                )
                nats_N[chunk] = log_sum_N[chunk] - told_C
        ctx.save_for_backward(hidden_NW, weight_VW, bias_V, tokens_N, log_sum_N)
        return nats_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        hidden_NW, weight_VW, bias_V, tokens_N, log_sum_N = ctx.saved_tensors
        grad_hidden_NW = torch.empty_like(hidden_NW)
        # The gradient of the head is a sum over chunks, which bfloat16 would round after each.
        grad_weight_VW = torch.zeros_like(weight_VW, dtype=log_sum_N.dtype)
        grad_bias_V = torch.zeros_like(bias_V, dtype=log_sum_N.dtype)
        with torch.autocast(hidden_NW.device.type, enabled=False):
            cast_VW = weight_VW.to(hidden_NW.dtype)
            for chunk in _chunks(hidden_NW, weight_VW):
                error_CV = _logits(hidden_NW[chunk], cast_VW, bias_V)
                error_CV.sub_(log_sum_N[chunk, None]).exp_()
                minus_C1 = error_CV.new_full((len(error_CV), 1), -1.0)
                error_CV.scatter_add_(1, tokens_N[chunk, None], minus_C1)
                error_CV *= grad_N[chunk, None]
                grad_bias_V += error_CV.sum(0)
                error_CV = error_CV.to(hidden_NW.dtype)
                grad_hidden_NW[chunk] = error_CV @ cast_VW
                grad_weight_VW += error_CV.T @ hidden_NW[chunk]
                del error_CV  # or the next chunk's would be made beside it
        return grad_hidden_NW, grad_weight_VW.to(weight_VW), grad_bias_V.to(bias_V), None


def _scores(
    hidden_CW: Tensor, weight_VW: Tensor, bias_V: Tensor, tokens_C1: Tensor
) -> tuple[Tensor, Tensor]:
    """``log sum exp`` of the logits and the logit of the token, ``[C]`` each."""
    logits_CV = _logits(hidden_CW, weight_VW, bias_V)
    return logits_CV.logsumexp(1), logits_CV.gather(1, tokens_C1)[:, 0]


def _logits(hidden_CW: Tensor, weight_VW: Tensor, bias_V: Tensor) -> Tensor:
    """``[C, V]``, float32 or better."""
    product_CV = hidden_CW @ weight_VW.T
    wide = torch.promote_types(product_CV.dtype, torch.float32)
    return product_CV.to(wide).add_(bias_V)


def _chunks(hidden_NW: Tensor, weight_VW: Tensor) -> list[slice]:
    # Larger ones than elsewhere, because each chunk passes over the whole gradient of the head.
    return spans(len(hidden_NW), len(weight_VW), hidden_NW.device, factor=2)
