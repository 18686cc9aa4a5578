"""What a Prometheus server can scrape of a training run while it runs.

Ray exports a gauge that is set in any of its processes on that node's metrics port, its name led
by `ray_`: `dsl_tokens_per_second` is scraped as `ray_dsl_tokens_per_second{run="…"}`. The panels
of infra/deploy/monitoring/dashboard.json ask for these names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


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
)


class Gauges:
    """The gauges of one run; made and set in a process of Ray, by rank 0."""

    def __init__(self, run: str) -> None:
        from ray.util import metrics

        self.tags = {"run": run}
        self.by_metric = {
            gauge.metric: metrics.Gauge(gauge.name, gauge.meaning, tag_keys=("run",))
            for gauge in GAUGES
        }

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics that have a gauge."""
        for name, value in {**metrics, "step": step}.items():
            if gauge := self.by_metric.get(name):
                gauge.set(value, self.tags)
