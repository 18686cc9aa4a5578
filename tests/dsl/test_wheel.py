"""The wheel alone, with what it requires and nothing else, samples from a saved folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dsl

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("dsl", "infra", "pipelines", "pyproject.toml", "README.md", "LICENSE")
UNREAD = {".py", ".pyc", ".md", ".png", ".svg"}  # below pipelines, by what runs from a wheel
REQUIRED = {"torch", "numpy", "safetensors", "tokenizers"}

# Hides packages as an environment without them would.
CODE = """
import sys
from importlib.machinery import PathFinder
wheel, folder, hidden = sys.argv[1], sys.argv[2], set(sys.argv[3:])
find = PathFinder.find_spec

def visible(name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else find(name, path, target)

PathFinder.find_spec = visible
sys.path.insert(0, wheel)
import dsl

assert dsl.__file__.startswith(wheel), dsl.__file__
denoiser = dsl.load(folder)
state = dsl.State.masked(2, 8, denoiser.table_VD.shape[1])
path = dsl.paths.Hybrid(dsl.paths.SentenceSDE(gamma_max=9.0), dsl.paths.Masked(), split=(3, 4))
ids_BL = dsl.sample(denoiser, path, state, budget=7, seed=1).tokens_BL
for ids in ids_BL.tolist():
    print(dsl.Vocabulary.load(folder).decode(ids))
"""


def requirements(name: str) -> Iterator[str]:
    """What a distribution needs without its extras."""
    for line in metadata.requires(name) or ():
        required = Requirement(line)
        if required.marker is None or required.marker.evaluate({"extra": ""}):
            yield canonicalize_name(required.name)


def closure(names: set[str]) -> set[str]:
    """The distributions with all that they require, as far as they are installed."""
    found, left = set[str](), list(names)
    installed = {canonicalize_name(d.metadata["Name"]) for d in metadata.distributions()}
    while left:
        name = left.pop()
        if name in installed and name not in found:
            found.add(name)
            left += requirements(name)
    return found


@pytest.mark.long
def test_a_wheel_samples_with_what_it_requires_alone(tmp_path: Path) -> None:
    source, wheel = tmp_path / "source", tmp_path / "wheel"
    for name in SOURCES:  # copied, because a build leaves files beside its sources
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name)
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "wheel"]
    build = [*pip, "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True)
    (file,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(file, wheel, "zip")
    # The verbs also read presets and parts of pages, which are not found by being imported.
    paths = [path for path in (source / "pipelines").rglob("*") if path.is_file()]
    read = [path.relative_to(source) for path in paths if path.suffix not in UNREAD]
    assert len(read) > 10
    assert [path for path in read if not (wheel / path).exists()] == []

    (described,) = metadata.distributions(path=[str(wheel)])
    needed = {
        canonicalize_name(Requirement(line).name)
        for line in described.requires or ()
        if "extra ==" not in line
    }
    assert needed == REQUIRED
    allowed = closure(needed)
    hidden = {
        package
        for package, owners in metadata.packages_distributions().items()
        if not allowed & {canonicalize_name(owner) for owner in owners}
    }
    assert {"ray", "mlflow", "transformers", "pandas"} <= hidden
    hidden -= {"dsl", "infra", "pipelines"}

    torch.manual_seed(0)
    vocabulary = dsl.Vocabulary.char()
    backbone = dsl.DiTConfig(
        tokens=vocabulary.size, width=16, blocks=1, heads=2, cond_dim=8, start="open"
    )
    denoiser = dsl.Denoiser(dsl.DenoiserConfig(backbone=backbone, embed_dim=4)).eval()
    dsl.save(denoiser, tmp_path / "model", vocabulary)
    ended = subprocess.run(
        [sys.executable, "-I", "-c", CODE, str(wheel), str(tmp_path / "model"), *sorted(hidden)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    state = dsl.State.masked(2, 8, 4)
    path = dsl.paths.Hybrid(dsl.paths.SentenceSDE(gamma_max=9.0), dsl.paths.Masked(), split=(3, 4))
    drawn = dsl.sample(denoiser, path, state, budget=7, seed=1).tokens_BL.tolist()
    assert ended.stdout.splitlines() == [vocabulary.decode(ids) for ids in drawn]
