"""Show a text in a terminal while it is drawn, one frame for each call.

Shapes: L positions.
"""

from __future__ import annotations

import shutil
import textwrap
import unicodedata
from itertools import groupby
from operator import itemgetter
from typing import IO

from dsl.conditioning import BLANK
from dsl.paths import Clock
from dsl.posterior import Posterior
from dsl.state import State
from dsl.vocabulary import Vocabulary

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
UNKNOWN = "\ue000"  # a private-use character, which no printed text contains
WIDE = "\ue001"  # another, before each character that takes two columns of a terminal
REDRAW = "\x1b[{lines}F\x1b[J"  # go up to the start of the last frame and clear from there


class TerminalRecorder:
    """A recorder that shows the first row of a batch: revealed text, and `_` for other tokens.

    It does not read the posterior, so it costs no calls.
    """

    name = "terminal"

    def __init__(self, vocabulary: Vocabulary, terminal: IO[str]) -> None:
        self.vocabulary = vocabulary
        self.terminal = terminal
        self.lines = 0

    def observe(self, clock: Clock, before: State, posterior: Posterior, after: State) -> None:
        if after is before:
            return
        columns, rows = shutil.get_terminal_size()
        frame = [f"call {clock.call + 1} of {clock.budget}"]
        # One column is spare: a wide character may begin a line and have its mark in the last.
        frame += textwrap.wrap(self._text(after), columns - 2)[: rows - 2]
        redraw, unknown = "", BLANK
        if self.terminal.isatty():
            redraw = REDRAW.format(lines=self.lines) if self.lines else ""
            unknown = f"{DIM}{BLANK}{PLAIN}"
        text = "\n".join(frame).replace(WIDE, "").replace(UNKNOWN, unknown)
        self.terminal.write(f"{redraw}{text}\n")
        self.terminal.flush()
        self.lines = len(frame)

    def result(self) -> None:
        return None

    def _text(self, state: State) -> str:
        """On one line, with marks before wide characters.

        Neighbours are decoded together, as a character may be several tokens.
        """
        tokens = zip(state.tokens_BL[0].tolist(), state.revealed_BL[0].tolist(), strict=True)
        text = ""
        for revealed, stretch in groupby(tokens, key=itemgetter(1)):
            ids = [token for token, _ in stretch]
            spelled = self.vocabulary.decode_behind if text else self.vocabulary.decode
            text += printable(spelled(ids)) if revealed else UNKNOWN * len(ids)
        text = text.replace("\n", "⏎").replace("\t", " ")
        return "".join(WIDE * (unicodedata.east_asian_width(c) in ("W", "F")) + c for c in text)


def printable(text: str) -> str:
    """Text without terminal commands: control characters but line ends and tabs become `·`."""
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)
