"""A world of tiny models of every kind, and `evaluate` as its own command line would run it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsl.vocabulary import Vocabulary
from infra import command, tracking
from infra.shards import read_manifest
from infra.storage import Folder
from pipelines import evaluate, models
from pipelines.models import DATA_ERRORS
from pipelines.verb import TrackingConfig
from tests.pipelines import tiny
from tests.pipelines.evaluation import strangers
from tests.pipelines.evaluation.small import LENGTH, network

SETTINGS = [
    "name=judged", "batch=5", "split=validation", "workers.count=0",
    "likelihood={rows: 8, samples: 2, steps: 2, gamma_max: 9, gamma_star: [4, 9]}",
    "states={revealed: [0, 0.5], gammas: [1, 4]}", "samples={rows: 6, traced: 3}",
]  # fmt: skip
Run = Callable[..., tuple[int, dict[str, Any], str]]
Refused = Callable[[list[str], int, list[str]], None]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, a model of each kind, and one registered run: no test changes it."""
    world = tmp_path_factory.mktemp("world")
    data = tiny.shards(world / "data")
    vocabulary = models.vocabulary_of(read_manifest(data), Folder.at(data))

    def save(name: str, kind: str, vocabulary: Vocabulary = vocabulary, **how: bool) -> Folder:
        folder = Folder.at(str(world / name))
        denoiser = network(vocabulary.size, **how)
        models.save(folder, denoiser, vocabulary, kind=kind, length=LENGTH)
        return folder

    for kind in ("mdlm", "dsl", "ar"):
        save(kind, kind, causal=kind == "ar")
    save("flat", "dsl", uniform=True)
    save("flat_ar", "ar", uniform=True, causal=True)
    save("foreign", "dsl", Vocabulary.train_bpe(["x"], 257))
    made = save("runs/made/model", "dsl")
    handle = tracking.start(
        TrackingConfig(),
        root=str(world / "runs"),
        name="made",
        params={},
        tags={},
        config_yaml="finetune: {}",
    )
    with (world / "runs/made/metrics.jsonl").open("w") as journal:
        journal.writelines(
            json.dumps(
                {"step": s, "time": 1.0, "loss": 3 / s, "validation/loss": 3 / s}
                | {"converter/beta": 1 / s}
            )
            + "\n"
            for s in (1, 2, 3)
        )
    handle = tracking.finish(handle)
    models.register(made, "tiny", handle, tags={})
    return world


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 as others save one: no test changes it."""
    return strangers.gpt2(tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture
def run(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit code, what was made, stderr) of `evaluate` with these settings, into `tmp_path`."""

    def run(*argv: str) -> tuple[int, dict[str, Any], str]:
        code = command.run(
            "evaluate",
            evaluate.EvaluateConfig,
            plan=evaluate.plan,
            execute=evaluate.execute,
            presets=tiny.PRESETS,
            doc="",
            argv=[
                *SETTINGS,
                f"data={world / 'data/shards'}",
                f"root={tmp_path}",
                f"tracking.uri=sqlite:///{world / 'runs/mlflow.db'}",
                *argv,
            ],
            data_errors=DATA_ERRORS,
        )
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if code == 0 else {}, err

    return run


@pytest.fixture
def refused(run: Run, world: Path, tmp_path: Path) -> Refused:
    """Asserts that settings end in one message with these words, and leave nothing behind."""

    def refused(argv: list[str], code: int, words: list[str]) -> None:
        found, _, err = run(*(argument.replace("WORLD", str(world)) for argument in argv))
        assert found == code, err
        assert [word for word in words if word not in err] == []
        assert len(err.strip().splitlines()) == 1
        assert not (tmp_path / "judged").exists()

    return refused
