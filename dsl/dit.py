"""The diffusion transformer of the public MDLM checkpoints, parameter for parameter.

Inputs arrive already embedded (see `dsl.converter`) and leave as hidden states: the vocabulary
projection is applied by whoever wants logits, at the positions it wants them.

Shapes: B rows, L positions, W width, M inner width (W in attention, 4 W in the MLP), H heads, K
head dimension, C conditioning width, V tokens, U = V + 1 slots (the last is [MASK]).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsl.backbone import precise

SINUSOID = 256  # width of the timestep sinusoid in every public checkpoint


@dataclass(frozen=True, kw_only=True)
class DiTShape:
    """The sizes and settings of a DiT that a user chooses. Defaults: the sizes of the public
    checkpoints (which were trained with a dropout of 0.1), and no dropout.

    start: initial values for training from scratch. "zero", as in the public code: the gates of
        the blocks and the head are 0, so every block is the identity and the posterior uniform.
        "open": the gates are 1 and the head is drawn from N(0, 1/W). A "zero" network first learns
        token frequencies. It uses the neighbours of a masked position only after many steps, in
        which gates, head and attention grow. "open" spares small networks and short runs these.

    Raises:
        ValueError: a size is below 1, W is no multiple of 2 H, or a setting is out of its range.
    """

    kind: Literal["dit"] = "dit"
    width: int = 768
    blocks: int = 12
    heads: int = 12
    cond_dim: int = 128
    dropout: float = 0.0
    start: Literal["zero", "open"] = "zero"

    def __post_init__(self) -> None:
        sizes = (self.width, self.blocks, self.heads, self.cond_dim)
        if min(sizes) < 1 or self.width % (2 * self.heads):
            raise ValueError(
                f"{self}: sizes must be positive and the width a multiple of twice the heads, "
                "because rotary position pairs the coordinates of every head"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must lie in [0, 1)")
        if self.start not in ("zero", "open"):
            raise ValueError(f"start {self.start!r} must be 'zero' or 'open'")

    def config(self, tokens: int, *, causal: bool) -> "DiTConfig":
        """The whole configuration, with V from the data and ``causal`` from the objective."""
        return DiTConfig(**vars(self), tokens=tokens, causal=causal)


@dataclass(frozen=True, kw_only=True)
class DiTConfig(DiTShape):
    """A whole DiT. ``tokens`` is V, the real tokens: [MASK] is not among them."""

    tokens: int
    mlp_ratio: int = 4
    causal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.tokens, self.mlp_ratio) < 1:
            raise ValueError(f"{self}: sizes must be positive")

    def build(self) -> "DiT":
        return DiT(self)


class DiT(nn.Module):
    """``[B, L, W]`` inputs to ``[B, L, W]`` hidden states; logits are ``linear(hidden)``.

    The timestep module is kept so that checkpoints fit, and is fed sigma = 0: the state already
    says how corrupted it is (000 §4.7, 003 A.1).
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_embed = Embedding(config.tokens + 1, config.width)
        self.sigma_map = ZeroTimestep(config.cond_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.output_layer = OutputLayer(config)

    def forward(self, inputs_BLW: Tensor) -> Tensor:
        """Hidden states after the last norm, in the compute dtype."""
        cond_C = self.sigma_map()
        head_dim = self.config.width // self.config.heads
        # Passed as integers: FSDP casts the floating inputs of a block to its compute dtype, and
        # these would be wrong by up to 1/512 in bfloat16.
        turn_2LK = rotary(inputs_BLW.shape[1], head_dim, inputs_BLW.device).view(torch.int32)
        hidden_BLW = inputs_BLW
        for block in self.blocks:
            hidden_BLW = block(hidden_BLW, cond_C, turn_2LK)
        output: Tensor = self.output_layer(hidden_BLW, cond_C)
        return output

    @property
    def values_UW(self) -> Tensor:
        """Input embedding of every slot, the mask row last."""
        return self.vocab_embed.embedding

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        """``weight_VW, bias_V`` of the vocabulary projection."""
        return self.output_layer.linear.weight, self.output_layer.linear.bias

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations of one token's forward and backward pass, head included.

        Counts matrix products (2 per multiply-add, backward twice the forward) and the full
        attention square. The converter's own cost for evidence is left out.
        """
        width, blocks = self.config.width, self.config.blocks
        weights = blocks * (4 + 2 * self.config.mlp_ratio) * width**2 + self.config.tokens * width
        return 3 * (2 * weights + 4 * blocks * length * width)


class Embedding(nn.Module):
    """The slots' input rows. The converter reads the parameter itself, so there is no forward."""

    def __init__(self, slots: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(slots, width))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))


class ZeroTimestep(nn.Module):
    """``c = SiLU(MLP(sinusoid(sigma)))`` at sigma = 0, where the cosines are 1 and the sines 0."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(SINUSOID, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim)
        )

    def forward(self) -> Tensor:
        half = next(self.parameters()).new_ones(SINUSOID // 2)
        return F.silu(self.mlp(torch.cat([half, torch.zeros_like(half)])))


class Block(nn.Module):
    """Attention and MLP, each between an adaptive norm and a gate. Dropout acts in training."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, inner = config.width, config.mlp_ratio * config.width
        self.heads, self.causal, self.dropout = config.heads, config.causal, config.dropout
        self.norm1 = Norm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = Norm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width)
        )
        self.adaLN_modulation = zeroed(nn.Linear(config.cond_dim, 6 * width))
        if config.start == "open":
            for gate_W in self.adaLN_modulation.bias.detach().chunk(6)[2::3]:
                gate_W.fill_(1)

    def forward(self, hidden_BLW: Tensor, cond_C: Tensor, turn_2LK: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(cond_C).chunk(6)
        mixed_BLW = self._mixed(self.norm1(hidden_BLW, shift1, scale1), turn_2LK)
        hidden_BLW = self._add(hidden_BLW, gate1, self.attn_out, mixed_BLW)
        widen, gelu, narrow = self.mlp
        inner_BLM = gelu(widen(self.norm2(hidden_BLW, shift2, scale2)))
        return self._add(hidden_BLW, gate2, narrow, inner_BLM)

    def _add(
        self, hidden_BLW: Tensor, gate_W: Tensor, linear: nn.Module, inputs_BLM: Tensor
    ) -> Tensor:
        update_BLW = gated(linear, gate_W, inputs_BLM)
        return hidden_BLW + F.dropout(update_BLW, self.dropout, self.training)

    def _mixed(self, hidden_BLW: Tensor, turn_2LK: Tensor) -> Tensor:
        qkv_BL3HK = self.attn_qkv(hidden_BLW).unflatten(-1, (3, self.heads, -1))
        query_BHLK, key_BHLK, value_BHLK = qkv_BL3HK.permute(2, 0, 3, 1, 4)
        turn_2LK = turn_2LK.view(torch.float32)
        # One by one: rotated together, each would be copied out of the result, even compiled.
        query_BHLK, key_BHLK = rotate(query_BHLK, turn_2LK), rotate(key_BHLK, turn_2LK)
        mixed_BHLK = F.scaled_dot_product_attention(
            query_BHLK, key_BHLK, value_BHLK, is_causal=self.causal
        )
        return mixed_BHLK.transpose(1, 2).flatten(2)


class OutputLayer(nn.Module):
    """The last adaptive norm, and the vocabulary projection that `DiT.head` hands out."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm_final = Norm(config.width)
        self.linear = zeroed(nn.Linear(config.width, config.tokens))
        self.adaLN_modulation = zeroed(nn.Linear(config.cond_dim, 2 * config.width))
        if config.start == "open":
            nn.init.normal_(self.linear.weight, std=config.width**-0.5)

    def forward(self, hidden_BLW: Tensor, cond_C: Tensor) -> Tensor:
        output: Tensor = self.norm_final(hidden_BLW, *self.adaLN_modulation(cond_C).chunk(2))
        return output


class Norm(nn.Module):
    """LayerNorm with a weight and no bias, then a shift and a scale. It computes in at least
    float32 whatever comes in, and answers in the dtype of the shift, the compute dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden_BLW: Tensor, shift_W: Tensor, scale_W: Tensor) -> Tensor:
        hidden_BLW = precise(hidden_BLW)
        # Scale and shift are one vector each for all positions. As a part of the norm they cost no
        # pass over the positions, and neither do their gradients.
        weight_W = self.weight.to(hidden_BLW) * (1 + scale_W.to(hidden_BLW))
        normed_BLW = F.layer_norm(hidden_BLW, weight_W.shape, weight_W, shift_W.to(hidden_BLW))
        return normed_BLW.to(shift_W.dtype)


def rotary(length: int, head_dim: int, device: torch.device) -> Tensor:
    """``[2, L, K]`` float32 factors of rotary position, base 10000, for `rotate`: the cosines of
    both halves of a head, and the sines, negative for the first half.

    Computed, not stored: a buffer would be rounded with the model and lost on the meta device.
    """
    angle_LK = torch.arange(length, device=device)[:, None] * rotary_frequencies(head_dim, device)
    cos_LK, sin_LK = angle_LK.cos(), angle_LK.sin()
    return torch.stack([torch.cat([cos_LK, cos_LK], 1), torch.cat([-sin_LK, sin_LK], 1)])


def rotary_frequencies(head_dim: int, device: torch.device) -> Tensor:
    """``[K/2]`` radians per position, falling geometrically from 1."""
    share = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1 / 10000**share


def rotate(heads_BHLK: Tensor, turn_2LK: Tensor) -> Tensor:
    """Turn the pairs (k, k + K/2) of every head, ``[..., L, K]``, by the angles of each position.

    turn_2LK: as `rotary` gives it.
    """
    wide, (own_LK, other_LK) = precise(heads_BHLK), turn_2LK
    # A compiler turns `roll` into a mere change of index, in the backward pass too. The result of
    # `cat` would be written to memory.
    other = wide.roll(wide.shape[-1] // 2, dims=-1)
    turned: Tensor = (wide * own_LK + other * other_LK).to(heads_BHLK.dtype)
    return turned


def gated(linear: nn.Module, gate_W: Tensor, inputs_BLM: Tensor) -> Tensor:
    """``gate_W * linear(inputs_BLM)``, ``[B, L, W]``. The gate is multiplied into the weights, so
    that neither it nor its gradient costs a pass over the positions."""
    if type(linear) is not nn.Linear:  # a map with an adapter, which adds to the map's answer
        update_BLW: Tensor = gate_W * linear(inputs_BLM)
        return update_BLW
    bias_W = None if linear.bias is None else gate_W * linear.bias
    return F.linear(inputs_BLM, gate_W[:, None] * linear.weight, bias_W)


def zeroed(linear: nn.Linear) -> nn.Linear:
    """Start a layer at zero."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
