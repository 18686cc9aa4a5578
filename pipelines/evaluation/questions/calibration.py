"""How far a model's confidence is from its accuracy, at each SNR of the states.

Shapes: B rows of a part, L positions, K bins of confidence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import pyarrow.compute as pc
from torch import Tensor

from dsl.calibration import calibration
from dsl.denoiser import Denoiser
from pipelines.evaluation.conditions import AtSNR
from pipelines.evaluation.parts import matrix
from pipelines.evaluation.question import Columns, Drawn, OfRows, Questions, RowQuestion
from pipelines.evaluation.subjects import Subject
from pipelines.evaluation.survey import Survey
from pipelines.kinds import ModelKind
from pipelines.report import Column, Row, Table
from pipelines.report.plots import reliability

BINS = ("count", "confidence", "right")


def binned(
    denoiser: Denoiser, tokens_BL: Tensor, *, gammas: Sequence[float], seed: int, first_row: int
) -> Columns:
    """One row for each SNR: how many predictions each bin holds, their confidence and how many
    were right."""
    found = calibration(denoiser, tokens_BL, gammas=gammas, seed=seed, first_row=first_row)
    return {
        "gamma": list(found),
        "count": [bins.count_K.tolist() for bins in found.values()],
        "confidence": [bins.confidence_K.tolist() for bins in found.values()],
        "right": [bins.right_K.tolist() for bins in found.values()],
    }


class Calibration(RowQuestion):
    name, title = "calibration", "Calibration under teacher forcing"
    text = (
        "The likeliest token at every position, in ten bins of equal width. ECE: expected "
        "calibration error."
    )
    table = (
        Column("model", "Model"),
        Column("state", "State"),
        Column("ece", "ECE", ".4f"),
        Column("accuracy_of_all", "Accuracy", ".4f"),
        Column("confidence_of_all", "Confidence", ".4f"),
    )

    def asked(self, config: Questions, kind: ModelKind) -> Mapping[str, OfRows]:
        if not kind.finite_snr or not config.states.gammas:
            return {}
        return {"": partial(binned, gammas=config.states.gammas, seed=config.seed)}

    def rows(self, survey: Survey, subject: Subject) -> Iterator[Row]:
        if not self.asked(survey.config, subject.trained_as):
            return
        parts = survey.parts.read(self.group(subject.name))
        for gamma in survey.config.states.gammas:
            of_gamma = parts.filter(pc.equal(parts["gamma"], gamma))
            count_K, sure_K, right_K = (matrix(of_gamma[key], np.float64).sum(0) for key in BINS)
            filled_K, empty_K = np.maximum(count_K, 1), count_K == 0
            yield {
                "model": subject.name,
                "state": AtSNR(snr=gamma).name,
                "gamma": gamma,
                "ece": float(np.abs(right_K - sure_K).sum() / count_K.sum()),
                "accuracy_of_all": float(right_K.sum() / count_K.sum()),
                "confidence_of_all": float(sure_K.sum() / count_K.sum()),
                "count": count_K.tolist(),
                "confidence": _or_none(sure_K / filled_K, empty_K),
                "accuracy": _or_none(right_K / filled_K, empty_K),
            }

    def plots(self, survey: Survey, tables: Mapping[str, Table]) -> Iterable[Drawn]:
        return [("reliability", "Reliability by SNR", reliability(tables["calibration"].rows))]


def _or_none(values_K: np.ndarray, empty_K: np.ndarray) -> list[float | None]:
    return [None if empty else v for v, empty in zip(values_K.tolist(), empty_K, strict=True)]
