"""The registry on a real database: what goes in comes out, and no pickle does either."""

from __future__ import annotations

import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from infra import registry, tracking
from infra.errors import DataError, InfraError
from infra.tracking import RunHandle, TrackingConfig, connect
from tests.infra.common import Bomb

CODE = """
from pathlib import Path

import mlflow
from mlflow.models import set_model
from safetensors.numpy import load_file

from tripler import triple


class Model(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        folder = Path(context.artifacts["model"])
        self.weight = load_file(folder / "model.safetensors")["weight"]

    def predict(self, context, model_input, params=None):
        return [triple(text) + str(int(self.weight.sum())) for text in model_input]


set_model(Model())
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunHandle:
    root = tmp_path_factory.mktemp("runs")
    return tracking.start(
        TrackingConfig(experiment="toy"),
        root=str(root),
        name="made",
        params={},
        tags={},
        config_yaml="",
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A code file, a package that only it knows of, and weights."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "serve.py").write_text(CODE)
    (folder / "tripler").mkdir()
    (folder / "tripler/__init__.py").write_text("def triple(text):\n    return 3 * text\n")
    (folder / "weights").mkdir()
    save_file({"weight": np.arange(4.0)}, folder / "weights/model.safetensors")
    (folder / "weights/config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def made(run: RunHandle, sources: Path) -> registry.ModelVersion:
    return register(run, sources)


def register(run: RunHandle, sources: Path, **more: object) -> registry.ModelVersion:
    sys.path.insert(0, str(sources))  # as the repository is for the process that registers
    try:
        given = {
            "code": sources / "serve.py",
            "folder": sources / "weights",
            "name": "toy",
            "run_id": run.run_id,
            "uri": run.uri,
            "requirements": ["numpy", "safetensors"],
            "code_paths": [sources / "tripler"],
            "tags": {"step": "400"},
        }
        return registry.register(**given | more)
    finally:
        sys.path.remove(str(sources))
        sys.modules.pop("tripler", None)


def test_what_is_registered_is_described(run: RunHandle, made: registry.ModelVersion) -> None:
    assert made.uri == "models:/toy/1"
    assert made.candidate_uri == "models:/toy@candidate"
    assert (made.run_id, made.tags, made.aliases) == (run.run_id, {"step": "400"}, ("candidate",))
    assert registry.describe("models:/toy@candidate", run.uri) == made
    assert registry.get_alias("toy", "candidate", run.uri) == made
    assert registry.get_alias("toy", "champion", run.uri) is None


def test_a_model_is_found_among_many(run: RunHandle, made: registry.ModelVersion) -> None:
    """MLflow lists a hundred at a time, in the order of their names."""
    client = connect(run.uri)
    names = [f"another-{nth}" for nth in range(100)]
    for name in names:
        client.create_registered_model(name)
    try:
        assert registry.describe(made.uri, run.uri) == made
        assert registry.get_alias("toy", "candidate", run.uri) == made
    finally:
        for name in names:
            client.delete_registered_model(name)


def test_weights_come_back(run: RunHandle, made: registry.ModelVersion) -> None:
    with registry.downloaded(made.uri, run.uri) as folder:
        files = {file.name for file in folder.iterdir()}
        assert files == {"config.json", "model.safetensors"}
        assert load_file(folder / "model.safetensors")["weight"].tolist() == [0, 1, 2, 3]
    assert not folder.exists()


def take(model_uri: str, uri: str) -> None:
    with registry.downloaded(model_uri, uri):
        pass


def copied(run: RunHandle, made: registry.ModelVersion, to: Path) -> Path:
    """A copy of all files of a model."""
    with registry.downloaded(made.uri, run.uri) as folder:
        root = next(above for above in folder.parents if (above / "MLmodel").exists())
        return Path(shutil.copytree(root, to))


def test_aliases_move(run: RunHandle, made: registry.ModelVersion, sources: Path) -> None:
    second = register(run, sources, name="moved")
    third = register(run, sources, name="moved")
    assert (second.version, third.version) == (1, 2)
    registry.set_alias(second.uri, "champion", run.uri)
    assert registry.get_alias("moved", "champion", run.uri).version == 1
    assert registry.get_alias("moved", "candidate", run.uri).version == 2
    registry.set_alias("models:/moved@candidate", "champion", run.uri)
    assert registry.describe("models:/moved/2", run.uri).aliases == ("candidate", "champion")


def test_the_candidate_is_never_an_older_version(
    run: RunHandle, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where a killed attempt is repeated after others have registered, nor where they do
    so while it registers."""
    from mlflow import MlflowClient

    first = register(run, sources, name="raced", tags={"of": "first"})
    register(run, sources, name="raced")
    again = registry.registered("raced", str(run.run_id), first.tags, run.uri)
    assert (again.version, again.aliases) == (1, ())
    assert registry.get_alias("raced", "candidate", run.uri).version == 2
    create = MlflowClient.create_model_version

    def overtaken(client: MlflowClient, name: str, **given: object) -> object:
        made = create(client, name, **given)
        monkeypatch.setattr(MlflowClient, "create_model_version", create)
        register(run, sources, name="raced")
        return made

    monkeypatch.setattr(MlflowClient, "create_model_version", overtaken)
    assert register(run, sources, name="raced").version == 3
    assert registry.get_alias("raced", "candidate", run.uri).version == 4
    connect(run.uri).delete_registered_model_alias("raced", "candidate")
    again = registry.registered("raced", str(run.run_id), first.tags, run.uri)
    assert again.aliases == ("candidate",)


@pytest.mark.parametrize(
    ("model_uri", "message"),
    [
        ("models:/toi@candidate", "no model is named toi. Did you mean toy?"),
        ("models:/toy@candidat", "toy has no alias candidat. Did you mean candidate?"),
        ("models:/toy/7", "toy has no version 7. Known: 1"),
        ("models:/toy", "not the address of a registered model"),
        ("runs:/abc/model", "not the address of a registered model"),
        ("models:/it's@candidate", "not the address of a registered model"),
    ],
)
def test_what_is_not_there(
    run: RunHandle, made: registry.ModelVersion, model_uri: str, message: str
) -> None:
    with pytest.raises(DataError) as caught:
        take(model_uri, run.uri)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["python_model.pkl", "weights.pt", "pytorch_model.bin", "x"])
def test_a_pickle_is_not_taken_in(run: RunHandle, sources: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / name).write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    with pytest.raises(DataError, match="may hold a pickle"):
        register(run, sources, folder=tmp_path / "weights", name="bad")
    with pytest.raises(DataError, match="no model is named bad"):
        registry.describe("models:/bad/1", run.uri)


def test_code_that_cannot_be_imported(run: RunHandle, sources: Path, tmp_path: Path) -> None:
    code = tmp_path / "serve.py"
    code.write_text("import no_such_package")
    with pytest.raises(DataError, match=r"serve\.py: does not serve as a model .*no_such_package"):
        register(run, sources, code=code, name="bad")


def forged(run: RunHandle, folder: Path, name: str) -> str:
    """A version that somebody else put into the registry, by MLflow's own means."""
    client = connect(run.uri)
    client.create_registered_model(name)
    client.create_model_version(name, source=str(folder))
    return f"models:/{name}/1"


def test_a_pickled_model_is_not_opened(run: RunHandle, tmp_path: Path) -> None:
    import mlflow.pyfunc

    class Pickled(mlflow.pyfunc.PythonModel):
        trace = tmp_path / "trace"

        def predict(self, context, model_input, params=None):
            return model_input

        def __reduce__(self):
            return Path.touch, (self.trace,)

    model = tmp_path / "model"
    mlflow.pyfunc.save_model(model, python_model=Pickled(), pip_requirements=[])
    (tmp_path / "trace").unlink(missing_ok=True)
    uri = forged(run, model, "pickled")
    with pytest.raises(DataError, match="may hold a pickle"):
        take(uri, run.uri)
    (model / "python_model.pkl").rename(model / "python_model.json")
    described = yaml.safe_load((model / "MLmodel").read_text())
    described["flavors"]["python_function"]["python_model"] = "python_model.json"
    (model / "MLmodel").write_text(yaml.safe_dump(described))
    with pytest.raises(DataError, match="not a model made of code and safetensors"):
        take(uri, run.uri)
    assert not (tmp_path / "trace").exists()


def test_weights_that_point_elsewhere_are_not_opened(
    run: RunHandle, made: registry.ModelVersion, tmp_path: Path
) -> None:
    model = copied(run, made, tmp_path / "copy")
    described = yaml.safe_load((model / "MLmodel").read_text())
    described["flavors"]["python_function"]["artifacts"]["model"]["path"] = "../../elsewhere"
    (model / "MLmodel").write_text(yaml.safe_dump(described))
    with pytest.raises(DataError, match="not a model made of code and safetensors"):
        take(forged(run, model, "elsewhere"), run.uri)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "serve.py"])
def test_a_flipped_bit_is_found(
    run: RunHandle, made: registry.ModelVersion, tmp_path: Path, name: str
) -> None:
    model = copied(run, made, tmp_path / "copy")
    (file,) = model.rglob(name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    uri = forged(run, model, f"flipped {name}")
    with pytest.raises(DataError) as caught:
        take(uri, run.uri)
    assert caught.value.where == f"{uri}: {file.relative_to(model)}"
    (model / registry.CHECKSUMS).unlink()  # as of a model from before there were any
    take(uri, run.uri)


def test_a_registry_that_is_away(made: registry.ModelVersion) -> None:
    with pytest.raises(InfraError, match=r"the model registry .*no answer.* Check tracking\.uri"):
        take(made.uri, "http://127.0.0.1:9")


def test_a_database_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    missing = rf"{tmp_path}/mlflow\.db does not exist, so no model is registered"
    for ask in (registry.describe, take):
        with pytest.raises(DataError, match=rf"models:/toy@champion: {missing}.* Check root"):
            ask("models:/toy@champion", uri)
    with pytest.raises(DataError, match=missing):
        registry.set_alias("models:/toy/1", "champion", uri)
    with pytest.raises(DataError, match=missing):
        registry.tag("models:/toy/1", {}, uri)
    assert registry.get_alias("toy", "champion", uri) is None
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database" * 99)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(InfraError) as caught:
        registry.describe("models:/toy/1", uri)
    assert (caught.value.where, "not a database" in caught.value.why) == (uri, True)
    with pytest.raises(InfraError, match="not a database"):
        tracking.start(
            TrackingConfig(experiment="toy"), root=str(tmp_path), name="run",
            params={}, tags={}, config_yaml="",
        )  # fmt: skip
