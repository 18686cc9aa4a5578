"""The registry: models as code and safetensors, never a pickle.

A registered model is an MLflow pyfunc "from code": one Python file, the folder with its weights
(`model.safetensors`, `config.json`, …) and the packages the file imports. Loading one executes
that Python code, so it must be trusted like a repository. Data is never executed: a model is
registered or downloaded only if all its files are of kinds that cannot hide code.

The weights reach the code file as `context.artifacts["model"]`, the path of the folder. The file
`checksums.json` holds the sha256 of every other file, verified after each download.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.documents import from_yaml, parse
from infra.errors import DataError, InfraError, Problem, nearest
from infra.journal import reason
from infra.tracking import SQLITE, connect

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

ARTIFACT = "model"
CANDIDATE = "candidate"  # the alias of the version that was registered last
LOADER = "mlflow.pyfunc.loaders.code_model"  # MLflow's for models from code: no pickle
HARMLESS = {".safetensors", ".json", ".txt", ".md", ".yaml", ".yml", ".py"}
# Files that MLflow itself adds, listed by name because they have no suffix.
MLFLOW_FILES = {"MLmodel", "registered_model_meta"}
CHECKSUMS = "checksums.json"
URI = re.compile(r"models:/(?P<name>[^/@']+)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+))")
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
MOVING_S = 300  # a server that keeps files in a bucket answers only after it has copied them


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """One version of a registered model."""

    name: str
    version: int
    run_id: str | None
    tags: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"

    @property
    def candidate_uri(self) -> str:
        return f"models:/{self.name}@{CANDIDATE}"


def register(
    *,
    code: Path,
    folder: Path,
    name: str,
    run_id: str,
    uri: str,
    requirements: Sequence[str],
    code_paths: Sequence[Path] = (),
    signature: ModelSignature | None = None,
    tags: Mapping[str, str] | None = None,
) -> ModelVersion:
    """Register `folder` behind the pyfunc in the file `code` as a new version of `name`.

    run_id: the run that made the weights; uri: the tracking URI of both.
    requirements: what the model's environment needs, as pip writes it.
    code_paths: packages that `code` imports and that no index has; they travel with the model.

    The alias `candidate` moves last, once the version is complete, but never to an older one than
    it has. DataError for a file that could hold a pickle; InfraError where the server is away or
    refuses.
    """
    import mlflow.pyfunc
    from mlflow.entities import LoggedModelStatus
    from mlflow.models import Model

    _check_files(folder)
    with _registry(uri) as client, tempfile.TemporaryDirectory() as staging:
        experiment = client.get_run(run_id).info.experiment_id
        logged = client.create_logged_model(experiment, name=ARTIFACT, source_run_id=run_id)
        try:
            local = Path(staging) / ARTIFACT
            described = Model(
                artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id
            )
            with _importing(code):
                mlflow.pyfunc.save_model(
                    local,
                    mlflow_model=described,
                    python_model=str(code),
                    artifacts={ARTIFACT: str(folder)},
                    code_paths=[str(path) for path in code_paths] or None,
                    signature=signature,
                    pip_requirements=list(requirements),
                )
            _drop_bytecode(local)
            _check_model(local)
            (local / CHECKSUMS).write_text(json.dumps(_checksums(local), indent=1))
            client.log_model_artifacts(logged.model_id, str(local))
        except BaseException:
            client.finalize_logged_model(logged.model_id, LoggedModelStatus.FAILED)
            raise
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
        _ensure_name(client, name)
        made = client.create_model_version(
            name,
            source=logged.artifact_location,
            run_id=run_id,
            model_id=logged.model_id,
            tags=dict(tags or {}),
        )
        _advance_candidate(client, name, int(made.version))
    return describe(f"models:/{name}/{made.version}", uri)


def registered(name: str, run_id: str, tags: Mapping[str, str], uri: str) -> ModelVersion | None:
    """The last version of `name` that a run has registered with these tags, None if there is none.
    The alias `candidate` moves as in `register`, as a killed attempt may not have moved it."""
    with _registry(uri) as client:
        found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
        versions = [int(made.version) for made in found if tags.items() <= made.tags.items()]
        if not versions:
            return None
        _advance_candidate(client, name, max(versions))
    return describe(f"models:/{name}/{max(versions)}", uri)


@contextmanager
def downloaded(model_uri: str, uri: str) -> Iterator[Path]:
    """The folder of a model's weights, for `models:/name@alias` or `models:/name/3`, on this
    machine for the duration of the block.

    Nothing is executed. DataError for a model, version or alias that does not exist, for a damaged
    file, and for one that could hold a pickle.
    """
    with tempfile.TemporaryDirectory(prefix="model-") as into:
        root = _fetch(model_uri, uri, into)
        # Loading a model in place leaves bytecode beside it, which need not match the source.
        _drop_bytecode(root)
        folder = _check_model(root)
        _verify(root, model_uri)
        yield folder


def describe(model_uri: str, uri: str) -> ModelVersion:
    """The version behind `models:/name@alias` or `models:/name/3`: its run, tags and aliases."""
    with _found(model_uri, uri) as (_, found):
        return ModelVersion(
            name=found.name,
            version=int(found.version),
            run_id=found.run_id,
            tags=dict(found.tags),
            aliases=tuple(found.aliases),
        )


def set_alias(model_uri: str, alias: str, uri: str) -> None:
    """Point `models:/name@alias` at the version behind `model_uri`."""
    with _found(model_uri, uri) as (client, found):
        client.set_registered_model_alias(found.name, alias, found.version)


def tag(model_uri: str, tags: Mapping[str, str], uri: str) -> None:
    """Write tags on the version behind `model_uri`, over those of the same names."""
    with _found(model_uri, uri) as (client, found):
        for name, value in tags.items():
            client.set_model_version_tag(found.name, found.version, name, value)


def get_alias(name: str, alias: str, uri: str) -> ModelVersion | None:
    """The version that an alias points at; None if the model or the alias does not exist."""
    try:
        return describe(f"models:/{name}@{alias}", uri)
    except DataError:
        return None


def _fetch(model_uri: str, uri: str, into: str) -> Path:
    import mlflow.artifacts

    with _found(model_uri, uri) as (client, found):
        source = client.get_model_version_download_uri(found.name, found.version)
        local = mlflow.artifacts.download_artifacts(
            artifact_uri=source, tracking_uri=uri, registry_uri=uri, dst_path=into
        )
    return Path(local)


@contextmanager
def _found(model_uri: str, uri: str) -> Iterator[tuple[MlflowClient, Any]]:
    """A client and MLflow's entity of a version. DataError that names what there is instead."""
    parts = URI.fullmatch(model_uri)
    if not parts:
        fix = "Write models:/name@alias or models:/name/3"
        raise DataError(model_uri, "not the address of a registered model", fix)
    database = uri.removeprefix(SQLITE)
    if uri.startswith(SQLITE) and not Path(database).exists():  # to connect would make it
        why = f"{database} does not exist, so no model is registered yet"
        raise DataError(model_uri, why, "Check root and tracking.uri")
    with _registry(uri) as client:
        yield client, _find(client, model_uri, parts)


def _find(client: MlflowClient, model_uri: str, parts: re.Match[str]) -> Any:
    name, alias, version = parts["name"], parts["alias"], parts["version"]
    registered = client.search_registered_models(f"name = '{name}'")
    if not registered:
        names = [model.name for model in client.search_registered_models()]  # the first hundred
        raise DataError(model_uri, f"no model is named {name}", _offer(name, names))
    aliases = registered[0].aliases
    if alias and alias not in aliases:
        raise DataError(model_uri, f"{name} has no alias {alias}", _offer(alias, aliases))
    version = version or aliases[alias]
    versions = [found.version for found in client.search_model_versions(f"name = '{name}'")]
    if int(version) not in map(int, versions):
        why = f"{name} has no version {version}"
        raise DataError(model_uri, why, f"Known: {', '.join(map(str, sorted(versions)))}")
    return client.get_model_version(name, version)


def _offer(wanted: str, names: Iterable[str]) -> str:
    names = sorted(names)
    near = nearest(wanted, names)
    there = f"Known: {', '.join(names)}" if names else "None is registered yet"
    return f"Did you mean {near}? {there}" if near else there


def _advance_candidate(client: MlflowClient, name: str, version: int) -> None:
    """Point the alias `candidate` at a version, unless a later one has it."""
    holder = client.get_registered_model(name).aliases.get(CANDIDATE)
    if holder is None or int(holder) < version:
        client.set_registered_model_alias(name, CANDIDATE, str(version))


def _ensure_name(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _check_model(root: Path) -> Path:
    """The folder of a model's weights; DataError if loading the model could unpickle anything."""
    _check_files(root)
    try:
        ((flavor, pyfunc),) = from_yaml((root / "MLmodel").read_bytes())["flavors"].items()
        folder = root / pyfunc["artifacts"][ARTIFACT]["path"]
        ours = (
            flavor == "python_function"
            and pyfunc["loader_module"] == LOADER
            and "model_code_path" in pyfunc
            and "python_model" not in pyfunc
            and folder.resolve().is_relative_to(root.resolve())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        why = "not a model made of code and safetensors, so it is not opened"
        raise DataError(str(root / "MLmodel"), why, "Register it again with this repository")
    return folder


def _check_files(root: Path) -> None:
    for file in sorted(root.rglob("*")):
        if file.is_file() and file.suffix not in HARMLESS and file.name not in MLFLOW_FILES:
            why = "a file of this kind may hold a pickle, which could run anything"
            raise DataError(str(file), why, f"Allowed are {' '.join(sorted(HARMLESS))}")


def _checksums(root: Path) -> dict[str, str]:
    """The sha256 of every file of a model, by its path in it."""
    found = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(root).as_posix()] = digest
    return found


def _verify(root: Path, model_uri: str) -> None:
    """DataError for a file that is not as it was registered. Old models have no checksums."""
    if not (root / CHECKSUMS).exists():
        return
    fix = "Download it again; if that does not help, use another version"
    stated = parse(
        (root / CHECKSUMS).read_bytes(), dict[str, str], f"{model_uri}: {CHECKSUMS}", fix
    )
    found = _checksums(root)
    for name, digest in stated.items():
        if found.get(name) != digest:
            why = "does not match its checksum" if name in found else "is missing"
            raise DataError(f"{model_uri}: {name}", f"damaged model: the file {why}", fix)


def _drop_bytecode(root: Path) -> None:
    for folder in list(root.rglob("__pycache__")):
        shutil.rmtree(folder)


@contextmanager
def _importing(code: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        fix = "Import the file by hand, with the packages it needs"
        raise DataError(str(code), f"does not serve as a model ({reason(error)})", fix) from None


@contextmanager
def _registry(uri: str) -> Iterator[MlflowClient]:
    """A client whose failures are Problems, and which waits long enough to move a large file."""
    client = connect(uri)
    before = os.environ[TIMEOUT]
    os.environ[TIMEOUT] = str(MOVING_S)
    try:
        yield client
    except Problem:
        raise
    except Exception as error:
        why = f"the model registry refused or did not answer ({reason(error)})"
        raise InfraError(uri, why, "Check tracking.uri and the server") from None
    finally:
        os.environ[TIMEOUT] = before
