"""What is known of every token of a batch: nothing, soft evidence, or the token itself.

Shapes: B rows, L positions, D table dimension, V tokens.
"""

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor


class Knowledge:
    """What is known of every token, as masks."""

    gamma_BL: Tensor
    frozen_BL: Tensor

    @property
    def masked_BL(self) -> Tensor:
        """True where nothing is known: gamma = 0."""
        return self.gamma_BL == 0

    @property
    def evidence_BL(self) -> Tensor:
        """True where there is soft evidence: 0 < gamma < inf."""
        return (self.gamma_BL > 0) & self.gamma_BL.isfinite()

    @property
    def revealed_BL(self) -> Tensor:
        """True where the token is known: gamma = inf."""
        return self.gamma_BL.isinf()


@dataclass(frozen=True)
class OnHost(Knowledge):
    """What decides which tokens of a state are read and moved, as copies on the CPU."""

    gamma_BL: Tensor
    frozen_BL: Tensor


@dataclass(frozen=True)
class State(Knowledge):
    """A batch of token states under the localization channel (003 eq. 1).

    ``gamma_BL`` is each token's SNR in [0, inf] and says how to read the rest:

    - ``gamma = 0``: masked. ``z = 0`` exactly.
    - ``0 < gamma < inf``: evidence. ``z = gamma x + sqrt(gamma) eps``; the token is unknown.
    - ``gamma = inf``: revealed. ``tokens`` holds the id, which is all there is to know.

    ``tokens_BL`` (int64) is 0 where nothing is revealed and ``z_BLD`` is 0 where something is,
    so equal states are equal tensors. ``frozen_BL`` marks tokens that no path may move. Only
    `dsl.channel.transition` moves tokens from one state to another.
    """

    tokens_BL: Tensor
    z_BLD: Tensor
    gamma_BL: Tensor
    frozen_BL: Tensor

    @classmethod
    def masked(
        cls,
        rows: int,
        length: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "State":
        """Zero information everywhere: all gamma 0, z 0, nothing frozen."""
        return cls(
            tokens_BL=torch.zeros(rows, length, dtype=torch.int64, device=device),
            z_BLD=torch.zeros(rows, length, dim, dtype=dtype, device=device),
            gamma_BL=torch.zeros(rows, length, dtype=dtype, device=device),
            frozen_BL=torch.zeros(rows, length, dtype=torch.bool, device=device),
        )

    @classmethod
    def from_tokens(
        cls,
        table_VD: Tensor,
        tokens_BL: Tensor,
        known_BL: Tensor,
        gamma_BL: Tensor | None = None,
    ) -> "State":
        """Start from given text: prompts, infilling, garbled drafts (003 C.1).

        Where ``known_BL`` the token is revealed and frozen, whatever its gamma. Elsewhere
        ``gamma_BL`` says how far the given token is trusted: 0 (the default) not at all, a finite
        SNR as noise-free soft evidence ``z = gamma x_token``, inf as revealed but editable.

        Raises:
            ValueError: shapes are not one ``[B, L]``, tokens are no integers, an id lies outside
                [0, V), or a gamma is negative or NaN.
        """
        if gamma_BL is None:
            gamma_BL = torch.zeros(tokens_BL.shape)
        if tokens_BL.ndim != 2 or not tokens_BL.shape == known_BL.shape == gamma_BL.shape:
            raise ValueError(
                f"tokens {tuple(tokens_BL.shape)}, known {tuple(known_BL.shape)} and gamma "
                f"{tuple(gamma_BL.shape)} must share one shape [B, L]"
            )
        known_BL = known_BL.to(table_VD.device, torch.bool)
        gamma_BL = gamma_BL.to(table_VD).masked_fill(known_BL, torch.inf)
        if not (gamma_BL >= 0).all():
            raise ValueError("gamma must lie in [0, inf]: it is negative or NaN somewhere")
        given_BL = gamma_BL > 0
        # An id that means nothing may be any number.
        tokens_BL = token_ids(tokens_BL.to(table_VD.device).masked_fill(~given_BL, 0), table_VD)
        evidence_BL = given_BL & gamma_BL.isfinite()
        z_BLD = table_VD.new_zeros(*tokens_BL.shape, table_VD.shape[1])
        z_BLD[evidence_BL] = gamma_BL[evidence_BL, None] * table_VD.detach()[tokens_BL[evidence_BL]]
        return cls(
            tokens_BL=tokens_BL.masked_fill(gamma_BL.isfinite(), 0),
            z_BLD=z_BLD,
            gamma_BL=gamma_BL,
            frozen_BL=known_BL,
        )

    def like(self, table_VD: Tensor) -> "State":
        """The same state with ``z`` and ``gamma`` in the dtype and on the device of a table.

        Raises:
            ValueError: ``z`` has another number of dimensions than the table.
        """
        if self.z_BLD.shape[2] != table_VD.shape[1]:
            raise ValueError(
                f"the state has z of {self.z_BLD.shape[2]} dimensions, the table of "
                f"{table_VD.shape[1]}: make the state with the table's"
            )
        moved = State(
            tokens_BL=self.tokens_BL.to(table_VD.device),
            z_BLD=self.z_BLD.to(table_VD),
            gamma_BL=self.gamma_BL.to(table_VD),
            frozen_BL=self.frozen_BL.to(table_VD.device),
        )
        gamma_BL = self.host.gamma_BL.to(table_VD.dtype)
        return moved.with_host(OnHost(gamma_BL, self.host.frozen_BL))

    def rows(self, rows_R: Tensor) -> "State":
        """The sub-batch of the rows with these numbers, which lie on the CPU."""
        there_R = send(rows_R, self.z_BLD.device)
        part = State(**{f.name: getattr(self, f.name)[there_R] for f in fields(self)})
        host = self.host
        return part.with_host(OnHost(host.gamma_BL[rows_R], host.frozen_BL[rows_R]))

    @cached_property
    def host(self) -> OnHost:
        """A copy on the CPU of what shapes depend on.

        The CPU has to wait for a GPU to copy from it, so the copy is made once and passed on.
        """
        return OnHost(self.gamma_BL.cpu(), self.frozen_BL.cpu())

    def with_host(self, host: OnHost) -> "State":
        """This state, with a known `host` set in place. `dataclasses.replace` does not keep it."""
        vars(self)["host"] = host
        return self


def token_ids(tokens_BL: Tensor, table_VD: Tensor) -> Tensor:
    """Whole texts ``[B, L]`` as int64 ids on the device of a table ``[V, D]``.

    Raises:
        ValueError: they are no integers ``[B, L]``, or one lies outside [0, V).
    """
    if tokens_BL.ndim != 2 or tokens_BL.is_floating_point():
        raise ValueError(
            f"texts must be ids [B, L], got {tokens_BL.dtype} of shape {tuple(tokens_BL.shape)}"
        )
    tokens_BL = tokens_BL.long()
    if not ((tokens_BL >= 0) & (tokens_BL < len(table_VD))).all():
        raise ValueError(f"a token id lies outside [0, {len(table_VD)})")
    return tokens_BL.to(table_VD.device)


def flat(where_BL: Tensor) -> Tensor:
    """Flat positions ``[N]`` in [0, B·L) at which a ``[B, L]`` mask is true."""
    return where_BL.flatten().nonzero().squeeze(1)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to another device without making the CPU wait.

    The tensor is pinned for that. To copy from memory that is not pinned, the CPU would wait until
    a GPU has computed everything that was ordered before.
    """
    if tensor.is_cpu and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=tensor.is_cpu)
