"""The last bit of a result: the same wherever its operands lie in memory.

Bit-exact resumption rests on it, because a process that resumes lays its tensors out anew.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

LINE = 16  # places within a cache line where a float32 may begin
SHAPES = [(1, 5, 7), (5, 6, 11), (3, 17, 11), (5, 16, 48), (7, 33, 33), (100, 96, 31)]


def placed(values: Tensor, offset: int) -> Tensor:
    """A copy that begins ``offset`` elements after the start of a cache line."""
    room = torch.empty(values.numel() + 2 * LINE, dtype=values.dtype)
    start = -(room.data_ptr() // room.element_size()) % LINE + offset
    return room[start : start + values.numel()].view(values.shape).copy_(values)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda one, two: one @ two,
    "linear": lambda one, two: F.linear(one, two.mT.contiguous()),
    "softmax": lambda one, two: one.softmax(-1),
    "norm": lambda one, two: F.layer_norm(two, two.shape[-1:]),
    "sum": lambda one, two: torch.stack([one.sum(), two.pow(2).sum()]),
    "attention": lambda one, two: F.scaled_dot_product_attention(*[one[None, None]] * 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_result_depends_on_where_its_operands_lie(name: str, dtype: torch.dtype) -> None:
    draws = torch.Generator().manual_seed(0)
    for rows, inner, columns in SHAPES:
        one = torch.randn(rows, inner, generator=draws).to(dtype)
        two = torch.randn(inner, columns, generator=draws).to(dtype)
        expected = OPERATIONS[name](one, two)
        for offset in range(LINE):
            for other in range(0, LINE, 3):
                found = OPERATIONS[name](placed(one, offset), placed(two, other))
                assert torch.equal(found, expected), (rows, inner, columns, offset, other)
