"""The precision of a network's matrix products: what a user's setting means.

Posteriors, draws and x_hat are made from a network's answers in float32 either way, see
`Denoiser.computing_in`.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]


def dtype_of(precision: Precision, device: torch.device | str) -> torch.dtype:
    """The dtype that a setting means on a device; ``auto`` is bfloat16 on a GPU, else float32.

    Raises:
        ValueError: no such setting.
    """
    gpu = torch.device(device).type == "cuda"
    known = {
        "auto": torch.bfloat16 if gpu else torch.float32,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }
    if precision not in known:
        raise ValueError(f"precision must be one of {', '.join(known)}, got {precision!r}")
    return known[precision]


def products_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """A context whose matrix products are in ``dtype``; float32 leaves all as it is."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)
