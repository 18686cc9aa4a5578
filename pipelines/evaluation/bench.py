"""What a process holds that works on an evaluation: its data, its parts and the models at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch

from dsl.denoiser import Denoiser
from dsl.vocabulary import Vocabulary
from infra.storage import Folder
from pipelines import models
from pipelines.evaluation.judge import Judged
from pipelines.evaluation.parts import Parts, matrix
from pipelines.evaluation.settings import REFERENCES, EvaluateConfig
from pipelines.models import Model

WORDS = "parts/words"  # the group of parts that holds those of the training split
MODELS = "models"  # of the run directory: the weights as they were when the evaluation began


class Bench:
    """Opens what a job asks for, and keeps it for the next one.

    Jobs of one model come one after another, so one model is kept and not all.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        self.folder = Folder.at(config.root) / config.name
        self.parts = Parts(self.folder)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._opened: tuple[str, Model] | None = None

    def model(self, name: str) -> Model:
        """One of the evaluation's models, on the device."""
        if self._opened is None or self._opened[0] != name:
            self._opened = None  # before the next takes its place in memory
            self._opened = (name, self._open(name))
        return self._opened[1]

    def denoiser(self, name: str) -> Denoiser:
        return self.model(name).denoiser

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Held-out rows ``[B, L]``, the same for every model."""
        return torch.from_numpy(self._held_out_NL[first : first + count])

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.from_json((self.folder / MODELS).read_bytes("tokenizer.json").decode())

    @cached_property
    def words(self) -> frozenset[str]:
        """Those of the training split."""
        return frozenset(self.parts.read(WORDS)["word"].to_pylist())

    @cached_property
    def featurize(self) -> Callable[[Sequence[str], np.ndarray], np.ndarray]:
        assert self.config.mauve is not None
        return self.config.mauve.featurizer.load(self.device, self._stranger)

    @cached_property
    def judge(self) -> Callable[[Sequence[str], np.ndarray], Judged]:
        assert self.config.judge is not None
        return self.config.judge.load(self.device, self._stranger)

    @cached_property
    def _held_out_NL(self) -> np.ndarray:
        return matrix(self.parts.read(f"samples/{REFERENCES}", ["tokens"])["tokens"], np.int64)

    def _open(self, name: str) -> Model:
        model = models.load_folder(self.folder / MODELS / name)
        model.denoiser.to(self.device).eval()
        return model

    def _stranger(self, address: str) -> Model:
        """A model of ours that is asked about the texts of others."""
        return self._open(stranger(address))


def stranger(address: str) -> str:
    """The name in `models` of one that judges or featurizes."""
    return "judging-" + "".join(c if c.isalnum() else "-" for c in address)
