"""The interface of a backbone, the transformer between a denoiser's inputs and its head.

To add a backbone, write one file with a module and its configuration, and add the latter to
`dsl.denoiser.BackboneConfig`. `dsl.dit` is built in, `dsl.foreign` wraps models of
`transformers`.

Shapes: B rows, L positions, W input width, H hidden width, V tokens, U = V + 1 slots (the last is
[MASK]).
"""

from typing import Protocol

import torch
from torch import Tensor, nn


class Backbone(Protocol):
    """A module from ``[B, L, W]`` inputs to ``[B, L, H]`` hidden states.

    Its configuration is a frozen dataclass with a ``kind``, the integers ``tokens`` (V) and
    ``blocks``, ``causal`` (whether a position sees those before it alone), and ``build()``, which
    makes the module.
    """

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks in order: training shards and recomputes them one by one."""

    @property
    def values_UW(self) -> Tensor:
        """Input rows of every slot, the mask row last: what the converter mixes."""

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        """``weight_VH, bias_V`` of the vocabulary projection: logits are ``linear(hidden)``."""

    def __call__(self, inputs_BLW: Tensor) -> Tensor:
        """Hidden states, in the compute dtype."""

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations of one token's forward and backward pass, head included."""


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it already is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
