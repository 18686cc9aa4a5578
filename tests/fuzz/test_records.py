"""What runs leave behind for their own next attempt, damaged: never half of it is believed."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from infra import journal, registry, tracking
from infra.checkpoints import Checkpoints, consolidate
from infra.config import to_yaml
from infra.errors import ConfigError
from infra.storage import Folder
from pipelines import runs
from pipelines.evaluation import promotion
from pipelines.evaluation.gate import Decision, Interval
from pipelines.evaluation.parts import Parts
from pipelines.prepare import PrepareConfig
from pipelines.sweeping.trials import BOUND, PARTS, Trials
from pipelines.verb import TrackingConfig
from tests.fuzz import mutate
from tests.fuzz.judge import judge
from tests.fuzz.mutate import seeds
from tests.infra.workers import Patient
from tests.pipelines.sweeping import small

# --- checkpoints -------------------------------------------------------------------------------

NUMBERS = {
    "model.weight": torch.arange(12.0).view(3, 4),
    "model.bias": torch.arange(4, dtype=torch.bfloat16),
    "step": torch.tensor(7),
}
META = {"step": 3, "config": {"lr": 0.1}, "digest": "ab"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    Patient(str(folder), keep=1).save(3, NUMBERS, META)
    return folder


def loaded(folder: Path) -> tuple[dict[str, torch.Tensor], Any, dict[str, torch.Tensor]]:
    tensors = {name: torch.zeros_like(tensor) for name, tensor in NUMBERS.items()}
    meta = Checkpoints(str(folder), keep=1).load(3, tensors)
    return tensors, meta, consolidate(str(folder), 3, "model.")


@seeds(120)
def test_a_commit(saved: Path, tmp_path: Path, seed: str) -> None:
    folder = mutate.damaged(saved, tmp_path, seed, "step_000003/commit.json", mutate.json_)
    found = judge(lambda: loaded(folder), "step_000003")
    if found:
        tensors, meta, whole = found
        assert equal(tensors, NUMBERS)
        assert equal(whole, {"weight": NUMBERS["model.weight"], "bias": NUMBERS["model.bias"]})
        assert isinstance(meta, dict)  # its content is for the run to judge


@seeds(90)
def test_a_checkpoints_numbers(saved: Path, tmp_path: Path, seed: str) -> None:
    folder = mutate.copy_of(saved, tmp_path / "checkpoints")
    rng = Random(f"numbers {seed}")
    (file,) = (folder / "step_000003").glob("*.safetensors")
    mutate.spoil(rng, file)
    agree = folder / "step_000003/commit.json"
    if file.is_file() and rng.random() < 0.8:
        commit = json.loads(agree.read_text())
        commit["files"][file.name] = file.stat().st_size
        del commit["sha256"]
        agree.unlink()
        agree.write_text(json.dumps(commit))
    found = judge(lambda: loaded(folder), file.name, "commit.json")
    assert not found or equal(found[0], NUMBERS)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- run directories ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with all that a finished run leaves, its server never reached."""
    root = tmp_path_factory.mktemp("runs")
    config = PrepareConfig(out="x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        tracking.start(
            TrackingConfig(uri="http://127.0.0.1:9"), root=str(root), name="made",
            params={"steps": 3, "lr": 0.1}, tags={"verb": "pretrain"},
            config_yaml=to_yaml(config, "prepare"),
            dataset={"name": "x", "digest": "ab", "source": "/data"},
        )  # fmt: skip
    log = journal.Journal(str(root / "made"))
    for step in range(1, 9):
        log.append(step, {"loss": 3.0 / step, "odd": float("nan"), "validation/loss": 2.0})
    log.close()
    made = {"run": "runs/made", "register": None, "metrics": {"loss": 0.375}}
    (root / "made" / runs.RESULT).write_text(json.dumps(made))
    return root / "made"


@seeds(90)
def test_a_journal(run: Path, tmp_path: Path, seed: str) -> None:
    """Whole lines that were written, in their order, and the last may be torn."""
    folder = mutate.copy_of(run, tmp_path / "run")
    rng = Random(f"journal {seed}")
    file = folder / journal.NAME
    whole = journal.read(str(run))
    if rng.random() < 0.5:
        lines = file.read_bytes().splitlines(keepends=True)
        at = rng.randrange(len(lines))
        lines[at] = mutate.json_(rng, lines[at]).rstrip(b"\n") + b"\n"
        file.unlink()
        file.write_bytes(b"".join(lines))
    else:
        mutate.spoil(rng, file)
    rows = judge(lambda: journal.read(str(folder)), journal.NAME) or []
    assert len(rows) <= len(whole) + 1
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))
    for row in rows:
        assert all(type(value) in (int, float) for value in row.values())


@seeds(60)
def test_a_runs_record(run: Path, tmp_path: Path, seed: str) -> None:
    folder = mutate.damaged(run, tmp_path, seed, tracking.RECORD, mutate.json_)
    handle = judge(lambda: tracking.opened(str(folder)), tracking.RECORD)
    if handle:
        assert isinstance(handle.uri, str)
        assert isinstance(handle.run_id, str | None)
        assert handle.folder == str(folder)


@seeds(40)
def test_a_result(run: Path, tmp_path: Path, seed: str) -> None:
    folder = mutate.damaged(run, tmp_path, seed, runs.RESULT, mutate.json_)
    made = judge(lambda: runs.result(Folder.at(str(folder)), "run", "register"), runs.RESULT)
    assert made is None or {"run", "register"} <= made.keys()


@seeds(60)
def test_the_settings_of_an_earlier_attempt(run: Path, tmp_path: Path, seed: str) -> None:
    """Either they are the same, or the run is refused; it is never wiped."""
    folder = mutate.copy_of(run, tmp_path / "run")
    rng = Random(f"settings {seed}")
    file = folder / tracking.CONFIG
    if rng.random() < 0.5:
        mutate.spoil(rng, file)
    else:
        content = mutate.tree(rng, yaml.safe_load(file.read_text()))
        file.unlink()
        file.write_bytes(json.dumps(content).encode())
    config = small.load(f"root={tmp_path}", "name=run")
    judge(lambda: enter(config), tracking.CONFIG, "name", str(folder))
    assert (folder / runs.RESULT).exists()


def enter(config: Any) -> None:
    with runs.opened(config, "sweep"):
        raise ConfigError("name", "nothing was to be run")


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decided")
    interval = Interval(metric="nats", candidate=2.0, other=2.1, difference=0.1, low=0.0, high=0.2)
    decision = Decision(
        accepted=True, why="it is better", candidate="a", other="b", confidence=0.95,
        metric=interval, guards=(interval,),
    )  # fmt: skip
    (folder / promotion.DECISION).write_text(json.dumps(asdict(decision)))
    return folder


# --- parts of an evaluation --------------------------------------------------------------------


@pytest.fixture(scope="module")
def laid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    parts = Parts(Folder.at(str(folder)))
    for first in (0, 8):
        table = pa.table({"nats": np.arange(8.0) + first, "text": ["some words"] * 8})
        parts.write("group", first, table, {"seconds": 1.5})
    return folder


@seeds(90)
def test_a_part(laid: Path, tmp_path: Path, seed: str) -> None:
    folder = mutate.copy_of(laid, tmp_path / "parts")
    # Not every damage is seen: a Parquet footer has no checksum, and a part may be another's copy.
    mutate.spoil(Random(f"part {seed}"), folder / "group" / "00000008.parquet")
    parts = Parts(Folder.at(str(folder)))
    table = judge(lambda: parts.read("group", ["nats"]), "00000008.parquet")
    if table is not None:
        nats = table["nats"].to_pylist()
        assert nats == [float(n) for n in range(16)] or nats == [float(n) for n in range(8)]
    for note in judge(lambda: parts.notes("group"), "00000008.parquet") or []:
        assert note["seconds"] == 1.5


def test_a_file_of_another_name_is_no_part(laid: Path, tmp_path: Path) -> None:
    folder = mutate.copy_of(laid, tmp_path / "parts")
    for name in ("x.parquet", "-1.parquet", "٣٣٣٣٣٣٣٣.parquet", "00000009.parquet.gz"):
        shutil.copy(folder / "group/00000000.parquet", folder / "group" / name)
    assert Parts(Folder.at(str(folder))).present("group") == {0, 8}


# --- trials of a sweep -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trials")
    trials = Trials(folder=Folder.at(str(folder)))
    for number, beta in enumerate((0.3, 1.0)):
        name = trials.add(number, {"converter.beta": beta})
        small.write(folder / name, 3.0, 2.0, 1.0)
    return folder


@seeds(90)
def test_a_trial(tried: Path, tmp_path: Path, seed: str) -> None:
    folder = mutate.copy_of(tried, tmp_path / "trials")
    rng = Random(f"trial {seed}")
    name = rng.choice(("trial-001.json", "trial-001/metrics.jsonl"))
    mutate.spoil(rng, folder / name, mutate.json_ if name.endswith("n") else mutate.bytes_)
    for trial in judge(lambda: Trials(folder=Folder.at(str(folder))).all(), name) or []:
        assert trial.state in ("running", "finished", "stopped", "failed", "lost")
        assert isinstance(trial.settings, dict)
        assert all(type(report.bound) is float for report in trial.validations)


def test_a_trials_report_is_whole_or_none(tried: Path, tmp_path: Path) -> None:
    folder = mutate.copy_of(tried, tmp_path / "trials")
    log = journal.Journal(str(folder / "trial-000"), resume=20)
    log.append(25, {BOUND: 9.0, PARTS[0]: 9.0})
    log.close()
    trial = Trials(folder=Folder.at(str(folder))).read("trial-000")
    assert [report.step for report in trial.validations] == [10, 20]


# --- models of the registry --------------------------------------------------------------------

MLMODEL = """
artifact_path: model
flavors:
  python_function:
    artifacts: {model: {path: artifacts/model, uri: weights}}
    cloudpickle_version: 3.1.0
    code: code
    loader_module: mlflow.pyfunc.loaders.code_model
    model_code_path: model.py
    python_version: 3.11.7
mlflow_version: 3.17.2
"""


@seeds(90)
def test_what_describes_a_registered_model(tmp_path: Path, seed: str) -> None:
    """Its weights lie inside of it, and nothing in it is to be unpickled."""
    rng = Random(f"MLmodel {seed}")
    (tmp_path / "artifacts/model").mkdir(parents=True)
    file = tmp_path / "MLmodel"
    if rng.random() < 0.4:
        file.write_bytes(mutate.bytes_(rng, MLMODEL.encode()))
    else:
        file.write_text(json.dumps(mutate.tree(rng, yaml.safe_load(MLMODEL))))
    if rng.random() < 0.1:
        mutate.place(rng, file)
    folder = judge(lambda: registry._check_model(tmp_path), "MLmodel")
    assert folder is None or folder.resolve().is_relative_to(tmp_path.resolve())


@seeds(40)
def test_a_decision(decided: Path, tmp_path: Path, seed: str) -> None:
    """What moves an alias is of the right kind in every part."""
    folder = mutate.damaged(decided, tmp_path, seed, promotion.DECISION, mutate.json_)
    place = Folder.at(str(folder))
    found = judge(lambda: promotion.decided(place), promotion.DECISION)
    assert found is None or (type(found.accepted) is bool and type(found.metric.low) is float)
