"""The whole job in one process, with one Ray: prepare, pretrain, finetune, evaluate, generate.

    python -m pipelines.examples.quickstart
    python -m pipelines.examples.quickstart existing=restart

Each verb does what its own command does with the preset `quickstart`. A second run picks up what
the first has left; `existing=restart` makes everything anew.
"""

from __future__ import annotations

import importlib
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

from infra import documents
from infra.config import load, to_tree
from infra.console import clock, say
from infra.storage import Folder
from pipelines import verb
from pipelines.verb import PRESETS, VERBS

PRESET = "quickstart"
RUNS = ("prepare", "pretrain", "finetune", "evaluate")
WIDTH = 96  # characters of a line
MOST = 25  # lines of the summary
WORKERS = 2  # what the preset asks for


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """`existing`: go on from what an earlier run has left, or make everything anew."""

    existing: Literal["resume", "restart"] = "resume"


def execute(config: QuickstartConfig) -> dict[str, Any]:
    """Run all verbs and say what came out; the addresses of what was made."""
    # Imported late, as the verbs are: `--help` is to answer at once.
    from infra import cluster

    began = time.monotonic()
    finished = config.existing == "resume" and all(map(_is_finished, RUNS[1:]))
    ray = cluster.connected(cluster.ClusterConfig(), needed_cpus=WORKERS)
    with nullcontext() if finished else ray:
        made = {name: _run(name, f"existing={config.existing}") for name in RUNS}
        texts = dict(_texts())
    folder, name = Folder.holding(made["evaluate"]["tables"])
    tables = documents.load(folder, name, dict[str, Any], "Evaluate again with existing=restart")
    say("\n".join(summary(made, tables, texts, time.monotonic() - began)))
    return {
        "model_uri": made["finetune"].get("alias_uri"),
        "report": made["evaluate"]["report"],
        "texts": len(texts),
    }


def _is_finished(name: str) -> bool:
    """Whether a verb has nothing left to do, so that Ray need not be started for it."""
    from pipelines.runs import RESULT

    return bool(_config(name).folder.exists(RESULT))


def _run(name: str, *argv: str, **given: Any) -> dict[str, Any]:
    """What a verb makes with the preset."""
    found: dict[str, Any] = _module(name).execute(_config(name, *argv), **given)
    return found


def _config(name: str, *argv: str) -> Any:
    kind = getattr(_module(name), f"{name.capitalize()}Config")
    return load(kind, verb=name, argv=[PRESET, *argv], presets=PRESETS, verbs=VERBS)


def _module(name: str) -> Any:
    return importlib.import_module(f"pipelines.{name}")


def _texts() -> Iterator[tuple[str, str]]:
    """One text of the registered model along each path of the evaluation, at its last budget."""
    from infra.config import overridden

    asked = _config("evaluate")
    for name, entry in asked.paths.items():
        path, budget = list(entry.walks(_config("prepare").length))[-1]
        drawn: list[dict[str, Any]] = []
        settings = {
            "path": to_tree(path),
            "budget": budget,
            "nucleus": asdict(entry.nucleus or asked.samples.nucleus),
            "rows": 1,
            "out": f"runs/samples/{name}",
        }
        config = overridden(_config("generate"), settings, "the path of the evaluation")
        _module("generate").execute(config, show=drawn.append)
        yield f"{name}, {drawn[0]['calls']} calls", drawn[0]["text"]


def summary(
    made: Mapping[str, Mapping[str, Any]],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    texts: Mapping[str, str],
    seconds: float,
) -> list[str]:
    """At most `MOST` lines, none longer than it must be.

    Args:
        made: what each verb returned. tables: rows of the report, by the name of the table.
        texts: one of each path, by its heading. seconds: that all of it took.
    """
    data, registered = made["prepare"], made["finetune"].get("alias_uri") or "not registered"
    shown = list(texts.items())[: (MOST - 15) // 2]  # of two lines each
    return [
        "",
        f"Done in {clock(seconds)} min. Made:",
        f"  data    {data['rows']['train']:,} rows of {data['length']} tokens to train on, "
        f"vocabulary {data['vocabulary']:,}",
        f"  models  a masked-diffusion model, and DSL fine-tuned from it: {registered}",
        "Measured on held-out text (± one standard error):",
        *_likelihood(tables),
        *_words(tables),
        *_calls(tables),
        "A text of each path:",
        *(line for name, text in shown for line in _wrapped(f"{name}: {text}")),
        f"The page with all tables and plots: {made['evaluate']['report']}",
        "Try next: .venv/bin/python pipelines/generate.py quickstart text='The ' watch=true",
    ]


def _likelihood(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """DSL's bound against the unigram's likelihood, and what the gate says of the difference."""
    rows = {(row["model"], row["view"]): row for row in tables["likelihood"]}
    ours, floor = rows["dsl", "endpoint_bound"], rows["unigram", "exact"]
    yield (
        f"  bits per byte  {_figure(ours, 'bits_per_byte')} at most; "
        f"{_figure(floor, 'bits_per_byte')} for the unigram, which knows no context"
    )
    for row in tables.get("gate", ())[:1]:
        yield (
            f"    the gate: {row['verdict']} by {row['difference']:.3f} nats per token, "
            f"95 % interval {row['low']:.3f} to {row['high']:.3f}"
        )


def _words(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """The share of words that occur in the corpus, on the best of DSL's paths."""
    best = max(_walks(tables), key=lambda row: row["words"])
    alone = {row["model"]: row for row in tables["samples"] if "path" not in row}
    yield f"  known words    {_figure(best, 'words')} of DSL's words occur in the corpus"
    yield (
        f"    on the path {best['path']}; {_figure(alone['real'], 'words')} in real text, "
        f"{_figure(alone['unigram'], 'words')} for the unigram"
    )


def _calls(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """What fewer denoiser calls cost on the path that was walked at the most budgets."""
    paths: dict[str, list[Mapping[str, Any]]] = {}
    for row in _walks(tables):
        paths.setdefault(row["path"], []).append(row)
    name, rows = max(paths.items(), key=lambda pair: len(pair[1]))
    few, many = (pick(rows, key=lambda row: row["budget"]) for pick in (min, max))
    yield (
        f"  calls          {name} with {few['budget']} calls of the network a text: "
        f"{_figure(few, 'words')} known words;"
    )
    yield f"    with {many['budget']} calls: {_figure(many, 'words')}"


def _walks(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    return [row for row in tables["samples"] if row["model"] == "dsl" and row.get("words")]


def _figure(row: Mapping[str, Any], key: str) -> str:
    error = row.get(f"{key}_stderr")
    return f"{row[key]:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _wrapped(text: str) -> list[str]:
    """The beginning of a text, on two lines at most."""
    from pipelines.watch import printable  # late, because it imports torch

    return textwrap.wrap(
        " ".join(printable(text).split()),
        WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
        max_lines=2,
        placeholder=" …",
    )


def plan(config: QuickstartConfig) -> dict[str, Any]:
    """What would be made, for `--dry-run`."""
    return {name: asdict(_config(name)).get("name") or _config(name).out for name in RUNS}


def main() -> int:
    return verb.run(PRESET, QuickstartConfig, plan=plan, execute=execute, doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
