"""What the READMEs name is there, and what they promise in numbers holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from infra import checkpoints, cluster, dcp, head, lease, storage
from pipelines.model import PARAMS

ROOT = Path(__file__).parents[1]
ROOMS = ("dsl", "infra", "pipelines", "tests")
READMES = [ROOT / "README.md", *sorted(f for r in ROOMS for f in (ROOT / r).rglob("README.md"))]


def words(file: str) -> str:
    """The text of a file in one line, as a paragraph may break anywhere."""
    return " ".join((ROOT / file).read_text().split())


@pytest.mark.parametrize("file", READMES, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_a_readme_links_to_or_names_is_there(file: Path) -> None:
    text = file.read_text()
    links = [name for name in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in name]
    assert [name for name in links if not (file.parent / name).exists()] == []
    # By their paths from the root of the repository, from tests/, or from infra/deploy.
    named = re.findall(r"`([\w.]+/[\w./]+\.(?:py|yaml))`", text)
    places = (ROOT, ROOT / "tests", ROOT / "infra/deploy")
    assert [name for name in named if not any((at / name).exists() for at in places)] == []


def test_the_readmes_name_files() -> None:
    """A guard of the guard."""
    table = (ROOT / "tests/faults/README.md").read_text()
    assert len(re.findall(r"`[\w/]+/test_\w+\.py`", table)) > 40


def test_the_faults_that_are_sat_out_are_those_that_the_readme_states() -> None:
    stated = words("infra/README.md")
    for words_of_it, holds in {
        "Each request to a store is tried up to six times": storage.ATTEMPTS == 6,
        "Each write of a checkpoint is tried up to four times": len(checkpoints.PAUSES_S) + 1 == 4,
        "until the next renewal of the lease, 10 s later": lease.BEAT_S == 10,
        "a sha256 of each chunk of a tensor (16 MiB or less)": dcp.CHUNK_BYTES == 16 * 2**20,
        "the run says every 30 s what it waits for": cluster.SAY_S == 30,
        "and ends with exit 4 after 10 minutes": cluster.START_S == 600,
        "90 s in the image and on a head that `infra.cluster up` has": head.JOB_SECONDS == 90,
    }.items():
        assert words_of_it in stated
        assert holds, words_of_it
    faults = words("tests/faults/README.md")
    assert "at once; 60 s from another machine" in faults
    assert lease.PATIENCE_S == 60


def test_a_server_takes_the_params_that_the_readme_names() -> None:
    text = words("pipelines/exporting/README.md")
    sentence = re.sub(r"\([^)]*\)", "", text.partition("`params` may hold ")[2].partition(". ")[0])
    assert set(re.findall(r"`(\w+)`", sentence)) == set(PARAMS)
