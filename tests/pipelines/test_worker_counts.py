"""How many workers a configuration may ask for."""

from __future__ import annotations

import pytest

from infra.errors import ConfigError
from pipelines.training.settings import WorkersConfig
from tests.pipelines import tiny


def counts(count: str, lanes: int = 6) -> list[int]:
    given = [f"workers.count={count}", f"train.stream.num_lanes={lanes}"]
    return list(tiny.load("pretrain", "name=x", "data=y", *given).workers.counts)


def test_a_number_or_a_range() -> None:
    assert counts("3") == [3]
    assert counts("[1, 3]") == [1, 2, 3]
    assert counts("[2, 2]") == [2]
    assert WorkersConfig(count=(1, 3)).most == 3
    assert [WorkersConfig(count=n).shown for n in (3, (1, 3), (2, 2))] == ["3", "1 to 3", "2"]


@pytest.mark.parametrize("count", ["0", "[0, 2]", "[2, 1]", "[1, 2, 3]", "two", "1.5"])
def test_what_is_no_count(count: str) -> None:
    with pytest.raises(ConfigError, match=r"^workers(\.count)?[: ]"):
        counts(count)


@pytest.mark.parametrize(("count", "odd"), [("4", 4), ("[1, 4]", 4), ("[3, 5]", 4)])
def test_lanes_that_some_count_cannot_share(count: str, odd: int) -> None:
    with pytest.raises(ConfigError, match=rf"\(6\) must be a multiple of workers\.count \({odd}\)"):
        counts(count)


def test_a_share_of_a_gpu_is_for_one() -> None:
    assert WorkersConfig(gpu=True, gpu_share=0.5).resources == {"CPU": 1.0, "GPU": 0.5}
    with pytest.raises(ValueError, match="gpu_share is for one process"):
        WorkersConfig(count=(1, 2), gpu_share=0.5)
    with pytest.raises(ValueError, match="gpu_share is of a GPU, and gpu is false"):
        WorkersConfig(gpu_share=0.5)
