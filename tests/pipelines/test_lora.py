"""Adapters through the verbs: what is trained, kept, resumed and refused, and on two workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import dsl
from dsl.lora import Lora
from dsl.objective import DSLObjective
from dsl.support import Mixed
from infra import parallel
from infra.parallel import ParallelConfig
from pipelines.training.learner import Learner
from pipelines.training.settings import TrainConfig
from tests.dsl import hubs
from tests.infra.workers import in_workers
from tests.pipelines import tiny
from tests.pipelines.test_foreign import BARE, argv, shards

pytest.importorskip("peft", reason="the extra `hub` is not installed")

ADAPTED = ("q_proj", "v_proj")
LORA = f"lora={{rank: 2, targets: [{', '.join(ADAPTED)}]}}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    hubs.saved(folder, "llama", special=BARE)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, base: Path) -> str:
    return shards(tmp_path_factory.mktemp("data"), base)


def test_adapters_are_trained_in_the_place_of_the_backbone(
    tmp_path: Path, data: str, base: Path
) -> None:
    """The weights of a run's model differ from the initial ones where there was an adapter, and
    nowhere else in the backbone. A run that was stopped is the same bit for bit."""
    given = argv(data, tmp_path, "whole", base, "adapt=shift", LORA)
    tiny.execute("finetune", *given)
    run, stopped = tmp_path / "whole", tmp_path / "stopped"
    initial, made = (dsl.load(run / name).state_dict() for name in ("init", "model"))
    assert made.keys() == initial.keys()
    changed = {name for name in made if not torch.equal(made[name], initial[name])}
    backbone = {name for name in changed if name.startswith("backbone")}
    layers = "backbone.network.model.layers"
    assert backbone == {f"{layers}.{i}.self_attn.{n}.weight" for i in range(2) for n in ADAPTED}
    assert "table.direction_VD" in changed - backbone
    optimized = {n.rpartition(".")[0] for n in tiny.tensors(run, 4) if n.startswith("optimizer.")}
    assert len([name for name in optimized if ".lora_" in name]) == 2 * 2 * len(ADAPTED)
    assert {name for name in optimized if ".lora_" not in name} == {
        f"optimizer.denoiser.{name}" for name in initial if not name.startswith("backbone")
    }

    settings = [*given, "name=stopped", "train.checkpoint.every=2"]
    with tiny.bare(tiny.interrupted_at(3)), pytest.raises(KeyboardInterrupt):
        tiny.VERBS["finetune"].execute(tiny.load("finetune", *settings))
    tiny.execute("finetune", *settings)
    tiny.assert_same(stopped, run, 4)
    for name in ("model.safetensors", "config.json"):
        assert (run / "model" / name).read_bytes() == (stopped / "model" / name).read_bytes()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("lora={targets: [q_proj, w_proj]}", "lora.targets: 'w_proj' is no linear map"),
        ("lora={rank: 0}", "must be at least 1"),
        ("lora={ranks: 1}", "lora.ranks"),
    ],
)
@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_what_cannot_be_adapted_is_one_message(
    verb: str,
    setting: str,
    said: str,
    tmp_path: Path,
    data: str,
    base: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = argv(data, tmp_path, "run", base, "adapt=shift", setting)
    for more in ((), ("--dry-run",)):
        code, message = tiny.outcome(capsys, verb, *given, *more)
        assert (code, said in message) == (2, True), message
    assert not (tmp_path / "run").exists()


def test_there_is_nothing_to_adapt_in_a_fresh_network(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = argv(data, tmp_path, "run", "scratch", LORA)
    code, message = tiny.outcome(capsys, "pretrain", *given)
    assert (code, "init is scratch" in message) == (2, True), message


KINDS = [(dtype, adapters) for dtype in ("float32", "bfloat16") for adapters in (False, True)]


def losses(base: Path) -> list[list[float]]:
    """Of three steps of two lanes, shared by the ranks, and of a validation, for all `KINDS`."""
    return [_losses(base, *kind) for kind in KINDS]


def _losses(base: Path, dtype: str, adapters: bool) -> list[float]:
    torch.manual_seed(0)  # of the table
    denoiser = dsl.from_transformers(base, embed_dim=4, adapt="shift")
    if adapters:
        denoiser = Lora(rank=2).attached(denoiser, seed=0)
    config = ParallelConfig(compute_dtype=dtype, activation_checkpointing=True, threads=1)
    rows = np.random.default_rng(0).integers(len(BARE), 17, size=(4, 2, 3, 8))
    rank, size = parallel.world()
    lanes = range(rank, 2, size)
    with parallel.join(config) as mesh:
        learner = Learner(DSLObjective(denoiser, Mixed()), TrainConfig(), mesh, config)
        found = [learner.step(i, {k: rows[i, k] for k in lanes})["loss"] for i in (1, 2, 3)]
        held_out = {"alone": [(lane, rows[0, lane]) for lane in lanes]}
        return [*found, learner.validate(held_out, {"alone": 1.0}, {})["validation/loss"]]


def test_a_sharded_foreign_network_trains_as_a_whole_one_does(base: Path) -> None:
    alone = losses(base)
    shared, same = in_workers(2, losses, base)
    assert shared == same
    for (dtype, _), ours, theirs in zip(KINDS, shared, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5 if dtype == "float32" else 1e-2)
    whole, adapted, *rounded = alone
    assert whole[0] == adapted[0]
    assert whole[1] != adapted[1]
    for ours, theirs in zip(rounded, alone, strict=False):
        assert ours == pytest.approx(theirs, rel=0.02)
