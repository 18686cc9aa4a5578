"""Models that read the texts of others: strangers from the hub, and our own as stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pipelines.models import Model

# From the address of one of our own models to the model, which speaks the data's vocabulary.
OpenModel = Callable[[str], Model]


@dataclass(frozen=True, kw_only=True)
class HubReader:
    """`model` is a name on the Hugging Face hub or a local folder. It sees `max_tokens` of its own
    tokenizer's at once, and `batch` texts of like length share a call."""

    model: str = "gpt2-large"
    max_tokens: int = 1024
    batch: int = 8
    kind: Literal["hub"] = "hub"

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 2), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def label(self) -> str:
        return f"{self.model}, {self.max_tokens} tokens"

    def addresses(self) -> tuple[str, ...]:
        """The models of our own that it opens."""
        return ()


@dataclass(frozen=True, kw_only=True)
class OwnReader:
    """`model` is an address as `pipelines.models.load` takes it; figures compare with each other
    and not with published ones."""

    model: str
    batch: int = 64
    kind: Literal["own"] = "own"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")

    @property
    def label(self) -> str:
        return f"stand-in: {self.model}, not comparable with gpt2-large"

    def addresses(self) -> tuple[str, ...]:
        """The models of our own that it opens."""
        return (self.model,)
