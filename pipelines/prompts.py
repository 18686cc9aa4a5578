"""The inputs of `generate`: texts, and the vocabulary that encodes them."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import replace

from dsl import conditioning
from dsl.conditioning import Given, Mode
from dsl.errors import TextError, VocabularyError
from infra.documents import from_json
from infra.errors import ConfigError, DataError
from infra.storage import Folder
from pipelines import models
from pipelines.corpus import JSON_LINES
from pipelines.models import Model


def read(address: str) -> list[tuple[str, str]]:
    """(place, text) of each line of a file at any fsspec URL.

    address: each line of a file of JSON lines (`….jsonl`, `.ndjson`, `.json`) is an object with a
        `text`, or blank; of another file, a text.

    Raises DataError, which names the line.
    """
    folder, name = Folder.holding(address)
    try:
        content = folder.read_bytes(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(address, f"not UTF-8 text ({error})", "Convert it") from None
    # Not `splitlines`: form feeds and U+2028, for example, are characters of a text.
    lines = [line.removesuffix("\n") for line in io.StringIO(content, newline=None)]
    places = [(f"{address}, line {number}", line) for number, line in enumerate(lines, 1)]
    if name.endswith(JSON_LINES):
        places = [(place, _text(line, place)) for place, line in places if line.strip()]
    if not places:
        raise DataError(address, "the file is empty", "Write one text a line")
    return places


def given(
    texts: Iterable[tuple[str, str]], model: Model, *, mode: Mode, snr: float, length: int | None
) -> list[Given]:
    """The row of each (place, text) before sampling; see `dsl.conditioning.read`.

    Raises DataError for a text that is too long or has a character that the vocabulary lacks.
    """
    assert model.vocabulary is not None
    rows = []
    for where, text in texts:
        try:
            row = conditioning.read(
                text, model.vocabulary, mode=mode, snr=snr, length=length, otherwise=model.length
            )
        except (TextError, VocabularyError) as error:
            raise DataError(where, str(error)) from error
        rows.append(row)
    return rows


def with_vocabulary(model: Model, tokenizer: str | None) -> Model:
    """The model with its own vocabulary, or with that at `tokenizer` if it came without one.

    Raises ConfigError if there is no vocabulary or are two; DataError if the size is another.
    """
    if model.vocabulary and tokenizer:
        raise ConfigError("tokenizer", f"{model.address} has its own", "Leave it out")
    if model.vocabulary:
        return model
    if not tokenizer:
        raise ConfigError("tokenizer", f"{model.address} comes without one", "Name its files")
    vocabulary = models.read_vocabulary(tokenizer)
    tokens = model.denoiser.config.backbone.tokens
    if vocabulary.size != tokens:
        why = f"has {vocabulary.size} tokens, {model.address} has {tokens}"
        raise DataError(tokenizer, why, "Give the tokenizer that the model was trained with")
    return replace(model, vocabulary=vocabulary)


def _text(line: str, where: str) -> str:
    try:
        text = from_json(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise DataError(where, "not an object with a text", 'Write {"text": "…"}')
    return text
