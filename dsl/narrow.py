"""Scores of all tokens as products of bfloat16 factors, for the tensor cores of a GPU.

Tensor cores multiply bfloat16 ten times as fast as float32, and sum in float32. So sums stay in
float32 here, and a factor that needs more than the 8 bits of bfloat16 is split into parts: it is
*wide*, the others are *narrow*. The vocabulary is padded: with V = 50257, which is odd, a product
took five times as long on an H100 as with 50304.

Shapes: N positions, V tokens, P = V padded, K dimensions of a wide factor, W of a narrow one,
A columns of all factors side by side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

ROWS = 64  # P is a multiple of it
COLUMNS = 8  # and A of this: 8 numbers are the 16 bytes that a GPU reads at once
# The bias of padded tokens, and the lowest that any token has: minus infinity times a zero of the
# other factor would be NaN.
NEVER = -1e30


def product(left_NA: Tensor, right_AP: Tensor) -> Tensor:
    """``[N, P]`` products ``left @ right`` of bfloat16 factors, in float32."""
    # The GPU's own product of this kind has no forward-mode derivative.
    derived = any(unpack_dual(factor).tangent is not None for factor in (left_NA, right_AP))  # type: ignore[no-untyped-call]
    if left_NA.is_cuda and not derived:
        return torch.mm(left_NA, right_AP, out_dtype=torch.float32)
    return left_NA.float() @ right_AP.float()


def queries(query_NK: Tensor, *narrow_NW: Tensor) -> Tensor:
    """``[N, A]``: the factors of the queries side by side, to be multiplied with those of `keys`.

    The `product` of both is ``query key^T`` plus the products of the narrow factors. The last
    column of a query is 1, that of a key its bias (`dsl.converter.biased`), which is as exact as in
    float32. Other columns have a high and a low part each. Only low times low is left out: the
    relative error is 2^-16, where bfloat16 alone has 2^-8.
    """
    (high_ND, low_ND), one_N1 = _parts(query_NK[:, :-1], 2), query_NK[:, -1:].bfloat16()
    return beside(*narrow_NW, high_ND, low_ND, high_ND, one_N1, one_N1, one_N1)


def keys(key_VK: Tensor, *narrow_VW: Tensor) -> Tensor:
    """``[P, A]``: the factors of the keys, see `queries`. Padded tokens have the bias `NEVER`."""
    key_PK = padded(key_VK).clamp_min(NEVER)
    key_PK[len(key_VK) :, -1] = NEVER
    high_PD, low_PD = _parts(key_PK[:, :-1], 2)
    bias = _parts(key_PK[:, -1:], 3)
    return beside(*map(padded, narrow_VW), high_PD, high_PD, low_PD, *bias)


def beside(*narrow: Tensor) -> Tensor:
    """Narrow factors side by side, and zeros up to a multiple of `COLUMNS`."""
    columns = torch.cat(narrow, dim=1)
    return F.pad(columns, (0, -columns.shape[1] % COLUMNS))


def padded(rows_VK: Tensor) -> Tensor:
    """``[P, K]``, with rows of zeros at the end up to a multiple of `ROWS`."""
    return F.pad(rows_VK, (0, 0, 0, -len(rows_VK) % ROWS))


def _parts(wide: Tensor, count: int) -> list[Tensor]:
    """``count`` parts in bfloat16, from high to low, whose sum is ``wide`` to 8 bits for each.

    This must not be compiled: a compiler leaves out the rounding of a part before it subtracts the
    part, and so makes all later parts zero.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("not to be compiled")  # torch.compile then runs this as it is
    parts = []
    for _ in range(count):
        parts.append(wide.bfloat16())
        wide = wide - parts[-1].to(wide)
    return parts
