"""Start from a model of the `transformers` library: any masked language model that reads embedded
inputs, or a causal one that is adapted to see both sides, as DiffuLLaMA does (arXiv 2410.17891).

The library is imported only where such a model is opened. Only safetensors are read, and no code
that comes with a model is run.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dsl.denoiser import BackboneConfig, Denoiser, DenoiserConfig
from dsl.errors import AdaptationError, VocabularyError, WeightsError
from dsl.foreign import OPENED_BY, ForeignBackbone, ForeignConfig, Trained, bidirectional
from dsl.vocabulary import TOKENIZER, Vocabulary
from dsl.weights import CONFIG, read_json

# How a causal model becomes one that sees both sides: at each position it answers for the next one,
# as it was trained to ("shift"), or for the position itself ("no_shift").
Adapt = Literal["shift", "no_shift"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
LOCAL = {"trust_remote_code": False, "local_files_only": True}


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
) -> Denoiser:
    """A denoiser around a pretrained network, float32 on the CPU, in evaluation mode.

    At gamma in {0, inf} and ``mask_prior`` -> 1 a masked model's posterior is the model's own, less
    the special tokens that no text holds. Those that a text may hold, which are the ends of a
    document and the unknown token, are predicted like any other. A causal model gets a mask row,
    the mean of its embedding. The table is new and random.

    Args:
        path: a folder that `save_pretrained` wrote, weights and tokenizer.
        adapt: how a causal model is used: ``"shift"`` keeps its shift by one position,
            ``"no_shift"`` drops it. None for a masked model.
        embed_dim: D of the new table.
        beta, mask_prior: where the converter starts (see `dsl.converter.Converter`).
        skip: whether evidence skips the backbone (see `dsl.converter.ConverterConfig`).

    Raises:
        WeightsError: anything but a whole model of the library with a tokenizer that fits it; a
            masked model without a mask token.
        AdaptationError: a causal model without ``adapt``, a masked one with it, or a model of a
            kind that only code beside its weights knows.
        ValueError: ``embed_dim``, ``beta`` or ``mask_prior`` out of range.
    """
    folder = Path(path)
    trained = _trained(folder, adapt)
    spoken = _tokenizer(folder, trained)
    network = _network(folder, trained)
    rows = len(network.get_input_embeddings().weight)
    if spoken.tokens > rows:
        raise WeightsError(
            f"{folder}: its tokenizer has {spoken.tokens} tokens, its embedding {rows} rows. "
            "Take both from one and the same model."
        )
    backbone = ForeignConfig(
        tokens=spoken.tokens,
        blocks=network.config.num_hidden_layers,
        settings=network.config.to_diff_dict(),
        trained=trained,
        start=spoken.start if adapt == "shift" else None,
        mask=spoken.mask,
        never=spoken.never,
    )
    config = DenoiserConfig(
        backbone=backbone, embed_dim=embed_dim, beta=beta, mask_prior=mask_prior, skip=skip
    )
    return Denoiser(config, ForeignBackbone(backbone, bidirectional(network))).eval()


def adaptation(config: BackboneConfig) -> Adapt | None:
    """How a network was adapted; None for one that was not."""
    if not isinstance(config, ForeignConfig) or config.trained == "masked":
        return None
    return "no_shift" if config.start is None else "shift"


def _trained(folder: Path, adapt: Adapt | None) -> Trained:
    """What the model of a folder was trained for, from its configuration alone."""
    try:
        from transformers.models.auto import modeling_auto
    except ImportError as error:
        raise WeightsError(
            f"{folder}: a model of the transformers library, which is not installed. "
            "Run: pip install 'discrete-stochastic-localization[hub]'"
        ) from error
    declared = read_json(folder / CONFIG)
    kind = str(declared.get("model_type"))
    masked = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    causal = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    named = str(declared.get("architectures") or "")
    if not masked and not causal:
        if declared.get("auto_map"):
            raise AdaptationError(
                f"{folder}: {kind!r} is known only to code that comes with the weights, and such "
                "code is never run. Take a model that transformers knows itself"
            )
        raise WeightsError(
            f"{folder}: {kind!r} is no masked or causal language model that the installed "
            "transformers knows. Take one such as BERT, or update the library."
        )
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
    return "causal" if is_causal else "masked"


@dataclass(frozen=True)
class _Spoken:
    """What a tokenizer says: how many tokens there are, and which ids are special."""

    tokens: int
    mask: int | None
    start: int
    never: tuple[int, ...]


def _tokenizer(folder: Path, trained: Trained) -> _Spoken:
    import transformers

    try:
        vocabulary = Vocabulary.load(folder)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, **LOCAL)
    except VocabularyError as error:
        raise WeightsError(
            f"{folder}: no tokenizer that can be used ({error}). "
            f"Save it there with transformers, which writes {TOKENIZER}."
        ) from error
    except Exception as error:  # the library raises whatever a file makes it stumble over
        raise _unusable(folder, error) from error
    mask = tokenizer.mask_token_id
    if mask is None and trained == "masked":
        raise WeightsError(
            f"{folder}: its tokenizer names no mask token. Give a model that was trained with one, "
            "or name it as mask_token in tokenizer_config.json."
        )
    spoken = {vocabulary.eos, vocabulary.bos, tokenizer.unk_token_id}
    special = {id for id in tokenizer.all_special_ids if id < vocabulary.size}
    return _Spoken(
        tokens=vocabulary.size,
        mask=mask if mask is not None and mask < vocabulary.size else None,
        start=vocabulary.bos,
        never=tuple(sorted(special - spoken)),
    )


def _network(folder: Path, trained: Trained) -> Any:
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
        network, report = getattr(transformers, OPENED_BY[trained]).from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **LOCAL,
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


def _unusable(folder: Path, error: Exception) -> WeightsError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return WeightsError(f"{folder}: transformers cannot open it ({reason}). Copy it again.")
