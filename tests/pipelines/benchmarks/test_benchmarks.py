"""Every benchmark at sizes that take seconds: what it says, and never how fast anything is."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsl.denoiser import Denoiser
from infra.errors import ConfigError, InfraError
from pipelines.benchmarks import flops, ingest, paper, sampler, startup, timing, tokenizing
from pipelines.benchmarks.results import SKIPPED, Bar, ratio
from pipelines.benchmarks.settings import BenchmarkConfig, ModelConfig, build
from pipelines.verb import VERBS
from tests.pipelines.benchmarks import small

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
WITHOUT_RAY = ("sampler", "train", "converter", "paper")


@pytest.fixture
def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "peak_gib", small.in_this_process)


def rows_of(name: str, *argv: str) -> dict[str, Any]:
    table = importlib.import_module(f"pipelines.benchmarks.{name}").run(small.benchmark(*argv))
    found = small.by_key(table.rows)
    assert len(found) == len(table.rows), "two rows of one key"
    return found


def finite(row: Any) -> bool:
    return SKIPPED in row or all(math.isfinite(row[key]) for key in ("ratio", "ours", "theirs"))


def test_sampler(in_one_process: None) -> None:
    rows = rows_of("sampler")
    assert {"masked", "remask", "reference", "sde", "calls", "remask_memory"} <= rows.keys()
    assert all(map(finite, rows.values()))
    assert rows["masked"]["verdict"] == "not measured here"  # not the size of the bar
    assert rows["calls"]["verdict"] == "met"
    assert rows["calls"]["ours"] < rows["calls_public"]["theirs"] == 16


def test_train(in_one_process: None) -> None:
    rows = rows_of("train")
    assert {"dsl", "mdlm", "dsl_memory", "mdlm_memory", "sharded", "mfu"} <= rows.keys()
    assert all(map(finite, rows.values()))
    assert "no GPU" in rows["mfu"][SKIPPED]


def test_converter(in_one_process: None) -> None:
    rows = rows_of("converter")
    assert {"forward", "backward", "memory", "endpoints"} <= rows.keys()
    assert all(map(finite, rows.values()))


def test_evaluate_compares_equal_features(tmp_path: Path) -> None:
    from pipelines.benchmarks import evaluate

    size = small.benchmark().evaluate
    network, encoder = evaluate.save(tmp_path, size)
    texts = evaluate.written(encoder, size)
    assert {len(encoder.encode(text)) for text in texts} <= set(range(1, size.max_tokens + 1))
    ours = evaluate.HubFeaturizer(model=str(tmp_path), max_tokens=size.max_tokens, batch=2)
    ours_NF = ours.load(CPU, lambda address: None)(texts, np.empty((len(texts), 0)))
    np.testing.assert_allclose(
        ours_NF, evaluate.one_by_one(network.eval(), encoder, texts), rtol=1e-4, atol=1e-5
    )
    assert finite(rows_of("evaluate")["features"])


def test_ingest(ray_cluster: None, in_one_process: None) -> None:
    rows = rows_of("ingest")
    assert {"stream", "ray", "flat", "flat_memory", "plan", "prepare"} <= rows.keys()
    assert all(map(finite, rows.values()))
    assert rows["stream"]["verdict"] == "not measured here"


def test_the_stream_is_asked_for_all_rows() -> None:
    batches = iter([{0: np.zeros((4, 1))}] * 4)
    ingest.take(batches, 9)
    assert len(list(batches)) == 1


def test_the_text_is_as_long_as_asked_for() -> None:
    size = small.benchmark().ingest
    texts = tokenizing.documents(size)
    assert sum(map(len, texts)) == pytest.approx(1e6, rel=0.01)
    assert texts.count(texts[0]) > 1


def test_startup(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(startup, "_process", lambda argv, number: asked.append(argv))
    rows = rows_of("startup")
    assert rows.keys() == {"import", *(f"help_{verb}" for verb in VERBS)}
    assert len(asked) == 3 * (2 + len(VERBS))


def test_startup_says_which_command_fails() -> None:
    with pytest.raises(InfraError, match=r"pipelines/generate\.py --hlep: ended with 2"):
        startup._process(["pipelines/generate.py", "--hlep"], 0)


def test_the_networks_are_timed_without_ray() -> None:
    """Even those that the machine has no GPU for: nothing of Ray or MLflow is ever imported."""
    code = (
        "import importlib, sys\n"
        f"for name in {WITHOUT_RAY}: importlib.import_module('pipelines.benchmarks.' + name)\n"
        "from pipelines.benchmarks import paper, sampler\n"
        "from tests.pipelines.benchmarks import small\n"
        "sampler.once(small.benchmark(), 'remask'); paper.run(small.benchmark())\n"
        "assert not {'ray', 'mlflow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- figures on paper ------------------------------------------------------------------------


def test_flops_agree_with_the_backbones_own() -> None:
    config = ModelConfig().mdlm()
    with torch.device("meta"):
        denoiser = Denoiser(config)
    assert flops.STEP * flops.forward(config, 1024) == denoiser.backbone.flops_per_token(1024)


def test_flops_agree_with_what_runs() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = small.MODEL.dsl()
    denoiser = build(config, CPU).eval()
    tokens_BL = torch.zeros(2, 8, dtype=torch.int64)
    with FlopCounterMode(display=False) as bare, torch.no_grad():
        denoiser.backbone(torch.zeros(2, 8, config.backbone.width))
    expected = tokens_BL.numel() * flops.backbone(config, 8)
    # The counter sees the conditioning too, which is computed once for all tokens.
    assert bare.get_total_flops() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("gpus", [1, 8, 64, 1024])
def test_paper(gpus: int) -> None:
    config = BenchmarkConfig()
    model = paper.Model.of(config)
    assert model.parameters == pytest.approx(170e6, rel=0.01)
    row = paper.scaled(model, config.paper, gpus)
    assert row["tokens"] == gpus * 8192
    assert row["state_mb"] == pytest.approx(16 * model.parameters / gpus / 1e6)
    assert (row["efficiency"] == 100) == (gpus == 1)


def test_more_lanes_hide_the_gradients_and_more_rows_the_weights() -> None:
    config = BenchmarkConfig()
    model, given = paper.Model.of(config), vars(config.paper)

    def efficiency(**settings: int) -> float:
        changed = type(config.paper)(**{**given, **settings})
        return paper.scaled(model, changed, 64)["efficiency"]

    assert efficiency() < efficiency(lanes=8) < efficiency(rows=64)


# --- timing and verdicts ---------------------------------------------------------------------


def test_procedures_take_turns_and_the_first_round_does_not_count() -> None:
    turns: list[tuple[str, int]] = []
    procedures = {name: lambda number, name=name: turns.append((name, number)) for name in "ab"}
    seconds = timing.interleaved(procedures, 2, CPU)
    assert turns == [(name, number) for number in (0, 0, 1) for name in "ab"]
    assert {len(seconds_R) for seconds_R in seconds.values()} == {2}


def test_a_ratio_is_taken_within_each_round() -> None:
    """A machine that slows down threefold leaves every ratio where it was."""
    row = ratio("k", "what", "against", np.array([2.0, 6.0, 4.0]), np.array([1.0, 3.0, 2.0]))
    assert row["ratio"] == row["low"] == row["high"] == 2.0


@pytest.mark.parametrize(
    ("bar", "verdict"),
    [
        (Bar("≤", 2.0, here=True), "met"),
        (Bar("≤", 1.9, here=True), "not met"),
        (Bar("≥", 2.1, here=True), "not met"),
        (Bar("≤", 1.9, here=False), "not measured here"),
        (Bar("≤", 9.0, here=True, unit="s"), "not met"),  # judged by the figure itself
    ],
)
def test_verdicts(bar: Bar, verdict: str) -> None:
    assert ratio("k", "what", "against", 10.0, 5.0, bar=bar)["verdict"] == verdict


def test_a_bar_reads_like_a_number() -> None:
    assert str(Bar("≥", 5.0, here=True, unit="M tokens/s")) == "≥ 5 M tokens/s"
    assert str(Bar("≤", 1.534, here=True)) == "≤ 1.53"


def allocate(mib: int) -> None:
    np.ones(mib * 2**17)


def stumble() -> None:
    raise KeyError("bad")


def test_peak_memory_is_that_of_a_fresh_process() -> None:
    ballast = np.ones(256 * 2**17)  # in this process, and not to be seen in the other
    small_gib, large_gib = timing.peak_gib(allocate, 1), timing.peak_gib(allocate, 257)
    assert large_gib - small_gib == pytest.approx(0.25, abs=0.05)
    assert len(ballast)


def test_a_process_that_fails_is_reported() -> None:
    with pytest.raises(InfraError, match="ended with 1 while its memory"):
        timing.peak_gib(stumble)


# --- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("only=[sampler,trian]", "train"),
        ("only=[]", "at least one"),
        ("rounds=0", "rounds must be positive"),
        ("sampler.nucleus=1.5", "nucleus"),
        ("paper.mfu=2", "mfu"),
        ("paper.gpus=[]", "gpus"),
    ],
)
def test_settings_that_cannot_be(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small.benchmark(argument)


def test_one_call_reveals_and_masks_again() -> None:
    config = small.benchmark("sampler.budget=4", "sampler.length=64")
    after = sampler.procedures(config, CPU)["masked"](0)
    before, _ = sampler._states(build(config.model.dsl(), CPU), config.sampler)
    assert (after.revealed_BL & ~before.revealed_BL).any()
    assert (after.revealed_BL | ~before.revealed_BL).all()
