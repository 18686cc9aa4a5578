"""How the tests are shared out to processes; one Ray cluster a process; real data where given."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is slow, and no fault of what is tested.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# What a shell, a git hook or a proxy may have set would lead the tests, and all that they start, to
# clusters, servers, repositories and accounts that are not theirs.
FOREIGN = re.compile(
    r"(AWS|GIT|MLFLOW)_.*|RAY_(ADDRESS|API_SERVER_ADDRESS|AUTH_TOKEN.*)|HF_(TOKEN|ENDPOINT)"
    r"|HUGGING_FACE_HUB_TOKEN|.*_proxy",
    re.IGNORECASE,
)
for name in filter(FOREIGN.fullmatch, list(os.environ)):
    del os.environ[name]

# Ray reads these when it is first imported, so they are set before any test module is.
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    RAY_DEDUP_LOGS="0",
    RAY_TRAIN_ENABLE_PRINT_PATCH="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_TRAIN_METRICS_ENABLED="0",
    RAY_DASHBOARD_STARTUP_TIMEOUT_S="600",
    OMP_NUM_THREADS="1",
)
os.environ.setdefault("MKL_CBWR", "AUTO")  # as `infra` does, which not every test imports

# A shell that starts the tests in the background has them ignore interrupts, which some send.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent

# The files that take longest, longest first; those of a row run in one process, and so share its
# Ray cluster. All others follow, file by file.
LONGEST = (
    (
        "tests/infra/test_group.py", "tests/infra/test_pool.py", "tests/infra/test_stream.py",
        "tests/infra/test_cluster.py", "tests/pipelines/benchmarks/test_benchmarks.py",
    ),
    ("tests/pipelines/test_workers.py",),
    ("tests/pipelines/sweeping/test_killed.py",),
    ("tests/pipelines/test_submit.py",),
    ("tests/pipelines/evaluation/test_killed.py",),
    ("tests/infra/test_store_faults.py",),
    ("tests/pipelines/evaluation/test_champion.py",),
    ("tests/pipelines/report/test_plots.py",),
    ("tests/infra/test_tracking.py",),
    ("tests/pipelines/test_launch.py",),
    ("tests/pipelines/evaluation/test_evaluate.py",),
    ("tests/pipelines/test_buckets.py",),
    ("tests/pipelines/test_gpu_check.py",),
    ("tests/pipelines/test_preemption.py",),
    ("tests/infra/test_stall.py",),
    ("tests/pipelines/test_failures.py",),
    ("tests/pipelines/sweeping/test_arms.py",),
    ("tests/pipelines/test_model.py",),
    ("tests/pipelines/exporting/test_export.py",),
    ("tests/pipelines/test_secrets.py",),
)  # fmt: skip
MOST_PROCESSES = 4  # each takes about a GiB, and the workers of Ray come on top


def _rank(file: str) -> int:
    """The row of `LONGEST` that a test file is in, or the number of rows."""
    return next((rank for rank, row in enumerate(LONGEST) if file in row), len(LONGEST))


def _file(item: pytest.Item) -> str:
    return item.nodeid.split("::")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _rank(_file(item)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process more than cores, as many tests wait for other processes."""
    return min(len(os.sched_getaffinity(0)) + 1, MOST_PROCESSES)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files, in the order in which they were collected, and whole rows of `LONGEST`."""
    from xdist.scheduler import LoadFileScheduling

    class Rows(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            rank = _rank(file)
            return LONGEST[rank][0] if rank < len(LONGEST) else file

    config.option.loadscopereorder = False  # which would begin with the files of most tests
    return Rows(config, log)


def pytest_report_header() -> str:
    """What a failure that others do not see may come from."""
    import torch

    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    data = os.environ.get("DSL_TEST_DATA") or "none"
    return (
        f"cpu: {model[1] if model else 'unknown'}, {len(os.sched_getaffinity(0))} cores, "
        f"torch computes with {torch.backends.cpu.get_cpu_capability()}; test data: {data}"
    )


@pytest.fixture(scope="module")
def ray_cluster() -> None:
    """A local Ray of four logical CPUs: two workers, and two for the data tasks that feed them.

    It serves all files of a row of `LONGEST`, and ends with the last of them: idle, it would take
    a share of a core from the tests that follow.
    """
    import ray

    if ray.is_initialized():
        return
    # Workers unpickle functions of this repository by name, so they must find it.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    # Another process for each group, which infra.cluster does without in a local Ray, too.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    with pytest.MonkeyPatch.context() as patch:
        # Ray Train asks the dashboard whether the controller of a group lives, and ends the workers
        # where it does not. Without a dashboard Ray names the usual port all the same, on which
        # another Ray of this machine may answer, that has no such controller. So ask where nobody
        # listens.
        patch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=150 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
        )


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The end of `ray_cluster`."""
    ends = nextitem is None or _rank(_file(nextitem)) != _rank(_file(item))
    if ends and "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real text and tokenizer files that `DSL_TEST_DATA` names."""
    folder = os.environ.get("DSL_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("DSL_TEST_DATA does not name a folder of test data")
    return Path(folder)


@pytest.fixture(scope="session")
def references(test_data: Path) -> Path:
    """The reference outputs that lie beside the test data."""
    folder = test_data.parent / "references"
    if not folder.is_dir():
        pytest.skip("no folder `references` beside DSL_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of CPython's own text: L = 32, a BPE of 300 tokens."""
    from infra.config import load
    from pipelines import prepare

    folder = tmp_path_factory.mktemp("data") / "tiny"
    argv = [f"out={folder}", "length=32", "vocabulary.size=300"]
    config = load(prepare.PrepareConfig, verb="prepare", argv=argv, presets=ROOT)
    prepare.execute(config)
    return folder
