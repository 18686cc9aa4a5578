"""A Ray head on this machine behind a token, and jobs submitted to it with Ray's own commands.

    python -m infra.cluster up                 # a head on 127.0.0.1
    python -m infra.cluster submit -- python pipelines/finetune.py quickstart \\
        root=$PWD/runs data=$PWD/data/quickstart init=$PWD/runs/quickstart-mdlm
    python -m infra.cluster logs JOB
    python -m infra.cluster down

`python` inside a job is the interpreter that ran `up`. A job runs in a copy of this folder that Ray
makes, without `runs`, `data` and what else `.gitignore` names. So data is found, and results are
kept, only at absolute paths. If a job wrote into its copy all the same, `down` leaves that there.

Added to `ray start --head --block` and `ray job`: a token that lies in a file of its own (`ray
get-auth-token` writes into the home folder), the exit code of a job (`ray job submit` returns 1
for any failure), the commit of the code, and an end of this one head (`ray stop` ends all).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infra import process
from infra.cluster import COMMIT_VARIABLE, DATA_CPUS, QUIET, ROOT, commit
from infra.console import say
from infra.errors import InfraError, Problem
from infra.local import OBJECT_STORE_BYTES

UP = "Start one with `python -m infra.cluster up`"
START_SECONDS, STOP_SECONDS = 180, 20
JOB_SECONDS = 90  # that a stopped job has for a last checkpoint; 3 by default
OUTPUTS = ("runs", "data")  # where verbs and presets write by default
# A job needs none of them. Ray itself leaves out .git, .venv and what .gitignore names.
EXCLUDES = ["/.cluster", "/tests", *(f"/{name}" for name in OUTPUTS)]
LIVE = ("PENDING", "RUNNING")  # what Ray says of a job that has not ended
RAY = str(Path(sys.executable).with_name("ray"))
# A head is on this machine: a proxy could not reach it, and would be told the token.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head as `up` started it: what is needed to reach it and to end it."""

    pid: int
    started: str  # tells apart two processes that got the same pid one after the other
    address: str
    folder: str

    @staticmethod
    def load(state: Path, *, alive: bool = True) -> Head:
        """The head that `state` records; InfraError where there is none, or none is `alive`."""
        record = state / "head.json"
        try:
            head = Head(**json.loads(record.read_text()))
        except FileNotFoundError:
            raise InfraError(str(state), "no cluster is up", UP) from None
        except (ValueError, TypeError):
            fix = "End its processes by hand, if there are any, and remove the file"
            raise InfraError(str(record), "not the record of a cluster", fix) from None
        if alive and not head.alive:
            raise InfraError(str(state), "the cluster that was up is gone", f"{UP} after `down`")
        return head

    @property
    def alive(self) -> bool:
        return process.started(self.pid) == self.started

    def save(self, state: Path) -> None:
        """Record the head in `state`; a kill leaves no part of a record."""
        partial = state / "head.json.partial"
        partial.write_text(json.dumps(asdict(self)))
        os.replace(partial, state / "head.json")


def up(state: Path, *, dashboard_port: int = 8265, num_cpus: int | None = None) -> Head:
    """Start a head on this machine that answers only to the token in `state`, and wait for it."""
    if (state / "head.json").exists():
        raise InfraError(str(state), "a cluster is recorded as up", "End it with `down`")
    _require_free(dashboard_port)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        client_port = probe.getsockname()[1]  # the one port for which Ray does not accept 0
    _make_token(state)
    folder = tempfile.mkdtemp(prefix="ray-head-")  # a short path, as sockets need
    arguments = {
        "node-ip-address": "127.0.0.1", "port": 0, "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard_port, "ray-client-server-port": client_port,
        "dashboard-agent-listen-port": 0, "temp-dir": folder,
        "object-store-memory": OBJECT_STORE_BYTES,
        "min-worker-port": 0, "max-worker-port": 0,  # any free one instead of a fixed range
        "num-cpus": (os.cpu_count() or 1) + DATA_CPUS if num_cpus is None else num_cpus,
    }  # fmt: skip
    # `down` stops the jobs first. Ray would then wait half a minute for actors of its own to end.
    patience = {
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", "RAY_JOB_STOP_WAIT_TIME_S": str(JOB_SECONDS),
    }  # fmt: skip
    with (state / "head.log").open("w") as log:
        ray = subprocess.Popen(
            [RAY, "start", "--head", "--block", *(f"--{k}={v}" for k, v in arguments.items())],
            env=_environment(state) | patience, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard_port}"
    head = Head(pid=ray.pid, started=process.started(ray.pid) or "", address=address, folder=folder)
    head.save(state)
    _wait_until_up(head, state, ray)
    return head


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        if not probe.connect_ex(("127.0.0.1", port)):
            # Ray would take the next port, and jobs would go to whatever listens on this one.
            why = f"port {port} is taken"
            raise InfraError("the Ray page", why, "Choose another with --dashboard-port")


def _make_token(state: Path) -> None:
    """A new token, which nobody else may read from the moment on at which the file exists."""
    state.mkdir(parents=True, exist_ok=True)
    token = state / "token"
    token.unlink(missing_ok=True)
    with open(os.open(token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


def _wait_until_up(head: Head, state: Path, ray: subprocess.Popen[bytes]) -> None:
    """Wait until a head answers; InfraError, and nothing left of it, if it does not in time."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError):
            _ask(f"{head.address}/api/version", (state / "token").read_text())
            return
        if ray.poll() is not None or time.monotonic() > deadline:
            down(state)
            raise InfraError(head.address, "the head did not start", f"See {state / 'head.log'}")
        time.sleep(0.5)


def submit(state: Path, entrypoint: Sequence[str], working_dir: Path) -> int:
    """Run a command as a job on the head, its output shown here; the command's exit code."""
    head, job = Head.load(state), f"job-{secrets.token_hex(6)}"
    code = commit(working_dir)
    runtime = {"excludes": EXCLUDES, "env_vars": {COMMIT_VARIABLE: str(code)} if code else {}}
    environment = _environment(state)
    subprocess.run(
        [RAY, "job", "submit", "--address", head.address, "--submission-id", job,
         "--working-dir", str(working_dir), "--runtime-env-json", json.dumps(runtime),
         "--", *entrypoint],
        env=environment,
    )  # fmt: skip
    try:
        info = _ask(f"{head.address}/api/jobs/{job}", environment["RAY_AUTH_TOKEN"])
    except OSError as error:
        raise InfraError(f"{head.address}, {job}", f"no word of the job: {error}") from error
    if info["driver_exit_code"] is None:
        if info["status"] in LIVE:
            fix = f"See it with `python -m infra.cluster logs {job}`"
            raise InfraError(job, "its output broke off, and it goes on", fix)
        raise InfraError(job, f"ended without an exit code, {info['status']}: {info['message']}")
    return int(info["driver_exit_code"])


def logs(state: Path, job: str) -> int:
    """Show the output of a job."""
    command = [RAY, "job", "logs", "--address", Head.load(state).address, job]
    return subprocess.run(command, env=_environment(state)).returncode


def down(state: Path) -> None:
    """End the head that `up` started: its jobs, its process group, and nothing else. Its folder
    stays if a job wrote into the copy of the code that it ran in."""
    head = Head.load(state, alive=False)
    if head.alive:
        _stop_jobs(head.address, state / "token")
        os.kill(head.pid, signal.SIGTERM)
        _wait_while(lambda: head.alive, STOP_SECONDS)
    # Otherwise another process has the pid by now.
    if process.started(head.pid) in (None, head.started):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
    if made := _made_by_jobs(Path(head.folder)):
        say(f"{head.folder} stays. Jobs wrote there: {', '.join(made)}")
    else:
        shutil.rmtree(head.folder, ignore_errors=True)
    for name in ("head.json", "token"):
        (state / name).unlink(missing_ok=True)


def _made_by_jobs(folder: Path) -> list[str]:
    """What lies in the copies of the code below a head's folder and is not of the code."""
    copied = {path.name for path in ROOT.iterdir()} - set(OUTPUTS)
    found = folder.glob("session_*/runtime_resources/working_dir_files/*/*")
    return sorted({str(path.resolve()) for path in found if path.name not in copied})


def _environment(state: Path) -> dict[str, str]:
    """The environment of a `ray` command: the token, no proxy on the way to the head, and the
    interpreter that jobs find first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    try:
        token = (state / "token").read_text()
    except FileNotFoundError:
        fix = f"End the cluster with `down`. {UP}"
        raise InfraError(str(state), "the token of the cluster is gone", fix) from None
    hidden = {"RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", COMMIT_VARIABLE}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    here = "127.0.0.1"
    if not urllib.request.proxy_bypass_environment(here):  # for all hosts, say
        others = kept.get("no_proxy") or kept.get("NO_PROXY")
        kept["no_proxy"] = f"{others},{here}" if others else here
    return {**kept, **QUIET, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def _ask(url: str, token: str, method: str = "GET") -> Any:
    """The head's answer; OSError if it refuses or does not answer."""
    headers = {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(url, headers=headers, method=method)
    with DIRECT.open(request, timeout=10) as answer:
        return json.load(answer)


def _stop_jobs(address: str, token: Path) -> None:
    """Stop all jobs: their drivers have sessions of their own and would outlive the head."""

    def running() -> list[str]:
        jobs = _ask(f"{address}/api/jobs/", token.read_text())
        live = [job["submission_id"] for job in jobs if job["status"] in LIVE]
        return [job for job in live if job]  # a driver that was not submitted has no id

    # A head that does not answer, or whose token is gone, is ended all the same.
    with contextlib.suppress(OSError):
        for job in running():
            _ask(f"{address}/api/jobs/{job}/stop", token.read_text(), "POST")
        _wait_while(lambda: bool(running()), JOB_SECONDS + STOP_SECONDS)


def _wait_while(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until the condition is false, for so many seconds at most."""
    deadline = time.monotonic() + seconds
    while condition() and time.monotonic() < deadline:
        time.sleep(0.2)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--state", type=Path, default=Path(".cluster"), help="token, pid and log")
    verbs = parser.add_subparsers(dest="verb", required=True)
    upper = verbs.add_parser("up", help="start a head on this machine")
    upper.add_argument("--dashboard-port", type=int, default=8265)
    upper.add_argument("--num-cpus", type=int)
    verbs.add_parser("submit", help="run a command as a job").add_argument("entrypoint", nargs="+")
    verbs.add_parser("logs", help="show the output of a job").add_argument("job")
    verbs.add_parser("down", help="end the head")
    given = parser.parse_args(argv)
    try:
        if given.verb == "submit":
            return submit(given.state, given.entrypoint, Path.cwd())
        if given.verb == "logs":
            return logs(given.state, given.job)
        if given.verb == "down":
            down(given.state)
            return 0
        head = up(given.state, dashboard_port=given.dashboard_port, num_cpus=given.num_cpus)
    except Problem as problem:
        sys.stderr.write(f"{problem}\n")
        return problem.exit_code
    except KeyboardInterrupt:
        return 130  # a submitted job goes on; `logs` shows it
    token = given.state / "token"
    sys.stdout.write(f"Ray is up: {head.address}, token in {token}, process {head.pid}\n")
    return 0
