"""Ray for real: a group that is killed and restarts, and a head that asks for a token."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from infra import cluster, head, local
from infra.cluster import Revision
from infra.errors import DataError, InfraError, PeerLost, Problem
from infra.preemption import Terminated
from tests.infra.common import free_port

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long  # test_group.py and pipelines/test_workers.py have its two halves
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_restarts_the_group_and_a_problem_surfaces(tmp_path: Path) -> None:
    def worker(payload: dict[str, Any]) -> None:
        import torch
        import torch.distributed as dist

        rank, folder = dist.get_rank(), Path(payload["folder"])
        starts = len(list(folder.glob(f"rank{rank}-*")))
        (folder / f"rank{rank}-{starts}").touch()
        dist.all_reduce(torch.ones(1))
        if rank == 1 and starts == 0:
            time.sleep(3)  # a death while the group still starts is Ray's to retry or not
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1:
            raise DataError("part-0.parquet, row 3", "token 9 of 8", "Prepare it again")
        dist.all_reduce(torch.ones(1))

    with pytest.raises(DataError) as caught:
        cluster.run_group(
            worker, {"folder": str(tmp_path)}, name="killed", num_workers=2, max_failures=5
        )
    assert str(caught.value) == "part-0.parquet, row 3: token 9 of 8. Prepare it again"
    started = sorted(path.name for path in tmp_path.iterdir())
    assert started == ["rank0-0", "rank0-1", "rank1-0", "rank1-1"], "bad data is not tried again"


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (Exception("The current node timed out during startup."), InfraError),
        (RuntimeError("Failed to start GCS. Last 1 lines of error files:\n…"), InfraError),
        (TypeError("an argument that Ray does not know"), TypeError),
        (SystemExit(signal.SIGTERM), Terminated),  # the handler that Ray installs while it starts
        (SystemExit(1), SystemExit),
    ],
    ids=str,
)
def test_ray_that_does_not_start(
    monkeypatch: pytest.MonkeyPatch, raised: BaseException, expected: type[BaseException]
) -> None:
    import ray

    def fail(**_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise raised

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    local = cluster.connected(cluster.ClusterConfig(address="local"))
    with pytest.raises(expected) as caught, local:
        pass
    assert caught.type is expected
    assert signal.getsignal(signal.SIGTERM) is before
    assert expected is not InfraError or caught.value.where == "Ray on this machine"


def failed(*errors: Exception, restarts: int = 3) -> Problem | None:
    from ray.train.v2.api.exceptions import WorkerGroupError

    return cluster.problem_of(WorkerGroupError("…", dict(enumerate(errors))), "run", restarts)


def test_what_ended_a_worker_is_told_rather_than_what_the_others_saw() -> None:
    from ray.exceptions import OutOfMemoryError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    lost, bad = PeerLost("workers", "the connection broke"), DataError("part-0", "row 3", "Mend it")
    memory = OutOfMemoryError("Killed due to the node running low on memory.\nA long story")
    killed = WorkerHealthCheckFailedError("…", failure=memory)
    assert failed(lost, bad) is bad
    assert failed(RuntimeError("r"), lost) is lost
    assert failed(RuntimeError("r"), KeyError("k")) is None
    assert str(failed(lost, killed)) == (
        "run: a worker died, 3 restarts allowed: Killed due to the node running low on memory. "
        "Out of memory, or did one stand still? See the lines above, and logs/ of the run"
    )
    assert "a worker died, any number of restarts allowed: K" in str(failed(killed, restarts=-1))


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({}, {"RAY_AUTH_TOKEN"}),
        ({"RAY_AUTH_TOKEN": "mine"}, set()),
        ({"RAY_AUTH_MODE": "disabled"}, set()),
        ({"RAY_AUTH_TOKEN_PATH": "/file"}, set()),
    ],
    ids=str,
)
def test_a_local_cluster_gets_a_token_of_its_own(given: dict[str, str], added: set[str]) -> None:
    """Unless the environment says which one, or that none is to be."""
    with mock.patch.dict(os.environ, given, clear=True):
        local.require_token()
        first = dict(os.environ)
        local.require_token()
        assert os.environ == first
    assert {name: first[name] for name in given} == given
    assert first.keys() - given.keys() == added
    assert all(len(first[name]) == 64 for name in added)


@pytest.mark.long
def test_a_local_cluster_is_the_one_its_processes_find(tmp_path: Path) -> None:
    """However many there are on the machine, and whichever is the latest. Without the token of its
    processes nobody is answered, and it lies in no file of the home folder, where Ray keeps one."""
    script = """
import os, urllib.request, urllib.error
from pathlib import Path
from infra import head
from infra.cluster import ClusterConfig, connected
with connected(ClusterConfig(num_cpus=1)):
    import ray
    jobs = f"http://{ray._private.worker.global_worker.node.webui_url}/api/jobs/"
    try:
        answered = urllib.request.urlopen(jobs, timeout=60).status
    except urllib.error.HTTPError as error:
        answered = error.code
    assert answered == 401, answered
    head._ask(jobs, os.environ["RAY_AUTH_TOKEN"])
    assert not (Path.home() / ".ray/auth_token").exists()
    from ray._private.services import canonicalize_bootstrap_address_or_die as found
    told, theirs = ray.get(ray.remote(lambda: ("RAY_ADDRESS" in os.environ, found(None))).remote())
    assert (told, theirs) == (True, ray.get_runtime_context().gcs_address)
assert not {"RAY_ADDRESS", "RAY_GCS_SERVER_PORT"} & set(os.environ)
"""
    env = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_no_cluster_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(**_: object) -> None:
        raise ConnectionError("nobody listens\nand a long story")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    refused = pytest.raises(InfraError, match=r"127\.0\.0\.1:1: nobody listens\. Is it up")
    with refused, cluster.connected(cluster.ClusterConfig(address="127.0.0.1:1")):
        pass


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def test_commit_from_git_or_from_the_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cluster.COMMIT_VARIABLE, raising=False)
    assert cluster.commit(tmp_path) is None
    code, other = tmp_path / "code", tmp_path / "other"
    for folder in (code, other):
        folder.mkdir()
        git(folder, "init")
        git(folder, "commit", "--allow-empty", "-m", folder.name)
    clean = cluster.commit(code)
    assert clean is not None
    assert (len(clean.sha), clean.dirty) == (40, False)
    (code / "file").touch()
    dirty = Revision(clean.sha, True)
    assert cluster.commit(code) == dirty
    # As in a hook of the other one.
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git/index"))
    assert cluster.commit(code) == dirty
    monkeypatch.setenv(cluster.COMMIT_VARIABLE, str(Revision("abc", True)))
    assert cluster.commit(tmp_path) == Revision("abc", True)


def test_the_commit_of_an_image_is_that_of_its_own_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code that is submitted with a job, and runs from another folder, has no such file."""
    monkeypatch.delenv(cluster.COMMIT_VARIABLE, raising=False)
    (tmp_path / cluster.COMMIT_FILE).write_text("abc\n")
    assert cluster.commit(tmp_path) == Revision("abc", False)
    (tmp_path / cluster.COMMIT_FILE).write_text("\n")  # of an image that was not told
    assert cluster.commit(tmp_path) is None


# Of a machine whose way out is a proxy, which here listens to nobody.
BEHIND = {"http_proxy": "http://127.0.0.1:1", "all_proxy": "http://127.0.0.1:1"}
UNPROXIED = """
import os, sys
from pathlib import Path
from infra import head
state, url = sys.argv[1:]
print(head._ask(url, "secret"), head._environment(Path(state))["no_proxy"])
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "127.0.0.1"),
        ({"NO_PROXY": ".local"}, ".local,127.0.0.1"),
        ({"no_proxy": "127.0.0.1,.local"}, "127.0.0.1,.local"),
        ({"no_proxy": "*"}, "*"),
    ],
    ids=str,
)
def test_a_head_is_asked_past_a_proxy(tmp_path: Path, given: dict[str, str], expected: str) -> None:
    """Which would not find it, and would be told the token. `ray job` is told so, too."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.headers["Authorization"] == "Bearer secret"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'"here"')

    (tmp_path / "token").write_text("secret")
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        done = subprocess.run(
            [sys.executable, "-c", UNPROXIED, str(tmp_path), url],
            cwd=ROOT, env={**os.environ, **BEHIND, **given}, capture_output=True, text=True,
        )  # fmt: skip
        server.shutdown()
    assert done.stdout == f"here {expected}\n", done.stderr


def command(state: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "infra.cluster", "--state", str(state), *arguments],
        cwd=ROOT, env={**os.environ, **BEHIND}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


SLOW_TO_END = """
import pathlib, signal, sys, time
def end(*_):
    time.sleep(4)
    pathlib.Path(sys.argv[1]).touch()
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("begun", flush=True)
time.sleep(5000.125)
"""


@pytest.fixture
def running_head(tmp_path: Path) -> Iterator[Path]:
    state = tmp_path / "cluster"
    done = command(state, "up", "--dashboard-port", str(free_port()), "--num-cpus", "2")
    assert done.returncode == 0, done.stderr
    yield state
    if (state / "head.json").exists():
        head.down(state)


def processes_of(folder: str) -> list[str]:
    lines = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True).stdout
    return [line for line in lines.splitlines() if folder in line]


@pytest.mark.long
def test_a_head_that_asks_for_a_token(running_head: Path) -> None:
    state = running_head
    record = head.Head.load(state)
    assert stat.S_IMODE((state / "token").stat().st_mode) == 0o600
    assert processes_of(record.folder)

    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{record.address}/api/jobs/")
    assert refused.value.code == 401
    untold = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": record.address}
    ray = Path(sys.executable).with_name("ray")
    assert subprocess.run([ray, "job", "list"], env=untold, capture_output=True).returncode != 0

    again = command(state, "up")
    assert again.returncode == InfraError.exit_code
    assert "a cluster is recorded as up" in again.stderr

    script = "import sys, infra.cluster as c; print('of', c.commit(), sys.executable); sys.exit(3)"
    job = command(state, "submit", "--", "python", "-c", script)
    assert job.returncode == 3, "the job's own exit code, not that of `ray job submit`"
    commit = cluster.commit(ROOT)
    assert commit is not None
    assert f"of {commit.sha}" in job.stdout
    assert sys.executable in job.stdout

    last = state / "last"
    forever = ["python", "-c", SLOW_TO_END, str(last)]
    long = subprocess.Popen(
        [sys.executable, "-m", "infra.cluster", "--state", str(state), "submit", "--", *forever],
        cwd=ROOT, env={**os.environ, **BEHIND}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert long.stdout is not None
    assert any(line.startswith("begun") for line in long.stdout)
    assert command(state, "down").returncode == 0
    long.communicate(timeout=300)
    assert long.returncode
    assert not processes_of(record.folder)
    assert not processes_of("5000.125")
    assert last.exists(), "a job has time for a last checkpoint"
    assert not Path(record.folder).exists()
    gone = command(state, "submit", "--", "true")
    assert (gone.returncode, "no cluster is up" in gone.stderr) == (InfraError.exit_code, True)


def test_a_job_that_is_stopped_has_time_and_a_record_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, written, start = {}, [], subprocess.Popen
    replace = os.replace

    def ends_at_once(command: list[str], env: dict[str, str], **more: Any) -> Any:
        given.update(env)
        return start(["true"], **more)

    def replaced(partial: Path, path: Path) -> None:
        assert not path.exists()
        written.append(json.loads(partial.read_text()))
        replace(partial, path)

    monkeypatch.setattr(head.subprocess, "Popen", ends_at_once)
    monkeypatch.setattr(head.os, "replace", replaced)
    with pytest.raises(InfraError, match="the head did not start"):
        head.up(tmp_path, dashboard_port=free_port())
    assert given["RAY_JOB_STOP_WAIT_TIME_S"] == "90"
    assert [record.keys() for record in written] == [{"pid", "started", "address", "folder"}]
    assert os.listdir(tmp_path) == ["head.log"]


def test_a_head_may_have_no_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one for drivers alone."""
    given, start = [], subprocess.Popen

    def ends_at_once(command: list[str], **more: Any) -> Any:
        given.extend(command)
        return start(["true"], **more)

    monkeypatch.setattr(head.subprocess, "Popen", ends_at_once)
    with pytest.raises(InfraError, match="the head did not start"):
        head.up(tmp_path, dashboard_port=free_port(), num_cpus=0)
    assert "--num-cpus=0" in given


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"pid": 1}'])
def test_a_broken_record_of_a_head_is_named(tmp_path: Path, record: str) -> None:
    (tmp_path / "head.json").write_text(record)
    with pytest.raises(InfraError, match=r"head\.json: not the record of a cluster\. End its"):
        head.down(tmp_path)


def test_a_head_whose_token_is_gone_can_be_ended(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    started = head.process.started(process.pid)
    assert started
    head.Head(pid=process.pid, started=started, address="http://127.0.0.1:9", folder="none").save(
        tmp_path
    )
    with pytest.raises(InfraError, match=r"the token of the cluster is gone\. End the cluster"):
        head.logs(tmp_path, "job")
    head.down(tmp_path)
    assert process.wait(60) == -signal.SIGTERM


@pytest.mark.parametrize("made", ["runs/a/run.json", "data/a/manifest.json", "samples/a.txt", ""])
def test_what_jobs_wrote_into_their_own_folder_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], made: str
) -> None:
    """It is a copy of the code, where relative paths of their commands lead."""
    code = tmp_path / "head/session_1/runtime_resources/working_dir_files/_ray_pkg_1"
    for name in filter(None, ["infra/head.py", "README.md", made]):
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        (code / name).touch()
    process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    folder = tmp_path / "head"
    (folder / "session_latest").symlink_to("session_1")
    started = head.process.started(process.pid)
    assert started
    head.Head(
        pid=process.pid, started=started, address="http://127.0.0.1:9", folder=str(folder)
    ).save(tmp_path)
    head.down(tmp_path)
    process.wait(60)
    if made:
        assert (code / made).exists()
        assert capsys.readouterr().err.endswith(f": {code / made.partition('/')[0]}\n")
    else:
        assert not folder.exists()
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("RUNNING", "its output broke off, and it goes on. See it with .* logs job-"),
        ("FAILED", "ended without an exit code, FAILED: as told"),
    ],
)
def test_a_job_without_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, said: str
) -> None:
    """As where the connection breaks through which the job is followed."""
    pid = os.getpid()
    started = head.process.started(pid) or ""
    head.Head(pid=pid, started=started, address="http://127.0.0.1:9", folder="none").save(tmp_path)
    (tmp_path / "token").write_text("x")
    answer = {"driver_exit_code": None, "status": status, "message": "as told"}
    monkeypatch.setattr(head, "RAY", "true")
    monkeypatch.setattr(head, "_ask", lambda *question: answer)
    with pytest.raises(InfraError, match=said):
        head.submit(tmp_path, ["python", "x.py"], ROOT)


def test_a_start_is_known_without_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """And without `ps`, which goes by the clock and is not everywhere."""
    from_ps = head.process._shown(os.getpid())
    assert from_ps
    assert head.process._shown(2**22 + 1) is None
    monkeypatch.setenv("PATH", "")
    found = head.process.started(os.getpid())
    assert found
    assert found.isdigit()
    assert head.process.started(2**22 + 1) is None


def test_a_process_may_have_any_name(tmp_path: Path) -> None:
    """The kernel keeps 15 bytes of it, here with half a letter at the end."""
    (tmp_path / "éééééééééé").write_text("#!/bin/sh\nread line\n")
    (tmp_path / "éééééééééé").chmod(0o755)
    named = subprocess.Popen([tmp_path / "éééééééééé"], stdin=subprocess.PIPE)
    assert (head.process.started(named.pid) or "").isdigit()
    named.communicate()


def test_down_signals_no_process_that_took_over_the_pid(tmp_path: Path) -> None:
    (tmp_path / "head.json").write_text(
        f'{{"pid": {os.getpid()}, "started": "long ago", "address": "", "folder": "none"}}'
    )
    with pytest.raises(InfraError, match="is gone"):
        head.Head.load(tmp_path)
    head.down(tmp_path)  # the test would end here
    assert not (tmp_path / "head.json").exists()
