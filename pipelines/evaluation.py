"""What an evaluation does: read the held-out rows, ask every model, tabulate the answers.

Shapes: N rows, L positions, V tokens, T tokens of a text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dsl.denoiser import Denoiser
from dsl.vocabulary import Vocabulary
from infra import journal, registry, shards, stream, tracking
from infra.errors import ConfigError
from infra.shards import Manifest
from infra.storage import Folder
from pipelines import measures, metrics, models, plots
from pipelines.launch import say
from pipelines.metrics import Score, Unigram
from pipelines.report import SKIPPED, STDERR, Column, Plot, Report, Row, Table, Text

if TYPE_CHECKING:
    from pipelines.evaluate import EvaluateConfig

ANCHORS = ("unigram", "real")  # what stands beside the models in the table of texts
TEXTS = 2  # of each model and path are shown; all of them are in samples/
NGRAMS = (1, 2, 3)

LIKELIHOOD = (
    Column("model", "Model"),
    Column("view", "View"),
    Column("nats_per_token", "Nats per token", ".4f"),
    Column("bits_per_byte", "Bits per byte", ".4f"),
    Column("perplexity", "Perplexity", ".2f"),
    Column("meaning", "Which is"),
)
STATES = (
    Column("model", "Model"),
    Column("state", "State"),
    Column("nats", "Cross-entropy", ".4f"),
    Column("squared_error", "Squared error", ".4f"),
)
SAMPLES = (
    Column("model", "Model"),
    Column("path", "Path"),
    Column("budget", "Budget"),
    Column("calls", "Calls"),
    Column("words", "Words in corpus", ".3f"),
    *(Column(f"distinct_{n}", f"Distinct-{n}", ".3f") for n in NGRAMS),
    Column("entropy", "Entropy", ".3f"),
    Column("seconds", "Seconds a text", ".4f"),
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model under evaluation; `origin` is where it came from, as the registry and runs know."""

    name: str
    kind: str
    denoiser: Denoiser
    origin: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out rows, and what the training split says of words and frequencies."""

    manifest: Manifest
    vocabulary: Vocabulary
    rows_NL: np.ndarray
    unigram: Unigram
    words: frozenset[str]

    @classmethod
    def read(cls, config: EvaluateConfig) -> HeldOut:
        manifest, data = manifest_of(config), Folder.at(config.data)
        vocabulary = models.vocabulary_of(manifest, data)
        corpus_T = _corpus(data, manifest, config.corpus_rows)
        wanted = max(config.likelihood.rows, config.samples.rows)
        return cls(
            manifest=manifest,
            vocabulary=vocabulary,
            rows_NL=stream.holdout(data, manifest, config.split, wanted, config.seed),
            unigram=Unigram.fit(corpus_T, vocabulary.size),
            words=frozenset(metrics.words(corpus_T, vocabulary)),
        )


def manifest_of(config: EvaluateConfig) -> Manifest:
    """The data's manifest; ConfigError where the split has too few rows for the settings."""
    manifest = shards.read_manifest(config.data)
    there = manifest.rows(config.split)
    for key, wanted in (
        ("likelihood.rows", config.likelihood.rows),
        ("samples.rows", config.samples.rows),
    ):
        if wanted > there:
            raise ConfigError(
                key,
                f"{wanted} of the {there} rows of {Folder.at(config.data).url_of(config.split)}",
                "Ask for fewer, or prepare a larger split",
            )
    return manifest


def _corpus(data: Folder, manifest: Manifest, most: int) -> np.ndarray:
    """The training split in its order, without the marks that frame its rows; ``[T]``."""
    parts, left = [], most
    for file, groups in zip(
        manifest.files("train"), shards.check_files(data, manifest, "train"), strict=True
    ):
        for index in range(len(groups)):
            if left > 0:
                parts.append(shards.read_group(data, manifest, file.name, index)[:left])
                left -= len(parts[-1])
    rows_NL = np.concatenate(parts)
    return {"eos": rows_NL, "bos_eos": rows_NL[:, 1:-1]}[manifest.blocks].reshape(-1)


def origin(address: str, uri: str, root: str) -> dict[str, Any]:
    """Which model an address means now: its version, the run that made it, that run's folder."""
    if not address.startswith("models:/"):
        run_id = _run_id(Folder.at(address))
        return {"address": address, **({"run": address, "run_id": run_id} if run_id else {})}
    version = registry.describe(address, uri)
    runs = Folder.at(root)
    made = [name for name in runs.names() if _run_id(runs / name) == version.run_id]
    return {
        "address": address,
        "version": version.uri,
        "run_id": version.run_id,
        **({"run": (runs / made[0]).url} if made else {}),
    }


def _run_id(folder: Folder) -> str | None:
    if not folder.exists(tracking.RECORD):
        return None
    return json.loads(folder.read_bytes(tracking.RECORD)).get("run_id")


def evaluate(
    config: EvaluateConfig, held_out: HeldOut, subjects: Sequence[Subject], samples: Folder
) -> tuple[Report, dict[str, float]]:
    """The report, and its figures under flat names; every sample goes into the folder `samples`."""
    likelihood = list(_likelihood(config, held_out, subjects))
    states = list(_states(config, held_out, subjects))
    walks = list(_walks(config, held_out, subjects, samples))
    written = [row for row, _ in walks]
    manifest = held_out.manifest
    rows_NL = held_out.rows_NL[: config.likelihood.rows]
    text = int(metrics.text_bytes(rows_NL, held_out.vocabulary).sum())
    made = Report(
        title=f"Evaluation {config.name}",
        subtitle=f"{config.split} split of {manifest.source} (digest {manifest.digest[:12]}), "
        f"V = {manifest.vocabulary.size}, L = {manifest.length}, seed {config.seed}",
        facts={
            "data": {"digest": manifest.digest, "split": config.split, "blocks": manifest.blocks},
            "models": {
                subject.name: {
                    **subject.origin,
                    "kind": subject.kind,
                    "parameters": sum(p.numel() for p in subject.denoiser.parameters()),
                }
                for subject in subjects
            },
        },
        tables={
            "likelihood": Table(
                title="Likelihood of held-out text",
                note=f"{len(rows_NL)} rows, {rows_NL.size:,} tokens, {text:,} bytes. Every token "
                "counts, end marks too, which hold no byte. ± is one standard error over rows.",
                columns=LIKELIHOOD,
                rows=likelihood,
            ),
            "states": Table(
                title="Error by state",
                note="Per unrevealed token of the same rows: cross-entropy in nats, and "
                "|x - x̂|², which is E(SNR) where every token has one SNR.",
                columns=STATES,
                rows=states,
            ),
            "samples": Table(
                title="Texts",
                note=f"{config.samples.rows} texts each at temperature "
                f"{config.samples.temperature:g} and nucleus {config.samples.nucleus:g}. Words in "
                "corpus: the share of words that occur in the training split. Entropy in nats.",
                columns=SAMPLES,
                rows=written,
            ),
        },
        plots=_plots(subjects, states, written),
        texts=[text for _, texts in walks for text in texts],
    )
    return made, dict(_flat(likelihood, states, written))


def _likelihood(
    config: EvaluateConfig, held_out: HeldOut, subjects: Sequence[Subject]
) -> Iterator[Row]:
    rows_NL = held_out.rows_NL[: config.likelihood.rows]
    bytes_N = metrics.text_bytes(rows_NL, held_out.vocabulary)
    length = rows_NL.shape[1]

    def row(model: str, view: str, meaning: str, nats_N: np.ndarray) -> Row:
        nats = metrics.mean(nats_N)
        perplexity = math.exp(nats.value)
        bits = metrics.ratio(nats_N * length / math.log(2), bytes_N)
        say(f"{model}: {view} {nats.value:.4f} nats per token, {bits.value:.4f} bits per byte")
        return {
            "model": model,
            "view": view,
            **_entries("nats_per_token", nats),
            **_entries("bits_per_byte", bits),
            **_entries("perplexity", Score(perplexity, perplexity * nats.stderr)),
            "meaning": meaning,
        }

    yield row("unigram", "exact", "exact", held_out.unigram.nats(rows_NL))
    tokens_NL = torch.from_numpy(rows_NL)
    for subject in subjects:
        for view in measures.VIEWS[subject.kind]:
            nats_N = measures.nats(
                view,
                subject.denoiser,
                tokens_NL,
                config.likelihood,
                seed=config.seed,
                batch=config.batch,
            )
            yield row(subject.name, view.name, view.meaning, nats_N)


def _states(
    config: EvaluateConfig, held_out: HeldOut, subjects: Sequence[Subject]
) -> Iterator[Row]:
    tokens_NL = torch.from_numpy(held_out.rows_NL[: config.likelihood.rows])
    keys = {"seed": config.seed, "batch": config.batch}

    def row(errors: measures.Errors) -> Row:
        return {
            **_entries("nats", metrics.mean(errors.nats_N)),
            **_entries("squared_error", metrics.mean(errors.squared_N)),
        }

    for subject in subjects:
        name, denoiser = subject.name, subject.denoiser
        if subject.kind == "ar":
            yield {"model": name, "state": "all", SKIPPED: "ar reads nothing but what is before"}
            continue
        for share in config.states.revealed:
            say(f"{name}: error with {share:.0%} revealed")
            errors = measures.errors_revealed(denoiser, tokens_NL, share, **keys)
            yield {"model": name, "state": f"{share:.0%} revealed", "share": share, **row(errors)}
        if subject.kind == "mdlm":
            yield {"model": name, "state": "finite SNR", SKIPPED: "mdlm was not trained on it"}
            continue
        for gamma in config.states.gammas:
            say(f"{name}: error at SNR {gamma:g}")
            errors = measures.errors_at(denoiser, tokens_NL, gamma, **keys)
            yield {"model": name, "state": f"SNR {gamma:g}", "gamma": gamma, **row(errors)}


def _walks(
    config: EvaluateConfig, held_out: HeldOut, subjects: Sequence[Subject], samples: Folder
) -> Iterator[tuple[Row, list[Text]]]:
    """A row of figures and some texts, for the anchors and for every model, path and budget."""
    rows, length = config.samples.rows, held_out.manifest.length
    vocabulary = held_out.vocabulary
    unigram_NL = held_out.unigram.draw(rows, length, config.seed)
    for name, tokens_NL in zip(ANCHORS, (unigram_NL, held_out.rows_NL[:rows]), strict=True):
        yield {"model": name, **_figures(tokens_NL, held_out)}, _texts(name, tokens_NL, vocabulary)
    for subject in subjects:
        for path_name, entry in config.paths.items():
            for budget in entry.budgets:
                row = {"model": subject.name, "path": path_name, "budget": budget}
                if reason := measures.refusal(subject.kind, entry.path, budget, length):
                    yield row | {SKIPPED: reason}, []
                    continue
                texts = measures.draw(
                    subject.denoiser,
                    entry.path,
                    budget=budget,
                    length=length,
                    config=config.samples,
                    seed=config.seed,
                    batch=config.batch,
                )
                row |= {"calls": texts.calls, "seconds": texts.seconds / rows}
                row |= _figures(texts.tokens_NL, held_out)
                heading = f"{subject.name} {path_name} {budget}"
                _write(samples, heading.replace(" ", "-"), texts.tokens_NL, vocabulary)
                say(f"{heading}: {row['words']:.1%} of words in corpus, {texts.seconds:.1f} s")
                yield row, _texts(heading, texts.tokens_NL, vocabulary)


def _figures(tokens_NL: np.ndarray, held_out: HeldOut) -> dict[str, Any]:
    return {
        **_entries("words", metrics.word_share(tokens_NL, held_out.vocabulary, held_out.words)),
        **{f"distinct_{n}": metrics.distinct(tokens_NL, n) for n in NGRAMS},
        **_entries("entropy", metrics.entropy(tokens_NL)),
    }


def _texts(heading: str, tokens_NL: np.ndarray, vocabulary: Vocabulary) -> list[Text]:
    return [Text(heading, vocabulary.decode(row)) for row in tokens_NL[:TEXTS].tolist()]


def _write(folder: Folder, name: str, tokens_NL: np.ndarray, vocabulary: Vocabulary) -> None:
    lines = [
        json.dumps({"row": row, "text": vocabulary.decode(tokens), "tokens": tokens})
        for row, tokens in enumerate(tokens_NL.tolist())
    ]
    folder.write_bytes(f"{name}.jsonl", "".join(f"{line}\n" for line in lines).encode())


def _plots(
    subjects: Sequence[Subject], states: Sequence[Row], written: Sequence[Row]
) -> list[Plot]:
    runs = {
        subject.name: journal.read(subject.origin["run"])
        for subject in subjects
        if "run" in subject.origin
    }
    runs = {name: rows for name, rows in runs.items() if rows}
    walked = [row for row in written if "calls" in row]
    anchors = {row["model"]: row["words"] for row in written if row["model"] in ANCHORS}
    by_snr = [row for row in states if "gamma" in row]
    drawn = (
        (
            "loss",
            "Training and validation loss of the evaluated models' runs",
            runs,
            lambda: plots.losses(runs),
        ),
        (
            "quality",
            "Words in corpus against calls; dotted: unigram draws and real text",
            walked,
            lambda: plots.quality(walked, anchors),
        ),
        (
            "snr",
            "Cross-entropy and squared error over SNR",
            by_snr,
            lambda: plots.errors_by_snr(by_snr),
        ),
    )
    return [Plot(name, caption, draw()) for name, caption, data, draw in drawn if data]


def _flat(
    likelihood: Sequence[Row], states: Sequence[Row], written: Sequence[Row]
) -> Iterator[tuple[str, float]]:
    """Figures by names that MLflow takes; those that are not finite are left out."""
    labels = ("model", "view", "share", "gamma", "path", "budget")
    for rows, columns in ((likelihood, LIKELIHOOD), (states, STATES), (written, SAMPLES)):
        for row in rows:
            prefix = "/".join(str(row[key]) for key in labels if key in row)
            figures = {c.key: row[c.key] for c in columns if c.key in row and c.key not in labels}
            for key, value in figures.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    yield f"{prefix}/{key}", float(value)


def _entries(key: str, score: Score) -> dict[str, float]:
    return {key: score.value, key + STDERR: score.stderr}
