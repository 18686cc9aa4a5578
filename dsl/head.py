"""The cross-entropy of the vocabulary projection, without the logits of all positions at once.

Shapes: N positions, C positions of a chunk, W backbone width, V tokens, P = V padded, D dimensions
of the table, K = D + 1, A and G columns of joined factors.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsl import narrow
from dsl.chunks import spans
from dsl.converter import biased
from dsl.passes import PLAIN, Passes


def nats(
    hidden_NW: Tensor,
    weight_VW: Tensor,
    bias_V: Tensor,
    z_ND: Tensor,
    table_VD: Tensor,
    tokens_N: Tensor,
    passes: Passes = PLAIN,
) -> Tensor:
    """``-log softmax(hidden @ weight.T + z @ table.T + bias)`` at the tokens, ``[N]``.

    Products are computed in the dtype of the hidden states, which need not be that of the head:
    under autocast it is not. Evidence may add hundreds of nats, which bfloat16 would round by whole
    nats, see `dsl.narrow`. The softmax, sums over chunks and the result are of the dtype of the
    table and of z, float32 or better. D may be 0.

    The logits are computed again in the backward pass, which can be taken once.
    """
    arguments = hidden_NW, weight_VW, bias_V, z_ND, table_VD, tokens_N
    narrowed = hidden_NW.dtype == torch.bfloat16
    found: Tensor = _NarrowNats.apply(passes, *arguments) if narrowed else _Nats.apply(*arguments)  # type: ignore[no-untyped-call]
    return found


class _Nats(torch.autograd.Function):
    """Hidden states in float32 or float64."""

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
        with torch.autocast(hidden_NW.device.type, enabled=False):
            cast_VW = weight_VW.to(hidden_NW.dtype)
            query_NK, key_VK = biased(z_ND, table_VD, bias_V)
            grad_weight_VW, grad_key_VK = torch.zeros_like(cast_VW), torch.zeros_like(key_VK)
            # A position's gradient scales its row of each product, which is shorter than [V].
            grad_N1 = grad_N[:, None]
            scaled_NK, scaled_NW = grad_N1 * query_NK, grad_N1 * hidden_NW
            for chunk in _chunks(hidden_NW, weight_VW):
                error_CV = _logits(hidden_NW[chunk], cast_VW, query_NK[chunk], key_VK).softmax(1)
                minus_C1 = error_CV.new_full((len(error_CV), 1), -1.0)
                error_CV.scatter_add_(1, tokens_N[chunk, None], minus_C1)
                grad_key_VK.addmm_(error_CV.T, scaled_NK[chunk])
                grad_z_ND[chunk] = grad_N1[chunk] * (error_CV @ table_VD)
                grad_hidden_NW[chunk] = grad_N1[chunk] * (error_CV @ cast_VW)
                grad_weight_VW.addmm_(error_CV.T, scaled_NW[chunk])
                del error_CV  # as above
        grad_table_VD, grad_bias_V = grad_key_VK[:, :-1], grad_key_VK[:, -1].to(bias_V)
        grad_head = grad_weight_VW.to(weight_VW), grad_bias_V
        return grad_hidden_NW, *grad_head, grad_z_ND, grad_table_VD, None


class _NarrowNats(torch.autograd.Function):
    """Hidden states in bfloat16: each product is one of joined factors."""

    @staticmethod
    def forward(ctx: Any, passes: Passes, *arguments: Tensor) -> Tensor:
        tokens_N, ctx.passes = arguments[-1], passes
        with torch.autocast(tokens_N.device.type, enabled=False):
            query_NA, key_PA = _joined(*arguments[:-1])
            own_N, log_sum_N = query_NA.new_empty(2, len(query_NA), dtype=torch.float32)
            for chunk in _chunks(query_NA, key_PA):
                scores_CP = narrow.product(query_NA[chunk], key_PA.T)
                log_sum_N[chunk] = passes.log_sums(scores_CP)
                own_N[chunk] = scores_CP.gather(1, tokens_N[chunk, None]).squeeze(1)
                del scores_CP  # or the next chunk's would be made beside it
        ctx.save_for_backward(*arguments, log_sum_N)
        nats_N: Tensor = log_sum_N - own_N
        return nats_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        *arguments, tokens_N, log_sum_N = ctx.saved_tensors
        hidden_NW, weight_VW, bias_V, z_ND, table_VD = arguments
        tokens, width, dim = len(weight_VW), weight_VW.shape[1], z_ND.shape[1]
        with torch.autocast(tokens_N.device.type, enabled=False):
            query_NA, key_PA = _joined(*arguments)
            ones_N1 = hidden_NW.new_ones(len(hidden_NW), 1)
            left_NG = narrow.beside(hidden_NW, z_ND.bfloat16(), ones_N1)
            right_PG = narrow.padded(narrow.beside(weight_VW.bfloat16(), table_VD.bfloat16()))
            grad_left_NG = torch.empty_like(left_NG[:, : width + dim], dtype=torch.float32)
            grad_right_PG = left_NG.new_zeros(len(key_PA), left_NG.shape[1], dtype=torch.float32)
            for chunk in _chunks(query_NA, key_PA):
                scores_CP = narrow.product(query_NA[chunk], key_PA.T)
                where = tokens_N[chunk], grad_N[chunk]
                error_CP = ctx.passes.errors(scores_CP, log_sum_N[chunk], *where)
                del scores_CP
                found_CG = narrow.product(error_CP, right_PG)
                grad_left_NG[chunk] = found_CG[:, : width + dim]
                grad_right_PG += narrow.product(error_CP.T, left_NG[chunk])
                del error_CP
        grad_left_NG, grad_right_VG = grad_left_NG.to(z_ND), grad_right_PG[:tokens]
        return (
            None,
            grad_left_NG[:, :width].to(hidden_NW),
            grad_right_VG[:, :width].to(weight_VW),
            grad_right_VG[:, width + dim].to(bias_V),
            grad_left_NG[:, width:],
            grad_right_VG[:, width : width + dim].to(table_VD),
            None,
        )


def _joined(
    hidden_NW: Tensor, weight_VW: Tensor, bias_V: Tensor, z_ND: Tensor, table_VD: Tensor
) -> tuple[Tensor, Tensor]:
    """``[N, A]`` and ``[P, A]``, whose products are the logits."""
    query_NK, key_VK = biased(z_ND, table_VD, bias_V)
    return narrow.queries(query_NK, hidden_NW), narrow.keys(key_VK, weight_VW.bfloat16())


def _logits(hidden_CW: Tensor, weight_VW: Tensor, query_CK: Tensor, key_VK: Tensor) -> Tensor:
    """``[C, V]``."""
    return (hidden_CW @ weight_VW.T).addmm_(query_CK, key_VK.T)


def _chunks(hidden_NW: Tensor, weight_VW: Tensor) -> list[slice]:
    # Larger ones than elsewhere, because each chunk passes over the whole gradient of the head.
    return spans(len(hidden_NW), len(weight_VW), hidden_NW.device, factor=2)
