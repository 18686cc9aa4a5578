"""What the driver does between Tune and the run directories, without a cluster."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from infra import tracking
from infra.config import to_yaml
from infra.errors import ConfigError, DataError, InfraError
from infra.parallel import ParallelConfig
from infra.storage import Folder
from pipelines import finetune, runs, sweep
from pipelines.evaluation import preparation
from pipelines.sweep import expected_steps
from pipelines.sweeping import second, tuning
from pipelines.sweeping.settings import Asha, SweepConfig
from pipelines.sweeping.trials import BOUND, State, Trials
from pipelines.training.settings import WorkersConfig
from tests.pipelines.sweeping import small

CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


def of_tune(name: str, last: object = None) -> Any:
    return SimpleNamespace(trial_id=name, config={"trial": name}, last_result=last)


def judge(halving: tuning.Halving, name: str, step: int, bound: float) -> str:
    return halving.on_trial_result(None, of_tune(name), {"step": step, BOUND: bound})


def test_halving_remembers_the_trials_of_an_earlier_process() -> None:
    asha = Asha(grace=10, reduction=2)
    known = [
        small.trial(0, {}, "finished", 2.0, 1.8, 1.7, 1.6),
        small.trial(1, {}, "stopped", 3.0),
        small.trial(2, {}, "running", 2.5, 2.4, 2.3),
    ]
    halving = tuning.Halving(asha, 40, known)
    assert judge(halving, "trial-003", 10, 2.6) == STOP  # the median is 2.5
    assert judge(halving, "trial-004", 10, 1.9) == CONTINUE
    # It passed both rungs, and is not judged there again when it resumes from a checkpoint.
    assert judge(halving, "trial-002", 10, 9.0) == CONTINUE
    assert judge(halving, "trial-002", 30, 9.0) == CONTINUE
    # It has trained to the end: stopping would save nothing.
    assert judge(halving, "trial-004", 40, 9.0) == CONTINUE


@pytest.mark.parametrize("state", ["running", "lost"])
@pytest.mark.parametrize("step", [10, 15])
def test_a_trial_that_was_interrupted_at_a_rung_is_judged_when_it_resumes(
    state: State, step: int
) -> None:
    """It writes a validation down before the driver hears of it, which may never be."""
    known = [small.trial(0, {}, "finished", 2.0), small.trial(1, {}, state, 9.0)]
    halving = tuning.Halving(Asha(grace=10, reduction=2), 40, known)
    assert judge(halving, "trial-001", step, 9.0) == STOP


def test_a_bound_that_is_no_number_is_worse_than_any() -> None:
    halving = tuning.Halving(Asha(grace=10, reduction=2), 40, [])
    assert judge(halving, "trial-000", 10, math.nan) == CONTINUE  # nothing to compare with
    assert judge(halving, "trial-001", 10, 3.0) == CONTINUE
    assert judge(halving, "trial-002", 10, math.nan) == STOP
    assert judge(halving, "trial-003", 10, math.inf) == STOP
    assert judge(halving, "trial-004", 10, 3.5) == STOP


def test_a_trial_that_ends_without_a_finite_bound_has_failed(tmp_path: Path) -> None:
    """Its weights have grown beyond all numbers since the loss was last looked at."""
    trials = Trials(folder=Folder.at(str(tmp_path)))
    for number, bounds in enumerate([(3.0, math.nan), (3.0, math.inf), (math.nan, 3.0), ()]):
        name = trials.add(number, {})
        small.write(tmp_path / name, *bounds)
        (tmp_path / name / "result.json").write_text("{}")
    found = trials.all()
    assert [trial.state for trial in found] == ["failed", "failed", "finished", "failed"]
    assert found[0].why == found[3].why == "it has no finite bound at its end"
    assert [[v.step for v in trial.validations] for trial in found] == [[10], [10], [20], []]


def test_without_others_at_the_rung_a_trial_goes_on() -> None:
    assert judge(tuning.Halving(Asha(grace=10), 40, []), "trial-003", 10, 99.0) == CONTINUE


@given(
    order=st.permutations([f"trial-{n:03d}" for n in range(6)] * 8),
    bounds=st.lists(st.integers(0, 20), min_size=48, max_size=48),
    grace=st.integers(1, 4),
    reduction=st.integers(2, 4),
)
def test_the_rule_is_that_of_rays_asha(
    order: list[str], bounds: list[int], grace: int, reduction: int
) -> None:
    """For any order in which trials report, each at every tenth step."""
    halving = tuning.Halving(Asha(grace=10 * grace, reduction=reduction), 80, [])
    rays = ASHAScheduler(
        time_attr="step", metric=BOUND, mode="min", max_t=80, grace_period=10 * grace,
        reduction_factor=reduction, stop_last_trials=False,
    )  # fmt: skip
    steps: dict[str, int] = {}
    stopped = set()
    for name, bound in zip(order, bounds, strict=True):
        if name not in steps:
            rays.on_trial_add(None, of_tune(name))
        steps[name] = steps.get(name, 0) + 10
        if name in stopped or steps[name] == 80:
            continue
        result = {"step": steps[name], BOUND: float(bound)}
        verdict = halving.on_trial_result(None, of_tune(name), result)
        assert verdict == rays.on_trial_result(None, of_tune(name), result)
        stopped |= {name} if verdict == STOP else set()


def test_rungs_and_what_they_save() -> None:
    def load(every: int, grace: int) -> SweepConfig:
        given = f"asha={{grace: {grace}}}", f"finetune.train.validate_every={every}"
        return small.load("finetune.train.steps=90", *given)

    config = load(every=10, grace=10)
    assert config.asha is not None
    assert config.asha.rungs(90) == config.judged_at == [10, 30]
    assert expected_steps(config) == pytest.approx(10 + 20 / 3 + 60 / 9)
    assert expected_steps(replace(config, asha=None)) == 90
    # Bounds are there at validations only, and one of them may stand for two rungs.
    assert load(every=20, grace=10).judged_at == [20, 40]
    assert load(every=40, grace=10).judged_at == [40]
    assert expected_steps(load(every=40, grace=10)) == pytest.approx(40 + 50 / 3)


@pytest.mark.parametrize(("every", "grace"), [(10, 81), (90, 10), (50, 60), (500, 10), (10, 90)])
def test_a_rule_that_could_stop_no_trial_is_refused(every: int, grace: int) -> None:
    given = f"asha={{grace: {grace}}}", f"finetune.train.validate_every={every}"
    with pytest.raises(ConfigError, match=r"^asha\.grace: "):
        small.load("finetune.train.steps=90", *given)


def test_interrupted_trials_come_first_and_ended_ones_never(tmp_path: Path) -> None:
    config = small.load(f"root={tmp_path}")
    trials = Trials(folder=config.folder / "trials")
    names = [trials.add(n, {"converter.beta": beta}) for n, beta in enumerate((0.3, 1.0))]
    trials.end(names[0], "failed", "because")
    trials.end(names[1], "lost", "its node went away")
    proposals = tuning.Proposals(config, trials)
    assert proposals.suggest("x") == {"trial": "trial-001"}
    assert trials.read("trial-001").state == "running"
    assert proposals.suggest("y") == {"trial": "trial-002"}
    assert trials.read("trial-002").settings == {"converter.beta": 3.0}
    assert proposals.suggest("z") == Searcher.FINISHED


@pytest.mark.parametrize("kind", ["grid", "random", "optuna"])
def test_a_trial_that_was_removed_is_proposed_again_and_no_other_one(
    kind: str, tmp_path: Path
) -> None:
    """As the messages about a damaged trial have it."""
    config = small.load(f"root={tmp_path}", f"search.kind={kind}")
    trials = Trials(folder=config.folder / "trials")

    def rest() -> list[str]:
        proposals, names = tuning.Proposals(config, trials), list[str]()
        while isinstance(chosen := proposals.suggest("x"), dict) and len(names) < 9:
            names.append(chosen["trial"])
            trials.end(names[-1], "failed", "because")
        return names

    assert rest() == ["trial-000", "trial-001", "trial-002"]
    before = trials.all()
    trials.folder.remove("trial-001.json")
    assert rest() == ["trial-001"]
    assert trials.all() == before


def test_a_trial_is_read_from_its_directory(tmp_path: Path) -> None:
    trials = Trials(folder=Folder.at(str(tmp_path)))
    for number in (0, 2, 10, 1000):
        trials.add(number, {"a": {"kind": "roar"}})
    small.write(tmp_path / "trial-002", 3.0, 2.0)
    small.write(tmp_path / "trial-010", 3.0)
    (tmp_path / "trial-010" / "result.json").write_text("{}")
    found = {trial.name: trial for trial in trials.all()}
    assert list(found) == ["trial-000", "trial-002", "trial-010", "trial-1000"]
    assert [found["trial-002"].step, found["trial-002"].bound] == [20, 2.0]
    assert found["trial-010"].state == "finished"
    trials.end("trial-000", "stopped", "because")
    assert trials.read("trial-000").why == "because"
    assert trials.read("trial-000").settings == {"a": {"kind": "roar"}}


@pytest.mark.parametrize(
    ("error", "state", "why"),
    [
        (ConfigError("train.optimizer.lr", "the loss is nan"), "failed", "the loss is nan"),
        (RuntimeError("a bug"), "failed", "a bug"),
        (InfraError("the store", "is away"), "lost", "the store: is away"),
        (OSError(28, "No space left on device", "disk"), "lost", "No space left on device"),
    ],
)
def test_what_settings_are_to_blame_for_is_not_tried_again(
    error: Exception, state: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small.load(f"root={tmp_path}")
    trials = Trials(folder=config.folder / "trials")
    name = trials.add(0, {"converter.beta": 0.3})

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(finetune, "execute", fail)
    raised = pytest.raises(type(error)) if state == "lost" else nullcontext()
    with raised:
        tuning._trial({"trial": name}, config, None)
    found = trials.read(name)
    assert found.state == state
    assert why in found.why
    if state == "lost":  # Tune gives up, and starts it again in the next sweep
        tuning.SweepCallback(config, trials).on_trial_error(1, [], of_tune(name))
        assert trials.read(name) == found
        monkeypatch.setattr(finetune, "execute", lambda *_, **__: None)
        tuning._trial({"trial": name}, config, None)
        assert trials.read(name).state == "running"


def test_values_that_do_not_go_together_are_a_trial_that_failed(tmp_path: Path) -> None:
    """A search that learns may propose them: they are not known before it begins."""
    space = (
        "{support.roar.gamma_min: {kind: choice, values: [0, 20]}, "
        "support.roar.gamma_max: {kind: choice, values: [10, 30]}}"
    )
    config = small.load(f"root={tmp_path}", "search.kind=optuna", space=space)
    trials = Trials(folder=config.folder / "trials")
    name = trials.add(0, {"support.roar.gamma_min": 20, "support.roar.gamma_max": 10})
    tuning._trial({"trial": name}, config, None)
    assert trials.read(name).state == "failed"
    assert "gamma_max must be above gamma_min" in trials.read(name).why


def test_a_second_level_that_the_data_cannot_meet_is_told_before_any_trial(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "run", lambda *_: pytest.fail("a trial was trained"))
    walks = "paths: {masked: {path: masked, budgets: [4]}}, likelihood: {rows: 4}"
    few, nowhere = "samples: {rows: 6}", tmp_path / "nowhere"
    for asked, where, kind in (
        ("samples: {rows: 9999}", "second.samples.rows: 9999 of the", ConfigError),
        (f"{few}, judge: {{kind: ngram, order: 99}}", "second.judge.order: order 99", ConfigError),
        (f"{few}, judge: {{kind: own, model: {nowhere}}}", "second.judge.model: ", DataError),
    ):
        config = small.load(f"data={data}", f"root={tmp_path}", f"second={{{walks}, {asked}}}")
        with pytest.raises(kind, match="^" + re.escape(where)):
            sweep.execute(config)
        assert not config.folder.exists()


def test_a_sweep_goes_on_with_what_its_trials_and_second_level_may_change(tmp_path: Path) -> None:
    def load(*argv: str) -> SweepConfig:
        return small.load(f"root={tmp_path}", "second={paths: {masked: {path: masked}}}", *argv)

    first = load()
    first.folder.write_bytes(tracking.CONFIG, to_yaml(first, "sweep").encode())
    free = (
        "second.workers.count=1", "finetune.workers.max_failures=9", "finetune.train.log_every=5",
        "finetune.train.checkpoint.keep=1", "finetune.workers.cluster.address=auto",
    )  # fmt: skip
    with runs.opened(load(*free), "sweep", sweep.Sweep.free) as holder:
        assert holder.run.exists(tracking.CONFIG)
    for decisive in ("second.keep=1", "finetune.workers.gpu=true", "finetune.train.steps=50"):
        refused = pytest.raises(ConfigError, match=re.escape(decisive.partition("=")[0]))
        with refused, runs.opened(load(decisive), "sweep", sweep.Sweep.free):
            pass


def test_only_settings_of_the_second_level_are_told_as_such(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small.load(f"data={data}", "second={paths: {masked: {path: masked}}}")
    for told in (
        DataError("s3://bucket/mauve", "no finished shards"),
        ConfigError("data", "too short"),
    ):
        monkeypatch.setattr(preparation, "rows", Mock(side_effect=told))
        with pytest.raises(type(told), match="^" + re.escape(str(told))):
            second.require(config)


def test_a_trial_that_was_stopped_says_at_which_rung(tmp_path: Path) -> None:
    """The last one that its last validation reached."""
    config = small.load(f"root={tmp_path}", "finetune.train.steps=60", "asha={grace: 10}")
    trials = Trials(folder=config.folder / "trials")
    callback = tuning.SweepCallback(config, trials)
    bad = math.nan
    for number, bounds in enumerate([(3.0,), (3.0, 3.0), (3.0, 3.0, 3.0), (bad,), (3.0, 3.0, bad)]):
        name = trials.add(number, {"converter.beta": 0.3})
        small.write(Path(config.folder.path) / "trials" / name, *bounds)
        last = {"step": 10 * len(bounds), BOUND: bounds[-1]}
        callback.on_trial_complete(1, [], of_tune(name, last))
    worse, none = "not among the best 1/3", "no finite bound"
    found = [(worse, 10), (worse, 10), (worse, 30), (none, 10), (none, 30)]
    assert [(trial.state, trial.why) for trial in trials.all()] == [
        ("stopped", f"{why} at step {rung}") for why, rung in found
    ]


def test_a_trial_whose_process_died_is_lost(tmp_path: Path) -> None:
    config = small.load(f"root={tmp_path}")
    trials = Trials(folder=config.folder / "trials")
    name = trials.add(0, {"converter.beta": 0.3})
    tuning.SweepCallback(config, trials).on_trial_error(1, [], of_tune(name))
    assert (trials.read(name).state, trials.read(name).why) == ("lost", "its process died")


def test_a_line_of_progress_reads_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is shown at every validation of every trial, in Tune's own loop."""
    config = small.load(f"root={tmp_path}", "finetune.train.steps=60")
    trials = Trials(folder=config.folder / "trials")
    names = [trials.add(n, {"converter.beta": 0.3}) for n in range(2)]
    small.write(Path(config.folder.path) / "trials" / names[0], 3.0, 2.0)
    trials.end(names[1], "failed", "because")
    shown: list[str] = []
    monkeypatch.setattr(tuning, "progress", shown.append)
    clock = Mock(return_value=0.0)
    monkeypatch.setattr(tuning.time, "monotonic", clock)
    callback = tuning.SweepCallback(config, trials)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read_bytes", lambda *_: pytest.fail("a file was read"))
        patch.setattr(Folder, "names", lambda *_: pytest.fail("a folder was read"))
        for name, step in ((names[0], 30), ("trial-002", 20)):
            clock.return_value += 10.0
            callback.on_trial_result(1, [], of_tune(name), {"step": step, BOUND: 2.5})
    trials.add(2, {"converter.beta": 1.0})
    trials.end("trial-002", "failed", "because")
    callback.on_trial_complete(1, [], of_tune("trial-002"))
    callback.on_trial_result(1, [], of_tune(names[0]), {"step": 40, BOUND: 2.5})
    assert shown == [
        # 10 of 60 - 20 + 60 steps have taken 10 seconds, 30 of them 20.
        "sweep tried  1/3 trials  trial-000 at step 30  bound 2.5000  1.0 steps/s  ETA 1:30",
        "sweep tried  1/3 trials  trial-002 at step 20  bound 2.5000  1.5 steps/s  ETA 0:46",
        "sweep tried  2/3 trials  trial-000 at step 40  bound 2.5000  2.0 steps/s  ETA 0:10",
    ]


ROOM = {
    "one CPU each": (WorkersConfig(), {"CPU": 4}, 4),
    "a quarter of a GPU": (WorkersConfig(gpu=True, gpu_share=0.25), {"CPU": 16, "GPU": 2}, 8),
    "fewer CPUs than GPUs": (WorkersConfig(gpu=True), {"CPU": 3, "GPU": 8}, 3),
    "two threads each": (WorkersConfig(parallel=ParallelConfig(threads=2)), {"CPU": 5}, 2),
    "four workers and their data": (WorkersConfig(count=4, gpu=True), {"CPU": 32, "GPU": 8}, 2),
    "no more data": (WorkersConfig(count=4, gpu=True), {"CPU": 13, "GPU": 8}, 1),
}


@pytest.mark.parametrize("name", ROOM)
def test_as_many_at_a_time_as_there_is_room_for(name: str) -> None:
    workers, there, expected = ROOM[name]
    config = small.load("finetune.train.stream.num_lanes=4")
    config = replace(config, finetune=replace(config.finetune, workers=workers))
    assert tuning.concurrent(config, there) == expected
    assert tuning.concurrent(replace(config, concurrent=1), there) == 1
    with pytest.raises(InfraError, match="a trial takes"):
        tuning.concurrent(config, {"CPU": 0.5})
    # Of a cluster that has no machine yet, and brings them for trials that wait.
    assert tuning.concurrent(replace(config, concurrent=8), {}) == 8


def test_a_share_of_a_gpu_is_for_one_process() -> None:
    with pytest.raises(ConfigError, match="gpu_share is for one process"):
        small.load("finetune.workers={count: 2, gpu: true, gpu_share: 0.5}")
