"""Where the time of a training run goes: for its metrics, for Prometheus, and for a person.

Ray exports a gauge that is set in any of its processes on that node's metrics port, its name led
by `ray_`: `dsl_tokens_per_second` is scraped as `ray_dsl_tokens_per_second{run="…"}`. The panels
of infra/deploy/monitoring/dashboard.json ask for these names.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from infra import console, parallel
from infra.threads import repeated

SECONDS_BETWEEN_LINES = 5.0
STATUS = Path("/proc/self/status")
RECENT = 100  # steps of which percentiles are taken
SET_EVERY_S = 2.0  # Ray exports gauges every 10 s


class Progress:
    """Times the steps of one attempt at a run, from the one after `done` to `steps`.

    tokens, flops: of one step, all workers together. peak: FLOP/s of all their devices, where that
    is known. saved: what `saving` returned for the checkpoint of `done`; for a new run `began`
    alone, when it was first started, in seconds since the epoch. what: the verb and the run, for
    the person.
    """

    def __init__(
        self,
        steps: int,
        done: int,
        *,
        tokens: int,
        flops: float,
        peak: float | None,
        saved: Mapping[str, Any],
        what: str,
    ) -> None:
        self.what, self.steps, self.step, self.tokens = what, steps, done, tokens
        self.flops, self.peak = flops, peak
        self.began = saved.get("began", time.time())
        self.useful = saved.get("useful_s", 0.0)
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.start, self.first = time.perf_counter(), done
        self.since, self.from_step, self.waited = self.start, done, 0.0
        self.saved_at = {done: self.start}

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a step's data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Around a step."""
        began = time.perf_counter()
        yield
        self.recent.append(time.perf_counter() - began)
        self.useful += self.recent[-1]
        self.step += 1

    def saving(self) -> dict[str, float]:
        """Note that the checkpoint of this step begins; what it must hold for the next attempt."""
        self.saved_at[self.step] = time.perf_counter()
        return {"began": self.began, "useful_s": self.useful}

    def metrics(self, committed: int | None, failed: int = 0) -> dict[str, float]:
        """Rates since the last `line`, and totals so far. committed: the last checkpoint's step;
        failed: how many checkpoints have failed since.

        Goodput is the share of the time since the run was first started that went into steps that
        were not lost, by the clock of this machine. Peak memory is that of this process.
        """
        now = time.perf_counter()
        elapsed = max(now - self.since, 1e-9)
        rate = (self.step - self.from_step) / elapsed
        p50, p90, p99 = np.percentile(self.recent, (50, 90, 99)) if self.recent else (0, 0, 0)
        found = {
            "workers": parallel.world()[1],
            "tokens_per_s": rate * self.tokens,
            "data_wait_percent": 100 * self.waited / elapsed,
            "step_s_p50": float(p50),
            "step_s_p90": float(p90),
            "step_s_p99": float(p99),
            "goodput_percent": min(100 * self.useful / max(time.time() - self.began, 1e-9), 100.0),
            "checkpoint_age_s": now - self.saved_at.get(committed or self.first, self.start),
            "failed_checkpoints": failed,
            "peak_memory_gib": peak_memory() / 2**30,
            "eta_s": self.eta(now),
        }
        if self.peak:
            found["mfu_percent"] = 100 * rate * self.flops / self.peak
        return {f"speed/{name}": value for name, value in found.items()}

    def eta(self, now: float) -> float:
        """Seconds that the remaining steps will take, at this attempt's pace."""
        return (self.steps - self.step) * (now - self.start) / max(self.step - self.first, 1)

    def line(self, metrics: Mapping[str, float]) -> None:
        """A line for a person, every few seconds; from the first worker."""
        now = time.perf_counter()
        early = now - self.since < SECONDS_BETWEEN_LINES and self.step < self.steps
        if parallel.world()[0] or early:
            return
        speed = self.metrics(None)
        facts = [f"loss {metrics['loss']:.4f}"]
        if (validated := metrics.get("validation/loss")) is not None:
            facts.append(f"validation/loss {validated:.4f}")
        if (workers := speed["speed/workers"]) > 1:
            facts.append(f"{workers} workers")
        facts.append(f"data wait {speed['speed/data_wait_percent']:.1f} %")
        if (mfu := speed.get("speed/mfu_percent")) is not None:
            facts.append(f"MFU {mfu:.1f} %")
        rate = f"{speed['speed/tokens_per_s']:,.0f} tokens/s"
        shown = console.line(
            self.what,
            self.step,
            self.steps,
            "steps",
            *facts,
            rate=rate,
            eta_s=speed["speed/eta_s"],
        )
        console.progress(shown, last=self.step == self.steps)
        self.since, self.from_step, self.waited = now, self.step, 0.0


def peak_memory() -> int:
    """Bytes: of the GPU, where this process computes on one, else of the process."""
    if parallel.device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    if STATUS.exists():  # on Linux, getrusage also counts the parent's, from between fork and exec
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024)


class Gauge(NamedTuple):
    """`name` for Prometheus; `metric` is the name in the run's journal."""

    name: str
    metric: str
    meaning: str


GAUGES = (
    Gauge("dsl_step", "step", "optimizer steps done"),
    Gauge("dsl_loss", "loss", "training loss"),
    Gauge("dsl_workers", "speed/workers", "processes that train"),
    Gauge("dsl_tokens_per_second", "speed/tokens_per_s", "tokens trained on a second, all workers"),
    Gauge("dsl_mfu_percent", "speed/mfu_percent", "share of the GPUs' peak FLOPs that is used"),
    Gauge("dsl_data_wait_percent", "speed/data_wait_percent", "share of time spent on waiting"),
    Gauge("dsl_goodput_percent", "speed/goodput_percent", "share of time whose steps were kept"),
    Gauge(
        "dsl_checkpoint_age_seconds",
        "speed/checkpoint_age_s",
        "since the last committed checkpoint",
    ),
    Gauge("dsl_failed_checkpoints", "speed/failed_checkpoints", "since the last committed one"),
    Gauge("dsl_eta_seconds", "speed/eta_s", "that the remaining steps will take"),
)


@contextmanager
def gauges(run: str) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """A function that shows those metrics of a step that have a gauge, inside the block; for rank 0
    of a run, in a process of Ray.

    A thread sets the gauges again and again: Ray drops one that was not set for 20 s, and a run
    that hangs can only be told from one that has ended if its gauges stay.
    """
    from ray.util import metrics

    made = {
        gauge.metric: metrics.Gauge(gauge.name, gauge.meaning, tag_keys=("run",))
        for gauge in GAUGES
    }
    latest: Mapping[str, float] = {}

    def show(step: int, metrics: Mapping[str, float]) -> None:
        nonlocal latest
        latest = {**metrics, "step": step}

    def set_all() -> None:
        for name, value in latest.items():
            if gauge := made.get(name):
                gauge.set(value, {"run": run})

    try:
        with repeated(set_all, SET_EVERY_S, "gauges"):
            yield show
    finally:
        set_all()
