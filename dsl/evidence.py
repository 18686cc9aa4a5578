"""Known text seen through the localization channel with keyed noise: how measurements look at it.

Shapes: B rows, L positions, V tokens, D table dimension.
"""

from dataclasses import replace

import torch
from torch import Tensor

from dsl.noise import Draws
from dsl.state import State


def evidence(table_VD: Tensor, tokens_BL: Tensor, gamma_BL: Tensor, draws: Draws) -> State:
    """``z = gamma x + sqrt(gamma) eps`` of given tokens (003 eq. 1); nothing is frozen.

    A token at gamma 0 is masked and one at inf is revealed. The noise of a row depends on its key
    alone, so a measurement does not depend on how rows were batched.

    Raises:
        ValueError: see `State.from_tokens`.
    """
    known_BL = torch.zeros_like(tokens_BL, dtype=torch.bool)
    state = State.from_tokens(table_VD.detach(), tokens_BL, known_BL, gamma_BL)
    deviation_BL = state.gamma_BL.masked_fill(state.revealed_BL, 0).sqrt()
    noise_BLD = draws.normal(state.z_BLD.shape, state.z_BLD.dtype).to(state.z_BLD.device)
    return replace(state, z_BLD=state.z_BLD + deviation_BL[:, :, None] * noise_BLD)
