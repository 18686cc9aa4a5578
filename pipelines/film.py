"""A film of how texts are drawn, call by call, and an HTML page that plays it.

Shapes: B rows, L positions, V tokens, N asked positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsl.paths import Clock
from dsl.posterior import Posterior
from dsl.recorders import max_prob
from dsl.state import State
from dsl.vocabulary import Vocabulary
from pipelines.report.page import film_page


class Film:
    """A recorder of each token's SNR, its likeliest value and the probability of that value.

    It reads every posterior, so `dsl.sample` cannot skip calls while nothing changes.

    title: lines above the film, by name, e.g. the model and the path.
    rows: the first ones are recorded; None for all of the batch.
    tokens: about how many the frames show together, at least those of the first and the last; of
    more frames, some evenly spaced ones are kept. None for no bound.
    """

    name = "film"

    def __init__(
        self,
        vocabulary: Vocabulary,
        title: Mapping[str, str],
        *,
        rows: int | None = None,
        tokens: int | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        self.title = title
        self.rows = rows
        self.tokens = tokens
        self.frames: list[dict[str, Any]] = []
        self.calls: list[int] = []  # made before each frame: a step of some paths makes several
        self.given_BL: Tensor | None = None
        self.last: State | None = None
        self.budget = 0

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
        self.frames.append(self._frame(tokens_BL, before.gamma_BL, sure_BL))
        self.calls.append(clock.call)
        self.last, self.budget = after, clock.budget

    def result(self) -> dict[str, Any]:
        """The film as JSON holds it; without frames if no call was made.

        `calls` says how many calls were made before each frame, the last of which is the end.
        """
        frames = [*self.frames, *self._end()]
        shown = self._spread(len(frames))
        frames = [frames[frame] for frame in shown]
        used = {token for frame in frames for row in frame["tokens"] for token in row}
        spelled = self.vocabulary.decode_behind
        given_BL = [] if self.given_BL is None else self.given_BL[: self.rows].int().tolist()
        return {
            "title": dict(self.title),
            "texts": {str(token): spelled([token]) for token in sorted(used)},
            "given": given_BL,
            "calls": [[*self.calls, self.budget][frame] for frame in shown],
            "frames": frames,
        }

    def page(self) -> str:
        """The film as one HTML document that loads nothing."""
        return film_page("Text localising", self.result())

    def _end(self) -> list[dict[str, Any]]:
        """The frame after the last call."""
        if self.last is None:
            return []
        sure_BL = torch.ones_like(self.last.gamma_BL)
        return [self._frame(self.last.tokens_BL, self.last.gamma_BL, sure_BL)]

    def _spread(self, frames: int) -> list[int]:
        """The frames that are shown, the first and the last among them."""
        if self.tokens is None or not frames:
            return list(range(frames))
        size = sum(map(len, self.frames[0]["tokens"]))
        most = min(frames, max(2, self.tokens // size))
        return sorted({round(at * (frames - 1) / (most - 1)) for at in range(most)})

    def _frame(self, tokens_BL: Tensor, gamma_BL: Tensor, sure_BL: Tensor) -> dict[str, Any]:
        """A frame in JSON: the SNR is null where a token is revealed, confidence is in percent."""
        rows = slice(self.rows)
        return {
            "tokens": tokens_BL[rows].tolist(),
            "gamma": [
                [None if gamma == float("inf") else float(f"{gamma:.3g}") for gamma in row]
                for row in gamma_BL[rows].tolist()
            ],
            "sure": (100 * sure_BL[rows]).round().int().tolist(),
        }
