"""The cross-entropy of the vocabulary projection, without the logits of all positions at once.

Shapes: N positions, C positions of a chunk, W backbone width, V tokens, P = V padded, D dimensions
of the table, K = D + 1, A, G and H columns of joined factors.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsl import narrow
from dsl.backbone import precise
from dsl.chunks import spans
from dsl.converter import biased
from dsl.passes import PLAIN, Passes

# Gradients of hidden states, head weight, head bias, z and table; empty where not asked for.
Gradients = tuple[Tensor, ...]


def nats(
    hidden_NW: Tensor,
    weight_VW: Tensor,
    bias_V: Tensor,
    z_ND: Tensor,
    table_VD: Tensor,
    tokens_N: Tensor,
    share_N: Tensor,
    passes: Passes = PLAIN,
) -> tuple[Tensor, Tensor]:
    """``-log softmax(hidden @ weight.T + z @ table.T + bias)`` at ``tokens_N``, ids in [0, V).

    Returns the sum of ``share * nats``, a scalar, and the nats themselves, ``[N]``, which carry no
    gradient. The sum can be differentiated once: its gradients are computed in the forward pass,
    while the logits exist. D may be 0.

    Products run in the dtype of the hidden states, which under autocast is not that of the head;
    float16 is taken as float32. Of evidence bfloat16 keeps 16 bits (`dsl.narrow`), because it may
    add hundreds of nats, which 8 bits would round to whole nats. The softmax, the sums over chunks
    and the results are in float32, or in float64 where the hidden states are.
    """
    if hidden_NW.dtype != torch.bfloat16:
        hidden_NW = precise(hidden_NW)
    leaves = hidden_NW, weight_VW, bias_V, z_ND, table_VD
    learns = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    found: tuple[Tensor, Tensor] = _Nats.apply(passes, learns, *leaves, tokens_N, share_N)  # type: ignore[no-untyped-call]
    return found


class _Nats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passes: Passes, learns: bool, *given: Tensor) -> tuple[Tensor, Tensor]:
        hidden_NW, share_N = given[0], given[-1]
        made = _narrow if hidden_NW.dtype == torch.bfloat16 else _wide
        with torch.autocast(hidden_NW.device.type, enabled=False):
            nats_N, gradients = made(passes, learns, ctx.needs_input_grad[3], *given)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [leaf.dtype for leaf in given[: len(gradients)]]
        ctx.mark_non_differentiable(nats_N)
        return (share_N * nats_N).sum(), nats_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        made = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[2:7], strict=True)
        asked = ((grad * of).to(dtype) if needed else None for of, dtype, needed in made)
        return None, None, *asked, None, None


def _wide(
    passes: Passes, learns: bool, weight_learns: bool, *given: Tensor
) -> tuple[Tensor, Gradients]:
    """In float32 or float64, by functions of torch: ``passes`` is not used."""
    hidden_NW, weight_VW, bias_V, z_ND, table_VD, tokens_N, share_N = given
    weight_VW = weight_VW.to(hidden_NW.dtype)
    query_NK, key_VK = biased(z_ND, table_VD, bias_V)
    nats_N = z_ND.new_empty(len(hidden_NW))
    if learns:
        grad_hidden_NW, grad_z_ND = torch.empty_like(hidden_NW), torch.empty_like(z_ND)
        grad_weight_VW = torch.zeros_like(weight_VW) if weight_learns else weight_VW[:0]
        grad_key_VK = torch.zeros_like(key_VK)
        # A position's share scales its row of each product, which is shorter than [V].
        share_N1 = share_N[:, None]
        scaled_NK, scaled_NW = share_N1 * query_NK, share_N1 * hidden_NW
    for chunk in _chunks(hidden_NW, weight_VW):
        logits_CV = (hidden_NW[chunk] @ weight_VW.T).addmm_(query_NK[chunk], key_VK.T)
        log_probs_CV, at_C1 = logits_CV.log_softmax(1), tokens_N[chunk, None]
        del logits_CV
        nats_N[chunk] = -log_probs_CV.gather(1, at_C1).squeeze(1)
        if learns:
            error_CV = log_probs_CV.exp_()
            error_CV.scatter_add_(1, at_C1, error_CV.new_full(at_C1.shape, -1.0))
            grad_hidden_NW[chunk] = share_N1[chunk] * (error_CV @ weight_VW)
            grad_z_ND[chunk] = share_N1[chunk] * (error_CV @ table_VD)
            if weight_learns:
                grad_weight_VW.addmm_(error_CV.T, scaled_NW[chunk])
            grad_key_VK.addmm_(error_CV.T, scaled_NK[chunk])
            del error_CV
        del log_probs_CV  # before the next chunk's takes as much memory again
    if not learns:
        return nats_N, ()
    grad_table_VD, grad_bias_V = grad_key_VK[:, :-1], grad_key_VK[:, -1]
    return nats_N, (grad_hidden_NW, grad_weight_VW, grad_bias_V, grad_z_ND, grad_table_VD)


def _narrow(
    passes: Passes, learns: bool, weight_learns: bool, *given: Tensor
) -> tuple[Tensor, Gradients]:
    """In bfloat16: a sum of products is one product of joined factors."""
    hidden_NW, weight_VW, bias_V, z_ND, table_VD, tokens_N, share_N = given
    weight_VW = weight_VW.bfloat16()
    query_NK, key_VK = biased(z_ND, table_VD, bias_V)
    query_NA, key_PA = narrow.queries(query_NK, hidden_NW), narrow.keys(key_VK, weight_VW)
    nats_N = torch.empty_like(tokens_N, dtype=torch.float32)
    if learns:
        right_PG = narrow.padded(narrow.beside(weight_VW, key_VK.bfloat16()))
        grad_left_NG = right_PG.new_empty(len(hidden_NW), right_PG.shape[1], dtype=torch.float32)
        # What multiplies the weight comes last, because it is left out where the weight is frozen.
        left_NH = narrow.beside(query_NK.bfloat16(), *([hidden_NW] if weight_learns else []))
        grad_right_PH = left_NH.new_zeros(len(key_PA), left_NH.shape[1], dtype=torch.float32)
    for chunk in _chunks(query_NA, key_PA):
        scores_CP, at_C = narrow.product(query_NA[chunk], key_PA.T), tokens_N[chunk]
        log_sum_C = passes.log_sums(scores_CP)
        own_C = scores_CP.gather(1, at_C[:, None]).squeeze(1)
        # A score this low is that of a bias of minus infinity: the token cannot occur.
        nats_N[chunk] = (log_sum_C - own_C).masked_fill(own_C < narrow.NEVER / 2, torch.inf)
        if learns:
            error_CP = passes.errors(scores_CP, log_sum_C, at_C, share_N[chunk].float())
            grad_left_NG[chunk] = narrow.product(error_CP, right_PG)
            grad_right_PH += narrow.product(error_CP.T, left_NH[chunk])
            del error_CP
        del scores_CP  # before the next chunk's takes as much memory again
    if not learns:
        return nats_N.to(z_ND), ()
    (tokens, width), dim = weight_VW.shape, z_ND.shape[1]
    grad_hidden_NW, grad_z_ND = grad_left_NG[:, :width], grad_left_NG[:, width : width + dim]
    of_right = grad_right_PH[:tokens]
    grad_table_VD, grad_bias_V = of_right[:, :dim], of_right[:, dim]
    grad_weight_VW = of_right[:, dim + 1 : dim + 1 + width]
    return nats_N.to(z_ND), (grad_hidden_NW, grad_weight_VW, grad_bias_V, grad_z_ND, grad_table_VD)


def _chunks(hidden_NW: Tensor, weight_VW: Tensor) -> list[slice]:
    # Larger ones than elsewhere, because each chunk passes over the whole gradient of the head.
    return spans(len(hidden_NW), len(weight_VW), hidden_NW.device, factor=2)
