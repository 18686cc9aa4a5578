"""Text that sampling starts from: a prompt, a text with blanks, a garbled draft (003 C.1).

Shapes: B rows, L positions, V tokens, D table dimension.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

import torch
from torch import Tensor

from dsl.errors import TextError
from dsl.state import State
from dsl.vocabulary import Vocabulary

BLANK = "_"
Mode = Literal["infill", "prompt", "correct"]
MODES: tuple[str, ...] = get_args(Mode)


@dataclass(frozen=True)
class Given:
    """One row before sampling: the ids and SNRs of its L positions.

    At SNR 0 the token is drawn and its id means nothing. At a finite SNR the id is soft evidence.
    At SNR inf the token is kept.
    """

    tokens: tuple[int, ...]
    gamma: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.tokens)


def read(
    text: str,
    vocabulary: Vocabulary,
    *,
    mode: Mode = "infill",
    snr: float = 2.0,
    length: int | None = None,
    otherwise: int | None = None,
) -> Given:
    """A row to sample, from text.

    - ``"infill"``: the text is kept and every ``_`` is one token to draw. A text without any is
      a prompt.
    - ``"prompt"``: the text is kept, ``_`` being a character like any other, and what follows is
      drawn. An empty prompt leaves everything to be drawn.
    - ``"correct"``: the text is noise-free evidence of finite SNR ``snr``, which the sample may
      overrule; every ``_`` is one token to draw.

    Args:
        snr: SNR of the text in mode ``"correct"``, positive and finite.
        length: tokens of the row; those behind the text are drawn. None: as many as the text has,
            or ``otherwise`` for a prompt.
        otherwise: the model's own length, if it has one.

    Raises:
        TextError: the text does not fit the length, there is none to correct, or a prompt's length
            is not known.
        ValueError: an argument is out of its range.
        VocabularyError: the text has a character that the vocabulary lacks.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not 0 < snr < math.inf:
        raise ValueError(f"snr must be positive and finite, got {snr}")
    whole = mode == "correct" or (mode == "infill" and BLANK in text)
    pieces = [text] if mode == "prompt" else re.split(f"({BLANK})", text)
    known = snr if mode == "correct" else math.inf
    tokens: list[int] = []
    gamma: list[float] = []
    for place, piece in enumerate(pieces):
        if piece == BLANK and whole:
            tokens.append(0)
            gamma.append(0.0)
        elif piece:
            ids = vocabulary.encode_behind(piece) if place else vocabulary.encode([piece])[0]
            tokens += ids
            gamma += [known] * len(ids)

    if mode == "correct" and not any(gamma):
        raise TextError("there is no text to correct; give one")
    if length is None:
        length = len(tokens) if whole else otherwise
    if length is None:
        raise TextError("a prompt needs a length: this model does not say how long its rows are")
    if not 0 < length >= len(tokens):
        raise TextError(f"the text has {len(tokens)} tokens, the row has room for {length}")
    rest = length - len(tokens)
    return Given((*tokens, *[0] * rest), (*gamma, *[0.0] * rest))


def state(given: Sequence[Given], table_VD: Tensor) -> State:
    """The state of B given rows, all of one length, from which sampling starts."""
    tokens_BL = torch.tensor([row.tokens for row in given])
    gamma_BL = torch.tensor([row.gamma for row in given])
    return State.from_tokens(table_VD.detach(), tokens_BL, gamma_BL.isinf(), gamma_BL)


def batches(given: Sequence[Given], rows: int) -> Iterator[tuple[int, Sequence[Given]]]:
    """Runs of neighbouring rows of one length, cut to at most ``rows``, each with its first index.

    Raises:
        ValueError: ``rows`` is below 1.
    """
    if rows < 1:
        raise ValueError(f"a batch must be at least 1 row, got {rows}")
    first = 0
    for _, run in groupby(given, key=len):
        equal = list(run)
        for start in range(0, len(equal), rows):
            yield first + start, equal[start : start + rows]
        first += len(equal)
