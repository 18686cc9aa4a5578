"""Every benchmark at sizes that take seconds: what it says, and never how fast anything is."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from dsl.denoiser import Denoiser
from dsl.posterior import Denoises
from dsl.truncation import Truncated
from infra.errors import ConfigError, InfraError
from pipelines.benchmarks import converter, ingest, measure, sampler, train
from pipelines.benchmarks.results import Bar, ratio
from pipelines.benchmarks.settings import build
from tests.pipelines.benchmarks import small

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
KEYS = {
    "sampler": {"masked", "remask", "reference", "sde", "sde_nucleus", "remask_public", "calls"},
    "train": {"dsl", "mdlm", "matmul", "dsl_memory", "mdlm_memory", "sharded"},
    "converter": {"forward", "backward"},
    "ingest": {"ray", "waiting", "prepare"},
    "evaluate": {"features"},
}


@pytest.mark.parametrize(
    "name",
    [
        "sampler",
        "train",
        "converter",
        pytest.param("ingest", marks=pytest.mark.long),
        pytest.param("evaluate", marks=pytest.mark.long),
    ],
)
def test_a_benchmark_gives_its_figures(
    name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if name == "ingest":
        request.getfixturevalue("ray_cluster")
    monkeypatch.setattr(measure, "peak_gib", small.in_this_process)
    table = importlib.import_module(f"pipelines.benchmarks.{name}").run(small.benchmark())
    assert [row["key"] for row in table.rows] == list(dict.fromkeys(r["key"] for r in table.rows))
    assert {row["key"] for row in table.rows} == KEYS[name]
    for row in table.rows:
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("ratio", "ours", "theirs"))
        # These are not the sizes of the bars; calls do not depend on the size.
        judged = "met" if row["key"] == "calls" else "not judged at these sizes"
        assert row.get("verdict", judged) == judged


def test_evaluate_compares_equal_features(tmp_path: Path) -> None:
    from pipelines.benchmarks import evaluate

    size = small.benchmark().evaluate
    network, tokenizer = evaluate.save(tmp_path, size)
    texts = evaluate.written(tokenizer, size)
    assert {len(tokenizer.encode(text)) for text in texts} <= set(range(1, size.max_tokens + 1))
    ours = evaluate.HubFeaturizer(model=str(tmp_path), max_tokens=size.max_tokens, batch=2)
    read = ours.load("evaluate", CPU)(texts, np.empty((len(texts), 0)))
    theirs_NF = evaluate.one_by_one(network.eval(), tokenizer, texts)
    np.testing.assert_allclose(read.features_NF, theirs_NF, rtol=1e-4, atol=1e-5)


def test_the_text_is_as_long_as_asked_for() -> None:
    texts = ingest.documents(small.benchmark().ingest)
    assert sum(map(len, texts)) == 1_000_000
    assert texts.count(texts[0]) > 1


def test_the_networks_are_timed_without_ray() -> None:
    code = (
        "import sys\n"
        "from pipelines.benchmarks import converter, sampler, train\n"
        "from tests.pipelines.benchmarks import small\n"
        "train.two_steps(small.benchmark(), 'dsl')\n"
        "assert not {'ray', 'mlflow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_flops_are_those_of_the_positions_that_are_predicted() -> None:
    """Measured shares of the positions, between none and all of the head."""
    config = small.benchmark()
    tokens = config.train.rows * config.train.length
    whole = Denoiser(config.model.mdlm()).backbone.flops_per_token(config.train.length)
    head = 6 * config.model.tokens * config.model.backbone.width
    work = {name: train.flops(config, name, CPU) / tokens for name in ("mdlm", "dsl")}
    assert whole - head < work["mdlm"] < whole < work["dsl"]


def test_the_bare_products_of_the_converter_have_the_gradients_of_both_factors() -> None:
    """As the converter has; backward is twice the forward then."""
    from torch.utils.flop_counter import FlopCounterMode

    config = small.benchmark()
    timed, counted = converter.procedures(config, CPU), {}
    for name in ("products", "products_backward"):
        with FlopCounterMode(display=False) as counter:
            timed[name](0)
        counted[name] = counter.get_total_flops()
    model, positions = config.model, config.converter.positions
    forward = 2 * positions * model.tokens * (model.embed_dim + model.backbone.width)
    assert counted == {"products": forward, "products_backward": 3 * forward}


def test_flops_agree_with_what_runs() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = small.benchmark()
    backbone = Denoiser(config.model.mdlm()).backbone
    # The counter knows matrix products, and no fused attention.
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        backbone(torch.zeros(2, 16, 16))
    head = 2 * config.model.tokens * config.model.backbone.width
    expected = 2 * 16 * (backbone.flops_per_token(16) / 3 - head)
    # The counter also sees the conditioning, which is computed once for all tokens.
    assert counted.get_total_flops() == pytest.approx(expected, rel=0.05)


# --- timing and verdicts ---------------------------------------------------------------------


def test_procedures_take_turns_and_the_first_round_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock that each turn moves on, by one second more than the last."""
    turns: list[tuple[str, int]] = []
    clock = SimpleNamespace(perf_counter=lambda: sum(range(len(turns) + 1)))
    monkeypatch.setattr(measure, "time", clock)
    procedures = {name: lambda number, name=name: turns.append((name, number)) for name in "ab"}
    seconds = measure.interleaved(procedures, 2, CPU)
    assert turns == [(name, number) for number in (0, 0, 1) for name in "ab"]
    assert {name: seconds_R.tolist() for name, seconds_R in seconds.items()} == {
        "a": [3, 5],
        "b": [4, 6],
    }


def test_a_ratio_is_taken_within_each_round() -> None:
    """A machine that slows down threefold leaves every ratio where it was."""
    row = ratio("k", "what", "against", np.array([2.0, 6.0, 4.0]), np.array([1.0, 3.0, 2.0]))
    assert row["ratio"] == row["low"] == row["high"] == 2.0


def test_each_ratio_is_ours_over_theirs() -> None:
    """Of times for a step, of what is done in a second, and of memory."""
    config, second = small.benchmark(), np.ones(1)
    steps = {"mdlm": 2 * second, "dsl": 6 * second, "reference": 8 * second}
    looped = {"mdlm": 2 * second, "sharded": 4 * second}
    peaks = {"mdlm": 2.0, "dsl": 3.0, "reference": 8.0}
    work = {"mdlm": 1e12, "dsl": 1.5e12, "matmul": measure.Matmul(torch.device("cpu")).flops}
    rows = [
        *train._steps(config, {**steps, "matmul": second}, work),
        *train._memory(config, peaks),
        *train._worker(config, looped),
    ]
    found = {row["key"]: row["ratio"] for row in rows}
    assert found == {
        "dsl": 3.0,
        "mdlm": 0.25,
        "matmul": pytest.approx(0.5e12 / (2 * 2048**3)),
        "dsl_memory": 1.5,
        "mdlm_memory": 0.25,
        "sharded": 0.5,
    }
    assert rows[0]["bar"] == "≤ 1.65"  # a tenth more than its FLOPs
    names = ("backbone", "masked", "remask", "head", "sde", "sde_nucleus", "reference")
    calls = {name: (number + 1) * second for number, name in enumerate(names)}
    assert {row["key"]: row["ratio"] for row in sampler._calls(config, calls)} == {
        "masked": 2.0,
        "remask": 3.0,
        "reference": 7.0,
        "sde": pytest.approx(5 / 4),
        "sde_nucleus": pytest.approx(6 / 4),
        "remask_public": pytest.approx(3 / 7),
    }


@pytest.mark.parametrize("name", ["masked", "remask", "sde", "sde_nucleus"])
def test_what_is_timed_with_a_nucleus_has_one(name: str) -> None:
    """The path sees the sharpened posterior, but for the SDE, whose bar is without one."""
    seen: list[bool] = []

    def one_call(denoises: Denoises, *_: object) -> None:
        seen.append(isinstance(denoises, Truncated))

    with mock.patch.object(sampler, "one_call", one_call):
        sampler.procedures(small.benchmark(), CPU)[name](0)
    assert seen == [name != "sde"]


@pytest.mark.parametrize(
    ("bar", "verdict"),
    [
        (Bar("≤", 2.0, here=True), "met"),
        (Bar("≤", 1.9, here=True), "not met"),
        (Bar("≥", 2.1, here=True), "not met"),
        (Bar("≤", 1.9, here=False), "not judged at these sizes"),
        (Bar("≤", 9.0, here=True, unit="s"), "not met"),  # our own figure is judged
    ],
)
def test_verdicts(bar: Bar, verdict: str) -> None:
    assert ratio("k", "what", "against", 10.0, 5.0, bar=bar)["verdict"] == verdict


def test_a_bar_reads_like_a_number() -> None:
    assert str(Bar("≥", 5.0, here=True, unit="M tokens/s")) == "≥ 5 M tokens/s"
    assert str(Bar("≤", 1.534, here=True)) == "≤ 1.53"


def allocate(mib: int) -> None:
    np.ones(mib * 2**17)


def die() -> None:
    os._exit(1)


@pytest.mark.long
def test_peak_memory_is_that_of_a_fresh_process() -> None:
    ballast = np.ones(256 * 2**17)  # in this process, and not to be seen in the other
    low_gib, high_gib = measure.peak_gib(allocate, 1), measure.peak_gib(allocate, 257)
    assert high_gib - low_gib == pytest.approx(0.25, abs=0.05)
    assert len(ballast)


def test_a_process_that_dies_is_reported() -> None:
    with pytest.raises(InfraError, match="died"):
        measure.peak_gib(die)


# --- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("only=[]", "at least one"),
        ("rounds=0", "rounds must be positive"),
        ("sampler.nucleus=1.5", "nucleus"),
    ],
)
def test_settings_that_cannot_be(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small.benchmark(argument)


def test_one_call_reveals_and_masks_again() -> None:
    config = small.benchmark("sampler.budget=4", "sampler.length=64")
    after = sampler.procedures(config, CPU)["masked"](0)
    before, evidence = sampler.states(build(config.model.dsl(), CPU), config.sampler)
    assert before.revealed_BL.float().mean() == pytest.approx(0.5, abs=0.2)
    assert (evidence.gamma_BL == sampler.SDE.gamma(0.5)).all()
    assert (after.revealed_BL & ~before.revealed_BL).any()
    assert (after.revealed_BL | ~before.revealed_BL).all()
