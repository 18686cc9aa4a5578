"""Save and load a denoiser: ``model.safetensors``, ``config.json`` and its tokenizer."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsl import plain
from dsl.denoiser import Denoiser, DenoiserConfig
from dsl.errors import AdaptationError, WeightsError
from dsl.foreign import ForeignConfig
from dsl.vocabulary import TOKENIZER, Vocabulary

FORMAT = "dsl/1"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CHECKSUMS = "sha256"  # the key of config.json that holds them, by file
HASHED = (WEIGHTS, TOKENIZER)
PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def save(
    denoiser: Denoiser,
    folder: str | os.PathLike[str],
    tokenizer: Vocabulary | None = None,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a denoiser so that `load` gives it back bit for bit.

    ``config.json`` is written last, and a folder without it is no model: an interrupted save leaves
    none. It holds a checksum of every other file. Files of an earlier save are replaced.

    Args:
        metadata: JSON values for later readers, such as ``{"objective": "dsl", "length": 1024}``.

    Raises:
        TypeError: ``metadata`` is not JSON.
        WeightsError: `load` would refuse the weights: they include adapters, or numbers that are
            not finite, or are of more than one precision.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    config = {
        "format": FORMAT,
        "denoiser": asdict(denoiser.config),
        "metadata": dict(metadata or {}),
    }
    json.dumps(config)  # metadata that is not JSON raises before a file is touched
    with torch.device("meta"):
        expected = Denoiser(denoiser.config).state_dict()
    tensors = denoiser.state_dict()
    if found := _misfits(expected, tensors):
        raise WeightsError(
            f"{folder}: not saved, because it could not be loaded again. {found}. Merge adapters "
            "by `dsl.lora.merged`, and give all weights finite numbers of one precision"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (CONFIG, TOKENIZER):
        (folder / stale).unlink(missing_ok=True)
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    partial = folder / f"{WEIGHTS}.partial"
    save_file(tensors, partial)
    partial.replace(folder / WEIGHTS)
    if tokenizer is not None:
        tokenizer.save(folder)
    config[CHECKSUMS] = {n: _sha256(folder / n) for n in HASHED if (folder / n).is_file()}
    partial = folder / f"{CONFIG}.partial"
    partial.write_text(json.dumps(config, indent=2) + "\n")
    partial.replace(folder / CONFIG)


def load(folder: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Denoiser:
    """The denoiser of a folder that `save` wrote, on the CPU, in evaluation mode.

    Args:
        trust_remote_code: whether to run code that came with the weights. ``config.json`` holds
            such code for a network that the transformers library does not know.

    Raises:
        WeightsError: a file is missing, or is not the one that was saved, or the weights are not
            exactly the model's: every missing, unexpected, mis-shaped or non-finite tensor is
            named.
        AdaptationError: the denoiser needs code that is not trusted.
    """
    folder = Path(folder)
    config = read_config(folder)
    _require_unchanged(folder, config.get(CHECKSUMS, {}))
    tensors = read_safetensors(folder / WEIGHTS)
    try:
        denoiser_config = plain.read(DenoiserConfig, _with_kind(config.get("denoiser")), "denoiser")
        _require_room(denoiser_config, tensors)
        if not trust_remote_code:
            _require_no_code(denoiser_config, folder)
        # On the meta device: no memory and no random numbers for weights about to be replaced.
        with torch.device("meta"):
            denoiser = Denoiser(denoiser_config)
    except AdaptationError:
        raise
    except (ValueError, RuntimeError) as error:
        raise WeightsError(
            f"{folder / CONFIG}: it does not describe a denoiser ({error}). "
            "Take the file that `dsl.save` wrote beside these weights."
        ) from error
    set_weights(denoiser, tensors, where=folder / WEIGHTS)
    return denoiser.eval()


def _require_unchanged(folder: Path, checksums: Any) -> None:
    """WeightsError for a file whose checksum is another. Older folders hold none."""
    for name in HASHED:
        path = folder / name
        known = checksums.get(name) if isinstance(checksums, dict) else checksums
        if known is not None and path.is_file() and _sha256(path) != known:
            raise WeightsError(
                f"{path}: damaged: its sha256 is not the one in {CONFIG}. Copy the model again; "
                f"if the change is meant, remove {CHECKSUMS!r} from {CONFIG}."
            )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error}). Copy the model again.") from error


def _with_kind(described: Any) -> Any:
    """What ``denoiser`` of a file says; the first files name no kind of backbone."""
    match described:
        case {"backbone": {**backbone}}:
            return described | {"backbone": {"kind": "dit", **backbone}}
    return described


def _require_no_code(config: DenoiserConfig, folder: Path) -> None:
    code = config.backbone.code if isinstance(config.backbone, ForeignConfig) else {}
    if code:
        raise AdaptationError(
            f"{folder}: the network is code that came with its weights: {some(code)} in {CONFIG}. "
            "Read it, and if you trust it, have it run by trust_remote_code=True"
        )


def _require_room(config: DenoiserConfig, tensors: Mapping[str, Tensor]) -> None:
    """ValueError for a network that is larger than the file: it could fill the memory."""
    sizes = [size for size in vars(config.backbone).values() if isinstance(size, int)]
    most = sum(tensor.numel() for tensor in tensors.values())
    if max(*sizes, config.embed_dim) > most or config.backbone.blocks > len(tensors):
        raise ValueError(f"it is larger than the {most:,} numbers of {WEIGHTS}")


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The ``config.json`` of a saved denoiser: ``format``, ``denoiser``, ``metadata``, ``sha256``.

    Raises:
        WeightsError: the file is missing, is not JSON, or is of another format.
    """
    path = Path(folder) / CONFIG
    config = read_json(path)
    if config.get("format") != FORMAT:
        raise WeightsError(
            f"{path}: format {config.get('format')!r} is not {FORMAT!r}. A folder of a public MDLM "
            "checkpoint is read by `dsl.from_mdlm`."
        )
    if not isinstance(config.setdefault("metadata", {}), dict):
        raise WeightsError(f"{path}: its metadata is not an object. Copy it again.")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        WeightsError: the file is missing, unreadable, or no JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise WeightsError(
            f"{path}: no such file. A model folder holds {WEIGHTS} and {CONFIG}; without "
            f"{CONFIG} it was not written to the end, so save or copy it again."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not a readable JSON file ({error}). Copy it again.") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: holds {type(value).__name__}, not an object. Copy it again.")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, by name.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as error:
        raise WeightsError(
            f"{path}: no such file. A model folder holds {WEIGHTS} and {CONFIG}."
        ) from error
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"{path}: not a whole safetensors file ({error}). Copy it again."
        ) from error
    return tensors


def set_weights(module: nn.Module, tensors: Mapping[str, Tensor], *, where: Path) -> None:
    """Make ``tensors`` the weights of ``module``: all of them, exactly, or none.

    Raises:
        WeightsError: the first few of every sort of misfit, and how many there are.
    """
    if found := _misfits(module.state_dict(), tensors):
        raise WeightsError(
            f"{where}: these are not the weights of this model. {found}. "
            "Take weights and configuration from one and the same checkpoint."
        )
    module.load_state_dict(tensors, assign=True)


def _misfits(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """The first few of every sort of misfit, and how many there are; empty where all fit."""
    shared = [name for name in expected if name in tensors]
    misfits = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "mis-shaped": [
            f"{name} {list(tensors[name].shape)}, not {list(expected[name].shape)}"
            for name in shared
            if tensors[name].shape != expected[name].shape
        ],
        "not floating point": [n for n in shared if tensors[n].dtype not in PRECISIONS],
    }
    numbers = [name for name in shared if tensors[name].dtype in PRECISIONS]
    misfits["not finite"] = [name for name in numbers if not tensors[name].isfinite().all()]
    most = Counter(tensors[name].dtype for name in numbers).most_common(1)
    misfits["of another precision"] = [n for n in numbers if tensors[n].dtype != most[0][0]]
    return "; ".join(f"{misfit}: {some(names)}" for misfit, names in misfits.items() if names)


def some(names: Iterable[str], most: int = 4) -> str:
    """The first few names and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
