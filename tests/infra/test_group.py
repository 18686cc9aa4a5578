"""A group of workers that cannot start, or that fails in a way that no restart can mend."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from infra import cluster
from infra.errors import DataError, InfraError


class UnreadableWeights(ValueError):
    """An error that infra does not know."""


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        pytest.param(
            UnreadableWeights("model.safetensors: the file ends early"),
            Exception,
            id="which the caller calls fatal",
        ),
        pytest.param(
            DataError("part-0.parquet, row 3", "token 9 of 8", "Prepare it again"),
            DataError,
            id="in the data",
            marks=pytest.mark.long,
        ),
    ],
)
def test_an_error_that_is_not_tried_again(
    error: Exception, raised: type[Exception], tmp_path: Path
) -> None:
    def worker(folder: Path) -> None:
        (folder / str(len(list(folder.iterdir())))).touch()
        raise error

    with pytest.raises(raised, match=re.escape(str(error))):
        cluster.run_group(
            worker, tmp_path, name="fatal", num_workers=1, max_failures=5, fatal=(ValueError,)
        )
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("ray_cluster")
def test_no_other_ray_is_asked_whether_a_group_of_these_tests_lives() -> None:
    """It would know of none, and the group would lose its workers and start again."""
    import ray
    from ray.dashboard.utils import get_address_for_submission_client as asked

    assert ray.get(ray.remote(lambda: asked(None)).remote()) == "http://127.0.0.1:1"
    assert "RAY_API_SERVER_ADDRESS" not in os.environ  # which Ray's commands obey, too


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("count", [3, pytest.param((3, 4), marks=pytest.mark.long)])
def test_a_group_that_finds_no_room_gives_up(
    count: int | tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a number of workers or a range, for both of which Ray itself would wait for ever."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    monkeypatch.setattr(cluster, "START_S", 1.0)
    with pytest.raises(InfraError, match="3 workers of 2 CPU each could not be started within 1 s"):
        cluster.run_group(print, None, name="x", num_workers=count, resources_per_worker={"CPU": 2})


def test_a_wait_says_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(cluster.time, "monotonic", lambda: clock[0])
    waiting = cluster._waiting("run", 2, {"CPU": 1, "GPU": 0.5})
    states = {name: type(name, (), {})() for name in (*cluster.STARTING, "RunningState")}

    def at(seconds: float, state: str) -> str:
        clock[0] = seconds
        waiting.after_controller_state_update(None, states[state])
        return capsys.readouterr().err

    assert at(0, "InitializingState") == at(30, "SchedulingState") == ""
    line = "run: waiting for 2 workers of 1 CPU, 0.5 GPU each, 31 s of 600 s\n"
    assert at(31, "ReschedulingState") == line
    assert at(60, "SchedulingState") == at(500, "RunningState") == at(700, "RestartingState") == ""
    with pytest.raises(InfraError):
        at(1301, "RestartingState")
