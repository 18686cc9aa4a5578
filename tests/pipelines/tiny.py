"""Runs so small that a test may have many: numbers spelled out, and a network of 2 blocks.

    python -m tests.pipelines.tiny pretrain name=tiny data=… root=…

runs a verb as its own command line would, but in one process, without Ray and without MLflow.
`--interrupt-at N` sends it a Ctrl-C in step N, `--terminate-at N` a SIGTERM and `--kill-at N` a
SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from infra import config, journal, mixture, preemption
from infra.checkpoints import consolidate
from infra.mixture import Mixture
from infra.storage import Folder
from pipelines import finetune, prepare, pretrain
from pipelines.training import launch, worker
from pipelines.training.learner import Microbatches
from pipelines.verb import PRESETS

VERBS = {"prepare": prepare, "pretrain": pretrain, "finetune": finetune}
CONFIGS = {
    "prepare": prepare.PrepareConfig,
    "pretrain": pretrain.PretrainConfig,
    "finetune": finetune.FinetuneConfig,
}
STEPS = 12
SIZE = ["backbone.width=16", "backbone.blocks=2", "backbone.heads=2", "backbone.cond_dim=8"]
TRAIN = [
    *SIZE,
    f"train.steps={STEPS}", "train.validate_every=6", "train.validation_microbatches=1",
    "train.stream.num_lanes=2", "train.stream.rows_per_microbatch=4",
    "train.optimizer.lr=0.003", "train.optimizer.warmup=4", "train.optimizer.ema=0.9",
    "train.checkpoint.every=3", "workers.parallel.threads=1",
    "tracking.uri=http://127.0.0.1:9",  # nothing answers there
]  # fmt: skip
SETTINGS = {
    "prepare": ["length=32", "vocabulary.kind=char"],
    "pretrain": TRAIN,
    "finetune": [*TRAIN, "converter.embed_dim=8", "converter.mask_prior=0.5"],
}

NAMES = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
"""
WORDS = NAMES.split()


def spelled(number: int) -> str:
    """In words, of text8's characters; below a million."""
    thousands, rest = divmod(number, 1000)
    hundreds, rest = divmod(rest, 100)
    words = [spelled(thousands), "thousand"] if thousands else []
    words += [WORDS[hundreds], "hundred"] if hundreds else []
    if rest >= 20:
        words.append(WORDS[18 + rest // 10])
        rest %= 10
    return " ".join(words + ([WORDS[rest]] if rest or not words else []))


def documents(count: int = 240) -> list[str]:
    """Ten numbers each, counting on."""
    return [" ".join(map(spelled, range(10 * i, 10 * i + 10))) for i in range(count)]


def shards(folder: Path, texts: Sequence[str] = (), **settings: Any) -> str:
    """Prepare these texts, or `documents`, below a folder; where the shards are."""
    source = folder / "counting.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts or documents()))
    given = [f"{key}={value}" for key, value in settings.items()]
    execute("prepare", f"source={source}", f"out={folder / 'shards'}", *given)
    return str(folder / "shards")


def load(verb: str, *argv: str) -> Any:
    """The verb's configuration, tiny where `argv` does not say otherwise."""
    given = [*SETTINGS[verb], *argv]
    return config.load(CONFIGS[verb], verb=verb, argv=given, presets=PRESETS)


def execute(verb: str, *argv: str) -> dict[str, Any]:
    """Run a verb to its end in this process; what it made."""
    with bare():
        return VERBS[verb].execute(load(verb, *argv))


def main(verb: str, *argv: str) -> int:
    """Run a verb's own `main` in this process; its exit code."""
    with bare(), mock.patch.object(sys, "argv", [verb, *SETTINGS[verb], *argv]):
        return VERBS[verb].main()


class Outcome(NamedTuple):
    code: int
    message: str  # the last line of stderr


def outcome(capsys: pytest.CaptureFixture[str], verb: str, *argv: str) -> Outcome:
    """Run `main`: its JSON line is the last of stdout, a failure is one clear line on stderr."""
    capsys.readouterr()
    code = main(verb, *argv)
    out, err = capsys.readouterr()
    message = err.splitlines()[-1]
    if code:
        assert out == ""
        assert "Traceback" not in err
        assert "a bug" not in message
        assert len(message) < 800
    else:
        json.loads(out.splitlines()[-1])
    return Outcome(code, message)


@contextmanager
def bare(batches: Any = mixture.read) -> Iterator[None]:
    """This process in the place of Ray's workers, and no patience with the MLflow server."""
    train = partial(worker.train, batches=batches)
    patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}
    with mock.patch.object(launch, "on_cluster", train), mock.patch.dict(os.environ, patience):
        yield


def signalled_at(step: int, number: signal.Signals) -> Any:
    """`mixture.read`, but the process gets a signal when it asks for the rows of a step, and time
    to hear of what follows from it before it is given those of the next."""

    def read(order: Mixture, lanes: tuple[int, ...], done: int) -> Iterator[Microbatches]:
        for this, batch in enumerate(mixture.read(order, lanes, done), done + 1):
            if this == step:
                os.kill(os.getpid(), number)
            if this == step + 1:
                time.sleep(3 * preemption.ASK_S)
            yield batch

    return read


def interrupted_at(step: int) -> Any:
    return signalled_at(step, signal.SIGINT)


SIGNALS = {
    "--interrupt-at": signal.SIGINT,
    "--terminate-at": signal.SIGTERM,
    "--kill-at": signal.SIGKILL,
}


def curve(run: Path | str) -> list[dict[str, float]]:
    """The journal, without what measures time."""
    return [
        {k: v for k, v in row.items() if k != "time" and not k.startswith("speed/")}
        for row in journal.read(Folder.at(str(run)))
    ]


def tensors(run: Path | str, step: int = STEPS) -> dict[str, Tensor]:
    """All that a checkpoint holds: weights, average, optimizer."""
    return consolidate(f"{run}/checkpoints", step, "")


def assert_same(run: Path | str, reference: Path | str, steps: int = STEPS) -> None:
    """Two runs hold the same bit for bit: weights, average, optimizer, and each step once."""
    ours, theirs = tensors(run, steps), tensors(reference, steps)
    assert ours.keys() == theirs.keys()
    assert {"model", "ema", "optimizer"} <= {name.partition(".")[0] for name in ours}
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert curve(run) == curve(reference)
    assert [row["step"] for row in curve(run)] == list(range(1, steps + 1))


if __name__ == "__main__":
    # A shell that runs its tests in the background has them, and this process, ignore interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    batches = mixture.read
    if number := SIGNALS.get(sys.argv[1]):
        batches = signalled_at(int(sys.argv[2]), number)
        del sys.argv[1:3]
    verb, *argv = sys.argv[1:]
    sys.argv = [verb, *SETTINGS[verb], *argv]
    with bare(batches):
        sys.exit(VERBS[verb].main())
