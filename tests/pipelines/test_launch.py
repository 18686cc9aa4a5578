"""Training runs without Ray: what a stop costs, what a step is, what may change, what is kept."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dsl
from dsl.denoiser import Denoiser, DenoiserConfig
from dsl.dit import DiTConfig
from dsl.noise import generator
from dsl.objective import DSLObjective
from infra import checkpoints, journal, mixture, stream
from infra.checkpoints import committed, consolidate
from infra.errors import ConfigError, DataError
from infra.mixture import Mixture
from infra.parallel import ParallelConfig
from infra.shards import read_manifest
from infra.storage import Folder
from infra.stream import Plan
from pipelines import models, pretrain, runs
from pipelines.training import launch, learner, worker
from pipelines.training.learner import Microbatches
from tests.infra.common import alone
from tests.pipelines import tiny
from tests.pipelines.tiny import STEPS, curve, tensors


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: str) -> dict[str, Path]:
    """Both verbs without a break: `mdlm`, and `dsl` that starts from it."""
    root = tmp_path_factory.mktemp("whole")
    tiny.execute("pretrain", f"data={data}", f"root={root}", "name=mdlm")
    tiny.execute("finetune", f"data={data}", f"root={root}", "name=dsl", f"init={root / 'mdlm'}")
    return {"pretrain": root / "mdlm", "finetune": root / "dsl"}


def arguments(verb: str, data: str, run: Path, whole: dict[str, Path]) -> list[str]:
    """What gives another run of the settings of `whole`."""
    init = [f"init={whole['pretrain']}"] if verb == "finetune" else []
    return [f"data={data}", f"root={run.parent}", f"name={run.name}", *init]


def assert_same_run(one: Path, two: Path) -> None:
    """Bit for bit: weights, average, optimizer, every metric, and the model folder."""
    tiny.assert_same(two, one)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (one / "model" / name).read_bytes() == (two / "model" / name).read_bytes()


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_twelve_steps_are_six_a_stop_and_six(
    verb: str, tmp_path: Path, data: str, whole: dict[str, Path]
) -> None:
    run = tmp_path / "run"
    argv = arguments(verb, data, run, whole)
    with tiny.bare(tiny.interrupted_at(8)), pytest.raises(KeyboardInterrupt):
        tiny.VERBS[verb].execute(tiny.load(verb, *argv))
    assert curve(run)[-1]["step"] == 7  # of which the last is done again, from step 6
    assert max(committed(str(run / "checkpoints"))) <= 6
    assert not (run / "model").exists()
    made = tiny.execute(verb, *argv)
    assert_same_run(whole[verb], run)
    assert made["checkpoint"].endswith("step_000012")


def test_a_run_goes_on_in_the_precision_in_which_it_began(
    tmp_path: Path, data: str, whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `auto`, a run that moves to a GPU, or from one, would change it."""
    run = tmp_path / "run"
    argv = arguments("pretrain", data, run, whole)
    with tiny.bare(tiny.interrupted_at(8)), pytest.raises(KeyboardInterrupt):
        pretrain.execute(tiny.load("pretrain", *argv))
    before = curve(run)
    with monkeypatch.context() as patch:
        patch.setattr(ParallelConfig, "dtype", lambda config, device: torch.bfloat16)
        with pytest.raises(ConfigError, match=r"bfloat16 here, but float32 up to step [36]\."):
            tiny.execute("pretrain", *argv)
    assert curve(run) == before
    tiny.execute("pretrain", *argv, "workers.parallel.compute_dtype=float32")
    assert_same_run(whole["pretrain"], run)


def test_a_run_goes_on_with_the_rows_with_which_it_began(tmp_path: Path) -> None:
    """Even if others have been prepared at the same address since."""
    run = tmp_path / "run"
    argv = [f"data={tiny.shards(tmp_path / 'data')}", f"root={tmp_path}", "name=run"]
    with tiny.bare(tiny.interrupted_at(8)), pytest.raises(KeyboardInterrupt):
        pretrain.execute(tiny.load("pretrain", *argv))
    before = curve(run)
    tiny.shards(tmp_path / "data", tiny.documents(300), existing="restart")
    with pytest.raises(DataError, match="not the data that this run began with"):
        tiny.execute("pretrain", *argv)
    assert curve(run) == before
    tiny.shards(tmp_path / "data", existing="restart")
    tiny.execute("pretrain", *argv)


STAGES = {
    "before the record": (runs.tracking, "start"),
    "the initial weights": (models.weights, "save"),
    "the first batch": (stream, "read_group"),
    "a step": (learner.Learner, "step"),
    "the first validation": (learner.Learner, "validate"),
    "a checkpoint": (checkpoints.Checkpoints, "save"),
    "the model": (checkpoints, "consolidate"),
    "the last report": (runs.tracking, "finish"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_at_any_stage(
    stage: str,
    tmp_path: Path,
    data: str,
    whole: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit 130, and the same command ends as if nothing had been."""

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    argv = arguments("pretrain", data, tmp_path / "run", whole)
    with monkeypatch.context() as patch:
        patch.setattr(*STAGES[stage], interrupt)
        assert tiny.main("pretrain", *argv) == 130
    assert capsys.readouterr().err.endswith("run the same command again to resume\n")
    assert tiny.main("pretrain", *argv) == 0
    assert_same_run(whole["pretrain"], tmp_path / "run")


@pytest.mark.parametrize(
    "instructions",
    ["as is", *(pytest.param(name, marks=pytest.mark.long) for name in ("avx2", "default"))],
)
def test_a_real_ctrl_c(
    instructions: str, tmp_path: Path, data: str, whole: dict[str, Path]
) -> None:
    """A process that gets SIGINT in step 8 says so in one line; the next one finishes the run.

    On CPUs of any instruction set: what torch computes with is taken from it by name.
    """
    root = Path(runs.__file__).parents[1]
    env, undisturbed = {**os.environ, "PYTHONPATH": str(root)}, whole["finetune"]
    if instructions != "as is":
        env["ATEN_CPU_CAPABILITY"] = instructions
        undisturbed = tmp_path / "whole"

    def finetune(name: str, *options: str) -> subprocess.CompletedProcess[str]:
        argv = arguments("finetune", data, tmp_path / name, whole)
        command = [sys.executable, "-m", "tests.pipelines.tiny", *options, "finetune", *argv]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=root)

    stopped = finetune("run", "--interrupt-at", "8")
    assert stopped.returncode == 130
    assert stopped.stdout == ""
    assert stopped.stderr.splitlines()[-1] == "interrupted; run the same command again to resume"
    assert "Traceback" not in stopped.stderr
    assert 0 < len(curve(tmp_path / "run")) < STEPS
    assert finetune("run").returncode == 0
    assert undisturbed.exists() or finetune("whole").returncode == 0
    assert_same_run(undisturbed, tmp_path / "run")


def test_a_step_is_what_a_page_of_plain_torch_says(data: str, whole: dict[str, Path]) -> None:
    """Lanes in order, their mean loss, clipping, AdamW, the average: no sharding, no loop of ours.

    Only the order in which gradients are added up may differ, by rounding.
    """
    run = whole["finetune"]
    config = tiny.load("finetune", *arguments("finetune", data, run, whole))
    settings = config.train.optimizer
    objective = DSLObjective(dsl.load(run / "init").train(), config.support)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=settings.lr, weight_decay=0.0)
    average = AveragedModel(objective, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
    plan = Plan.of(Folder.at(data), read_manifest(data), "train", config.train.stream)
    for step, batches in zip(range(1, STEPS + 1), mixture.read(alone(plan), (0, 1)), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(step / settings.warmup, 1)
        losses = [
            objective(torch.from_numpy(batches[lane]), generator(0, step, lane)).value
            for lane in (0, 1)
        ]
        mean = sum(losses) / 2
        mean.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(objective)
        assert curve(run)[step - 1]["loss"] == pytest.approx(mean.item(), rel=2e-5)
    held = tensors(run)
    for prefix, module in (("model.", objective), ("ema.", average.module)):
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(held[prefix + name], tensor, rtol=1e-3, atol=2e-5)


def test_the_order_in_which_lanes_arrive_is_nothing(tmp_path: Path, data: str) -> None:
    """Of four, for the order of two sums alone would not show in a bit."""

    def backwards(order: Mixture, lanes: tuple[int, ...], done: int) -> Iterator[Microbatches]:
        for batch in mixture.read(order, lanes, done):
            yield dict(reversed(batch.items()))

    for name, batches in (("ahead", mixture.read), ("back", backwards)):
        argv = [f"data={data}", f"root={tmp_path}", f"name={name}", "train.steps=3"]
        with tiny.bare(batches):
            pretrain.execute(tiny.load("pretrain", *argv, "train.stream.num_lanes=4"))
    tiny.assert_same(tmp_path / "back", tmp_path / "ahead", 3)


def test_what_is_logged_is_shown(tmp_path: Path, data: str) -> None:
    shown: list[dict[str, float]] = []

    def show(step: int, metrics: Mapping[str, float]) -> None:
        shown.append({"step": step, **metrics})

    fit = partial(worker.train, show=show)
    with tiny.bare(), mock.patch.object(launch, "on_cluster", fit):
        argv = [f"data={data}", f"root={tmp_path}", "name=shown", "train.log_every=4"]
        pretrain.execute(tiny.load("pretrain", *argv))
    logged = journal.read(str(tmp_path / "shown"))
    assert [row["step"] for row in shown] == [4, 6, 8, 12]
    assert shown == [{k: v for k, v in row.items() if k != "time"} for row in logged]


def test_validation_knows_the_weights_alone(tmp_path: Path, data: str) -> None:
    """At a learning rate of 0 the training loss moves with its noise, validation does not."""
    argv = [f"data={data}", f"root={tmp_path}", "init=scratch", "train.optimizer.lr=0"]
    tiny.execute("finetune", *argv, "name=often", "train.validate_every=1", "train.steps=6")
    tiny.execute("finetune", *argv, "name=once", "train.validate_every=6", "train.steps=6")
    often, once = curve(tmp_path / "often"), curve(tmp_path / "once")
    keys = [key for key in once[-1] if key.startswith("validation/")]
    assert len(keys) == 8
    for row in often:
        assert {key: row[key] for key in keys} == {key: once[-1][key] for key in keys}
    assert len({row["loss"] for row in often}) == 6
    # And looking does not change what is looked at.
    assert [row["loss"] for row in often] == [row["loss"] for row in once]


def test_validation_is_of_the_average_on_the_holdout(data: str, whole: dict[str, Path]) -> None:
    """Bounds: of all rows at once, with one noise; an MDLM is not asked at finite SNR."""
    run = whole["finetune"]
    config = tiny.load("finetune", *arguments("finetune", data, run, whole))
    rows_NL = stream.holdout(Folder.at(data), read_manifest(data), "validation", 8, 0)
    denoiser, tokens_BL = dsl.load(run / "model"), torch.from_numpy(rows_NL).long()
    objective, found = DSLObjective(denoiser, config.support), curve(run)[-1]
    with torch.no_grad():
        losses = [
            objective(torch.from_numpy(rows_RL), generator(0, learner.VALIDATION, key)).value
            for key, rows_RL in enumerate(np.split(rows_NL, 2))
        ]
    assert found["validation/loss"] == pytest.approx(sum(losses).item() / 2, rel=1e-6)

    gamma_star = 30 * math.log(denoiser.config.backbone.tokens, 35)
    bound = partial(dsl.likelihood.hybrid_bound, gamma_star=gamma_star, steps=4)
    expected = {
        "endpoint_bound": dsl.likelihood.roar(denoiser, tokens_BL, samples=4, seed=0),
        "hybrid_bound": bound(denoiser, tokens_BL, seed=0),
    }
    for name, estimate in expected.items():
        mean = estimate.mean_B.mean().item()
        assert found[f"validation/{name}"] == pytest.approx(mean, rel=1e-5)
    mean = sum(found[f"validation/{name}"] for name in expected) / 2
    assert found["validation/bound"] == pytest.approx(mean, rel=1e-12)
    asked = {key for key in curve(whole["pretrain"])[-1] if key.endswith("_bound")}
    assert asked == {"validation/endpoint_bound"}


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_the_model_is_the_average_of_the_last_checkpoint(verb: str, whole: dict[str, Path]) -> None:
    run = whole[verb]
    average = consolidate(str(run / "checkpoints"), STEPS, "ema.denoiser.")
    model = dsl.load(run / "model").state_dict()
    assert model.keys() == average.keys()
    assert all(torch.equal(model[name], average[name]) for name in model)
    latest = consolidate(str(run / "checkpoints"), STEPS, "model.denoiser.")
    assert any(not torch.equal(model[name], latest[name]) for name in model)


def test_both_verbs_start_from_the_averaged_weights_of_init(
    tmp_path: Path, data: str, whole: dict[str, Path]
) -> None:
    argv = [f"data={data}", f"root={tmp_path}", f"init={whole['pretrain']}", "name=onward"]
    tiny.execute("pretrain", *argv, "train.optimizer.lr=0")
    given = dsl.load(whole["pretrain"] / "model").backbone.state_dict()
    for place in (tmp_path / "onward" / "model", whole["finetune"] / "init"):
        start = dsl.load(place).backbone.state_dict()
        assert all(torch.equal(start[name], given[name]) for name in given)


def test_a_frozen_table_stays_and_the_rest_is_trained(
    tmp_path: Path, data: str, whole: dict[str, Path]
) -> None:
    argv = arguments("finetune", data, tmp_path / "frozen", whole)
    tiny.execute("finetune", *argv, "freeze_table=true")
    trained = dsl.load(tmp_path / "frozen" / "model").state_dict()
    began = dsl.load(tmp_path / "frozen" / "init").state_dict()
    same = {name for name in trained if torch.equal(trained[name], began[name])}
    assert "table.direction_VD" in same
    assert not {name for name in same if name.startswith(("converter", "backbone.blocks"))}
    last = journal.read(str(tmp_path / "frozen"))[-1]
    assert ("converter/beta" in last, "table/mean_cosine" in last) == (True, False)


def test_another_seed_gives_another_run(tmp_path: Path, data: str, whole: dict[str, Path]) -> None:
    argv = arguments("pretrain", data, tmp_path / "run", whole)
    tiny.execute("pretrain", *argv, "train.stream.seed=1")
    pairs = zip(curve(whole["pretrain"]), curve(tmp_path / "run"), strict=True)
    assert all(a["loss"] != b["loss"] for a, b in pairs)


def test_a_finished_run_is_left_alone(data: str, whole: dict[str, Path]) -> None:
    run = whole["pretrain"]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    made = tiny.execute("pretrain", *arguments("pretrain", data, run, whole))
    assert made == json.loads((run / runs.RESULT).read_text())
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_other_settings_and_another_verb_are_refused(data: str, whole: dict[str, Path]) -> None:
    run = whole["pretrain"]
    argv = arguments("pretrain", data, run, whole)
    with pytest.raises(ConfigError) as refused:
        tiny.execute("pretrain", *argv, "train.optimizer.lr=0.5", "backbone.blocks=3")
    message = str(refused.value)
    assert "pretrain.train.optimizer.lr: 0.003 -> 0.5" in message
    assert "pretrain.backbone.blocks: 2 -> 3" in message
    assert "existing=restart" in message
    assert "width" not in message
    with pytest.raises(ConfigError, match=r"^name: .* is a run with other settings"):
        tiny.execute("finetune", *argv, "init=scratch")


def test_what_does_not_touch_the_weights_may_change(data: str, whole: dict[str, Path]) -> None:
    free = ["workers.max_failures=1", "train.checkpoint.every=5", "train.log_every=2"]
    run = whole["pretrain"]
    tiny.execute("pretrain", *arguments("pretrain", data, run, whole), *free)


def test_a_restart_wipes_the_run_and_nothing_else(
    tmp_path: Path, data: str, whole: dict[str, Path]
) -> None:
    run = tmp_path / "run"
    argv = arguments("pretrain", data, run, whole)
    tiny.execute("pretrain", *argv, "train.steps=6")
    for path in (run / "old", tmp_path / "beside"):
        path.touch()
    tiny.execute("pretrain", *argv, "existing=restart")
    assert_same_run(whole["pretrain"], run)
    assert not (run / "old").exists()
    assert (tmp_path / "beside").exists()


def test_a_folder_that_is_no_run_is_never_wiped(tmp_path: Path, data: str) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    argv = [f"data={data}", f"root={tmp_path}", "name=thesis"]
    for existing in ("resume", "restart"):
        with pytest.raises(ConfigError, match="exists and is not a run"):
            tiny.execute("pretrain", *argv, f"existing={existing}")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


@pytest.mark.parametrize("name", ["..", "a/b", ".hidden", "../escape"])
def test_a_name_stays_in_its_root(name: str) -> None:
    with pytest.raises(ConfigError, match="name must be letters"):
        tiny.load("pretrain", "data=x", f"name={name}")


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_a_dry_run_touches_nothing(
    verb: str, tmp_path: Path, data: str, whole: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(verb, data, tmp_path / "run", whole)
    assert tiny.main(verb, *argv, "--dry-run") == 0
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert planned["tokens"] == STEPS * 2 * 4 * 32
    model = dsl.load(whole[verb] / "model")
    if verb == "pretrain":
        assert planned["parameters"] == sum(p.numel() for p in model.parameters())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_dsl_save_is_a_model(tmp_path: Path) -> None:
    backbone = DiTConfig(tokens=5, width=8, blocks=1, heads=1, cond_dim=4)
    denoiser = Denoiser(DenoiserConfig(backbone=backbone, embed_dim=3))
    dsl.save(denoiser, tmp_path / "bare")
    model = models.load(
        str(tmp_path / "bare"), converter=models.ConverterConfig(), tracking_uri="unused"
    )
    assert (model.kind, model.vocabulary, model.length) == ("dsl", None, None)
    assert torch.equal(model.denoiser.table_VD, denoiser.table_VD)
