"""infra/deploy without a cluster: names, limits, commands, metrics, and versions that agree."""

from __future__ import annotations

import configparser
import importlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra import cluster, config, head
from infra.errors import ConfigError
from pipelines.training import progress
from pipelines.training.progress import GAUGES
from pipelines.verb import PRESETS
from tests.infra import manifests
from tests.infra.common import until
from tests.infra.manifests import DEPLOY, JOBS, ROOT, Object, complaints, everything

ALL = everything()


@pytest.fixture(scope="module")
def known(test_data: Path) -> dict[str, Object]:
    """The schemas of KubeRay's resources."""
    (archive,) = (test_data / "kuberay").glob("kuberay-crds-*.tar.xz")
    return manifests.schemas(archive)


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_unknown_to_kuberay(name: str, known: dict[str, Object]) -> None:
    assert list(manifests.misfits(ALL[name], known)) == []


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_left_open(name: str) -> None:
    assert list(complaints(ALL[name])) == []


def set_(path: str, value: Any = None) -> Callable[[Object], None]:
    """A change: put `value` at the path, or take away what is there."""

    def change(one: Any) -> None:
        *way, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in way:
            one = one[key]
        if value is None:
            del one[last]
        else:
            one[last] = value

    return change


HEAD = "spec/headGroupSpec/template/spec"
GPU = "spec/workerGroupSpecs/1/template/spec"
RULES = "spec/deletionStrategy/deletionRules"
OF_JOB = "spec/rayClusterSpec"
CONTAINER = "spec/template/spec/containers/0"


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("RayCluster/dsl", "spec/authOption", {"mode": "token"}),
        ("RayCluster/dsl", "spec/workerGroupSpecs/0/minReplica", 1),
        ("RayCluster/dsl", f"{GPU}/containers/0/securityContext/runAsNonroot", True),
        ("RayCluster/dsl", f"{GPU}/terminationGracePeriodSeconds", "long"),
        ("RayCluster/dsl", "spec/workerGroupSpecs/1/maxReplicas", None),
        ("RayJob/finetune", "spec/activeDeadlineSecond", 1),
        ("RayJob/evaluate", f"{RULES}/0/policy", "DeleteAll"),
        ("Deployment/mlflow", f"{CONTAINER}/envFrom/0/secretRefs", {}),
    ],
)
def test_a_misspelling_is_seen(name: str, path: str, value: Any, known: dict[str, Object]) -> None:
    changed = manifests.separate(ALL[name])
    set_(path, value)(changed)
    assert list(manifests.misfits(changed, known))


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("RayCluster/dsl", "spec/authOptions", None),
        ("RayCluster/dsl", "spec/rayVersion", "2.59.0"),
        ("RayCluster/dsl", "spec/autoscalerOptions/securityContext", None),
        ("RayCluster/dsl", f"{HEAD}/hostNetwork", True),
        ("RayCluster/dsl", f"{HEAD}/volumes/0/hostPath", {"path": "/"}),
        ("RayCluster/dsl", f"{HEAD}/containers/0/image", "registry.example/dsl:latest"),
        ("RayCluster/dsl", f"{HEAD}/securityContext/runAsNonRoot", False),
        ("RayCluster/dsl", f"{HEAD}/terminationGracePeriodSeconds", None),
        ("RayCluster/dsl", f"{HEAD}/containers/0/env", None),
        ("RayCluster/dsl", f"{HEAD}/containers/0/env/0/name", "RAY_JOB_STOP_WAIT_TIME_S"),
        ("RayCluster/dsl", f"{GPU}/containers/0/env/0/value", "20"),
        ("RayCluster/dsl", f"{GPU}/containers/0/volumeMounts/0/mountPath", "/data"),
        ("RayCluster/dsl", f"{GPU}/securityContext/seccompProfile", None),
        ("RayCluster/dsl", f"{GPU}/automountServiceAccountToken", True),
        ("RayCluster/dsl", f"{GPU}/terminationGracePeriodSeconds", 30),
        ("RayCluster/dsl", f"{GPU}/containers/0/resources/limits/memory", None),
        ("RayCluster/dsl", f"{GPU}/containers/0/securityContext/readOnlyRootFilesystem", False),
        ("RayCluster/dsl", f"{GPU}/containers/0/securityContext/capabilities", {"add": ["ALL"]}),
        ("RayCluster/dsl", f"{GPU}/containers/0/securityContext/privileged", True),
        ("RayJob/finetune", f"{OF_JOB}/authOptions/mode", "disabled"),
        ("RayJob/finetune", "spec/deletionStrategy", None),
        ("RayJob/finetune", f"{RULES}/0/condition/ttlSeconds", 86400),
        ("RayJob/finetune", "spec/activeDeadlineSeconds", None),
        ("RayJob/finetune", "spec/shutdownAfterJobFinishes", True),
        ("Deployment/mlflow", f"{CONTAINER}/env/1", {"name": "MLFLOW_PASSWORD", "value": "a"}),
        ("NetworkPolicy/closed", "spec/policyTypes", ["Egress"]),
        ("NetworkPolicy/ray-nodes", "spec/ingress/0/from/0", {"podSelector": {}}),
        ("NetworkPolicy/ray-nodes", "spec/ingress/0/from/0", {"ipBlock": {"cidr": "0.0.0.0/0"}}),
        ("NetworkPolicy/ray-page", "spec/ingress/0/ports", None),
        ("NetworkPolicy/ray-page", "spec/ingress/0/ports/0/port", 6379),
        ("NetworkPolicy/mlflow", "spec/ingress/0/form", []),
    ],
)
def test_a_gap_is_seen(name: str, path: str, value: Any) -> None:
    changed = manifests.separate(ALL[name])
    set_(path, value)(changed)
    assert list(complaints(changed))


def test_the_namespace_is_closed_but_for_the_policies() -> None:
    assert ALL["NetworkPolicy/closed"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    reached = {
        (name, port["port"])
        for name, one in ALL.items()
        if one["kind"] == "NetworkPolicy"
        for rule in one["spec"].get("ingress", ())
        for port in rule.get("ports", ())
    }
    assert reached == {
        ("NetworkPolicy/ray-page", 8265),
        ("NetworkPolicy/ray-metrics", 8080),
        ("NetworkPolicy/mlflow", 5000),
        ("NetworkPolicy/mlflow-database", 5432),
    }


def test_no_secret_lies_in_the_folder() -> None:
    for path in filter(Path.is_file, DEPLOY.rglob("*")):
        text = path.read_text()
        assert not re.search(r"://[^/\s:]+:[^/\s@]+@", text), path
        assert "kind: Secret" not in text, path
    users = configparser.ConfigParser()
    users.read(DEPLOY / "mlflow/basic_auth.ini")
    assert "admin_password" not in users["mlflow"]
    services = yaml.safe_load((DEPLOY / "mlflow/compose.yaml").read_text())["services"]
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        for name, value in service["environment"].items():
            if any(word in name for word in manifests.SECRET_WORDS):
                assert re.fullmatch(r"\$\{\w+:\?\}", value), name


def test_every_kustomization_names_files_that_are_there() -> None:
    """What `manifests` renders by hand is what these files ask `kubectl` for."""
    found = {path.parent.relative_to(DEPLOY): path for path in DEPLOY.rglob("kustomization.yaml")}
    jobs = {Path("jobs") / name for name in JOBS}
    component = Path("jobs/own-cluster")
    assert found.keys() == {Path("cluster"), Path("mlflow"), component, component / "copy"} | jobs
    for path in found.values():
        (one,) = manifests.documents(path)
        for name in one.get("resources", []) + one.get("components", []):
            assert (path.parent / name).exists(), f"{path}: {name}"
    for name in jobs:
        (one,) = manifests.documents(found[name])
        assert one["resources"] == ["../../cluster", "job.yaml"]
        assert one["components"] == ["../own-cluster"]
    (copied,) = manifests.documents(found[component / "copy"])
    (replacement,) = copied["replacements"]
    assert replacement["source"] == {"kind": "RayCluster", "name": "dsl", "fieldPath": "spec"}
    assert replacement["targets"][0]["fieldPaths"] == ["spec.rayClusterSpec"]


# --- commands --------------------------------------------------------------------------------


def parsed(entrypoint: str, presets: Path = PRESETS) -> Any:
    """The configuration of a command in a manifest, as `--dry-run` would read it."""
    python, script, *argv = shlex.split(entrypoint)
    verb = re.fullmatch(r"pipelines/(\w+)\.py", script)
    assert python == "python"
    assert verb
    module = importlib.import_module(f"pipelines.{verb[1]}")
    settings = getattr(module, f"{verb[1].capitalize()}Config")
    return config.load(settings, verb=verb[1], argv=argv, presets=presets)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_a_command_that_the_verb_takes(name: str) -> None:
    entrypoint = ALL[f"RayJob/{name}"]["spec"]["entrypoint"]
    settings = parsed(entrypoint)
    assert settings.data.startswith("s3://")
    assert settings.root.startswith("s3://")
    assert settings.tracking.uri == "http://mlflow:5000"
    with pytest.raises(ConfigError, match="no such key"):
        parsed(f"{entrypoint} rooot=s3://bucket/runs")


def test_jobs_read_what_is_there() -> None:
    """The shards that the preset's head shows how to make, and models that jobs register."""
    jobs = {name: parsed(ALL[f"RayJob/{name}"]["spec"]["entrypoint"]) for name in JOBS}
    (prepared,) = re.findall(r"^# .* out=(\S+)", (PRESETS / "owt.yaml").read_text(), re.MULTILINE)
    assert {job.data for job in jobs.values()} == {prepared}
    finetune, sweep, evaluate = (jobs[name] for name in JOBS)
    asked = [finetune.init, sweep.finetune.init, *evaluate.models.values()]
    made = {f"models:/{job.register}@candidate" for job in (finetune, sweep)}
    assert {address for address in asked if address.startswith("models:/")} <= made


@pytest.mark.parametrize("name", ["finetune", "evaluate"])
def test_the_cluster_has_the_gpus_that_the_job_asks_for(name: str) -> None:
    workers = parsed(ALL[f"RayJob/{name}"]["spec"]["entrypoint"]).workers
    groups = ALL["RayCluster/dsl"]["spec"]["workerGroupSpecs"]
    most = {group["groupName"]: group["maxReplicas"] for group in groups}
    assert workers.gpu
    assert workers.count <= min(most["gpu"], most["spot"])


def test_a_sweep_begins_on_a_cluster_that_has_no_worker_yet() -> None:
    from pipelines.sweeping import tuning

    settings = parsed(ALL["RayJob/sweep"]["spec"]["entrypoint"])
    groups = ALL["RayCluster/dsl"]["spec"]["workerGroupSpecs"]
    most = {group["groupName"]: group["maxReplicas"] for group in groups}
    assert 0 < tuning.concurrent(settings, {}) <= min(most["gpu"], most["spot"])


# --- the image -------------------------------------------------------------------------------


def test_versions_agree() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    constraints = (ROOT / "constraints.txt").read_text().split()
    (torch,) = set(re.findall(r"torch==[\d.]+", dockerfile))
    assert torch in constraints
    assert torch in (ROOT / "Makefile").read_text()
    assert "-c constraints.txt '.[pipeline]'" in dockerfile
    pinned = dict(line.split("==") for line in constraints)
    installed = re.search(r"-c /tmp/constraints\.txt (.*?)\nRUN", dockerfile, re.DOTALL)
    assert installed
    assert set(installed[1].split()) <= pinned.keys()


def test_the_image_is_nobodys_and_holds_no_secret() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    stages = "\n".join(lines).split("\nFROM ")[1:]
    assert [stage.split()[2] for stage in stages] == ["base", "mlflow", "ray"]
    assert all("USER 1000:1000" in stage for stage in stages[1:])
    assert re.search(r"^ARG PYTHON=\d+\.\d+\.\d+-", "\n".join(lines), re.MULTILINE)
    assert f'RUN echo "$COMMIT" > {cluster.COMMIT_FILE}' in lines
    assert cluster.COMMIT_VARIABLE not in manifests.image(), "it would speak for submitted code"
    assert "RAY_AUTH_MODE=token" in "\n".join(lines)
    assert manifests.image()["RAY_JOB_STOP_WAIT_TIME_S"] == str(head.JOB_SECONDS)
    # What the presets' `compile: true` needs, which a slim image has not.
    compilers = re.search(r"apt-get install -y --no-install-recommends (.*) \\", stages[2])
    assert compilers
    assert {"gcc", "g++", "libc6-dev"} <= set(compilers[1].split())
    given = (ROOT / ".dockerignore").read_text().split("\n")
    assert "*" in given, "an image takes what is named, not what happens to lie about"
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert {f"!{name}" for name in copied} <= set(given)


# --- metrics ---------------------------------------------------------------------------------


def asked() -> set[str]:
    """The metrics that the dashboard asks for."""
    board = json.loads((DEPLOY / "monitoring/dashboard.json").read_text())
    texts = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    texts += [v["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    return {name for text in texts for name in re.findall(r"\bray_\w+", text)}


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    ours = {f"ray_{gauge.name}" for gauge in GAUGES}
    assert ours <= asked()
    assert asked() - ours <= {f"ray_{name}" for name in METRICS_GAUGES}


Heard = list[tuple[str, float, dict[str, str]]]


def gauges_heard(monkeypatch: pytest.MonkeyPatch, *, every_s: float) -> Heard:
    """What Ray is told from here on."""
    from ray.util import metrics

    heard: Heard = []

    class Gauge:
        def __init__(self, name: str, meaning: str, *, tag_keys: tuple[str, ...]) -> None:
            assert meaning
            assert tag_keys == ("run",)
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            heard.append((self.name, value, tags))

    monkeypatch.setattr(metrics, "Gauge", Gauge)
    monkeypatch.setattr(progress, "SET_EVERY_S", every_s)
    return heard


def test_a_gauge_is_set_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = gauges_heard(monkeypatch, every_s=0.001)
    with progress.gauges("one") as show:
        show(7, {"loss": 2.5, "grad_norm": 1.0})
        until(lambda: len(heard) > 4)
    both = [("dsl_loss", 2.5, {"run": "one"}), ("dsl_step", 7, {"run": "one"})]
    assert heard == both * (len(heard) // 2)


def test_the_gauges_end_with_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = gauges_heard(monkeypatch, every_s=1000.0)
    with progress.gauges("one") as show:
        show(6, {"loss": 2.75})
        show(7, {"loss": 2.5})
    assert heard == [("dsl_loss", 2.5, {"run": "one"}), ("dsl_step", 7, {"run": "one"})]


def test_the_dashboard_shows_each_panel_once() -> None:
    board = json.loads((DEPLOY / "monitoring/dashboard.json").read_text())
    corners = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len({panel["id"] for panel in board["panels"]}) == len(set(corners)) == len(corners)


def test_prometheus_scrapes_the_ports_that_the_pods_name() -> None:
    (job,) = yaml.safe_load((DEPLOY / "monitoring/prometheus.yaml").read_text())["scrape_configs"]
    assert job["relabel_configs"][0]["regex"] == "yes;metrics"
    for pod in manifests.pods(ALL["RayCluster/dsl"]):
        ports = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
        assert ports["metrics"] == 8080
    labels = {rule.get("target_label") for rule in job["relabel_configs"]}
    assert {"cluster", "pod"} <= labels, "the dashboard's legends use them"
