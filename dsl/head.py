"""The cross-entropy of the vocabulary projection, without the logits of all positions at once.

Shapes: N positions, C positions of a chunk, W backbone width, V tokens, D dimensions of the table,
K = D + 1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsl.chunks import spans
from dsl.converter import add_product, biased


def nats(
    hidden_NW: Tensor,
    weight_VW: Tensor,
    bias_V: Tensor,
    z_ND: Tensor,
    table_VD: Tensor,
    tokens_N: Tensor,
) -> Tensor:
    """``-log softmax(hidden @ weight.T + z @ table.T + bias)`` at the tokens, ``[N]``.

    The first product is computed in the dtype of the hidden states, which need not be that of the
    head: under autocast it is not. Evidence may add hundreds of nats, which bfloat16 would round by
    whole nats. So the second one, the softmax, sums over chunks and the result are of the dtype of
    the table and of z, float32 or better. D may be 0.

    The logits are computed again in the backward pass, which can be taken once.
    """
    arguments = hidden_NW, weight_VW, bias_V, z_ND, table_VD, tokens_N
    found: Tensor = _Nats.apply(*arguments)  # type: ignore[no-untyped-call]
    return found


class _Nats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> Tensor:
        hidden_NW, weight_VW, bias_V, z_ND, table_VD, tokens_N = arguments
        nats_N = z_ND.new_empty(len(hidden_NW))
        with torch.autocast(hidden_NW.device.type, enabled=False):
            cast_VW = weight_VW.to(hidden_NW.dtype)
            query_NK, key_VK = biased(z_ND, table_VD, bias_V)
            for chunk in _chunks(hidden_NW, weight_VW):
                logits_CV = _logits(hidden_NW[chunk], cast_VW, query_NK[chunk], key_VK)
                nats_N[chunk] = F.cross_entropy(logits_CV, tokens_N[chunk], reduction="none")
                del logits_CV  # or the next chunk's would be made beside it
        ctx.save_for_backward(*arguments)
        return nats_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NW, weight_VW, bias_V, z_ND, table_VD, tokens_N = ctx.saved_tensors
        grad_hidden_NW, grad_z_ND = torch.empty_like(hidden_NW), torch.empty_like(z_ND)
        grad_weight_VW = torch.zeros_like(weight_VW, dtype=z_ND.dtype)
        with torch.autocast(hidden_NW.device.type, enabled=False):
            cast_VW = weight_VW.to(hidden_NW.dtype)
            query_NK, key_VK = biased(z_ND, table_VD, bias_V)
            grad_key_VK = torch.zeros_like(key_VK)
            # A position's gradient scales its row of each product, which is shorter than [V]. It
            # is never rounded to bfloat16: in a mean all rows would have the same error.
            grad_N1 = grad_N[:, None]
            scaled_NK, scaled_NW = grad_N1 * query_NK, (grad_N1 * hidden_NW).to(hidden_NW.dtype)
            for chunk in _chunks(hidden_NW, weight_VW):
                error_CV = _logits(hidden_NW[chunk], cast_VW, query_NK[chunk], key_VK).softmax(1)
                minus_C1 = error_CV.new_full((len(error_CV), 1), -1.0)
                error_CV.scatter_add_(1, tokens_N[chunk, None], minus_C1)
                add_product(grad_key_VK, error_CV.T, scaled_NK[chunk])
                grad_z_ND[chunk] = grad_N1[chunk] * (error_CV @ table_VD)
                error_CV = error_CV.to(hidden_NW.dtype)
                grad_hidden_NW[chunk] = grad_N1[chunk] * (error_CV @ cast_VW)
                add_product(grad_weight_VW, error_CV.T, scaled_NW[chunk])
                del error_CV  # as above
        grad_table_VD, grad_bias_V = grad_key_VK[:, :-1], grad_key_VK[:, -1].to(bias_V)
        grad_head = grad_weight_VW.to(weight_VW), grad_bias_V
        return grad_hidden_NW, *grad_head, grad_z_ND, grad_table_VD, None


def _logits(hidden_CW: Tensor, weight_VW: Tensor, query_CK: Tensor, key_VK: Tensor) -> Tensor:
    """``[C, V]``, in the dtype of the keys."""
    product_CV = (hidden_CW @ weight_VW.T).to(key_VK.dtype)
    return product_CV.addmm_(query_CK, key_VK.T)


def _chunks(hidden_NW: Tensor, weight_VW: Tensor) -> list[slice]:
    # Larger ones than elsewhere, because each chunk passes over the whole gradient of the head.
    return spans(len(hidden_NW), len(weight_VW), hidden_NW.device, factor=2)
