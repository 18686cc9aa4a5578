"""A cluster to break, and what every fault of this folder costs, as a table at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.faults import processes
from tests.faults.nodes import Nodes, started
from tests.pipelines import tiny

ROWS = pytest.StashKey[list[str]]()
Cost = Callable[[str, str, float], None]


@pytest.fixture
def cost(request: pytest.FixtureRequest) -> Cost:
    """`cost(fault, what was lost, seconds to recover)`: a row of the table."""

    def add(fault: str, lost: str, recovered_s: float) -> None:
        row = f"| {fault} | {lost} | {recovered_s:.1f} | {request.path.name} |"
        request.config.stash.setdefault(ROWS, []).append(row)

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = terminalreporter.config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("faults")
    for row in (
        "| fault | what was lost | seconds to recover | test |",
        "|---|---|---|---|",
        *rows,
    ):
        terminalreporter.line(row)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny.shards(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    """A head that trains nothing, and two nodes with room for one worker each."""
    with started() as found:
        yield found


@pytest.fixture(scope="session")
def finetune(nodes: Nodes, data: Path) -> processes.Begin:
    """`finetune(root, *argv)`: the verb in a process of its own, two workers on two nodes."""
    return partial(processes.finetune, nodes.address, data)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, finetune: processes.Begin) -> Path:
    """The run that nothing happens to."""
    with finetune(tmp_path_factory.mktemp("undisturbed")) as run:
        assert run.wait() == 0, run.said
    return run.folder
