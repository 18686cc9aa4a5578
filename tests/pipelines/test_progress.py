"""Where the time of a run goes, by a clock that is set by hand."""

from __future__ import annotations

import time

import pytest

from pipelines.training.progress import GAUGES, Progress


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def progress(done: int = 0, **given: object) -> Progress:
    settings = {
        "tokens": 100, "flops": 2e12, "peak": 10e12, "saved": {"began": 1000.0},
        "what": "pretrain mdlm", **given
    }  # fmt: skip
    return Progress(20, done, **settings)


def step(at: Progress, clock: Clock, seconds: float, waiting: float = 0.0) -> None:
    with at.waiting():
        clock.now += waiting
    with at.stepping():
        clock.now += seconds


def test_the_rates_of_a_few_steps(clock: Clock) -> None:
    at = progress()
    for seconds in (1.0, 1.0, 1.0, 1.0, 2.0):
        step(at, clock, seconds, waiting=0.8)
    found = at.metrics(None)
    assert at.step == 5
    assert found["speed/tokens_per_s"] == pytest.approx(5 * 100 / 10)
    assert found["speed/data_wait_percent"] == pytest.approx(40)
    assert found["speed/goodput_percent"] == pytest.approx(60)
    assert found["speed/mfu_percent"] == pytest.approx(100 * 5 * 2e12 / 10 / 10e12)
    assert found["speed/step_s_p50"] == 1.0
    assert found["speed/step_s_p90"] == pytest.approx(1.6)
    assert found["speed/step_s_p99"] == pytest.approx(1.96)
    assert found["speed/eta_s"] == pytest.approx(15 * 10 / 5)
    assert found["speed/peak_memory_gib"] > 0.01
    assert found["speed/checkpoint_age_s"] == pytest.approx(10)


def test_goodput_counts_what_was_lost_and_what_was_waited_for(clock: Clock) -> None:
    first = progress()
    for number in range(1, 7):
        step(first, clock, 1.0)
        if number == 4:
            kept = first.saving()
    assert first.metrics(None)["speed/goodput_percent"] == pytest.approx(100)
    clock.now += 4  # killed at 6, started again from 4
    second = progress(4, saved=kept)
    for _ in range(10):
        step(second, clock, 1.0)
    assert second.metrics(4)["speed/goodput_percent"] == pytest.approx(100 * 14 / 20)
    assert second.metrics(4)["speed/eta_s"] == pytest.approx(6)


def test_a_checkpoint_is_as_old_as_what_it_holds(clock: Clock) -> None:
    at = progress()
    step(at, clock, 3.0)
    at.saving()
    step(at, clock, 2.0)
    assert at.metrics(None)["speed/checkpoint_age_s"] == 5  # it is still being written
    assert at.metrics(1)["speed/checkpoint_age_s"] == 2


def test_no_peak_no_utilisation(clock: Clock) -> None:
    at = progress(peak=None)
    step(at, clock, 1.0)
    assert "speed/mfu_percent" not in at.metrics(None)


def test_every_gauge_shows_a_metric_that_there_is(clock: Clock) -> None:
    at = progress()
    step(at, clock, 1.0)
    there = at.metrics(None).keys() | {"loss", "step"}
    assert [gauge.name for gauge in GAUGES if gauge.metric not in there] == []


def test_a_line_for_a_person(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    at = progress()
    step(at, clock, 1.0)
    at.line({"loss": 2.0})
    assert capsys.readouterr().err == ""  # too soon
    step(at, clock, 9.0)
    at.line({"loss": 2.0, "validation/loss": 3.0})
    shown = "pretrain mdlm  2/20 steps  loss 2.0000  validation/loss 3.0000  data wait 0.0 %"
    assert capsys.readouterr().err == f"{shown}  MFU 4.0 %  20 tokens/s  ETA 1:30\n"
    assert at.metrics(None)["speed/tokens_per_s"] == 0  # since the line
