"""The token table: one trainable direction per token, every row on the unit sphere.

Shapes: V tokens, D table dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenTable(nn.Module):
    """Unit rows ``x_v`` (000 §4.1). The sphere is a parametrization, not a projection:

    the parameter is any direction, the row is that direction normalised on use, so no optimizer
    step can leave the sphere and the posterior stays free of the SNR (003 A.1).
    """

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        # Isotropic directions: in D dimensions random rows start nearly orthogonal (cosine
        # ~ D^-1/2), and unit length keeps the optimizer's step an angle of about its own size.
        self.direction_VD = nn.Parameter(F.normalize(torch.randn(tokens, dim), dim=-1))

    def forward(self) -> Tensor:
        """Rows ``[V, D]``, each of length one, in the parameter's dtype (at least float32)."""
        direction_VD: Tensor = self.direction_VD
        if direction_VD.dtype in (torch.float16, torch.bfloat16):
            direction_VD = direction_VD.float()
        return F.normalize(direction_VD, dim=-1)


@torch.no_grad()
def geometry_report(table_VD: Tensor) -> dict[str, float]:
    """How spread the rows are: ``mean_cosine`` over distinct pairs, in [-1, 1], and
    ``effective_rank``, the exponential of the spectral entropy, in [1, D].

    Long training can pull related tokens together (003 B.1 warns of full collapse), which both
    numbers show: the cosine drifts to 1 and the rank to 1.
    """
    table_VD = table_VD.detach().double()
    tokens = table_VD.shape[0]
    total = table_VD.sum(0).square().sum()
    mean_cosine = (total - tokens) / max(tokens * (tokens - 1), 1)
    spectrum_D = torch.linalg.eigvalsh(table_VD.T @ table_VD / tokens).clamp_min(0)
    share_D = spectrum_D / spectrum_D.sum()
    entropy = -torch.special.xlogy(share_D, share_D).sum()
    return {"mean_cosine": mean_cosine.item(), "effective_rank": entropy.exp().item()}
