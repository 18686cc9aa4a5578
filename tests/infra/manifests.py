"""The manifests of infra/deploy as `kubectl kustomize` renders them, and what is wrong there."""

from __future__ import annotations

import copy
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "infra" / "deploy"
JOBS = ("finetune", "sweep", "evaluate")
# A cluster that idles for longer than this after its job is forgotten, not wanted.
LONGEST_TTL_S = 3600
# How long Ray lets a driver end, on the head, and a node.
WAITS = ("RAY_JOB_STOP_WAIT_TIME_S", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
SECRET_WORDS = ("PASSWORD", "SECRET", "TOKEN", "_KEY")

Object = dict[str, Any]


def documents(path: Path) -> list[Object]:
    # Anchors make one object of what is written once; copies can be changed one by one.
    return [copy.deepcopy(found) for found in yaml.safe_load_all(path.read_text()) if found]


def image() -> dict[str, str]:
    """The environment of the image of Ray's nodes."""
    stage = (DEPLOY / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    lines = re.findall("^ENV (.*)", stage.replace("\\\n", " "), re.MULTILINE)
    return dict(word.split("=", 1) for line in lines for word in line.split())


def cluster() -> Object:
    (found,) = documents(DEPLOY / "cluster/cluster.yaml")
    return separate(found)


def job(name: str) -> Object:
    (found,) = documents(DEPLOY / "jobs" / name / "job.yaml")
    (shared,) = documents(DEPLOY / "jobs/own-cluster/lifetime.yaml")
    spec = {**found["spec"], **shared["spec"], "rayClusterSpec": cluster()["spec"]}
    return separate({**found, "spec": spec})


def everything() -> dict[str, Object]:
    """Every object that is applied, as `Kind/name`."""
    parts = ("cluster/network", "mlflow/server", "mlflow/database", "mlflow/network")
    plain = [separate(one) for part in parts for one in documents(DEPLOY / f"{part}.yaml")]
    found = [cluster(), *map(job, JOBS), *plain]
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in found}


def separate(value: Any) -> Any:
    """A copy in which no two places share an object, as `deepcopy` would let them."""
    if isinstance(value, dict):
        return {key: separate(item) for key, item in value.items()}
    return [separate(item) for item in value] if isinstance(value, list) else value


# --- schemas ---------------------------------------------------------------------------------


def schemas(archive: Path) -> dict[str, Object]:
    """{kind: strict JSON schema} of version v1 of each custom resource in the archive."""
    found = {}
    with tarfile.open(archive) as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            content = tar.extractfile(member)
            assert content is not None
            definition = yaml.load(content, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
            kind = definition["spec"]["names"]["kind"]
            found[kind] = strict(version["schema"]["openAPIV3Schema"])
    return found


def strict(schema: Any) -> Any:
    """The schema, refusing the names it does not know, as Kubernetes drops them without a word."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    closed = {key: strict(item) for key, item in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def misfits(one: Object, known: dict[str, Object]) -> Iterator[str]:
    """Where an object does not fit its schema; the pods of core kinds have that of Ray's."""
    schema, found = known.get(one["kind"]), one
    if schema is None and (template := one["spec"].get("template")):
        group = known["RayCluster"]["properties"]["spec"]["properties"]["headGroupSpec"]
        schema, found = group["properties"]["template"], template
    if schema is not None:
        for error in Draft202012Validator(schema).iter_errors(found):
            yield f"{error.json_path}: {error.message[:200]}"


# --- rules -----------------------------------------------------------------------------------


def complaints(one: Object) -> Iterator[str]:
    """What a schema cannot say: what makes an object unsafe or leaves it running for ever."""
    kind, spec = one["kind"], one["spec"]
    if unknown := one.keys() - {"apiVersion", "kind", "metadata", "spec"}:
        yield f"unknown fields {unknown}"
    if unknown := one["metadata"].keys() - {"name", "labels", "annotations"}:
        yield f"unknown metadata {unknown}"
    for pod in pods(one):
        yield from of_pod(pod)
    if kind == "RayCluster":
        yield from of_cluster(spec)
    elif kind == "RayJob":
        yield from of_cluster(spec["rayClusterSpec"])
        yield from of_job(spec)
    elif kind == "NetworkPolicy":
        yield from of_policy(spec)


def pods(one: Object) -> list[Object]:
    """The pod specs an object holds."""
    spec = one["spec"].get("rayClusterSpec", one["spec"])
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]] if "headGroupSpec" in spec else []
    holders = groups or ([spec] if "template" in spec else [])
    return [holder["template"]["spec"] for holder in holders]


def of_pod(pod: Object) -> Iterator[str]:
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield name
    if any("hostPath" in volume for volume in pod.get("volumes", ())):
        yield "a folder of the host"
    person = pod.get("securityContext", {})
    if not person.get("runAsNonRoot") or not person.get("runAsUser"):
        yield "may run as root"
    if person.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "no seccomp profile"
    for container in pod["containers"]:
        yield from of_container(container)


def of_container(container: Object) -> Iterator[str]:
    name, tag = container["image"].rpartition("/")[2].partition(":")[::2]
    if tag in ("", "latest"):
        yield f"{name} has no fixed version"
    for kind in ("requests", "limits"):
        if not {"cpu", "memory"} <= container.get("resources", {}).get(kind, {}).keys():
            yield f"no {kind}"
    yield from of_context(container.get("securityContext", {}))
    for variable in container.get("env", ()):
        if any(word in variable["name"] for word in SECRET_WORDS) and (
            "secretKeyRef" not in variable.get("valueFrom", {})
        ):
            yield f"{variable['name']} is not taken from a Secret"


def of_context(context: Object) -> Iterator[str]:
    if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
        yield "may gain privileges"
    if not context.get("readOnlyRootFilesystem"):
        yield "may write into its image"
    if context.get("capabilities") != {"drop": ["ALL"]}:
        yield "keeps capabilities"


def of_cluster(spec: Object) -> Iterator[str]:
    if spec.get("authOptions") != {"mode": "token"}:
        yield "Ray asks for no token"
    if f"ray=={spec.get('rayVersion')}" not in (ROOT / "constraints.txt").read_text().split():
        yield "rayVersion is not the one that is installed"
    yield from of_context(spec["autoscalerOptions"].get("securityContext", {}))
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        yield from of_group(group)


def of_group(group: Object) -> Iterator[str]:
    pod, name = group["template"]["spec"], group.get("groupName")
    if name and pod.get("automountServiceAccountToken") is not False:
        yield f"{name} holds a token of Kubernetes"
    container, given = pod["containers"][0], image()
    given |= {v["name"]: v["value"] for v in container.get("env", ()) if "value" in v}
    mounts = [mount["mountPath"] for mount in container.get("volumeMounts", ())]
    if not any(Path(given["HOME"]).is_relative_to(mount) for mount in mounts):
        yield f"{name or 'head'} has nowhere to write caches"
    if name and "nvidia.com/gpu" not in container["resources"]["limits"]:
        return
    waits = [int(given.get(variable, 0)) for variable in WAITS[name is not None :]]
    if not all(60 <= s <= pod.get("terminationGracePeriodSeconds", 30) - 10 for s in waits):
        yield f"{name or 'head'} leaves no time for a checkpoint"


def of_job(spec: Object) -> Iterator[str]:
    if not spec.get("activeDeadlineSeconds"):
        yield "may run for ever"
    if spec.get("shutdownAfterJobFinishes") or "ttlSecondsAfterFinished" in spec:
        yield "the operator takes either deletion rules or a TTL"
    kept = {("jobStatus", "SUCCEEDED"), ("jobStatus", "FAILED"), ("jobDeploymentStatus", "Failed")}
    for rule in spec.get("deletionStrategy", {}).get("deletionRules", ()):
        condition = dict(rule["condition"])
        soon = condition.pop("ttlSeconds", 0) <= LONGEST_TTL_S
        if rule["policy"] == "DeleteCluster" and soon and len(condition) == 1:
            kept -= condition.items()
        if rule["policy"] == "DeleteWorkers":
            yield "the operator refuses DeleteWorkers beside the autoscaler"
    if kept:
        yield f"the cluster stays after {sorted(kept)}"


def of_policy(spec: Object) -> Iterator[str]:
    if "Ingress" not in spec.get("policyTypes", ()):
        yield "lets everything in"
    if unknown := spec.keys() - {"podSelector", "policyTypes", "ingress"}:
        yield f"unknown fields {unknown}"
    for rule in spec.get("ingress", ()):
        if unknown := rule.keys() - {"from", "ports"}:
            yield f"unknown fields {unknown}"
        if not rule.get("from"):
            yield "lets anyone in"
        for peer in rule.get("from", ()):
            selectors = list(peer.values())
            if not selectors or peer.keys() - {"podSelector", "namespaceSelector"}:
                yield f"lets {peer} in"
            if any(not selector.get("matchLabels") for selector in selectors):
                yield f"a selector without labels lets anyone in: {peer}"
            # A foreign namespace reaches a page or metrics, and nothing else.
            if "namespaceSelector" in peer and not rule.get("ports"):
                yield f"{peer} reaches every port"
        for port in rule.get("ports", ()):
            if port.keys() != {"protocol", "port"} or port["port"] in (6379, 10001):
                yield f"opens {port}"
