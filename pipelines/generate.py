"""Draw text from a model along a path: freely, after a prompt, into blanks, or over a draft.

    python pipelines/generate.py model=models:/dsl-quickstart@candidate text='The '
    python pipelines/generate.py model=runs/quickstart-dsl text='The ____ of a list' watch=true
    python pipelines/generate.py model=runs/quickstart-dsl mode=correct text='Teh list' snr=2 \\
        path='{kind: hybrid, first: {kind: sentence_sde, gamma_max: 30}, second: masked,
        split: [16, 32]}' film=film.html
    python pipelines/generate.py toy=cyclic

`text` is kept and continued to `length`. If it holds a `_`, it is the whole row, and each `_` is
one token to draw. With `mode=prompt`, `_` is a character like any other; with `mode=correct`, the
text is evidence at the finite SNR `snr`, and the model may replace its letters. `input` is a file
of texts instead: one on each line, or .jsonl with a `text`. Each text is drawn `rows` times.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

import dsl
from dsl import conditioning
from dsl.conditioning import Given, Mode
from dsl.errors import PathError
from dsl.paths import AnyPath, choose
from dsl.precision import Precision, dtype_of
from dsl.sampling import Recorder
from dsl.truncation import Nucleus, Truncated, require_temperature
from infra import tracking
from infra.config import at_least, to_tree
from infra.console import Meter
from infra.errors import ConfigError
from infra.storage import Folder
from pipelines import models, prompts, verb
from pipelines.examples import toys
from pipelines.film import Film
from pipelines.models import ConverterConfig, Model
from pipelines.verb import TrackingConfig
from pipelines.watch import TerminalRecorder, printable


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What to draw, with which model, and where the texts go.

    `model` is any address that `finetune.init` takes; an MDLM checkpoint needs a `tokenizer` too.
    `path`, `budget` and `length` have defaults that suit the model. The noise of a row is keyed by
    `seed` and the number of the row, counted from `first_row`: a text depends neither on `batch`
    nor on other rows. `precision` is that of the network's matrix products: `auto` takes bfloat16
    on a GPU and float32 elsewhere. `film` is the file of an HTML page that plays the first batch.
    `trust_remote_code` runs code that came with the weights, for a network that only it knows.
    """

    model: str | None = None
    toy: Literal["cyclic", "two_bit", "windows", "chain"] | None = None
    text: str = ""
    input: str | None = None
    mode: Mode = "infill"
    snr: float = 2.0
    rows: int = 4
    length: int | None = None
    path: AnyPath | None = None
    budget: int | None = None
    temperature: float = 1.0
    nucleus: Nucleus = field(default_factory=Nucleus)
    seed: int = 0
    first_row: int = 0
    batch: int = 16
    precision: Precision = "auto"
    out: str = "runs/samples"
    watch: bool = False
    film: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    converter: ConverterConfig = field(default_factory=ConverterConfig)
    root: str = "runs"
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if (self.model is None) == (self.toy is None):
            raise ValueError("give either a model or a toy")
        for name in ("text", "input", "path", "budget", "length", "film", "tokenizer"):
            if self.toy and getattr(self, name):
                raise ValueError(f"{name} is for a model, and a toy takes none")
        if self.input and self.text:
            raise ValueError("give either a text or an input file")
        if not 0 < self.snr < math.inf:
            raise ValueError(f"snr must be positive and finite, got {self.snr}")
        at_least(1, self, "rows", "batch", "budget", "length")
        for name, bits in (("seed", 64), ("first_row", 32)):
            if not 0 <= (value := getattr(self, name)) < 2**bits:
                raise ValueError(f"{name} must lie in [0, 2^{bits}), got {value}")
        require_temperature(self.temperature)


def execute(
    config: GenerateConfig, show: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Draw, and write the texts. show: told each finished row; by default it is printed."""
    out = Folder.at(config.out)
    if config.toy:
        return toys.TOYS[config.toy](out, config.seed)
    model, given = prepare(config)
    film = Film(model.vocabulary, title(config, model, given)) if config.film else None
    places = [(out, "samples.txt"), (out, "samples.jsonl")]
    places += [Folder.holding(config.film)] if config.film else []
    for folder, name in places:
        folder.require_writable(name)
    drawn, meter = [], Meter(f"generate {config.model}", len(given), "rows")
    for row in draw(config, model, given, film):
        drawn.append(row)
        (show or _print)(row)
        if not config.watch:
            meter.show(len(drawn))
    texts = "".join(f"--- row {row['row']}\n{row['text']}\n" for row in drawn)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in drawn)
    out.write_bytes("samples.txt", texts.encode())
    out.write_bytes("samples.jsonl", lines.encode())
    made = {name: out.url_of(f"samples.{name}") for name in ("txt", "jsonl")}
    if film:
        folder, name = places[-1]
        folder.write_bytes(name, film.page().encode())
        made["film"] = folder.url_of(name)
    calls = sum(row["calls"] for row in drawn) / len(drawn)
    return made | {"model": config.model, "rows": len(drawn), "calls_per_row": calls}


def _print(row: dict[str, Any]) -> None:
    print(f"--- row {row['row']}, {row['calls']} calls\n{printable(row['text'])}", flush=True)


def prepare(config: GenerateConfig) -> tuple[Model, list[Given]]:
    """The model with its vocabulary, and every row to draw.

    Raises DataError for a text that does not fit, ConfigError for a path that does not.
    """
    assert config.model is not None
    uri = tracking.locate(config.tracking, config.root)
    model = models.load(
        config.model,
        converter=config.converter,
        tracking_uri=uri,
        trust_remote_code=config.trust_remote_code,
    )
    model = prompts.with_vocabulary(model, config.tokenizer)
    texts = prompts.read(config.input) if config.input else [("text", config.text)]
    given = prompts.given(texts, model, mode=config.mode, snr=config.snr, length=config.length)
    given = [row for row in given for _ in range(config.rows)]
    for length in {len(row) for row in given}:
        resolve(config, model, length)
    models.require_room(model.denoiser, max(map(len, given)), "length")
    return model, given


def title(config: GenerateConfig, model: Model, given: Sequence[Given]) -> dict[str, str]:
    """The head of the film: the given text, the model, the path and the budget."""
    path, budget = resolve(config, model, len(given[0]))
    text = config.input or config.text or "(nothing: every token is drawn)"
    walk = json.dumps(to_tree(path), ensure_ascii=False)
    return {"text": text, "model": model.address, "path": walk, "budget": f"{budget} calls"}


def resolve(config: GenerateConfig, model: Model, length: int) -> tuple[AnyPath, int]:
    """The path and the budget for rows of a length."""
    causal = model.denoiser.config.backbone.causal
    try:
        return choose(config.path, config.budget, length=length, causal=causal)
    except PathError as error:
        raise ConfigError("path", str(error)) from error


def draw(
    config: GenerateConfig, model: Model, given: Sequence[Given], film: Film | None
) -> Iterator[dict[str, Any]]:
    """Finished rows in order, each with its settings. The film records the first batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = model.denoiser.to(device).computing_in(dtype_of(config.precision, device))
    sharp = Truncated(network, config.temperature, config.nucleus.p, config.nucleus.convention)
    for first, batch in conditioning.batches(given, config.batch):
        path, budget = resolve(config, model, len(batch[0]))
        recorders: list[Recorder] = []
        if config.watch:
            recorders.append(TerminalRecorder(model.vocabulary, sys.stderr))
        if film and not first:
            recorders.append(film)
        began = time.perf_counter()
        try:
            sampled = dsl.sample(
                sharp,
                path,
                conditioning.state(batch, network.table_VD),
                budget=budget,
                seed=config.seed,
                first_row=config.first_row + first,
                recorders=recorders,
            )
        except PathError as error:  # e.g. an order of other positions than the text has
            raise ConfigError("path", str(error)) from error
        seconds = time.perf_counter() - began
        for row, ids in enumerate(sampled.tokens_BL.tolist()):
            yield {
                "row": config.first_row + first + row,
                "text": model.vocabulary.decode(ids),
                "tokens": ids,
                "path": to_tree(path),
                "budget": budget,
                "calls": int(sampled.row_calls_B[row]),
                "seed": config.seed,
                "batch_seconds": round(seconds, 4),
            }


def dry_run(config: GenerateConfig) -> dict[str, Any]:
    if config.toy:
        return {"toy": config.toy, "out": config.out}
    model, given = prepare(config)
    work = list(conditioning.batches(given, config.batch))
    plans = [resolve(config, model, len(batch[0])) for _, batch in work]
    return {
        "model": config.model,
        "objective": model.kind,
        "parameters": sum(p.numel() for p in model.denoiser.parameters()),
        "path": plans[0][0].kind,
        "rows": len(given),
        "tokens": sum(map(len, given)),
        "batches": len(work),
        "calls": sum(budget for _, budget in plans),
        "out": Folder.at(config.out).url,
    }


def main() -> int:
    return verb.run("generate", GenerateConfig, plan=dry_run, execute=execute, doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
