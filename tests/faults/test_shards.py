"""A shard that goes bad once it has been checked.

Rows so few as these are all read within seconds of the start, so that is when it has to be; for a
shard in the middle of an epoch, and for rows that are skipped, see `tests/infra/test_stream.py`.
"""

from __future__ import annotations

import re
import shutil
import time
from functools import partial
from pathlib import Path

import pytest

from tests.faults import processes
from tests.faults.conftest import Report
from tests.faults.nodes import Nodes, workers


@pytest.fixture
def shards(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "shards"))


def spoil(shards: Path) -> Path:
    """Flip the bytes of all pages of the training shard; its size and its footer stay."""
    import pyarrow.parquet as pq

    (shard,) = (shards / "train").glob("part-*")
    footer = pq.read_metadata(shard)
    content = bytearray(shard.read_bytes())
    for group in range(footer.num_row_groups):
        column = footer.row_group(group).column(0)
        content[column.data_page_offset + column.total_compressed_size // 2] ^= 255
    with shard.open("r+b") as file:
        file.write(content)
    return shard


def test_a_shard_that_goes_bad(
    nodes: Nodes, data: Path, shards: Path, undisturbed: Path, tmp_path: Path, report: Report
) -> None:
    """The run stops, names file and place, and is not started again to stop again; with the shard
    mended, the same command goes on as if nothing had been."""
    begin = partial(processes.finetune, nodes.address, shards, tmp_path)
    seen: set[int] = set()
    with begin() as run:
        run.until(lambda: "metrics:" in run.said)  # the files are checked before that is said
        shard, when = spoil(shards), time.time()

        def ended() -> bool:
            seen.update(workers())
            return run.process.poll() is not None

        processes.until(ended)
        stopped_s = time.time() - when
        assert run.wait() == 3, run.said
        where = rf"{re.escape(shard.name)} row group \d+: not readable as parquet"
        assert re.search(where, run.message), run.message
    assert len(seen) == 2, "the group was started once"
    shutil.copy(data / "train" / shard.name, shard)
    with begin() as run:
        assert run.wait() == 0, run.said
    report(
        "a shard goes bad", injected="a byte of every row group flipped under a running job",
        lost="nothing: exit 3 with file and row group, no restart; goes on once mended",
        recovered_s=stopped_s,
    )  # fmt: skip
    processes.assert_equal(run.folder, undisturbed)
