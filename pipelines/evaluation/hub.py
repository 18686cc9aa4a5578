"""Models of the Hugging Face hub, by folder or by name; a name is looked for on this machine first.
Only safetensors are read: nothing is unpickled, and no code that comes with a model is run.

Shapes: B sequences of a batch, L positions.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dsl.precision import Precision, dtype_of, products_in
from infra.errors import ConfigError, DataError, InfraError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
FILES = (
    CONFIG, WEIGHTS, INDEX, "model-*-of-*.safetensors", *TOKENIZERS, "merges.txt",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
CAUTION = {"trust_remote_code": False, "local_files_only": True}
FIX = "Copy it again, or name another that the transformers library knows"
LIKE = 3 / 4  # of the longest sequence's length, the least that joins its batch
PATIENCE_S = 3.0  # for each address that the hub's name has

Head = Literal["AutoModel", "AutoModelForCausalLM"]


class Opened(NamedTuple):
    """``network`` in evaluation mode; ``start`` is the id that opens a text."""

    tokenizer: Any
    network: Any
    start: int


def check(model: str, head: Head, *, max_tokens: int, where: str) -> None:
    """Make sure that a model is on this machine and can be used; its weights are not loaded.

    where: the dotted path of the setting that names it.

    Raises ConfigError for more tokens than it has positions, DataError for a model that is not
    there or cannot be used, InfraError where the hub would have to be asked and does not answer.
    """
    seen = _look_at(model, head, where)
    # None where positions are relative.
    embedded = getattr(seen.config, "max_position_embeddings", None)
    positions = min(embedded or math.inf, seen.tokenizer.model_max_length)
    if max_tokens > positions:
        why = f"{max_tokens} tokens, but {model} takes {positions}"
        raise ConfigError(f"{where.rpartition('.')[0]}.max_tokens", why, f"At most {positions}")


def open(
    model: str,
    head: Head,
    device: torch.device | str,
    *,
    where: str,
    precision: Precision = "auto",
) -> Opened:
    """A model on a device, its weights in float32; the errors of `check` but for ConfigError."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it would report of the weights is looked at below
    seen = _look_at(model, head, where)
    try:
        network, report = getattr(transformers, head).from_pretrained(
            seen.folder,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **CAUTION,
        )
    except Exception as error:  # the library raises whatever a file makes it stumble over
        raise _unusable(model, where, error) from error
    # The library fills such weights at random. The output of a pooler is not used here.
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:
        why = f"{model} has no weights for {missing[0]} ({len(missing)} are missing)"
        raise DataError(where, why, "Name a model that was saved with them")
    network.config.use_cache = False
    _fuse_activations(network)
    network = network.to(device).eval()
    _lower(network, dtype_of(precision, device))
    return Opened(seen.tokenizer, network, seen.start)


def _fuse_activations(network: Any) -> None:
    """GPT-2's GELU by torch's own kernel: the same formula, in one pass where it takes eight."""
    from transformers.activations import NewGELUActivation

    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def _lower(network: Any, dtype: torch.dtype) -> None:
    """Have a network compute its matrix products in a dtype, but for the logits.

    Logits of GPT-2 lie around -100, where neighbours in bfloat16 are half a nat apart.
    """
    if dtype == torch.float32:
        return
    forward, device = network.forward, network.device

    def lowered(**inputs: Any) -> Any:
        with products_in(dtype, device):
            return forward(**inputs)

    network.forward = lowered
    if (head := network.get_output_embeddings()) is not None:
        project = head.forward

        def exact(hidden: Tensor) -> Tensor:
            with torch.autocast(device.type, enabled=False):
                return project(hidden.float())

        head.forward = exact


def find(model: str, where: str) -> Path:
    """The folder with a model's files: a local one, the hub's cache, or downloaded into it."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder = Path(model).expanduser()
    if folder.is_dir():
        if lack := _lack_of(folder):
            raise DataError(where, f"{model}: {lack}", "Give a folder of `save_pretrained`")
        return folder
    try:
        config = try_to_load_from_cache(model, CONFIG)
    except HFValidationError:
        why = f"{model}: no such folder, and no name that a model of the hub could have"
        raise DataError(where, why, "Name one such as gpt2-large or owner/name") from None
    if isinstance(config, str) and not _lack_of(Path(config).parent):
        return Path(config).parent
    return _download(model, where)


class Batch(NamedTuple):
    """Sequences padded on the right, and the places ``rows`` they have among all of them."""

    rows: list[int]
    ids_BL: Tensor
    mask_BL: Tensor


def batches(
    sequences: Sequence[Sequence[int]], size: int, device: torch.device | str
) -> Iterator[Batch]:
    """Sequences of similar length together, the longest first, so that memory runs out at once or
    never."""
    order = sorted(range(len(sequences)), key=lambda row: -len(sequences[row]))
    while order:
        # Much shorter ones would mostly be padding: they come in a later batch.
        least = LIKE * len(sequences[order[0]])
        rows = [row for row in order[:size] if len(sequences[row]) >= least]
        order = order[len(rows) :]
        lengths_B = torch.tensor([len(sequences[row]) for row in rows])
        mask_BL = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
        ids_BL = torch.zeros(mask_BL.shape, dtype=torch.int64)
        ids_BL[mask_BL] = torch.tensor([token for row in rows for token in sequences[row]])
        yield Batch(rows, ids_BL.to(device), mask_BL.long().to(device))


def _download(model: str, where: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    section = where.rpartition(".")[0]
    stand_in = f"take {section}.kind=own with a model of your own, the offline stand-in"
    try:
        # A short time limit: without an answer, the download would retry for minutes.
        siblings = HfApi().model_info(model, timeout=PATIENCE_S).siblings or []
        lack = _lack({sibling.rfilename for sibling in siblings})
        if not lack:
            return Path(snapshot_download(model, allow_patterns=list(FILES)))
    except GatedRepoError:
        lack = "the hub wants its terms accepted, or a login, first"
    except RepositoryNotFoundError:
        lack = "no such folder here and no such model on the hub, or a private one"
    except Exception as error:  # of one HTTP library today and another one tomorrow
        reason = _line(error) or type(error).__name__
        if _is_of_disk(error):
            why = f"{model} cannot be kept in the cache on this machine ({reason})"
            raise InfraError(where, why, "Make room, or set HF_HOME to another folder") from error
        why = f"{model} is not on this machine, and the hub does not hand it out ({reason})"
        raise InfraError(where, why, f"Name a local folder that holds it, or {stand_in}") from error
    raise DataError(where, f"{model}: {lack}", f"Name another model, or {stand_in}")


def _is_of_disk(error: Exception) -> bool:
    """Whether an error is of a file here; errors of the network are OSErrors as well."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, OSError) and (error.filename is not None or error.errno in full)


def _lack_of(folder: Path) -> str | None:
    """What a folder should hold and does not."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    if lack := _lack(names):
        return lack
    missing = sorted(set(_weights(folder)) - names)
    return f"{missing[0]} is missing" if missing else None


def _lack(names: Collection[str]) -> str | None:
    if CONFIG not in names:
        return f"there is no {CONFIG}, so it is no model of Hugging Face"
    if not {WEIGHTS, INDEX} & set(names):
        pickles = sorted(name for name in names if name.endswith(PICKLES))
        if pickles:
            return f"its weights are {pickles[0]} alone, and only safetensors are read"
        return f"there is no {WEIGHTS}"
    return None if set(TOKENIZERS) & set(names) else f"there is no {TOKENIZERS[0]}"


def _weights(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    try:
        return sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        return [f"a readable {INDEX}"]


class _Seen(NamedTuple):
    """What is known of a model before its weights are loaded."""

    folder: Path
    config: Any
    tokenizer: Any
    start: int


def _look_at(model: str, head: Head, where: str) -> _Seen:
    """DataError unless a model is whole, of the wanted kind, and knows how texts begin."""
    import transformers
    from safetensors import safe_open

    folder = find(model, where)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **CAUTION)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **CAUTION)
        for name in _weights(folder):
            with safe_open(folder / name, "pt") as file:  # a torn file fails here
                file.keys()
    except Exception as error:  # the libraries raise whatever a file makes them stumble over
        raise _unusable(model, where, error) from error
    known, wanted = {
        "AutoModel": (transformers.MODEL_MAPPING, "a plain text model"),
        "AutoModelForCausalLM": (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, "a causal one"),
    }[head]
    if type(config) not in known or config.is_encoder_decoder:
        why = f"{model} is of type {config.model_type}, which is not {wanted}"
        raise DataError(where, why, "Name one such as gpt2-large")
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id)
    start = next((id for id in ends if id is not None), None)
    if start is None:
        why = f"the tokenizer of {model} has no token that begins or ends a text"
        raise DataError(where, why, "Name a model whose tokenizer has a bos or eos token")
    return _Seen(folder, config, tokenizer, start)


def _unusable(model: str, where: str, error: Exception) -> DataError:
    return DataError(where, f"{model} cannot be opened ({_line(error)})", FIX)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else f"{text[:160]}…"
