"""Fixtures every room shares: one Ray cluster a session, and real data where it is given."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is slow, and no fault of what is tested.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# Ray reads these when it is first imported, so they are set before any test module is.
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    RAY_DEDUP_LOGS="0",
    RAY_TRAIN_ENABLE_PRINT_PATCH="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_TRAIN_METRICS_ENABLED="0",
    RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="10",
    OMP_NUM_THREADS="1",
)
os.environ.setdefault("MKL_CBWR", "AUTO")  # as `infra` does, which not every test imports

# A shell that starts the tests in the background has them ignore interrupts, which some send.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


def pytest_report_header() -> str:
    """What a failure that others do not see may come from."""
    import torch

    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    data = os.environ.get("DSL_TEST_DATA") or "none"
    return (
        f"cpu: {model[1] if model else 'unknown'}, {len(os.sched_getaffinity(0))} cores, "
        f"torch computes with {torch.backends.cpu.get_cpu_capability()}; test data: {data}"
    )


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of four logical CPUs: two workers, and two for the data tasks that feed them."""
    import ray

    # Workers unpickle functions of this repository by name, so they must find it.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=150 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


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
