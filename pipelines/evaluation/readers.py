"""What reads the texts of models: networks in the files of Hugging Face, our own as stand-ins, and
whatever else a question defines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from dsl.denoiser import Denoiser
from dsl.precision import Precision
from infra.config import at_least
from infra.errors import Problem
from pipelines import models
from pipelines.evaluation import hub
from pipelines.models import ConverterConfig, Model

if TYPE_CHECKING:
    from pipelines.evaluation.held_out import HeldOut
    from pipelines.evaluation.workspace import Workspace


class Reader(ABC):
    """The base class of what reads texts. `key` is the dotted path of the section that asks for it,
    which errors name."""

    reads_training: ClassVar[bool] = False  # needs the rows of the training split, too

    @property
    @abstractmethod
    def label(self) -> str:
        """What tables call it."""

    def addresses(self) -> tuple[str, ...]:
        """The models of our own that it opens."""
        return ()

    def check(self, key: str, uri: str, **how: Any) -> None:  # noqa: B027 - there may be nothing to
        """A `Problem` where its model cannot be used; `uri` of the registry.

        how: the `converter` and `trust_remote_code` with which models of our own are opened.
        """

    def check_data(self, key: str, held_out: HeldOut) -> None:  # noqa: B027
        """A `Problem` where it cannot read texts of this data."""

    @abstractmethod
    def load_in(self, key: str, workspace: Workspace) -> Any:
        """A function of texts and their tokens."""


@dataclass(frozen=True, kw_only=True)
class PretrainedReader(Reader):
    """A network in the files of Hugging Face. It sees `max_tokens` of its own tokenizer's at once,
    and `batch` texts of like length share a call. `precision`: of its matrix products, `auto` takes
    bfloat16 on a GPU and float32 elsewhere."""

    max_tokens: int = 1024
    batch: int = 8
    precision: Precision = "auto"

    head: ClassVar[hub.Head]

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 2), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    @abstractmethod
    def name(self) -> str:
        """What people call it."""

    def where(self, key: str) -> str:
        """The dotted path of the setting that names it."""
        return f"{key}.model"

    @abstractmethod
    def place(self, key: str) -> str:
        """Its folder, or its name on the hub; a `Problem` where there is neither."""

    @abstractmethod
    def load(self, key: str, device: torch.device | str) -> Any:
        """A function of texts and their tokens."""

    def load_in(self, key: str, workspace: Workspace) -> Any:
        return self.load(key, workspace.device)

    @property
    def label(self) -> str:
        return f"{self.name}, {self.max_tokens} tokens"

    def check(self, key: str, uri: str, **how: Any) -> None:
        """Have the model on this machine, or say what to do; see `hub.check`."""
        place, where = self.place(key), self.where(key)
        hub.check(place, self.head, max_tokens=self.max_tokens, where=where)

    def open(self, key: str, device: torch.device | str) -> hub.Opened:
        place, where = self.place(key), self.where(key)
        return hub.open(place, self.head, device, where=where, precision=self.precision)


@dataclass(frozen=True, kw_only=True)
class HubReader(PretrainedReader):
    """`model` is a name on the Hugging Face hub or a local folder."""

    model: str = "gpt2-large"
    kind: Literal["hub"] = "hub"

    @property
    def name(self) -> str:
        return self.model

    def place(self, key: str) -> str:
        return self.model


@dataclass(frozen=True, kw_only=True)
class OwnReader(Reader):
    """`model` is an address as `pipelines.models.load` takes it; figures compare with each other
    and not with published ones."""

    model: str
    batch: int = 64
    kind: Literal["own"] = "own"

    def __post_init__(self) -> None:
        at_least(1, self, "batch")

    @property
    def label(self) -> str:
        return f"stand-in: {self.model}, not comparable with gpt2-large"

    def addresses(self) -> tuple[str, ...]:
        return (self.model,)

    def check(self, key: str, uri: str, **how: Any) -> None:
        """A `Problem` or dsl.WeightsError where there is no such model, or one that cannot be used;
        `uri` of the registry. how: see `Reader.check`."""
        try:
            model = models.load(
                self.model, **{"converter": ConverterConfig(), "tracking_uri": uri, **how}
            )
        except Problem as problem:
            why = f"{problem.where}: {problem.why}"
            raise type(problem)(f"{key}.model", why, problem.fix) from problem
        self.require(key, model)

    def require(self, key: str, model: Model) -> None:
        """DataError for a model that cannot be used."""

    def open(self, key: str, workspace: Workspace) -> Denoiser:
        model = workspace.own_reader(self.model)
        self.require(key, model)
        return model.denoiser

    def batches(self, tokens_NL: np.ndarray) -> Iterator[torch.Tensor]:
        """``[B, L]``, `batch` rows at a time."""
        yield from torch.from_numpy(tokens_NL.astype(np.int64)).split(self.batch)
