"""What a process keeps open while it works on an evaluation: its parts, its rows and one
model."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from dsl.precision import dtype_of
from dsl.vocabulary import Vocabulary
from infra.pool import PoolConfig
from pipelines import models
from pipelines.evaluation.cells import REFERENCES
from pipelines.evaluation.copies import Copies
from pipelines.evaluation.parts import Parts, lists, matrix
from pipelines.evaluation.readers import Reader
from pipelines.models import Model

if TYPE_CHECKING:
    from pipelines.evaluation.settings import EvaluateConfig

WORDS = "parts/words"  # the group of parts that holds those of the training split
TRAINING = "parts/training"  # the rows of that split that n-grams and copies are counted in
MODELS = "models"  # of the run directory: the weights as they were when the evaluation began


class Workspace:
    """Opens what a part needs, and keeps it for the next one.

    Parts of one model come one after another, so only one model is kept.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        self.folder = config.folder
        self.parts = Parts(self.folder)
        self.device = device_of(config.workers)
        self._opened: tuple[str, Model] | None = None
        self._readers: dict[Reader, Any] = {}

    def model(self, name: str) -> Model:
        """One of the evaluation's models, on the device."""
        if self._opened is None or self._opened[0] != name:
            self._opened = None  # frees the memory before the next is opened
            self._opened = (name, self._open(name))
        return self._opened[1]

    def reader(self, key: str, reader: Reader) -> Any:
        """What `load_in` of a reader answers: a function of texts and their tokens. key: the dotted
        path of the section that asks for it, which errors name."""
        if reader not in self._readers:
            self._readers[reader] = reader.load_in(key, self)
        return self._readers[reader]

    def own_reader(self, address: str) -> Model:
        """One of our own models that reads the texts of others, on the device."""
        return self._open(copied(address))

    def keep_training(self, training_RL: np.ndarray) -> None:
        """Have the rows of the training split for the processes that ask for them."""
        if not self.parts.present(TRAINING):
            self.parts.write(TRAINING, 0, pa.table({"tokens": lists(training_RL)}), {})

    @cached_property
    def training_RL(self) -> np.ndarray:
        """The rows of the training split that were kept."""
        return matrix(self.parts.read(TRAINING, ["tokens"])["tokens"], np.int64)

    @cached_property
    def copies(self) -> Copies:
        """An index of all stretches of these rows."""
        return Copies(self.training_RL)

    @cached_property
    def words(self) -> frozenset[str]:
        """Those of the training split."""
        return frozenset(self.parts.read(WORDS)["word"].to_pylist())

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Held-out rows ``[B, L]``, the same for every model."""
        return torch.from_numpy(self._held_out_NL[first : first + count])

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.from_json((self.folder / MODELS).read_bytes("tokenizer.json").decode())

    @cached_property
    def _held_out_NL(self) -> np.ndarray:
        return matrix(self.parts.read(f"samples/{REFERENCES}", ["tokens"])["tokens"], np.int64)

    def _open(self, name: str) -> Model:
        trusted = self.config.trust_remote_code
        model = models.load_folder(self.folder / MODELS / name, trust_remote_code=trusted)
        denoiser = model.denoiser.to(self.device).eval()
        dtype = dtype_of(self.config.precision, self.device)
        denoiser = denoiser.computing_in(dtype)
        return replace(model, denoiser=denoiser.compiled() if self.config.compile else denoiser)


def device_of(workers: PoolConfig) -> torch.device:
    """Where parts are made. The processes of a pool have a GPU each if they ask for one; this one,
    where there are no others, may lack it, and keeps off one that was not asked for."""
    gpu = workers.gpu and (workers.count > 0 or torch.cuda.is_available())
    return torch.device("cuda" if gpu else "cpu")


def copied(address: str) -> str:
    """The name in `MODELS` of a model of our own that reads the texts of others: another one for
    each address."""
    readable = "".join(c if c.isalnum() else "-" for c in address)
    return f"judging-{readable}-{hashlib.sha256(address.encode()).hexdigest()[:8]}"
