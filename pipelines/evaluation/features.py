"""What MAUVE compares texts by: a network's hidden state at the last token of each, or the mean
over its tokens. Every state has read its own token and, where the network is causal, none after it.

Shapes: N texts, L positions, F features, B rows of a batch, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsl.denoiser import Denoiser
from dsl.state import State
from infra.errors import ConfigError
from pipelines.evaluation import hub
from pipelines.evaluation.held_out import HeldOut
from pipelines.evaluation.readers import HubReader, OwnReader

if TYPE_CHECKING:
    from pipelines.evaluation.workspace import Workspace

EQUAL = 0.02  # by which mean lengths may differ: cut text is divided into other tokens at its ends

Pooling = Literal["last", "mean"]


class Features(NamedTuple):
    """``[N, F]`` float32 and how many tokens of each text were read for it, ``[N]``."""

    features_NF: np.ndarray
    tokens_N: np.ndarray


# From texts, and their rows of ids [N, L] in the data's vocabulary.
Featurize = Callable[[Sequence[str], np.ndarray], Features]


def same_length(own_N: np.ndarray, real_M: np.ndarray) -> bool:
    """Whether texts have about as many tokens as others, in the mean."""
    return bool(abs(own_N.mean() - real_M.mean()) <= EQUAL * real_M.mean())


def pool(states_BLH: Tensor, mask_BL: Tensor, pooling: Pooling) -> Tensor:
    """The state at the last token of each row, or the mean over its tokens, ``[B, H]``."""
    size_B1 = mask_BL.sum(1, keepdim=True)
    if pooling == "mean":
        return (states_BLH * mask_BL[:, :, None]).sum(1) / size_B1
    return states_BLH.take_along_dim(size_B1[:, :, None] - 1, dim=1).squeeze(1)


@dataclass(frozen=True, kw_only=True)
class HubFeaturizer(HubReader):
    """As in MAUVE's paper (arXiv 2102.01454, §4): the last hidden layer of a model of others.

    Text is cut at `max_tokens` of the model's own tokenizer, to which `<|endoftext|>` means what
    the tokenizer says; that is the length at which texts are compared, so real text must have as
    many tokens. A text without any token is read as the one token that begins texts; mauve-text
    would drop it. Features do not depend on the batch, up to rounding.
    """

    pooling: Pooling = "last"

    head: ClassVar[hub.Head] = "AutoModel"

    def check_data(self, key: str, held_out: HeldOut) -> None:
        """ConfigError where held-out texts end before `max_tokens`."""
        import transformers

        folder = hub.find(self.model, self.where(key))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **hub.CAUTION)
        texts = [held_out.vocabulary.decode(row_L) for row_L in held_out.rows_NL.tolist()]
        size_N = np.array([len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]])
        if not same_length(np.minimum(size_N, self.max_tokens), np.array([self.max_tokens])):
            why = (
                f"{self.max_tokens} tokens, and held-out texts have {size_N.min()} to "
                f"{size_N.max()} of {self.model}: MAUVE compares texts of equal length"
            )
            raise ConfigError(f"{key}.max_tokens", why, f"At most {size_N.min()}")

    def load(self, key: str, device: torch.device | str) -> Featurize:
        opened = self.open(key, device)
        tokenizer, network = opened.tokenizer, opened.network

        @torch.no_grad()
        def featurize(texts: Sequence[str], tokens_NL: np.ndarray) -> Features:
            cut = {"truncation": True, "max_length": self.max_tokens}
            ids = [row or [opened.start] for row in tokenizer(list(texts), **cut)["input_ids"]]
            features_NF = np.empty((len(ids), network.config.hidden_size), np.float32)
            for batch in hub.batches(ids, self.batch, device):
                read = network(input_ids=batch.ids_BL, attention_mask=batch.mask_BL)
                features_BF = pool(read.last_hidden_state.float(), batch.mask_BL, self.pooling)
                features_NF[batch.rows] = features_BF.cpu().numpy()
            return Features(features_NF, np.array([len(row) for row in ids], np.int64))

        return featurize


@dataclass(frozen=True, kw_only=True)
class OwnFeaturizer(OwnReader):
    """The offline stand-in: the hidden states of a model of our own.

    Normally of an AR model; any kind reads the text with every token revealed.
    """

    pooling: Pooling = "last"

    def load_in(self, key: str, workspace: Workspace) -> Featurize:
        denoiser = self.open(key, workspace)

        @torch.no_grad()
        def featurize(texts: Sequence[str], tokens_NL: np.ndarray) -> Features:
            features_NF = []
            for tokens_BL in self.batches(tokens_NL):
                states_BLH = _states(denoiser, tokens_BL)
                mask_BL = torch.ones(states_BLH.shape[:2], device=states_BLH.device).long()
                features_NF.append(pool(states_BLH, mask_BL, self.pooling).cpu().numpy())
            rows, length = tokens_NL.shape
            return Features(np.concatenate(features_NF), np.full(rows, length))

        return featurize


def _states(denoiser: Denoiser, tokens_BL: Tensor) -> Tensor:
    """The state at each token, ``[B, L, H]`` float32."""
    causal = denoiser.config.backbone.causal
    if causal:  # a token is read one place behind its own, so one more makes room for the last
        tokens_BL = torch.nn.functional.pad(tokens_BL, (0, 1))
    known_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
    states_BLH = denoiser.hidden(State.from_tokens(denoiser.table_VD, tokens_BL, known_BL)).float()
    return states_BLH[:, 1:] if causal else states_BLH


AnyFeaturizer = HubFeaturizer | OwnFeaturizer
