"""Training on several sources: each step's rows by weight, a loss of each, and resuming."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra import journal
from infra.errors import ConfigError, DataError
from infra.mixture import Schedule, read_manifests
from pipelines import pretrain
from pipelines.training import launch
from tests.pipelines import tiny

LANES = 2


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other text than that of `data`."""
    folder = tmp_path_factory.mktemp("other")
    return Path(tiny.shards(folder, [text[::-1] for text in tiny.documents(120)]))


def mixed(data: Path, other: Path) -> str:
    sources, later = f"{{a: {data}, b: {other}}}", "[{step: 7, weights: {b: 1}}]"
    return f"data={{sources: {sources}, weights: {{a: 1, b: 1}}, changes: {later}}}"


@pytest.fixture(scope="module")
def whole(data: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    tiny.execute("pretrain", mixed(data, other), f"root={root}", "name=run")
    return root / "run"


def schedule(data: Path, other: Path) -> Schedule:
    config = tiny.load("pretrain", "name=x", mixed(data, other))
    return Schedule(config=config.mixture, seed=config.train.stream.seed)


def test_the_loss_of_each_source_is_told(whole: Path, data: Path, other: Path) -> None:
    order, seen = schedule(data, other), set()
    for row in tiny.curve(whole):
        names = list(order.names(range(LANES), int(row["step"]) - 1).values())
        seen.add(tuple(sorted(names)))
        shares = {name: names.count(name) / LANES for name in names}
        assert {f"loss/{name}" for name in shares} == {k for k in row if k.startswith("loss/")}
        parts = sum(share * row[f"loss/{name}"] for name, share in shares.items())
        assert row["loss"] == pytest.approx(parts, rel=1e-6)
    assert seen >= {("a", "b"), ("b", "b")}


def test_validation_is_of_each_source_and_by_their_shares(whole: Path) -> None:
    half, last = (row for row in journal.read(str(whole)) if "validation/loss" in row)
    assert half["step"] == 6
    for key in ("validation/loss", "validation/bound"):
        a, b = half[f"{key}/a"], half[f"{key}/b"]
        assert abs(a - b) > 1e-3
        assert half[key] == pytest.approx((a + b) / 2, rel=1e-12)
        assert last[key] == pytest.approx(last[f"{key}/b"], rel=1e-12)


def test_a_killed_run_goes_on_with_the_same_rows(
    whole: Path, data: Path, other: Path, tmp_path: Path
) -> None:
    argv = [mixed(data, other), f"root={tmp_path}", "name=run"]
    with tiny.bare(tiny.interrupted_at(8)), pytest.raises(KeyboardInterrupt):
        pretrain.execute(tiny.load("pretrain", *argv))
    tiny.execute("pretrain", *argv)
    tiny.assert_same(tmp_path / "run", whole)


def test_a_source_alone_changes_nothing(finished: Path, data: Path, tmp_path: Path) -> None:
    alone = f"data={{sources: {{a: {data}}}, weights: {{a: 2}}}}"
    tiny.execute("pretrain", alone, f"root={tmp_path}", "name=run")
    ours, theirs = (tiny.tensors(run) for run in (tmp_path / "run", finished))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_the_plan_says_how_often_each_source_is_seen(data: Path, other: Path) -> None:
    config = tiny.load("pretrain", "name=x", mixed(data, other))
    epochs = launch._epochs(config, read_manifests(config.mixture))
    assert set(epochs) == {"a", "b"}
    assert 0 < epochs["a"] < epochs["b"]
    alone = tiny.load("pretrain", "name=x", f"data={data}")
    assert isinstance(launch._epochs(alone, read_manifests(alone.mixture)), float)


def test_a_change_after_the_last_step_is_refused(data: Path, other: Path) -> None:
    """It would have no effect."""
    assert tiny.load("pretrain", "name=x", mixed(data, other), "train.steps=7")
    with pytest.raises(
        ConfigError, match=r"step 7 \(data\.changes\) comes after .* \(train\.steps\)"
    ):
        tiny.load("pretrain", "name=x", mixed(data, other), "train.steps=6")


def test_sources_that_do_not_agree_leave_nothing(data: Path, tmp_path: Path) -> None:
    longer = tiny.shards(tmp_path / "longer", length=16)
    with pytest.raises(DataError, match="its length is not that of a"):
        tiny.execute("pretrain", mixed(data, Path(longer)), f"root={tmp_path / 'runs'}", "name=x")
    assert not (tmp_path / "runs/x").exists()
