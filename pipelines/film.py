"""An HTML page that plays how texts are drawn, call by call.

Shapes: B rows, L positions, V tokens, N asked positions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsl.paths import Clock
from dsl.posterior import Posterior
from dsl.recorders import max_prob
from dsl.state import State
from dsl.vocabulary import Vocabulary

PAGE = Path(__file__).with_name("film.html")
SLOT = "{{film}}"


class Film:
    """A recorder of each token's SNR, its likeliest value and the probability of that value.

    It reads every posterior, so `dsl.sample` cannot skip calls while nothing changes.

    title: lines above the film, by name, e.g. the model and the path.
    """

    name = "film"

    def __init__(self, vocabulary: Vocabulary, title: Mapping[str, str]) -> None:
        self.vocabulary = vocabulary
        self.title = title
        self.frames: list[dict[str, Any]] = []
        self.given_BL: Tensor | None = None
        self.last: State | None = None

    def observe(self, clock: Clock, before: State, posterior: Posterior, after: State) -> None:
        if self.given_BL is None:
            self.given_BL = before.frozen_BL
        tokens_BL, sure_BL = before.tokens_BL, torch.ones_like(before.gamma_BL)
        unrevealed_BL = ~before.revealed_BL
        at_N = unrevealed_BL.flatten().nonzero().squeeze(1)
        if len(at_N):  # reading the posterior costs a call
            token_N = posterior.summarise(partial(torch.argmax, dim=1), at_N)
            tokens_BL = tokens_BL.masked_scatter(unrevealed_BL, token_N)
            sure_N = posterior.summarise(max_prob, at_N).to(sure_BL)
            sure_BL = sure_BL.masked_scatter(unrevealed_BL, sure_N)
        self.frames.append(_frame(tokens_BL, before.gamma_BL, sure_BL))
        self.last = after

    def result(self) -> int:
        return len(self.frames)

    def shown(self) -> list[dict[str, Any]]:
        """All frames, the finished text last: lists ``tokens``, ``gamma`` (None where revealed) and
        ``sure`` (in percent), each of B rows of L."""
        assert self.last is not None
        end = _frame(self.last.tokens_BL, self.last.gamma_BL, torch.ones_like(self.last.gamma_BL))
        return [*self.frames, end]

    def page(self) -> str:
        """The film as one HTML document that loads nothing."""
        assert self.given_BL is not None
        frames = self.shown()
        used = {token for frame in frames for row in frame["tokens"] for token in row}
        film = {
            "title": dict(self.title),
            "texts": {token: self.vocabulary.decode([token]) for token in sorted(used)},
            "given": self.given_BL.int().tolist(),
            "frames": frames,
        }
        # "</script>" in a text would end the script; without "<" it cannot.
        content = json.dumps(film, separators=(",", ":")).replace("<", "\\u003c")
        return PAGE.read_text(encoding="utf-8").replace(SLOT, content)


def _frame(tokens_BL: Tensor, gamma_BL: Tensor, sure_BL: Tensor) -> dict[str, Any]:
    """A frame in JSON: the SNR is null where a token is revealed, confidence is in percent."""
    return {
        "tokens": tokens_BL.tolist(),
        "gamma": [
            [None if gamma == float("inf") else float(f"{gamma:.3g}") for gamma in row]
            for row in gamma_BL.tolist()
        ],
        "sure": (100 * sure_BL).round().int().tolist(),
    }
