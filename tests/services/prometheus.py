"""Prometheus as `infra/deploy/monitoring` configures it, on this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import requests
import yaml

from tests.infra.common import free_port, until
from tests.infra.manifests import DEPLOY
from tests.services.debian import START_S, program

MONITORING = DEPLOY / "monitoring"
EVERY = "1s"  # how often the copy scrapes and judges
# What `kubernetes_sd_configs` would find out about a pod. Debian's Prometheus is built without it.
POD = {
    "__meta_kubernetes_pod_label_ray_io_is_ray_node": "yes",
    "__meta_kubernetes_pod_container_port_name": "metrics",
    "__meta_kubernetes_namespace": "dsl",
    "__meta_kubernetes_pod_label_ray_io_cluster": "local",
    "__meta_kubernetes_pod_label_ray_io_group": "headgroup",
    "__meta_kubernetes_pod_name": "dsl-head",
}
OTHER_PORT = {**POD, "__meta_kubernetes_pod_container_port_name": "dashboard"}


def configuration(folder: Path, target: str, shorter: dict[str, str]) -> Path:
    """A copy of the configuration and the alerts that scrapes `target`, the pod's metrics port.

    shorter: durations of the alerts, and what they are in the copy.
    """
    found = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    (job,) = found["scrape_configs"]
    del job["kubernetes_sd_configs"]
    job["static_configs"] = [
        {"targets": [target], "labels": POD},
        {"targets": ["127.0.0.1:9"], "labels": OTHER_PORT},
    ]
    job["scrape_interval"] = EVERY
    found["global"] = {"evaluation_interval": EVERY}
    rules = (MONITORING / "alerts.yaml").read_text()
    for long, short in shorter.items():
        assert long in rules, long
        rules = rules.replace(long, short)
    (folder / "alerts.yaml").write_text(rules)
    path = folder / "prometheus.yaml"
    path.write_text(yaml.safe_dump(found))
    return path


class Prometheus:
    """A server on a port of its own."""

    def __init__(self, configuration: Path) -> None:
        folder, port = configuration.parent, free_port()
        self.url = f"http://127.0.0.1:{port}"
        with (folder / "prometheus.log").open("wb") as output:
            self.process = subprocess.Popen(
                [program("prometheus", "prometheus"), f"--config.file={configuration}",
                 f"--storage.tsdb.path={folder / 'series'}",
                 f"--web.listen-address=127.0.0.1:{port}"],
                stdout=output, stderr=output,
            )  # fmt: skip
        until(self._ready, START_S)

    def ask(self, query: str) -> list[tuple[dict[str, str], float]]:
        """The labels and values that a query has now."""
        found = self._get("query", query=query)["result"]
        return [(one["metric"], float(one["value"][1])) for one in found]

    def firing(self) -> set[str]:
        """The names of the alerts that fire."""
        alerts = self._get("alerts")["alerts"]
        return {one["labels"]["alertname"] for one in alerts if one["state"] == "firing"}

    def targets(self) -> list[dict[str, str]]:
        """The labels of what is scraped."""
        return [one["labels"] for one in self._get("targets")["activeTargets"]]

    def down(self) -> None:
        self.process.terminate()
        self.process.wait(START_S)

    def _get(self, what: str, **query: str) -> Any:
        answer = requests.get(f"{self.url}/api/v1/{what}", params=query, timeout=START_S)
        answer.raise_for_status()
        return answer.json()["data"]

    def _ready(self) -> bool:
        assert self.process.poll() is None, "see prometheus.log"
        try:
            return requests.get(f"{self.url}/-/ready", timeout=5).ok
        except requests.ConnectionError:
            return False
