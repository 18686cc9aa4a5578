"""Where models come from and go to: run directories, folders, buckets, the registry, checkpoints
of the public MDLM code. Whatever the address, the answer is a denoiser with its vocabulary."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from dsl import huggingface, mdlm, weights
from dsl.converter import ConverterConfig
from dsl.denoiser import BackboneShape, Denoiser
from dsl.errors import AdaptationError, VocabularyError, WeightsError
from dsl.foreign import ForeignConfig
from dsl.huggingface import Adapt
from dsl.lora import Lora
from dsl.state import State
from dsl.vocabulary import TOKENIZER, Vocabulary
from infra import registry
from infra.documents import from_json
from infra.errors import ConfigError, DataError
from infra.registry import ModelVersion
from infra.shards import Manifest
from infra.storage import Folder
from infra.tracking import RECORD, RunHandle
from pipelines.kinds import DSL, KINDS, MDLM

SCRATCH = "scratch"  # the address of no model: train from nothing
CONFIG = "config.json"  # written last: a folder that has it is complete
SAFE = ".safetensors"
PYFUNC = Path(__file__).with_name("model.py")
# What counts as bad data or weights beside infra's own errors.
DATA_ERRORS = (WeightsError, VocabularyError)
PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "pandas")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A denoiser, its vocabulary (None where the weights came without one), and what the weights
    were trained for (a name in `pipelines.kinds`). `length` is None where nobody wrote it down."""

    denoiser: Denoiser
    vocabulary: Vocabulary | None
    kind: str
    length: int | None
    address: str


def load(
    address: str,
    *,
    converter: ConverterConfig,
    tracking_uri: str,
    backbone: BackboneShape | None = None,
    adapt: Adapt | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """The model at an address.

    address: `models:/name@alias` or `models:/name/3`; a run directory; a folder that
        `dsl.save` wrote; an MDLM checkpoint, a Hugging Face folder or a Lightning file; a folder of
        a masked or causal language model of the transformers library. Any but the first may be any
        fsspec URL, such as hf://owner/name.
    converter: the fresh table and converter that all but the first three get.
    backbone: what the configuration says of the backbone, which comes with the weights.
    adapt: how a causal model of the transformers library is used, see `dsl.from_transformers`.
    trust_remote_code: whether code that came with the weights is run, for a network that only such
        code knows.

    Raises DataError or dsl.WeightsError, naming what is wrong and what was looked for, and
    ConfigError where `backbone` says otherwise than the weights, as it would have no effect, where
    `adapt` does not fit the model, or where it needs code that is not trusted.
    """
    model = _read(address, converter, tracking_uri, adapt, trust_remote_code)
    held = model.denoiser.config.backbone
    for key, wanted in vars(backbone).items() if backbone else ():
        if getattr(held, key, None) != wanted:
            why = f"{wanted!r}, but the backbone comes with the weights of {address}"
            what = f"there it is {getattr(held, key, None)!r}"
            raise ConfigError(f"backbone.{key}", f"{why}; {what}", "Leave it out: `backbone=null`")
    if adapt and adapt != huggingface.adaptation(held):
        raise ConfigError("adapt", f"{address} was not adapted so, and is not now", "Leave it out")
    return model


def _read(
    address: str,
    converter: ConverterConfig,
    tracking_uri: str,
    adapt: Adapt | None,
    trust_remote_code: bool,
) -> Model:
    if address.startswith("models:/"):
        with registry.downloaded(address, tracking_uri) as local:
            saved = Folder.at(str(local))
            return load_folder(saved, address, trust_remote_code=trust_remote_code)
    folder = Folder.at(address)
    if saved := _saved(folder):
        return load_folder(saved, address, trust_remote_code=trust_remote_code)
    if not folder.exists():
        raise DataError(
            address, "no such model", "Give a run, a model folder or models:/name@alias"
        )
    if folder.exists(RECORD):
        fix = (
            "A run of pretrain or finetune has one when it ends; its command, repeated, resumes it"
        )
        raise DataError(address, "a run without a model", fix)
    with _needed(folder) as local:
        if huggingface.is_folder_of(local):
            with _adapting(address, local):
                denoiser = huggingface.from_transformers(
                    local, adapt=adapt, trust_remote_code=trust_remote_code, **vars(converter)
                )
            vocabulary = Vocabulary.load(local)
        else:
            denoiser, vocabulary = mdlm.from_mdlm(local, **vars(converter)), None
    return Model(
        denoiser=denoiser, vocabulary=vocabulary, kind=MDLM.name, length=None, address=address
    )


def _saved(folder: Folder) -> Folder | None:
    """The model folder that `save` wrote: this one, or that of this run."""
    return next((place for place in (folder, folder / "model") if is_ours(place)), None)


def _needed(folder: Folder) -> AbstractContextManager[Path]:
    """The files of a folder, or the one file, on this machine, without pickles that go unused."""
    names = folder.files()
    if any(name.endswith(SAFE) for name in names):
        names = [name for name in names if not name.endswith(huggingface.PICKLES)]
    return folder.local(*names)


@contextmanager
def _adapting(address: str, local: Path) -> Iterator[None]:
    """Tell a network that cannot be used as is asked, whose files are in `local`, as a setting."""
    try:
        yield
    except AdaptationError as error:
        raise ConfigError(address, str(error).removeprefix(f"{local}: ")) from error


def digest(address: str) -> str:
    """SHA-256 of the names and contents of the files that `load` would read."""
    folder = Folder.at(address)
    found = hashlib.sha256()
    with _needed(_saved(folder) or folder) as local:
        files = [path for path in local.rglob("*") if path.is_file()] or [local]
        for path in sorted(files):
            with path.open("rb") as file:
                found.update(f"{path.relative_to(local)} ".encode())
                found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def load_folder(folder: Folder, address: str = "", *, trust_remote_code: bool = False) -> Model:
    """The model in a folder that `save` wrote, or `dsl.save`, which says less about it."""
    address = address or folder.url
    with folder.local() as local:
        config = weights.read_config(local)
        metadata = config["metadata"]
        kind, length = metadata.get("objective", DSL.name), metadata.get("length")
        known = isinstance(kind, str) and kind in KINDS
        if not known or (length is not None and (type(length) is not int or length < 1)):
            why = f"objective {kind!r} and length {length!r} are none of a model"
            raise DataError(folder.url_of(CONFIG), why, "Copy the file again")
        with _adapting(address, local):
            denoiser = weights.load(local, trust_remote_code=trust_remote_code)
        vocabulary = Vocabulary.load(local) if (local / TOKENIZER).exists() else None
        tokens = denoiser.config.backbone.tokens
        if vocabulary and config.get("mask_token_id") == tokens:
            # An exported model's mask, which transformers writes into the tokenizer's file.
            vocabulary = vocabulary.first(tokens)
        if vocabulary and vocabulary.size != tokens:
            why = f"has {vocabulary.size} tokens, the weights beside it have {tokens}"
            raise DataError(folder.url_of(TOKENIZER), why, "Copy the model again")
        return Model(
            denoiser=denoiser,
            vocabulary=vocabulary,
            kind=kind,
            length=length,
            address=address,
        )


def save(
    folder: Folder, denoiser: Denoiser, vocabulary: Vocabulary, *, kind: str, length: int
) -> None:
    """Write the weights, their configuration and the tokenizer; the configuration last.

    kind: what the weights are trained for. length: of the rows they are trained on.
    """
    with tempfile.TemporaryDirectory() as staging:
        weights.save(denoiser, staging, vocabulary, metadata={"objective": kind, "length": length})
        names = sorted(path.name for path in Path(staging).iterdir())
        for name in sorted(names, key=lambda name: name == CONFIG):
            folder.write_bytes(name, (Path(staging) / name).read_bytes())


def exists(folder: Folder) -> bool:
    """Whether `save` has finished there."""
    return folder.exists(CONFIG)


def is_ours(folder: Folder) -> bool:
    """Whether a folder was written by `save`, and not by the public MDLM code."""
    if not folder.exists(CONFIG):
        return False
    try:
        return str(from_json(folder.read_bytes(CONFIG)).get("format", "")).startswith("dsl")
    except (ValueError, AttributeError):
        return False


def vocabulary_of(manifest: Manifest, data: Folder) -> Vocabulary:
    """The vocabulary that shards were written with; DataError if the file is another one."""
    address = data.url_of(TOKENIZER)
    vocabulary = read_vocabulary(address)
    if vocabulary.sha256 != manifest.vocabulary.sha256:
        raise DataError(
            address, "not the vocabulary that the manifest names", "Prepare the data again"
        )
    return vocabulary


def read_vocabulary(address: str) -> Vocabulary:
    """The vocabulary in a `tokenizer.json`, or in a folder that holds one or GPT-2's two files."""
    with Folder.at(address).local() as local:
        return Vocabulary.load(local)


def require_same(model: Model, vocabulary: Vocabulary, where: str) -> None:
    """DataError unless a model speaks the vocabulary of the data."""
    tokens = model.denoiser.config.backbone.tokens
    if tokens != vocabulary.size:
        why = f"{model.address} has {tokens} tokens, the data has {vocabulary.size}"
    elif model.vocabulary and model.vocabulary.sha256 != vocabulary.sha256:
        why = f"{model.address} was made with another vocabulary of the same size"
    else:
        return
    raise DataError(where, why, "Prepare the data with the model's own tokenizer.json")


def require_room(denoiser: Denoiser, length: int, where: str) -> None:
    """DataError unless a network takes rows of a length. Some models of transformers do not say how
    many positions they have, so one is asked."""
    if not isinstance(denoiser.config.backbone, ForeignConfig):
        return
    try:
        with torch.no_grad():
            denoiser(State.masked(1, length, denoiser.config.embed_dim))
    except (IndexError, RuntimeError) as error:
        why = f"the model does not take rows of {length} tokens ({str(error)[:160]})"
        raise DataError(where, why, "Take rows of a smaller length") from error


def require_maps(denoiser: Denoiser, lora: Lora | None) -> None:
    """ConfigError unless a network has the linear maps that are to get adapters."""
    try:
        if lora:
            lora.names(denoiser.backbone)
    except AdaptationError as error:
        raise ConfigError("lora.targets", str(error)) from error


def register(
    model: Folder, name: str, handle: RunHandle, *, tags: Mapping[str, str]
) -> ModelVersion:
    """Register a model folder as a version of `name`, alias `candidate`: as a new one, unless the
    run has registered the same files with the same tags already."""
    from pipelines.model import SIGNATURE  # MLflow takes seconds to import

    assert handle.run_id is not None
    with model.local() as local:
        tags = {**tags, "digest": digest(str(local))}
        return registry.registered(name, handle.run_id, tags, handle.uri) or registry.register(
            code=PYFUNC,
            folder=local,
            name=name,
            run_id=handle.run_id,
            uri=handle.uri,
            requirements=_requirements(local),
            code_paths=[PYFUNC.parents[1] / "dsl"],
            signature=SIGNATURE,
            tags=tags,
        )


def _requirements(local: Path) -> list[str]:
    """What a model needs, in the versions that made it. Which build of one (`+cpu`) is left to
    whoever installs it."""
    kind = weights.read_config(local)["denoiser"]["backbone"].get("kind")
    names = (*PACKAGES, "transformers") if kind == "transformers" else PACKAGES
    return [f"{name}=={version(name).partition('+')[0]}" for name in names]
