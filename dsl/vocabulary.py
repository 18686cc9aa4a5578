"""Text to token ids and back: characters, byte-level BPE, or any tokenizer file."""

import hashlib
import json
import os
import string
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from dsl.errors import VocabularyError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
CHARACTERS = " " + string.ascii_lowercase  # the 27 of text8
# What known tokenizers call the ends of a document, most specific first.
EOS_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[CLS]")
# Named in place of the unknown token that a BPE does not have; no vocabulary holds it.
NO_TOKEN = "<for a character that no token holds>"
# Text that others continue: known tokenizers keep it a token of its own before almost any text.
MARK = ";"
# The two names of GPT-2's pair of files, OpenAI's and Hugging Face's.
PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


class Vocabulary:
    """V real tokens with ids 0 … V-1; [MASK] is never among them.

    Every vocabulary is one ``tokenizer.json``, so `load` reads them all. ``eos`` closes a document
    and counts as a real token, predicted and measured like any other; ``bos`` opens one; it is
    the id of ``eos`` where the tokenizer has no other. Special tokens are only put in by id: text
    that spells one out is encoded as ordinary text. A vocabulary can be pickled.

    Raises:
        VocabularyError: the tokenizer's ids have gaps, or it has no end-of-document token.
    """

    def __init__(self, tokenizer: "Tokenizer") -> None:
        from tokenizers import models

        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        if isinstance(tokenizer.model, models.BPE) and tokenizer.model.unk_token is None:
            # Without one the library drops characters silently; with one that it cannot find it
            # raises.
            tokenizer.model.unk_token = NO_TOKEN
        self._tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size()
        named = tokenizer.get_vocab()
        if sorted(named.values()) != list(range(self.size)):
            raise VocabularyError(
                f"the tokenizer's {self.size} ids are not 0 … {self.size - 1}: "
                "give one whose ids have no gaps"
            )
        ends = [named[name] for name in EOS_NAMES if name in named]
        if not ends:
            raise VocabularyError(
                f"the tokenizer has no end-of-document token: add one of {', '.join(EOS_NAMES)}"
            )
        self.eos: int = ends[0]
        self.bos: int = next((named[name] for name in BOS_NAMES if name in named), self.eos)

    @classmethod
    def char(cls) -> "Vocabulary":
        """text8's characters: id 0 is the space, 1 … 26 are a … z, 27 is eos, so V = 28.

        text8 is one document, so eos occurs at most once in it.
        """
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        model = models.WordLevel({c: i for i, c in enumerate((*CHARACTERS, END_OF_TEXT))})
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        tokenizer.decoder = decoders.Fuse()
        tokenizer.add_special_tokens([END_OF_TEXT])
        return cls(tokenizer)

    @classmethod
    def train_bpe(cls, texts: Iterable[str], size: int) -> "Vocabulary":
        """Byte-level BPE of at most ``size`` tokens: eos (id 0), the 256 bytes, then merges.

        Deterministic. V is smaller than ``size`` where the text runs out of pairs to merge.

        Raises:
            VocabularyError: ``size`` is below 257.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        if size < 257:
            raise VocabularyError(f"a byte-level BPE has at least 257 tokens; {size} is too few")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[END_OF_TEXT],
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def gpt2(cls, folder: str | os.PathLike[str]) -> "Vocabulary":
        """GPT-2's BPE from its two files (``encoder.json`` and ``vocab.bpe``); V = 50257.

        Raises:
            VocabularyError: a file is missing or damaged.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        folder = Path(folder)
        pairs = [(folder / ids, folder / merges) for ids, merges in PAIRS]
        found = [pair for pair in pairs if pair[0].is_file() and pair[1].is_file()]
        if not found:
            raise VocabularyError(
                f"{folder}: neither {TOKENIZER} nor {' nor '.join(' + '.join(p) for p in PAIRS)}. "
                "Name the folder that holds the tokenizer's files."
            )
        ids, merges = found[0]
        try:
            tokenizer = Tokenizer(models.BPE.from_file(str(ids), str(merges)))
        except Exception as error:  # the library raises bare exceptions
            raise VocabularyError(
                f"{ids} and {merges.name}: not GPT-2's pair of files ({error}). Copy them again."
            ) from error
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([END_OF_TEXT])
        try:
            return cls(tokenizer)
        except VocabularyError as error:
            raise VocabularyError(f"{folder}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Vocabulary":
        """From a ``tokenizer.json``, or a folder with that file or with GPT-2's two.

        Raises:
            VocabularyError: nothing readable there, ids with gaps, or no end-of-document token.
        """
        path = Path(path)
        if path.is_dir():
            if not (path / TOKENIZER).is_file():
                return cls.gpt2(path)
            path = path / TOKENIZER
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise VocabularyError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> "Vocabulary":
        """From the content of a ``tokenizer.json``; raises VocabularyError as `load` does."""
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare exceptions
            raise VocabularyError(
                f"not a tokenizer of the `tokenizers` library ({error}). "
                "Save it with its `Tokenizer.save`."
            ) from error
        return cls(tokenizer)

    def to_json(self) -> str:
        """The content of ``tokenizer.json``, keys sorted: equal vocabularies are equal texts."""
        return self._json

    @cached_property
    def _json(self) -> str:
        content = json.loads(self._tokenizer.to_str())
        if content["model"].get("unk_token") == NO_TOKEN:
            content["model"]["unk_token"] = None
        return json.dumps(content, sort_keys=True, ensure_ascii=False)

    @cached_property
    def sha256(self) -> str:
        """The digest of `to_json`: what a manifest remembers of a vocabulary."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def first(self, size: int) -> "Vocabulary":
        """This vocabulary without added tokens whose ids are ``size`` or more."""
        content = json.loads(self.to_json())
        content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < size]
        return Vocabulary.from_json(json.dumps(content))

    def id_of(self, token: str) -> int | None:
        """The id of a token as its file spells it; None where there is none."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json``, whole or not at all."""
        partial = Path(folder) / f"{TOKENIZER}.partial"
        partial.write_text(self.to_json(), encoding="utf-8")
        partial.replace(Path(folder) / TOKENIZER)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, no eos or bos added. The library spreads the texts over threads.

        Raises:
            VocabularyError: a text has a word or a character that a closed vocabulary lacks, or is
                not valid Unicode; the message says which text, and where if it is one character.
        """
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises bare exceptions
            raise VocabularyError(self._stray(texts) or str(error)) from error
        return [encoding.ids for encoding in encodings]

    def encode_behind(self, text: str) -> list[int]:
        """Ids of text that continues a text. With some tokenizers `encode` puts a space before the
        first word, because a text would begin there; here none is put.

        Raises:
            VocabularyError: as `encode` does.
        """
        (ids,) = self.encode([text])
        if self.decode_behind(ids) == text:
            return ids
        try:
            mark, both = self.encode([MARK, MARK + text])
        except VocabularyError:  # a closed vocabulary, without the mark
            return ids
        return both[len(mark) :] if both[: len(mark)] == mark else ids

    def _refusal(self, text: str) -> str | None:
        """Why a text cannot be encoded; None if it can."""
        try:
            self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        except Exception as error:  # as above
            return str(error)
        return None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids. Special tokens stay visible; a torn UTF-8 character reads as U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def decode_behind(self, ids: Sequence[int]) -> str:
        """Text of ids that continue a text. With some tokenizers `decode` drops the space before
        the first word, because a text would begin there; here that space is kept."""
        text, before = self.decode([self.eos, *ids]), self.decode([self.eos])
        return text.removeprefix(before) if text.startswith(before) else self.decode(ids)

    def bytes_of(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes that ids stand for: the unit of bits per byte. Special tokens stand for
        none.

        Where the decoder only joins tokens (`READERS`), the bytes are exact even if the ids cut a
        character in two. Elsewhere such a character becomes U+FFFD. A text begins behind bos or
        eos; ids before these continue one.
        """
        if self._pieces is not None:
            return b"".join(self._pieces[i] for i in ids)
        added = self._tokenizer.get_added_tokens_decoder()
        silent = {self.bos, self.eos, *(i for i, token in added.items() if token.special)}
        texts, read = [], self.decode_behind
        for end, run in groupby(ids, key=(self.bos, self.eos).__contains__):
            if not end:
                texts.append(read([i for i in run if i not in silent]))
            read = self.decode
        return "".join(texts).encode()

    @cached_property
    def _pieces(self) -> list[bytes] | None:
        """Each id's bytes; None where the decoder is not a plain joining of tokens."""
        content = json.loads(self._tokenizer.to_str())
        read = READERS.get((content["decoder"] or {}).get("type"))
        if read is None:
            return None
        # Added tokens stand for their own text, special ones for none.
        added = {
            token["id"]: b"" if token["special"] else token["content"].encode()
            for token in content["added_tokens"]
        }
        named = self._tokenizer.get_vocab()
        tokens = sorted(named, key=lambda token: named[token])
        try:
            return [added[i] if i in added else read(token) for i, token in enumerate(tokens)]
        except KeyError:  # a token that its own decoder cannot spell
            return None

    def _stray(self, texts: Sequence[str]) -> str | None:
        """The first text that cannot be encoded, and the first character that is to blame."""
        refused = ((row, text, self._refusal(text)) for row, text in enumerate(texts))
        row, text, reason = next((found for found in refused if found[2]), (0, "", None))
        if not reason:
            return None
        advice = "Clean the text, or use a byte-level BPE."
        added = self._tokenizer.get_added_tokens_decoder()
        named = self._tokenizer.get_vocab().items()
        # A letter of known words may be no token itself: it is not to blame.
        spelled = set().union(*(token for token, id in named if id not in added))
        stray = {c for c in set(text) - spelled if self._refusal(c)}
        column = next((column for column, c in enumerate(text) if c in stray), None)
        if column is None:
            return f"text {row}: the vocabulary cannot spell it ({reason}). {advice}"
        return (
            f"text {row}, character {column}: {text[column]!r} is not in this vocabulary "
            f"of {self.size} tokens. {advice}"
        )

    def __reduce__(self) -> tuple[Callable[[str], "Vocabulary"], tuple[str]]:
        return Vocabulary.from_json, (self.to_json(),)


def byte_alphabet() -> dict[str, int]:
    """The byte behind each character of a byte-level token.

    Visible Latin-1 characters stand for themselves, the other bytes for U+0100 onwards.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


BYTES = byte_alphabet()
# How a decoder turns one token into bytes, for decoders that only join tokens.
READERS: dict[str | None, Callable[[str], bytes]] = {
    "ByteLevel": lambda token: bytes(BYTES[character] for character in token),
    "Fuse": str.encode,
}
