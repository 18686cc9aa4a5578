"""What a text is to MAUVE: the hidden state of a model that has read it.

Shapes: N texts, L positions, F features, B rows of a batch, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dsl.state import State
from pipelines import models
from pipelines.evaluation import hub
from pipelines.evaluation.readers import HubReader, OpenModel, OwnReader
from pipelines.models import ConverterConfig

WHERE = "mauve.featurizer.model"

# From texts, and their rows of ids [N, L] in the data's vocabulary, to features [N, F] float32.
Featurize = Callable[[Sequence[str], np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class HubFeaturizer(HubReader):
    """The last hidden state at a text's last token, as in MAUVE's paper (arXiv 2102.01454, §4).

    Text is cut at `max_tokens` of the model's own tokenizer, to which `<|endoftext|>` means what
    the tokenizer says. A text without any token is read as the one token that begins texts;
    mauve-text would drop it. Features do not depend on the batch, up to rounding.
    """

    def check(self, uri: str) -> None:
        """Have the model on this machine, or say what to do; see `hub.check`."""
        hub.check(self.model, "AutoModel", max_tokens=self.max_tokens, where=WHERE)

    def load(self, device: torch.device | str, open_model: OpenModel) -> Featurize:
        opened = hub.open(self.model, "AutoModel", device, where=WHERE)
        tokenizer, network = opened.tokenizer, opened.network

        @torch.no_grad()
        def featurize(texts: Sequence[str], tokens_NL: np.ndarray) -> np.ndarray:
            cut = {"truncation": True, "max_length": self.max_tokens}
            ids = [row or [opened.start] for row in tokenizer(list(texts), **cut)["input_ids"]]
            features_NF = np.empty((len(ids), network.config.hidden_size), np.float32)
            for batch in hub.batches(ids, self.batch, device):
                read = network(input_ids=batch.ids_BL, attention_mask=batch.mask_BL)
                last_B1 = batch.mask_BL.sum(1, keepdim=True) - 1
                states_BLF = read.last_hidden_state
                last_BF = states_BLF.take_along_dim(last_B1[:, :, None], dim=1).squeeze(1)
                features_NF[batch.rows] = last_BF.cpu().numpy()
            return features_NF

        return featurize


@dataclass(frozen=True, kw_only=True)
class OwnFeaturizer(OwnReader):
    """The offline stand-in: the mean over positions of the hidden states of a model of our own.

    Normally of an AR model; any kind reads the text with every token revealed.
    """

    def check(self, uri: str) -> None:
        """DataError or dsl.WeightsError where there is no such model; `uri` of the registry."""
        models.load(self.model, converter=ConverterConfig(), tracking_uri=uri)

    def load(self, device: torch.device | str, open_model: OpenModel) -> Featurize:
        denoiser = open_model(self.model).denoiser.to(device).eval()

        @torch.no_grad()
        def featurize(texts: Sequence[str], tokens_NL: np.ndarray) -> np.ndarray:
            table_VD = denoiser.table_VD
            features_NF = []
            for first in range(0, len(tokens_NL), self.batch):
                rows_BL = tokens_NL[first : first + self.batch].astype(np.int64)
                tokens_BL = torch.from_numpy(rows_BL).to(device)
                known_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
                hidden_BLH = denoiser.hidden(State.from_tokens(table_VD, tokens_BL, known_BL))
                features_NF.append(hidden_BLH.float().mean(1).cpu().numpy())
            return np.concatenate(features_NF)

        return featurize


AnyFeaturizer = HubFeaturizer | OwnFeaturizer
