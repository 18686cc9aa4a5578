"""Start from a model of the `transformers` library: any masked language model that reads embedded
inputs, or a causal one that is adapted to see both sides, as DiffuLLaMA does (arXiv 2410.17891).

The library is imported only where such a model is opened. Only safetensors are read. Code that
comes with a model is run only where the caller says so.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dsl import foreign
from dsl.denoiser import BackboneConfig, Denoiser, DenoiserConfig
from dsl.errors import AdaptationError, VocabularyError, WeightsError
from dsl.foreign import (
    ForeignBackbone,
    ForeignConfig,
    Trained,
    bidirectional,
    count_blocks,
    is_source,
    opened_by,
)
from dsl.vocabulary import TOKENIZER, Vocabulary
from dsl.weights import CONFIG, read_json

# How a causal model becomes one that sees both sides: at each position it answers for the next one,
# as it was trained to ("shift"), or for the position itself ("no_shift").
Adapt = Literal["shift", "no_shift"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


def is_folder_of(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a model of the library, and not one of the public MDLM code."""
    file = Path(path) / CONFIG
    config = read_json(file) if file.is_file() else {}
    return "model_type" in config and "n_blocks" not in config


def from_transformers(
    path: str | os.PathLike[str],
    *,
    adapt: Adapt | None = None,
    embed_dim: int = 64,
    beta: float | None = None,
    mask_prior: float = 0.99,
    skip: bool = True,
    trust_remote_code: bool = False,
) -> Denoiser:
    """A denoiser around a pretrained network, float32 on the CPU, in evaluation mode.

    At gamma in {0, inf} and ``mask_prior`` -> 1 a masked model's posterior is the model's own, less
    the special tokens that no text holds. Those that a text may hold, which are the ends of a
    document and the unknown token, are predicted like any other. A causal model gets a mask row,
    the mean of its embedding. The table is new and random.

    Args:
        path: a folder that `save_pretrained` wrote, weights and tokenizer.
        adapt: how a causal model is used: ``"shift"`` keeps its shift by one position,
            ``"no_shift"`` drops it. None for a masked model. For a model that the library does not
            know, use ``"shift"`` if its output predicts the next position, as Dream's does.
        embed_dim: D of the new table.
        beta, mask_prior: where the converter starts (see `dsl.converter.Converter`).
        skip: whether evidence skips the backbone (see `dsl.converter.ConverterConfig`).
        trust_remote_code: whether code beside the weights is run, where the library does not know
            the model itself. The denoiser's configuration keeps that code.

    Raises:
        WeightsError: anything but a whole model of the library with a tokenizer that fits it; a
            masked model without a mask token.
        AdaptationError: a causal model without ``adapt``, a masked one with it, one that does not
            see both sides of a position, one with a step of its own at its embedding or its
            vocabulary projection (Gemma2 caps its logits), one that does not run without these,
            one that cannot be built again from its configuration, or one that only untrusted code
            knows.
        ValueError: ``embed_dim``, ``beta`` or ``mask_prior`` out of range, or another ``adapt``.
    """
    if adapt not in (None, *get_args(Adapt)):
        raise ValueError(f"adapt must be None or one of {get_args(Adapt)}, got {adapt!r}")
    folder = Path(path)
    declared = read_json(folder / CONFIG)
    trained, code = _kind(folder, declared, adapt, trust_remote_code)
    local = {"trust_remote_code": bool(code), "local_files_only": True}
    spoken = _tokenizer(folder, declared, trained, local)
    network = _network(folder, trained, opened_by(declared, trained, code), local)
    rows = len(network.get_input_embeddings().weight)
    if spoken.tokens > rows:
        raise WeightsError(
            f"{folder}: its tokenizer has {spoken.tokens} tokens, its embedding {rows} rows. "
            "Take both from one and the same model."
        )
    backbone = ForeignConfig(
        tokens=spoken.tokens,
        blocks=count_blocks(network),
        settings=network.config.to_diff_dict(),
        trained=trained,
        start=spoken.start if adapt == "shift" else None,
        mask=spoken.mask,
        never=spoken.never,
        code=code,
    )
    _require_rebuilt(backbone, folder)
    config = DenoiserConfig(
        backbone=backbone, embed_dim=embed_dim, beta=beta, mask_prior=mask_prior, skip=skip
    )
    asked_1L = _some_tokens(network, spoken)
    own_1LX = _logits(network, folder, input_ids=asked_1L)
    taken = ForeignBackbone(backbone, network)
    _require_its_own_answer(taken, asked_1L, own_1LX, folder)
    bidirectional(network)
    denoiser = Denoiser(config, taken).eval()
    _require_both_sides(denoiser, folder)
    return denoiser


def adaptation(config: BackboneConfig) -> Adapt | None:
    """How a network was adapted; None for one that was not."""
    if not isinstance(config, ForeignConfig) or config.trained == "masked":
        return None
    return "no_shift" if config.start is None else "shift"


def _kind(
    folder: Path, declared: Mapping[str, Any], adapt: Adapt | None, trust_remote_code: bool
) -> tuple[Trained, dict[str, str]]:
    """What the model of a folder was trained for, from its configuration alone, and the source
    files that it needs, by name: none where the library knows the model."""
    try:
        from transformers.models.auto import modeling_auto
    except ImportError as error:
        raise WeightsError(
            f"{folder}: a model of the transformers library, which is not installed. "
            "Run: pip install 'discrete-stochastic-localization[hub]'"
        ) from error
    kind = str(declared.get("model_type"))
    masked = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    causal = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    named = str(declared.get("architectures") or "")
    if not masked and not causal:
        if not declared.get("auto_map"):
            raise WeightsError(
                f"{folder}: {kind!r} is no masked or causal language model that the installed "
                "transformers knows. Take one such as BERT, or update the library."
            )
        if not trust_remote_code:
            raise AdaptationError(
                f"{folder}: {kind!r} is known only to code that comes with the weights. Read that "
                "code, and if you trust it, have it run by trust_remote_code=True"
            )
        sources = [path for path in sorted(folder.iterdir()) if is_source(path.name)]
        if not sources or "--" in str(declared["auto_map"]):
            raise WeightsError(
                f"{folder}: the code that knows {kind!r} lies in another place. Copy its files "
                f"beside the weights, and have auto_map in {CONFIG} name them there"
            )
        code = {path.name: path.read_text("utf-8", errors="replace") for path in sources}
        return "causal" if adapt else "masked", code
    is_causal = causal and (not masked or "ForCausalLM" in named or "LMHead" in named)
    if is_causal and adapt is None:
        raise AdaptationError(
            f"{folder}: {kind!r} is a causal model, which sees the tokens before a position alone. "
            "Say how to adapt it: adapt=shift, or adapt=no_shift"
        )
    if not is_causal and adapt is not None:
        raise AdaptationError(
            f"{folder}: {kind!r} is a masked model, and needs no adaptation. Leave adapt out"
        )
    return "causal" if is_causal else "masked", {}


@dataclass(frozen=True)
class _Spoken:
    """What a tokenizer says: how many tokens there are, and which ids are special."""

    tokens: int
    mask: int | None
    start: int
    never: tuple[int, ...]


def _tokenizer(
    folder: Path, declared: Mapping[str, Any], trained: Trained, local: Mapping[str, bool]
) -> _Spoken:
    import transformers

    try:
        vocabulary = Vocabulary.load(folder)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, **local)
    except VocabularyError as error:
        raise WeightsError(
            f"{folder}: no tokenizer that can be used ({error}). "
            f"Save it there with transformers, which writes {TOKENIZER}."
        ) from error
    except Exception as error:  # the library raises whatever a file makes it stumble over
        raise _unusable(folder, error) from error
    mask = tokenizer.mask_token_id
    if mask is None:
        mask = declared.get("mask_token_id")
    if mask not in range(vocabulary.size):
        mask = None
    if mask is None and trained == "masked":
        raise WeightsError(
            f"{folder}: its tokenizer names no mask token among its {vocabulary.size} tokens. Give "
            "a model that was trained with one, or name it as mask_token in tokenizer_config.json "
            f"or mask_token_id in {CONFIG}."
        )
    spoken = {vocabulary.eos, vocabulary.bos, tokenizer.unk_token_id}
    special = {id for id in (*tokenizer.all_special_ids, mask) if id in range(vocabulary.size)}
    return _Spoken(
        tokens=vocabulary.size,
        mask=mask,
        start=vocabulary.bos,
        never=tuple(sorted(special - spoken)),
    )


def _network(folder: Path, trained: Trained, opener: str, local: Mapping[str, bool]) -> Any:
    """The model with its weights."""
    import transformers

    names = [path.name for path in folder.iterdir()]
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise WeightsError(
            f"{folder}: its weights are {pickles[0]} alone, a pickle; only safetensors are read. "
            "Save the model again with a current transformers."
        )
    try:
        network, report = getattr(transformers, opener).from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **local,
        )
        if network.get_output_embeddings() is None:
            raise ValueError("it has no vocabulary projection")
    except Exception as error:  # as above
        raise _unusable(folder, error) from error
    if missing := sorted(report["missing_keys"]):
        raise WeightsError(
            f"{folder}: no weights for {missing[0]} ({len(missing)} are missing), so it is not a "
            f"whole {trained} language model. Name a folder that was saved with them."
        )
    return network


def _some_tokens(network: Any, spoken: _Spoken) -> Tensor:
    """``[1, L]`` ids to compare answers on, the mask token's last if there is one.

    Padding is left out, because some networks treat it apart.
    """
    silent = {*spoken.never, getattr(network.config, "pad_token_id", None)}
    ids = [id for id in range(spoken.tokens) if id not in silent][:8]
    return torch.tensor([ids + [spoken.mask] * (spoken.mask is not None)])


@torch.no_grad()
def _logits(network: Any, folder: Path, **given: Tensor) -> Tensor:
    try:
        logits_1LX: Tensor = network(**given).logits
    except Exception as error:  # as above
        raise _unusable(folder, error) from error
    return logits_1LX


def _require_rebuilt(backbone: ForeignConfig, folder: Path) -> None:
    """AdaptationError where a saved denoiser could never be loaded: its network is built again."""
    try:
        foreign.network(backbone)
    except ValueError as error:
        raise AdaptationError(
            f"{folder}: {_reason(error)}, so a saved denoiser could not be loaded. "
            "Take another model, such as BERT or Llama"
        ) from error


@torch.no_grad()
def _require_its_own_answer(
    taken: ForeignBackbone, asked_1L: Tensor, own_1LX: Tensor, folder: Path
) -> None:
    """AdaptationError unless the network, its embedding and projection taken out, still gives its
    own logits ``own_1LX``. Its attention must not have been changed yet."""
    with _bare(folder):
        hidden_1LH = taken.network(inputs_embeds=taken.values_UW[asked_1L]).logits
        ours_1LV = F.linear(hidden_1LH, taken.head[0], taken.bias_V)
    own_1LV = own_1LX[..., : taken.config.tokens]
    apart_1LV = (ours_1LV - own_1LV).abs()
    # Relative to the median: some networks give forbidden tokens the lowest float there is.
    if apart_1LV.max() > 1e-4 * own_1LV.abs().median():
        raise AdaptationError(
            f"{folder}: the network has a step of its own at its embedding or at its vocabulary "
            "projection, such as a cap on its logits, so it cannot be taken without them (logits "
            f"differ by {apart_1LV.max():.2g}). Take another model, such as BERT or Llama"
        )


@torch.no_grad()
def _require_both_sides(denoiser: Denoiser, folder: Path) -> None:
    """AdaptationError where the token behind a position does not change the answer there. Some
    networks stay causal whatever their configuration says, and cannot be adapted."""
    values_UW = denoiser.backbone.values_UW
    drawn_BLW = torch.randn(1, 2, values_UW.shape[1], generator=torch.Generator().manual_seed(0))
    first_BLW = values_UW.std() * drawn_BLW
    second_BLW = first_BLW * torch.tensor([1.0, -1.0])[:, None]
    with _bare(folder):
        here_W, there_W = (denoiser.backbone(rows)[0, 0] for rows in (first_BLW, second_BLW))
    if (here_W - there_W).abs().max() <= 1e-6 * here_W.abs().max():
        raise AdaptationError(
            f"{folder}: the network does not look at the tokens behind a position, so it cannot be "
            "a denoiser. Take a masked model, or a causal one such as Llama"
        )


@contextmanager
def _bare(folder: Path) -> Iterator[None]:
    """AdaptationError for whatever a network raises that runs without its two ends."""
    try:
        yield
    except Exception as error:  # as above
        raise AdaptationError(
            f"{folder}: the network does not run without its embedding and its vocabulary "
            f"projection ({_reason(error)}). Take another model, such as BERT or Llama"
        ) from error


def _unusable(folder: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{folder}: transformers cannot open it ({_reason(error)}). Copy it again.")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
