"""One real sweep, through Ray: four trials, of which one finishes, one fails, one is in its middle
when the driver is killed with SIGKILL, and one is stopped by ASHA after that."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from infra.checkpoints import committed
from infra.config import load
from infra.tracking import connect
from pipelines import finetune
from pipelines.finetune import FinetuneConfig
from pipelines.sweeping import tuning
from pipelines.sweeping.settings import SweepConfig
from pipelines.sweeping.trials import Trials
from pipelines.verb import TrackingConfig
from tests.infra.common import until
from tests.pipelines import tiny
from tests.pipelines.sweeping import small

pytestmark = pytest.mark.long

STEPS = 40
NOWHERE = TrackingConfig(uri="http://127.0.0.1:9")  # nothing answers there
SPACE = "{train.optimizer.lr: {kind: choice, values: [1.0e-3, 1.0e+30, 1.0e-2, 1.0e-6]}}"
SETTINGS = [
    f"finetune.train.steps={STEPS}",
    "finetune.train.validate_every=10",
    "finetune.train.checkpoint={every: 5, keep: 9}",
    "asha={grace: 10, reduction: 2}",
    "concurrent=1",
    "register=tried",
    """second={keep: 1, batch: 6, workers: {count: 0}, paths: {
        masked: {path: masked, budgets: [4]},
        hybrid: {splits: [[2, 2], [3, 1]], path: {kind: hybrid, split: [2, 2], second: masked,
            first: {kind: sentence_sde, gamma_max: 9}}}},
        likelihood: {rows: 4, samples: 2, steps: 2, gamma_max: 9, gamma_star: [9]},
        states: {revealed: [0], gammas: [1]}, samples: {rows: 6, traced: 2}}""",
]


class Swept(NamedTuple):
    config: SweepConfig
    before: dict[str, bytes]  # the files of the finished trial when the driver was killed
    checkpoints: list[int]  # of the interrupted trial at that time
    made: dict[str, Any]

    @property
    def trials(self) -> Path:
        return Path(self.config.folder.path) / "trials"


@pytest.fixture(scope="module")
def swept(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swept]:
    root = tmp_path_factory.mktemp("swept")
    argv = [f"data={data}", f"root={root}", *SETTINGS]
    trials = root / "tried" / "trials"
    ray_files = tempfile.mkdtemp(prefix="ray")  # whose name tells this test's processes

    def begin() -> subprocess.Popen[str]:
        module = "tests.pipelines.sweeping.small"
        return subprocess.Popen(
            [sys.executable, "-m", module, f"space={SPACE}", *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tiny.PRESETS.parents[1],
            env={**os.environ, "RAY_TMPDIR": ray_files},
        )

    third = trials / "trial-002"
    process = begin()
    begun = str(third / "checkpoints")
    until(lambda: process.poll() is not None or 10 in committed(begun), 900, every_s=0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL  # it had not ended by itself
    until(lambda: not alive(ray_files))  # Ray ends with its driver
    assert not (third / "result.json").exists()
    checkpoints = committed(str(third / "checkpoints"))
    before = files(trials / "trial-000")

    config = small.load(*argv, space=SPACE)
    assert tuning.workplace(config).exists()
    process = begin()
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert not tuning.workplace(config).exists()
    until(lambda: not alive(ray_files))
    made = json.loads(out.splitlines()[-1])
    yield Swept(config, before, checkpoints, made)
    shutil.rmtree(ray_files, ignore_errors=True)


def alive(name: str) -> int:
    """Processes on whose command line the name is."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += name.encode() in path.read_bytes()
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "run.json"
    }


def test_every_trial_ends_as_it_should(swept: Swept) -> None:
    trials = Trials(folder=swept.config.folder / "trials").all()
    assert [t.name for t in trials] == [f"trial-{n:03d}" for n in range(4)]
    assert [t.settings["train.optimizer.lr"] for t in trials] == [1e-3, 1e30, 1e-2, 1e-6]
    assert [t.state for t in trials] == ["finished", "failed", "finished", "stopped"]
    assert [t.step for t in trials] == [STEPS, 0, STEPS, 10]
    assert "Lower the learning rate" in trials[1].why
    # Judged at the first rung against what was reported before the kill.
    assert trials[3].why == "not among the best 1/2 at step 10"
    assert swept.made["failed"] == {"trial-001": trials[1].why}
    assert swept.made["best"] == "trial-002"


def test_what_was_finished_is_not_repeated(swept: Swept) -> None:
    assert "model/model.safetensors" in swept.before
    assert files(swept.trials / "trial-000") == swept.before


def test_what_was_interrupted_goes_on(swept: Swept, tmp_path: Path) -> None:
    """From its checkpoint, and ends as if nothing had been: bit for bit."""
    assert max(swept.checkpoints) < STEPS
    assert set(swept.checkpoints) < set(committed(str(swept.trials / "trial-002/checkpoints")))
    trial = swept.config.trial("whole", {"train.optimizer.lr": 1e-2})
    with tiny.bare():
        finetune.execute(replace(trial, root=str(tmp_path), tracking=NOWHERE))
    assert tiny.curve(tmp_path / "whole") == tiny.curve(swept.trials / "trial-002")
    model = "model/model.safetensors"
    whole, trial = tmp_path / "whole" / model, swept.trials / "trial-002" / model
    assert whole.read_bytes() == trial.read_bytes()


def test_mlflow_has_sweep_trial_and_split(swept: Swept) -> None:
    root = Path(swept.config.root)
    client = connect(f"sqlite:///{root}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "dsl"]
    found = client.search_runs([experiment.experiment_id])
    runs = {run.info.run_name: run for run in found}
    assert len(runs) == len(found)  # none is there twice
    status = {name: run.info.status for name, run in runs.items()}
    assert status.pop("trial-001") == "FAILED"
    assert status.pop("trial-003") == "KILLED"
    assert set(status.values()) == {"FINISHED"}
    ids = {name: run.info.run_id for name, run in runs.items()}
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    walks = {f"trial-002-{walk}" for walk in ("masked-4", "hybrid-2+2", "hybrid-3+1")}
    assert parents == {
        "tried": None,
        **{f"trial-{n:03d}": ids["tried"] for n in range(4)},
        "second": ids["tried"],
        **dict.fromkeys(walks, ids["trial-002"]),
    }
    assert runs["trial-003"].data.tags["stopped_at"] == "10"
    (version,) = client.search_model_versions("name = 'tried'")
    assert version.tags["sweep_run"] == ids["tried"]
    assert version.run_id == ids["trial-002"]
    assert swept.made["alias_uri"] == "models:/tried@candidate"


def test_the_recommendation_is_a_preset(swept: Swept) -> None:
    preset = swept.made["preset"]
    config = load(FinetuneConfig, verb="finetune", argv=[preset], presets=tiny.PRESETS)
    assert config.train.optimizer.lr == 1e-2
    assert config.name == "tried-best"
    assert yaml.safe_load(Path(preset).read_text())["generate"]["budget"] == 4


def test_the_report_is_whole(swept: Swept) -> None:
    folder = Path(swept.made["report"]).parent
    told = json.loads((folder / "sweep.json").read_text())
    assert told["best"]["settings"] == {"train.optimizer.lr": 1e-2}
    assert len(told["trials"]) == 4
    page = (folder / "report.html").read_text()
    for heading in ("Trials", "The second level"):
        assert heading in page
    assert (folder / "words_by_split.png").exists()
