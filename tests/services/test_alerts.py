"""What `promtool` says of the alerts and of the configuration that loads them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.infra.common import until
from tests.services import prometheus
from tests.services.debian import START_S, program
from tests.services.prometheus import MONITORING


def promtool(*arguments: str | Path) -> None:
    subprocess.run([program("promtool", "prometheus"), *arguments], check=True)


def test_the_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("check", "rules", MONITORING / "alerts.yaml")
    promtool("test", "rules", Path(__file__).with_name("alerts_test.yaml"))


def test_prometheus_takes_the_configuration(tmp_path: Path) -> None:
    configured = prometheus.configuration(tmp_path, "127.0.0.1:9", shorter={})
    promtool("check", "config", configured)
    server = prometheus.Prometheus(configured)
    try:
        (scraped,) = until(server.targets, START_S)
        assert scraped.items() >= {"cluster": "local", "pod": "dsl-head"}.items()
    finally:
        server.down()
