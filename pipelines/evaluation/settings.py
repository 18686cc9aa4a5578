"""The configuration of `evaluate`. Every question brings a section of its own."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, make_dataclass
from typing import Literal, Union

from dsl.precision import Precision
from dsl.vocabulary import TOKENIZER
from infra.config import at_least
from infra.pool import PoolConfig
from pipelines.evaluation.cells import CHAMPION, REAL, REFERENCES, UNIGRAM, PathConfig
from pipelines.evaluation.gate import require_resamples
from pipelines.evaluation.layouts import Published
from pipelines.evaluation.question import Merit, Question, require_names
from pipelines.evaluation.questions import QUESTIONS
from pipelines.evaluation.readers import Reader
from pipelines.models import ConverterConfig
from pipelines.verb import RunSettings

# `likelihood`, `states`, `samples`, …: None by default where a question is only asked on demand.
Sections = make_dataclass(
    "Sections",
    [
        (question.section, question.settings | None, None)
        if question.optional
        else (question.section, question.settings, field(default_factory=question.settings))
        for question in QUESTIONS
        if question.section
    ],
    frozen=True,
    kw_only=True,
)
# What texts can be compared by, and of that where one direction is better.
MERITS = tuple(merit for question in QUESTIONS for merit in question.merits)
QUALITY = tuple(merit for merit in MERITS if merit.better)
AnyMetric = Union[tuple(kind for question in QUESTIONS for kind in question.gate_metrics)]  # noqa: UP007


@dataclass(frozen=True, kw_only=True)
class Questions(Sections):
    """What is asked of models, whichever they are; `paths` go by names of your choice.

    At most `corpus_rows` rows of the training split say which words there are and how frequent
    tokens are. `batch` rows at a time share a denoiser call, and are what a kill can lose.
    `precision` is that of our models' matrix products: `auto` takes bfloat16 on a GPU and float32
    elsewhere; networks of others have a setting of their own. `compile` compiles our models, which
    takes a minute and halves the time of a call on a GPU. The sections of the questions stand
    beside these; those that are None by default are left out where they are not given.
    """

    paths: dict[str, PathConfig] = field(default_factory=dict)
    split: Literal["validation", "test"] = "test"
    seed: int = 0
    batch: int = 64
    corpus_rows: int = 20_000
    precision: Precision = "auto"
    compile: bool = False
    workers: PoolConfig = field(default_factory=PoolConfig)

    def __post_init__(self) -> None:
        require_names(self.paths)
        at_least(1, self, "batch", "corpus_rows")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must lie in [0, 2^64), got {self.seed}")
        for question in self.questions:
            question.check(self)

    @property
    def questions(self) -> tuple[Question, ...]:
        """Those that are asked, in the order of the report."""
        return tuple(q for q in QUESTIONS if not q.optional or getattr(self, q.section) is not None)

    @property
    def merits(self) -> tuple[Merit, ...]:
        """What texts can be compared by, measured here or not."""
        return tuple(merit for question in QUESTIONS for merit in question.merits_in(self))

    @property
    def beside(self) -> tuple[str, ...]:
        """What stands beside the models in the tables of texts."""
        others = (name for question in self.questions for name in question.beside(self))
        return (UNIGRAM, REAL, *others)

    @property
    def readers(self) -> dict[str, Reader]:
        """What reads the texts of the models, by the dotted key that says so."""
        found = (question.readers(self) for question in self.questions)
        return {key: reader for readers in found for key, reader in readers.items()}

    @property
    def held_out_rows(self) -> dict[str, int]:
        """How many rows of the split are needed, by the dotted key that says so."""
        needed = (question.held_out_rows(self) for question in self.questions)
        return {key: rows for wanted in needed for key, rows in wanted.items()}


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Of the evaluation's models, `model` may become champion: if it is better by `metric`, and
    by none of the `guards` worse, with intervals of this `confidence` from so many `resamples`.
    """

    model: str
    metric: AnyMetric
    guards: tuple[AnyMetric, ...] = ()
    confidence: float = 0.95
    resamples: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence lies between 0 and 1, got {self.confidence}")
        require_resamples(self.resamples)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Questions, RunSettings):
    """`models` go by names of your choice; every model walks every path it can.

    `data` are the shards of `prepare`. `gate` is left out where it is not given.
    `trust_remote_code` runs code that came with the weights of models that only it knows.
    """

    data: str
    models: dict[str, str]
    gate: GateConfig | None = None
    published: tuple[Published, ...] = ()
    converter: ConverterConfig = field(default_factory=ConverterConfig)
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        RunSettings.__post_init__(self)
        require_names(self.models)
        if not self.models:
            raise ValueError("models must name at least one model")
        if taken := self.models.keys() & {*self.beside, REFERENCES, CHAMPION}:
            raise ValueError(f"no model may be named {min(taken)}: that is a row of its own")
        if TOKENIZER in self.models:
            raise ValueError(f"no model may be named {TOKENIZER}: that file lies beside the models")
        if self.gate and self.gate.model not in self.models:
            raise ValueError(f"gate.model is {self.gate.model}, which is none of the models")
        walks = Counter(f"{m}-{p}" for m in (*self.models, CHAMPION) for p in self.paths)
        for name, times in walks.items():
            if times > 1:
                raise ValueError(f"two walks would be named {name}: rename a model or a path")
