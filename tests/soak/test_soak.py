"""One run under a seeded schedule of faults, which must end as if nothing had happened.

`make test-soak SOAK=short` has four of them and takes minutes.
"""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, ExitStack
from fnmatch import fnmatch
from pathlib import Path
from random import Random

import pytest

from infra import journal, tracking
from infra.storage import Folder
from tests.conftest import ROOT
from tests.faults import nodes
from tests.faults.conftest import Cost
from tests.faults.processes import PATIENCE_S
from tests.infra.common import until
from tests.infra.faulty import BUCKET
from tests.pipelines import tiny
from tests.soak import world as worlds
from tests.soak.faults import FAULTS, Planned, drawn
from tests.soak.world import NAME, Operator, World

STEPS = 10  # of the run for each fault
LOOK_S = 0.2
REPAIR_S = 30.0  # after which a thing is repaired that keeps the run from going on
# (seed, number of faults). Seeds that have once failed stay here.
SCHEDULES = {"short": [(187, 4)], "full": [(1, 2 * len(FAULTS))]}
# What a killed process leaves on its machine: Ray Train's folder of a driver and what it has said;
# the journal and log of a worker on their way to the store, and a folder that torch makes.
LEFT = ("ray-train-*", "finetune-*.log", "tmp*", "torchinductor_*")


class Injected:
    """A fault that has happened, and what it has cost.

    redone: steps that were done again. recovered_s: seconds until a step was done that had not
    been under way.
    """

    def __init__(self, planned: Planned, fault: AbstractContextManager[float], step: int) -> None:
        """step: the last one in the journal."""
        self.planned, self.step, self.repair = planned, step, ExitStack()
        self.when = self.repair.enter_context(fault)
        self.redone, self.recovered_s = 0, float("inf")

    def look(self, rows: list[dict[str, float]]) -> None:
        since = [row for row in rows if row["time"] > self.when]
        new = [row["time"] - self.when for row in since if row["step"] > self.step + 1]
        if new and new[0] < self.recovered_s:
            self.recovered_s = new[0]
            self.redone = sum(row["step"] <= self.step for row in since)

    def ends(self, step: int) -> bool:
        return step >= self.planned.repaired or time.time() > self.when + REPAIR_S


@pytest.mark.parametrize(
    ("seed", "count"),
    [
        pytest.param(*schedule, id=f"{name}-{schedule[0]}")
        for name, schedules in SCHEDULES.items()
        for schedule in schedules
    ],
)
def test_a_run_among_faults_loses_nothing(
    seed: int, count: int, tmp_path: Path, cost: Cost
) -> None:
    before, steps = os.listdir(ROOT), STEPS * count
    with worlds.made(tmp_path) as world:
        calm = world.begin(tmp_path / "calm", tmp_path, steps)
        assert calm.wait() == 0, calm.said
        began, operator = time.time(), world.operator(tmp_path, steps)
        try:
            injected = soak(world, operator, drawn(seed, count, steps), Random(seed))
        finally:
            operator.run.end()
        took_s = time.time() - began
        until(lambda: not nodes.workers())
        equal_to(calm.folder, steps)
        shown_once(world, steps)
        nothing_is_left(world)
        goodput = journal.read(f"{worlds.ROOT}/{NAME}")[-1]["speed/goodput_percent"]
    assert os.listdir(ROOT) == before
    for one in injected:
        lost = f"{one.redone} of {one.step} steps redone"
        cost(f"step {one.step}: {one.planned.name}", lost, one.recovered_s)
    commands = f"{len(operator.codes)} commands ended with {operator.codes}"
    cost(f"seed {seed}, {count} faults, {commands}", f"goodput {goodput:.1f} %", took_s)


def soak(world: World, operator: Operator, plan: list[Planned], rng: Random) -> list[Injected]:
    """Inject the planned faults until the run ends."""
    injected: list[Injected] = []
    with ExitStack() as broken:
        progressed, last = time.time(), 0
        while not operator.done():
            rows = operator.rows()
            if len(rows) != last:
                progressed, last = time.time(), len(rows)
            assert time.time() < progressed + PATIENCE_S, operator.run.said
            for one in injected:
                one.look(rows)
                if one.ends(last):
                    one.repair.close()
            if plan and last >= plan[0].step:
                next_one = plan.pop(0)
                fault = FAULTS[next_one.name](world, operator, rng)
                injected.append(Injected(next_one, fault, last))
                broken.push(injected[-1].repair)
            time.sleep(LOOK_S)
    assert not plan, "the run has ended before its faults"
    return injected


def equal_to(calm: Path, steps: int) -> None:
    tiny.assert_same(f"{worlds.ROOT}/{NAME}", calm, steps)


def shown_once(world: World, steps: int) -> None:
    """MLflow has one run, and in it each metric of each step once, as the journal has it, but for
    those that measure time."""
    folder = f"{worlds.ROOT}/{NAME}"
    world.server.down()
    world.server.database.up()
    world.server.up()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "300")
        tracking.replay(folder)  # what a server too slow for the run's patience has not heard
        client = tracking.connect(world.server.uri)
        experiment = client.get_experiment_by_name("dsl")
        (found,) = client.search_runs([experiment.experiment_id])
        assert found.info.status == "FINISHED"
        rows = journal.read(folder)
        for name in rows[-1].keys() - set(journal.CLOCK):
            history = client.get_metric_history(found.info.run_id, name)
            shown = sorted((one.step, one.value) for one in history)
            if name.startswith("speed/"):  # of a step done twice, MLflow may have the first time
                assert [step for step, _ in shown] == list(range(1, steps + 1))
            else:
                assert shown == [(row["step"], row[name]) for row in rows]


def nothing_is_left(world: World) -> None:
    """No file outside of the run directory."""
    keys = [key.removeprefix(f"{BUCKET}/") for key in world.store.filesystem.find(BUCKET)]
    assert [key for key in keys if not key.startswith(("data/", f"runs/{NAME}/"))] == []
    assert os.listdir(world.home) == []
    left = [path.name for path in world.disk.iterdir()]
    assert [name for name in left if not any(fnmatch(name, known) for known in LEFT)] == []
    assert not Folder.at(f"{worlds.ROOT}/{NAME}").exists("stop")
