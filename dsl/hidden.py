"""The Bayes denoiser of a hidden Markov model: a Markov chain over states that are not seen, each
of which emits tokens by probabilities of its own. A chain of order 1 is the model whose every state
emits one token.

Shapes: B rows, L positions, V tokens, S states, D table dimension.
"""

import torch
from torch import Tensor

from dsl.chain import ChainDenoiser, MarkovDenoiser, log, require_probabilities
from dsl.state import token_ids


class HiddenChainDenoiser(MarkovDenoiser):
    """The exact posterior of a hidden Markov model, by forward and backward messages over states.

    A call costs ``O(B L S (S + V))``.

    Args:
        table_VD: unit rows.
        initial_S: probabilities of the first state.
        transition_SS: probabilities of the next state (last dimension) after each state.
        emission_SV: probabilities of the token (last dimension) in each state.

    Raises:
        ValueError: other shapes, or numbers that are not probabilities with sums of 1.
    """

    def __init__(
        self, table_VD: Tensor, initial_S: Tensor, transition_SS: Tensor, emission_SV: Tensor
    ) -> None:
        states, tokens = len(initial_S), len(table_VD)
        shapes = [tuple(probs.shape) for probs in (initial_S, transition_SS, emission_SV)]
        if shapes != [(states,), (states, states), (states, tokens)]:
            raise ValueError(
                f"for {states} states and {tokens} tokens, initial must be [{states}], transition "
                f"must be [{states}, {states}] and emission must be [{states}, {tokens}], "
                f"got {', '.join(map(str, shapes))}"
            )
        require_probabilities("emission", emission_SV)
        self.table_VD = table_VD.double()
        # Only this chain's messages are used, so its table is a placeholder.
        self.chain = ChainDenoiser(torch.eye(states).to(self.table_VD), initial_S, transition_SS)
        self.emission_SV = log(emission_SV.to(self.table_VD))

    def log_prob(self, tokens_BL: Tensor) -> Tensor:
        return self.chain.marginals(self.emission_SV.T[token_ids(tokens_BL, self.table_VD)])[1]

    def draw(self, rows: int, length: int, seed: int) -> Tensor:
        generator = torch.Generator(self.table_VD.device).manual_seed(seed)
        states_N = self.chain.drawn_by(generator, rows, length).flatten()
        probs_NV = self.emission_SV.exp()[states_N]
        return torch.multinomial(probs_NV, 1, generator=generator).view(rows, length)

    def marginals(self, evidence_BLV: Tensor) -> tuple[Tensor, Tensor]:
        # The largest evidence of a position becomes 0: small numbers lose less to rounding.
        peak_BL1 = evidence_BLV.amax(-1, keepdim=True)
        said_BLSV = (evidence_BLV - peak_BL1)[:, :, None] + self.emission_SV
        own_BLS = said_BLSV.logsumexp(-1)
        states_BLS, total_B = self.chain.marginals(own_BLS)
        # The weight of each state by all other positions, without this position's own evidence.
        rest_BLS = states_BLS - own_BLS
        log_probs_BLV = (rest_BLS[..., None] + said_BLSV).logsumexp(2).log_softmax(-1)
        return log_probs_BLV, total_B + peak_BL1.sum((1, 2))
