"""What each worker logs, kept with the run: `logs/rank_00000.log` in its directory.

A restart appends. An object store cannot, so there the file grows in a temporary place and is
uploaded whole, soon after something was logged and at the end.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from infra import parallel
from infra.errors import DataError, Problem
from infra.storage import Folder
from infra.threads import repeated

# Where there is something new. `infra.stall` ends a process 10 s after its report at the earliest.
UPLOAD_EVERY_S = 5.0
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextmanager
def kept(run: Folder) -> Iterator[None]:
    """Keep what this process logs and warns of, when it began and how it ended."""
    rank, size = parallel.world()
    with _file(run / "logs", f"rank_{rank:05d}.log") as path:
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(logging.Formatter(FORMAT))
        own = logging.Logger("run", logging.INFO)  # heard by this file alone
        own.addHandler(handler)
        logging.getLogger().addHandler(handler)
        logging.captureWarnings(True)
        own.info("rank %d of %d begins: %s", rank, size, _here())
        try:
            yield
        except BaseException:
            own.exception("ended by an error")
            raise
        else:
            own.info("ended")
        finally:
            logging.captureWarnings(False)
            logging.getLogger().removeHandler(handler)
            handler.close()


@contextmanager
def _file(folder: Folder, name: str) -> Iterator[Path]:
    """A local file that is, or becomes, the one of this name in the folder."""
    if folder.is_local:
        Path(folder.path).mkdir(parents=True, exist_ok=True)
        yield Path(folder.path) / name
        return
    with tempfile.TemporaryDirectory() as place:
        path, sent = Path(place) / name, 0  # bytes that the store has
        with suppress(DataError):
            path.write_bytes(folder.read_bytes(name))

        def upload() -> None:
            nonlocal sent
            content = path.read_bytes()
            if len(content) > sent:
                with suppress(Problem):  # a store may be away for a while
                    folder.write_bytes(name, content)
                    sent = len(content)

        try:
            with repeated(upload, UPLOAD_EVERY_S, "ranklog"):
                yield path
        finally:
            with suppress(Problem):
                folder.write_bytes(name, path.read_bytes())


def _here() -> str:
    """Where a process runs, and on what."""
    device = parallel.device()
    shown = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return (
        f"process {os.getpid()} on {socket.gethostname()}, {platform.platform()}, {shown}, "
        f"{torch.get_num_threads()} threads, python {sys.version.split()[0]}, "
        f"torch {torch.__version__}"
    )
