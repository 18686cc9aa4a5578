"""Read every file of a folder of bombs in a process that may not grow.

    python -m tests.fuzz.bombs FOLDER

prints, as JSON, the exit code and message for each, and by how many MiB the process has grown.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.command import explain
from infra.shards import check_files, read_group, read_manifest
from infra.storage import Folder
from pipelines import models
from pipelines.corpus import pieces
from pipelines.models import DATA_ERRORS, ConverterConfig

ROOM = 3 << 30  # bytes of address space beyond what the libraries took


def corpus(file: Path) -> None:
    for _ in pieces(str(file), "text"):
        pass


def shards(folder: Path) -> None:
    check_files(Folder.at(str(folder)), read_manifest(str(folder)), "train")


def group(folder: Path) -> None:
    """As a reader does that looked at the footer before it became another."""
    place, manifest = Folder.at(str(folder)), read_manifest(str(folder))
    read_group(place, manifest, manifest.files("train")[0].name, 0)


def model(file: Path) -> None:
    models.load(str(file), converter=ConverterConfig(embed_dim=3), tracking_uri="")


READERS: dict[str, Callable[[Path], None]] = {
    "corpus": corpus, "shards": shards, "group": group, "model": model,
}  # fmt: skip


def outcome(read: Callable[[Path], None], file: Path) -> tuple[str, int]:
    try:
        read(file)
    except BaseException as error:
        return explain(error, DATA_ERRORS)
    return "", 0


def grown() -> float:
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(folder: Path) -> dict[str, Any]:
    for kind in READERS:  # once in peace, so that every library is loaded
        outcome(READERS[kind], folder / "peace" / kind)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))
    found = {}
    for file in sorted(folder.glob("*-*")):
        before = grown()
        message, code = outcome(READERS[file.name.partition("-")[0]], file)
        found[file.name] = {"code": code, "message": message, "grown": grown() - before}
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))))
