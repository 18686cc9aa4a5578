"""Ray: connecting to a cluster, running a function on its workers, and a local head to submit to.

    python -m infra.cluster up                 # a head on 127.0.0.1 that asks for a token
    python -m infra.cluster submit -- python pipelines/finetune.py quickstart
    python -m infra.cluster logs JOB
    python -m infra.cluster down

`python` inside a job is the interpreter that ran `up`.
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
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from infra.errors import InfraError, Problem, causes

ROOT = Path(__file__).resolve().parent.parent
OBJECT_STORE_BYTES = 256 * 2**20
DATA_CPUS = 2  # Ray Data's tasks need CPUs of their own beside the training workers
START_ATTEMPTS = 10  # of a minute each: the time an autoscaler has to bring machines
COMMIT_VARIABLE = "SUBMITTED_COMMIT"
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise each line of a worker appears twice
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in a worker and in the driver
}


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Which Ray to use: that at `address`, else that of the job one is in, else a local one."""

    address: str | None = None
    num_cpus: int | None = None  # of a local cluster; default: the machine's, or what is needed


class Commit(NamedTuple):
    """The commit of the code that runs, and whether files differ from it."""

    sha: str
    dirty: bool

    def __str__(self) -> str:
        return self.sha + ("-dirty" if self.dirty else "")


def connect(config: ClusterConfig, *, needed_cpus: int = 1) -> None:
    """Connect this process to Ray. A process that is connected already stays as it is.

    A local cluster has logical CPUs for `needed_cpus` and for the data tasks beside them, and
    asks for a token: one that only this process and its children know, so that Ray writes none
    to the home folder. Raises InfraError where there is no cluster at the address.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    address = config.address or os.environ.get("RAY_ADDRESS")
    if not address and not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        # Ray turns tokens on by itself for a local cluster; it may have read its mode already.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    if ray.is_initialized():
        return
    if address:
        try:
            ray.init(address=address, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            why = str(error).splitlines()[0]
            raise InfraError(f"Ray at {address}", why, "Is it up, and the token right?") from error
    else:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes it away
        ray.init(
            address="local",
            num_cpus=config.num_cpus or max(os.cpu_count() or 1, needed_cpus + DATA_CPUS),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=True,  # without it Ray Train logs a complaint every second
            logging_level="error",
        )


def shutdown() -> None:
    """Disconnect, and end the local cluster if this process started one."""
    import ray

    ray.shutdown()


def fit(
    worker: Callable[[dict[str, Any]], Any],
    payload: dict[str, Any],
    *,
    name: str,
    num_workers: int,
    resources_per_worker: dict[str, float] | None = None,
    use_gpu: bool = False,
    storage: str | None = None,
    max_failures: int = 0,
) -> Any:
    """Run `worker(payload)` on `num_workers` processes of one group and return rank 0's result.

    When a process dies or raises, the whole group starts again, up to `max_failures` times; the
    worker resumes from checkpoints of its own. Ray's bookkeeping gets a name and, unless
    `storage` names a folder, a temporary place per call, so it never resumes anything by itself.
    A worker's Problem is raised as it is; InfraError where the workers died or found no room.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    place = storage or tempfile.mkdtemp(prefix="ray-train-")
    trainer = TorchTrainer(
        worker,
        train_loop_config=payload,
        scaling_config=ScalingConfig(
            num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=resources_per_worker
        ),
        run_config=RunConfig(
            name=f"{name}-{secrets.token_hex(4)}",
            storage_path=place,
            failure_config=FailureConfig(
                max_failures=max_failures, controller_failure_limit=START_ATTEMPTS
            ),
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )
    try:
        with _interrupts():
            return trainer.fit().return_value
    except TrainingFailedError as error:
        found = list(causes(error))
        for cause in found:
            if isinstance(cause, Problem):
                raise cause from error
        if any(isinstance(cause, ray.exceptions.RayActorError) for cause in found):
            raise InfraError(
                name, f"a worker died, {max_failures} restarts allowed", "Out of memory?"
            ) from error
        raise
    finally:
        if not storage:
            shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _interrupts() -> Iterator[None]:
    """Ctrl-C under Ray Train as KeyboardInterrupt: Train's own handler would exit with 0."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


# --- the commit ------------------------------------------------------------------------------


def submitted_commit() -> Commit | None:
    """The commit that `submit` passed to the job this process belongs to."""
    sha, _, dirty = os.environ.get(COMMIT_VARIABLE, "").partition("-")
    return Commit(sha, bool(dirty)) if sha else None


def commit(folder: Path = ROOT) -> Commit | None:
    """The commit of the code: as submitted with the job, else what git says of `folder`."""
    if submitted := submitted_commit():
        return submitted

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return Commit(git("rev-parse", "HEAD"), bool(git("status", "--porcelain")))
    except (OSError, subprocess.CalledProcessError):
        return None


# --- a local head, with a token --------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Head:
    """A local head as `up` started it; what is needed to reach it and to end it."""

    pid: int
    started: str  # a pid may be given to another process: the start time tells them apart
    address: str
    folder: str

    @staticmethod
    def load(state: Path) -> Head:
        """The running head that `state` records; InfraError where there is none."""
        try:
            head = Head(**json.loads((state / "head.json").read_text()))
        except FileNotFoundError:
            raise InfraError(str(state), "no cluster is up", UP) from None
        if _started(head.pid) != head.started:
            raise InfraError(str(state), "the cluster that was up is gone", f"{UP} after `down`")
        return head


UP = "Start one with `python -m infra.cluster up`"
START_SECONDS, STOP_SECONDS = 60, 20
# Left at home: what the job does not read. Ray itself leaves out .git, .venv and .gitignore's.
EXCLUDES = [".git", ".venv", ".cluster", "runs", "data", "tests"]


def up(state: Path, *, dashboard_port: int = 8265, num_cpus: int | None = None) -> Head:
    """Start a head on this machine that answers only to the token in `state`, and wait for it."""
    if (state / "head.json").exists():
        raise InfraError(str(state), "a cluster is recorded as up", "End it with `down`")
    state.mkdir(parents=True, exist_ok=True)
    token = state / "token"
    token.unlink(missing_ok=True)
    with open(os.open(token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    port, client_port, agent_port = _free_ports(3)
    folder = tempfile.mkdtemp(prefix="ray-head-")  # short: sockets lie in it
    arguments = {
        "node-ip-address": "127.0.0.1", "port": port, "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard_port, "ray-client-server-port": client_port,
        "dashboard-agent-listen-port": agent_port, "temp-dir": folder,
        "object-store-memory": OBJECT_STORE_BYTES,
        "num-cpus": num_cpus or (os.cpu_count() or 1) + DATA_CPUS,
    }  # fmt: skip
    with (state / "head.log").open("w") as log:
        process = subprocess.Popen(
            [_ray(), "start", "--head", "--block", *(f"--{k}={v}" for k, v in arguments.items())],
            env=_environment(state), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard_port}"
    head = Head(pid=process.pid, started=_started(process.pid), address=address, folder=folder)
    (state / "head.json").write_text(json.dumps(asdict(head)))
    deadline = time.monotonic() + START_SECONDS
    while not _answers(address, token.read_text()):
        if process.poll() is not None or time.monotonic() > deadline:
            down(state)
            raise InfraError(address, "the head did not start", f"See {state / 'head.log'}")
        time.sleep(0.5)
    return head


def submit(state: Path, entrypoint: Sequence[str], working_dir: Path) -> int:
    """Run a command as a job on the head, its output shown here; the command's exit code."""
    head, job = Head.load(state), f"job-{secrets.token_hex(6)}"
    code = commit(working_dir)
    runtime = {"excludes": EXCLUDES, "env_vars": {COMMIT_VARIABLE: str(code)} if code else {}}
    environment = _environment(state)
    subprocess.run(
        [_ray(), "job", "submit", "--address", head.address, "--submission-id", job,
         "--working-dir", str(working_dir), "--runtime-env-json", json.dumps(runtime),
         "--", *entrypoint],
        env=environment,
    )  # fmt: skip
    request = _request(f"{head.address}/api/jobs/{job}", environment["RAY_AUTH_TOKEN"])
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            info = json.load(answer)
    except OSError as error:
        raise InfraError(f"{head.address}, {job}", f"no word of the job: {error}") from error
    if info["driver_exit_code"] is None:
        raise InfraError(job, f"ended without an exit code, {info['status']}: {info['message']}")
    return int(info["driver_exit_code"])


def logs(state: Path, job: str) -> int:
    """Show what a job has written."""
    head = Head.load(state)
    command = [_ray(), "job", "logs", "--address", head.address, job]
    return subprocess.run(command, env=_environment(state)).returncode


def down(state: Path) -> None:
    """End the head that `up` started, its whole process group and nothing else."""
    record = state / "head.json"
    if not record.exists():
        raise InfraError(str(state), "no cluster is up", UP)
    head = Head(**json.loads(record.read_text()))
    if _started(head.pid) == head.started:
        os.kill(head.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while _started(head.pid) == head.started and time.monotonic() < deadline:
            time.sleep(0.2)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    shutil.rmtree(head.folder, ignore_errors=True)
    for name in ("head.json", "token"):
        (state / name).unlink(missing_ok=True)


def _ray() -> str:
    return str(Path(sys.executable).with_name("ray"))


def _environment(state: Path) -> dict[str, str]:
    """What a `ray` command needs to know: the token, and the interpreter that jobs find first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    token = (state / "token").read_text()
    hidden = {"RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", COMMIT_VARIABLE}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return {**kept, **QUIET, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def _started(pid: int) -> str:
    """When the process began, empty where there is none or only its remains."""
    columns = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
    status, _, began = subprocess.run(columns, capture_output=True, text=True).stdout.partition(" ")
    return "" if status.startswith("Z") else began.strip()


def _request(url: str, token: str) -> urllib.request.Request:
    return urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})


def _answers(address: str, token: str) -> bool:
    try:
        with urllib.request.urlopen(_request(f"{address}/api/version", token), timeout=5):
            return True
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(prog="python -m infra.cluster", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--state", type=Path, default=Path(".cluster"), help="token, pid and log")
    verbs = parser.add_subparsers(dest="verb", required=True)
    upper = verbs.add_parser("up", help="start a head on this machine")
    upper.add_argument("--dashboard-port", type=int, default=8265)
    upper.add_argument("--num-cpus", type=int)
    verbs.add_parser("submit", help="run a command as a job").add_argument("entrypoint", nargs="+")
    verbs.add_parser("logs", help="show what a job has written").add_argument("job")
    verbs.add_parser("down", help="end the head")
    given = parser.parse_args(argv)
    actions: dict[str, Callable[[], int | None]] = {
        "up": lambda: print(_welcome(up(
            given.state, dashboard_port=given.dashboard_port, num_cpus=given.num_cpus
        ), given.state)),
        "submit": lambda: submit(given.state, given.entrypoint, Path.cwd()),
        "logs": lambda: logs(given.state, given.job),
        "down": lambda: down(given.state),
    }  # fmt: skip
    try:
        return actions[given.verb]() or 0
    except Problem as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code


def _welcome(head: Head, state: Path) -> str:
    return f"Ray is up: {head.address}, token in {state / 'token'}, process {head.pid}"


if __name__ == "__main__":
    sys.exit(main())
