"""The network that answers a state with a posterior: table, converter and backbone.

Shapes: B rows, L positions, D table dimension, V tokens, U = V + 1 slots, W backbone width,
N asked positions (flat), R rows.
"""

import copy
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsl import narrow
from dsl.backbone import Backbone, precise
from dsl.converter import Converter, ConverterConfig, biased, in_compute_dtype
from dsl.dit import DiTConfig, DiTShape
from dsl.foreign import ForeignConfig
from dsl.passes import PLAIN, Passes
from dsl.posterior import Posterior
from dsl.precision import products_in
from dsl.state import State

# The configurations of all backbones, told apart by ``kind``, and the part that presets set.
BackboneConfig = DiTConfig | ForeignConfig
BackboneShape = DiTShape


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig(ConverterConfig):
    """The configuration of a backbone, and of the table and converter before it.

    The default ``mask_prior`` of 1/2 suits training from scratch.
    """

    backbone: BackboneConfig
    mask_prior: float = 0.5


class TokenTable(nn.Module):
    """Unit rows ``x_v`` (000 §4.1), each a free direction that is normalised on use.

    No optimizer step can leave the sphere, so the posterior stays free of the SNR (003 A.1).
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


class Denoiser(nn.Module):
    """``p(s_i | state)`` for every position, from one network for every SNR (003 A.1).

    With a causal backbone, inputs move one position right behind a start symbol (the mask row): the
    backbone's answer at i depends on the tokens before i alone. A skip adds i's own evidence.

    Args:
        config: of the backbone, the table and the converter.
        backbone: a module that ``config.backbone`` describes, kept and not copied; None builds one.
    """

    def __init__(self, config: DenoiserConfig, backbone: Backbone | None = None) -> None:
        super().__init__()
        self.config = config
        tokens = config.backbone.tokens
        self.table = TokenTable(tokens, config.embed_dim)
        self.converter = Converter(
            tokens, config.embed_dim, beta=config.beta, mask_prior=config.mask_prior
        )
        self.backbone: Backbone = config.backbone.build() if backbone is None else backbone
        self._products = torch.float32
        self.passes = PLAIN

    def computing_in(self, dtype: torch.dtype, passes: Passes | None = None) -> "Denoiser":
        """A denoiser that shares these weights, and whose network multiplies matrices in ``dtype``.

        The softmax and all that is made of a posterior stay in float32, and evidence keeps 16 bits
        (`dsl.narrow`).

        Args:
            dtype: float32 or bfloat16.
            passes: functions of all tokens' scores, such as compiled ones; None: as so far.
        """
        other = copy.copy(self)
        other._products, other.passes = dtype, passes or self.passes
        return other

    def compiled(self) -> "Denoiser":
        """This denoiser, compiled: the blocks of its backbone, in place, and its `passes`.

        The first call of every shape takes seconds. On a GPU the others take half as long.
        """
        for block in self.backbone.blocks:
            block.compile()
        return self.computing_in(self._products, self.passes.compiled())

    @property
    def table_VD(self) -> Tensor:
        """Unit rows ``[V, D]``, attached to the parameter they come from."""
        table_VD: Tensor = self.table()
        return table_VD

    def flops_per_token(self, length: int, *, predicted: float, evidence: float) -> float:
        """Floating-point operations of a training step per token of its batch.

        Counts matrix products, forward and backward: the backbone at all tokens, the head at the
        share that is ``predicted`` and the converter at the share with ``evidence``, both in
        [0, 1]. What a backward pass computes again is left out.
        """
        tokens, dim = self.table.direction_VD.shape
        width = self.backbone.head[0].shape[1]
        logits = width + dim * (self.config.skip and evidence > 0)  # see `skip`
        mixture = self.backbone.values_UW.shape[1] + dim
        # The backbone counts its head at every token.
        body = self.backbone.flops_per_token(length) - 6 * tokens * width
        return body + 6 * tokens * (predicted * logits + evidence * mixture)

    def hidden(self, state: State) -> Tensor:
        """``[B, L, W]`` from the backbone; logits are its head's map of them, plus `skip`."""
        return self._read(state, self.table_VD)

    def skip(self, state: State, at_N: Tensor) -> tuple[Tensor, Tensor]:
        """``z_ND, table_VD``, whose product is what evidence adds to the logits at ``at_N``.

        Without a skip, or in a batch without evidence, D is 0 and nothing is computed for it.
        """
        heard = self.config.skip and bool(state.host.evidence_BL.any())
        table_VD = self.table_VD[:, : None if heard else 0]
        z_ND = state.z_BLD.flatten(0, 1)[at_N, : table_VD.shape[1]]
        return z_ND.to(table_VD), table_VD

    def forward(self, state: State) -> Posterior:
        """The posterior of every token. Runs the backbone; logits are computed when asked for.

        The state is moved to the table's device and dtype first, see `State.like` for its errors.
        """
        table_VD = self.table_VD
        state = state.like(table_VD)
        hidden_BLW = self._read(state, table_VD)
        weight_VW, bias_V = self.backbone.head
        head = weight_VW.to(hidden_BLW.dtype), bias_V
        evidence_BLD = state.z_BLD if self.config.skip else None
        return NetworkPosterior(state, table_VD, hidden_BLW, head, evidence_BLD)

    def _read(self, state: State, table_VD: Tensor) -> Tensor:
        values_UW = self.backbone.values_UW
        with products_in(self._products, table_VD.device):
            inputs_BLW = self.converter(state, table_VD, values_UW, self.passes)
            if self.config.backbone.causal:
                start_B1W = values_UW[-1].to(inputs_BLW).expand(len(inputs_BLW), 1, -1)
                inputs_BLW = torch.cat([start_B1W, inputs_BLW[:, :-1]], dim=1)
            # The last norm of some networks answers in float32, in which the head would be slow.
            return in_compute_dtype(self.backbone(inputs_BLW))


class NetworkPosterior(Posterior):
    """Hidden states, projected onto the vocabulary at asked positions only.

    ``evidence_BLD`` is what skips the backbone, None without a skip.
    """

    by_row = ("hidden_BLW", "evidence_BLD")

    def __init__(
        self,
        state: State,
        table_VD: Tensor,
        hidden_BLW: Tensor,
        head: tuple[Tensor, Tensor],
        evidence_BLD: Tensor | None,
    ) -> None:
        super().__init__(state, table_VD)
        self.hidden_BLW = hidden_BLW
        self.head = head
        self.evidence_BLD = evidence_BLD

    def _log_probs_unrevealed(self, at_N: Tensor) -> Tensor:
        return self._logits(at_N).log_softmax(-1)[:, : len(self.table_VD)]

    def _scores_unrevealed(self, at_N: Tensor) -> Tensor:
        return self._logits(at_N)[:, : len(self.table_VD)]

    def _probs_unrevealed(self, at_N: Tensor) -> Tensor:
        return self._logits(at_N).softmax(-1)[:, : len(self.table_VD)]

    def _logits(self, at_N: Tensor) -> Tensor:
        """``[N, V]``; in bfloat16 ``[N, P]``, where the columns behind V belong to padding."""
        hidden_NW, (weight_VW, bias_V) = self.hidden_BLW.flatten(0, 1)[at_N], self.head
        with torch.autocast(hidden_NW.device.type, enabled=False):
            if hidden_NW.dtype == torch.bfloat16:
                query_NA = narrow.queries(self._evidence(at_N)[0], hidden_NW)
                return narrow.product(query_NA, self._keys_PA.T)
            logits_NV = precise(F.linear(hidden_NW, weight_VW))
            if self.evidence_BLD is None:
                return logits_NV.add_(bias_V)
            query_NK, key_VK = self._evidence(at_N)
            return logits_NV.addmm_(query_NK, key_VK.T)

    def _evidence(self, at_N: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, K]`` and ``[V, K]``, whose product is the bias plus what evidence adds to the
        logits.

        They are wide factors (`dsl.narrow`): bfloat16 alone would round hundreds of nats of
        evidence by whole nats, and a log unigram probability of -11 by .03.
        """
        table_VD = self.table_VD.to(precise(self.hidden_BLW[:0]))
        if self.evidence_BLD is None:
            table_VD = table_VD[:, :0]
            return biased(table_VD.new_empty(len(at_N), 0), table_VD, self.head[1])
        return biased(self.evidence_BLD.flatten(0, 1)[at_N].to(table_VD), table_VD, self.head[1])

    @cached_property
    def _keys_PA(self) -> Tensor:
        nowhere_N = torch.empty(0, dtype=torch.int64, device=self.table_VD.device)
        return narrow.keys(self._evidence(nowhere_N)[1], self.head[0])


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
