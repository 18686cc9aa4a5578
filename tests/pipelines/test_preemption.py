"""SIGTERM with notice: one last checkpoint, a clean end, and nothing repeated afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from infra import journal, parallel, preemption, ranklog
from infra.checkpoints import committed
from infra.errors import InfraError
from infra.preemption import (
    Notice,
    Terminated,
    notices,
    stop_requested,
    stoppable,
    terminable,
)
from infra.storage import Folder
from pipelines import pretrain
from pipelines.training import launch
from tests.infra.common import until
from tests.infra.workers import in_workers
from tests.pipelines import tiny

NOTICED_IN = 5


def arguments(data: Path, root: Path) -> list[str]:
    # Far apart, so that only the notice makes a checkpoint; steps enough to be caught among them.
    return [f"data={data}", f"root={root}", "name=run", "train.checkpoint.every=1000"]


@pytest.fixture(scope="module")
def terminated(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run that got SIGTERM in a step, and went on until it had heard of it."""
    root = tmp_path_factory.mktemp("terminated")
    command = [sys.executable, "-m", "tests.pipelines.tiny", "--terminate-at", str(NOTICED_IN)]
    process = subprocess.run(
        [*command, "pretrain", *arguments(data, root)], capture_output=True, text=True, timeout=500
    )
    assert process.returncode == 143, process.stderr
    assert process.stdout == ""
    assert "ended by SIGTERM; run the same command again to resume" in process.stderr
    return root / "run"


def test_a_notice_makes_one_last_checkpoint(terminated: Path) -> None:
    (step,) = committed(str(terminated / "checkpoints"))
    assert NOTICED_IN <= step < 12
    assert [row["step"] for row in tiny.curve(terminated)] == list(range(1, step + 1))
    assert json.loads((terminated / "run.json").read_text())["status"] == "KILLED"
    assert not (terminated / "result.json").exists()
    assert sorted(os.listdir(terminated.parent)) == ["run"]  # the next one may come in
    kept = (terminated / "logs" / "rank_00000.log").read_text()
    assert "rank 0 of 1 begins: process" in kept


def test_the_same_command_goes_on_with_the_next_step(
    terminated: Path, data: Path, finished: Path
) -> None:
    (step,) = committed(str(terminated / "checkpoints"))
    before = journal.read(str(terminated))
    tiny.execute("pretrain", *arguments(data, terminated.parent))
    after = journal.read(str(terminated))
    assert after[:step] == before  # to the millisecond: no step was made again
    tiny.assert_same(terminated, finished)
    goodput = [row["speed/goodput_percent"] for row in after]
    assert all(0 < percent <= 100 for percent in goodput)
    kept = (terminated / "logs" / "rank_00000.log").read_text()
    assert kept.count("begins: process") == 2


def test_workers_that_end_early_without_sigterm_are_no_sigterm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path
) -> None:
    monkeypatch.setattr(launch, "on_cluster", lambda assignment: None)
    with pytest.raises(InfraError, match="the workers ended before step 12 and told no error"):
        pretrain.execute(tiny.load("pretrain", *arguments(data, tmp_path)))


def agreed(mine: list[int]) -> int:
    return parallel.highest(mine[dist.get_rank()])


def test_the_ranks_agree_on_what_the_highest_has_heard() -> None:
    assert in_workers(2, agreed, [Notice.NONE, Notice.END]) == [Notice.END, Notice.END]


def test_a_machine_that_goes_makes_for_a_checkpoint_and_an_end_prevails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preemption, "node_is_leaving", lambda: True)
    run = Folder.at("memory://leaving/run")
    with notices(run) as latest:
        assert until(latest) is Notice.SAVE
        run.write_bytes(preemption.STOP, b"")
        until(lambda: latest() is Notice.END)


def test_the_first_sigterm_asks_to_stop_and_the_second_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a store that fails twice, and that holds what a killed attempt has left."""
    run = Folder.at("memory://stopped/run")
    run.write_bytes(preemption.STOP, b"")
    write, answers = Folder.write_bytes, [False, False, True]

    def now_and_then(folder: Folder, name: str, content: bytes) -> None:
        if not answers.pop(0):
            raise InfraError(folder.url, "does not answer")
        write(folder, name, content)

    monkeypatch.setattr(Folder, "write_bytes", now_and_then)
    monkeypatch.setattr(preemption, "ASK_S", 0.01)
    before = signal.getsignal(signal.SIGTERM)

    def refuse(folder: Folder, name: str) -> bool:
        raise InfraError(folder.url, "does not answer")

    def twice(asked: Callable[[], bool]) -> None:
        assert not asked()
        assert not stop_requested(run)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
        until(lambda: stop_requested(run))
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated), stoppable(run) as asked:
        twice(asked)
    assert answers == []
    assert not stop_requested(run)
    monkeypatch.setattr(Folder, "exists", refuse)
    assert not stop_requested(run)
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_stays_one_where_a_library_raises_a_plain_interrupt() -> None:
    with pytest.raises(Terminated), terminable():  # noqa: PT012
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Terminated:
            raise KeyboardInterrupt from None  # as Ray does
    with pytest.raises(KeyboardInterrupt) as found, terminable():
        raise KeyboardInterrupt
    assert found.type is KeyboardInterrupt


def test_a_log_is_kept_in_any_store_and_appended_to() -> None:
    run = Folder.at("memory://kept/run")
    for why in ("one", "two"):
        with pytest.raises(InfraError), ranklog.kept(run):
            raise InfraError(why, "breaks")
    kept = (run / "logs").read_bytes("rank_00000.log").decode()
    assert kept.count("rank 0 of 1 begins") == 2
    assert kept.index("InfraError: one: breaks") < kept.index("InfraError: two: breaks")
    assert "Traceback" in kept
    run.remove()
