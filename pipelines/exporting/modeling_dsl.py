"""A DSL model as a model of the `transformers` library: a masked language model that can also draw
texts along any path of signal-to-noise ratios (SNR).

    from transformers import AutoModelForMaskedLM, AutoTokenizer

    model = AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
    ids_BL = model.generate(rows=4, length=128, seed=0)
    print(tokenizer.batch_decode(ids_BL))

`pipelines/export.py` joins this file with all that it needs of the package `dsl`, so that a folder
needs torch and transformers alone. Apache-2.0.

Shapes: B rows, L positions, V tokens, N given tokens.
"""

import math
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import MaskedLMOutput

from dsl import plain
from dsl.backbone import precise
from dsl.denoiser import Denoiser, DenoiserConfig
from dsl.paths import choose, from_dict
from dsl.sampling import sample
from dsl.state import State
from dsl.truncation import Convention, Truncated


class DSLConfig(PretrainedConfig):
    """What `config.json` says: ``denoiser``, the network, ``metadata``, how it was trained, and
    ``mask_token_id``, which marks the positions to be predicted or drawn."""

    model_type = "dsl"

    def __init__(
        self,
        denoiser: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        mask_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.denoiser = dict(denoiser or {})
        self.metadata = dict(metadata or {})
        self.mask_token_id = mask_token_id
        kwargs.pop("sha256", None)  # of the files it came with, not of those it is saved beside
        super().__init__(**kwargs)


class DSLForMaskedLM(PreTrainedModel, GenerationMixin):
    """The denoiser behind the interface of a masked language model."""

    config_class = DSLConfig
    base_model_prefix = "denoiser"  # files hold the denoiser's own names
    accepts_loss_kwargs = False  # `forward` ignores `num_items_in_batch`: its loss is a mean

    def __init__(self, config: DSLConfig) -> None:
        super().__init__(config)
        self.denoiser = Denoiser(plain.read(DenoiserConfig, config.denoiser, "denoiser"))
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Nothing to do: every weight comes from the file."""

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As for any model, under the denoiser's own names: `dsl.load` opens the folder, too."""
        tensors = self.state_dict() if state_dict is None else state_dict
        own = {name.removeprefix("denoiser."): tensor for name, tensor in tensors.items()}
        super().save_pretrained(save_directory, state_dict=own, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As for any model; the names may be those of saved files, which a trainer resumes from."""
        own = {f"denoiser.{n.removeprefix('denoiser.')}": t for n, t in state_dict.items()}
        return super().load_state_dict(own, *args, **kwargs)

    def get_input_embeddings(self) -> None:
        """None: the rows belong to the backbone, and are mixed where a token is evidence."""

    def get_output_embeddings(self) -> None:
        """None, as above."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits ``[B, L, V]`` at the endpoints: the mask id is SNR 0, other tokens infinity.

        Args:
            input_ids: ``[B, L]``.
            attention_mask: ones; rows have one length, and no padding.
            labels: ``[B, L]``, ids to be predicted, -100 elsewhere; the loss is their mean in nats.

        Raises:
            ValueError: padded rows, or an id that is no token.
        """
        _require_no_padding(attention_mask)
        known_BL = input_ids != self.config.mask_token_id
        state = State.from_tokens(self.denoiser.table_VD, input_ids * known_BL, known_BL)
        state = state.like(self.denoiser.table_VD)
        logits_BLV = precise(F.linear(self.denoiser.hidden(state), *self.denoiser.backbone.head))
        loss = None if labels is None else F.cross_entropy(logits_BLV.mT, labels)
        return MaskedLMOutput(loss=loss, logits=logits_BLV)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        rows: int = 1,
        length: int | None = None,
        path: str | Mapping[str, Any] | None = None,
        budget: int | None = None,
        seed: int = 0,
        first_row: int = 0,
        snr: float | None = None,
        temperature: float = 1.0,
        nucleus: float = 1.0,
        convention: Convention = "keep",
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Ids ``[B, L]``, drawn along a path in at most ``budget`` calls of the network.

        Args:
            input_ids: ``[B, N]``. Every mask id is to be drawn; other tokens stay, or, with
                ``snr``, are evidence of that SNR, which the sample may overrule. Positions behind
                the N given ones are to be drawn. None: nothing is given.
            rows: B, where nothing or one row is given.
            length: L, at least N. By default N where a given token is a mask id or evidence, else
                the length of the rows that the model was trained on.
            path: a kind, such as ``"masked"``, or a mapping with its settings, such as
                ``{"kind": "sentence_sde", "gamma_max": 20}``. By default `generation_config.path`.
            budget: calls, by default `generation_config.budget` where its path is taken.
            seed: the draws of a row are keyed by it and the row's number, from ``first_row``.
            temperature, nucleus, convention: they sharpen every answer of the network.

        Raises:
            ValueError: a path, a budget, a length or an id that does not fit.
        """
        _require_no_padding(attention_mask)
        if budget is not None and budget < 1:
            raise ValueError(f"budget must be at least one call, got {budget}")
        state = self._state(input_ids, rows, length, snr)
        if path is None:
            path = getattr(self.generation_config, "path", None)
            budget = budget or getattr(self.generation_config, "budget", None)
        wanted, calls = choose(
            None if path is None else from_dict(path),
            budget,
            length=state.gamma_BL.shape[1],
            causal=self.denoiser.config.backbone.causal,
        )
        denoiser = Truncated(self.denoiser, temperature, nucleus, convention)
        drawn = sample(denoiser, wanted, state, budget=calls, seed=seed, first_row=first_row)
        return drawn.tokens_BL

    def _state(
        self, input_ids: Tensor | None, rows: int, length: int | None, snr: float | None
    ) -> State:
        """Where sampling starts from."""
        if snr is not None and not 0 < snr < math.inf:
            raise ValueError(f"snr must be positive and finite, got {snr}")
        given_BN = torch.zeros(1, 0, dtype=torch.int64) if input_ids is None else input_ids.cpu()
        if len(given_BN) == 1:
            given_BN = given_BN.expand(rows, -1)
        known_BN = given_BN != self.config.mask_token_id
        given = given_BN.shape[1]
        if length is None:
            whole = given and (snr is not None or not known_BN.all())
            length = given if whole else self.config.metadata.get("length")
        if length is None or length < max(given, 1):
            raise ValueError(f"length must be at least the {given} tokens given, got {length}")
        shape = (0, length - given)
        tokens_BL = F.pad(given_BN * known_BN, shape)
        known_BL = F.pad(known_BN, shape)
        gamma_BL = torch.where(known_BL, math.inf if snr is None else snr, 0.0)
        return State.from_tokens(
            self.denoiser.table_VD.detach(), tokens_BL, gamma_BL.isinf(), gamma_BL
        )


def _require_no_padding(attention_mask: Tensor | None) -> None:
    if attention_mask is not None and not attention_mask.all():
        raise ValueError("rows must have one length: a DSL model knows no padding")
