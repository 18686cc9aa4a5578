"""What the parts of an evaluation say, by model, view and source: numbers for tables and the gate.

Shapes: N rows, K bins of confidence, F features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.errors import ConfigError
from pipelines.evaluation import mauve, measures
from pipelines.evaluation.cells import Cell
from pipelines.evaluation.judge import Judged
from pipelines.evaluation.measures import Condition
from pipelines.evaluation.parts import Parts, matrix
from pipelines.evaluation.settings import REFERENCES, UNIGRAM, EvaluateConfig
from pipelines.kinds import AR, KINDS


@dataclass(frozen=True)
class Found:
    """Reads parts. It is the `Scores` and the `Measures` of `pipelines.evaluation.gate`."""

    config: EvaluateConfig
    parts: Parts
    walked: tuple[Cell, ...]
    kinds: Mapping[str, str]  # of the models, by name

    def nats(self, model: str, view: str) -> np.ndarray:
        """Nats per token of held-out rows, ``[N]``.

        Where a likelihood is exact there is one view of it, which stands for any bound.
        """
        kind = KINDS.get(self.kinds.get(model, AR.name), AR)
        view = "exact" if kind.causal else view
        return self._column(f"parts/likelihood/{model}/{view}", "nats")

    def require_view(self, model: str, view: str) -> None:
        """ConfigError unless it is one of the model's."""
        config, kind = self.config, self.kinds[model]
        known = [view.name for view in measures.views(kind, config.likelihood, config.seed)]
        if view not in known and not KINDS[kind].causal:
            why = f"{view} is no view of the likelihood of {model}"
            raise ConfigError("gate", why, f"Name one of: {', '.join(known)}")

    def require_texts(self, model: str, path: str, budget: int) -> None:
        self.source(model, path, budget)

    def require_mauve(self) -> None:
        if self.config.mauve is None:
            raise ConfigError("gate", "asks for MAUVE, which is not measured", "Give mauve, too")

    def require_judge(self) -> None:
        if self.config.judge is None:
            raise ConfigError("gate", "asks for a judge, and there is none", "Give judge, too")

    def errors(self, model: str, condition: Condition) -> Mapping[str, np.ndarray]:
        """``nats`` and ``squared`` error of held-out rows, each ``[N]``."""
        return self._columns(f"parts/states/{model}/{measures.slug(condition)}")

    def reading(self, model: str, condition: Condition) -> Mapping[str, np.ndarray]:
        """``entropy`` of the converter's weights, and those of ``mask`` and the true ``token``,
        each ``[N]``."""
        return self._columns(f"parts/converter/{model}/{measures.slug(condition)}")

    def calibration(self, model: str) -> Mapping[float, Mapping[str, np.ndarray]]:
        """By SNR: ``count``, ``confidence`` and ``right`` of all predictions, each ``[K]``."""
        table = self.parts.read(f"parts/calibration/{model}")
        by_snr = {}
        for gamma in self.config.states.gammas:
            of_gamma = table.filter(pc.equal(table["gamma"], gamma))
            by_snr[gamma] = {
                name: matrix(of_gamma[name], np.float64).sum(0)
                for name in ("count", "confidence", "right")
            }
        return by_snr

    def trace(self, cell: Cell) -> Mapping[str, Any]:
        """What each recorder saw of a cell's first texts."""
        (row,) = self.parts.read(f"parts/traces/{cell.name}").to_pylist()
        return {name: json.loads(seen) for name, seen in row.items()}

    # --- texts, by source: a cell's name, or unigram, real or references ------------------------

    def texts(self, source: str, rows: int) -> list[str]:
        """The first texts."""
        return self.parts.one(f"samples/{source}", 0, ["text"])["text"][:rows].to_pylist()

    def count(self, source: str) -> int:
        """How many texts there are."""
        return len(self.parts.read(f"samples/{source}", ["row"]))

    def calls(self, source: str) -> np.ndarray:
        """Denoiser calls that each text took part in, ``[N]``."""
        return self._column(f"samples/{source}", "calls")

    def seconds(self, source: str) -> float:
        """What it took to draw all texts, as one process would."""
        return float(sum(note["seconds"] for note in self.parts.notes(f"samples/{source}")))

    def read(self, source: str) -> Mapping[str, np.ndarray]:
        """``known`` words, ``words``, ``entropy`` and ``repetition`` of each text, ``[N]``."""
        return self._columns(f"parts/read/{source}")

    def verdict(self, source: str) -> Judged:
        """What the judge said of each text."""
        return Judged(**self._columns(f"parts/judged/{source}"))

    def whole(self, source: str) -> list[dict[str, Any]]:
        """What was said of each repeat; empty where there are too few texts for one."""
        if not self.parts.present(f"parts/whole/{source}"):
            return []
        return self.parts.read(f"parts/whole/{source}").to_pylist()

    # --- as the gate asks -----------------------------------------------------------------------

    def judged(self, model: str, path: str, budget: int) -> tuple[np.ndarray, np.ndarray]:
        nats_N, tokens_N, _ = self.verdict(self.source(model, path, budget))
        return nats_N, tokens_N

    def words(self, model: str, path: str, budget: int) -> tuple[np.ndarray, np.ndarray]:
        read = self.read(self.source(model, path, budget))
        return read["known"], read["words"]

    def entropies(self, model: str, path: str, budget: int) -> np.ndarray:
        return self.read(self.source(model, path, budget))["entropy"]

    def reference_entropies(self) -> np.ndarray:
        return self.read(REFERENCES)["entropy"]

    def features(self, model: str, path: str, budget: int) -> np.ndarray:
        return self._features(self.source(model, path, budget))

    def reference_features(self) -> np.ndarray:
        return self._features(REFERENCES)

    def mauve(self, p_NF: np.ndarray, q_NF: np.ndarray, seed: int) -> float:
        assert self.config.mauve is not None
        return mauve.one(p_NF, q_NF, self.config.mauve, seed)

    def source(self, model: str, path: str, budget: int) -> str:
        """The texts of a model at a path and budget, of which there must be one cell."""
        if model == UNIGRAM:
            return UNIGRAM
        fitting = [c for c in self.walked if (c.model, c.path, c.budget) == (model, path, budget)]
        if len(fitting) != 1:
            there = ", ".join(f"{c.path} {c.budget}" for c in self.walked if c.model == model)
            raise ConfigError(
                "gate",
                f"{len(fitting)} walks of {model} along {path} with {budget} calls",
                f"Name one of: {there}",
            )
        return fitting[0].name

    def _features(self, source: str) -> np.ndarray:
        rows = self.config.samples.rows
        table = self.parts.read(f"parts/features/{source}", ["features"])
        return matrix(table["features"][:rows], np.float32)

    def _column(self, group: str, name: str) -> np.ndarray:
        return self._numbers(self.parts.read(group, [name])[name])

    def _columns(self, group: str) -> dict[str, np.ndarray]:
        table = self.parts.read(group)
        return {name: self._numbers(table[name]) for name in table.column_names}

    @staticmethod
    def _numbers(column: pa.ChunkedArray) -> np.ndarray:
        return column.combine_chunks().to_numpy(zero_copy_only=False)
