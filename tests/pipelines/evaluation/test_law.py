"""What the network lacks and what the path costs, on text of a known chain."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dsl.chain import ChainDenoiser
from infra import stream
from infra.errors import ConfigError, DataError
from infra.shards import read_manifest
from infra.storage import Folder
from pipelines.evaluation.conditions import AtSNR, Condition, Revealed
from pipelines.evaluation.questions import law as question
from pipelines.evaluation.questions.states import errors
from pipelines.examples import law
from pipelines.examples.law import LAW, LawConfig
from tests.pipelines.evaluation.conftest import Run
from tests.pipelines.evaluation.small import network, rows_of

TOKENS, LENGTH, DIM = 5, 16, 4
CONDITIONS = (Revealed(share=0.0), Revealed(share=0.5), AtSNR(snr=3.0))


def chain(order: int, seed: int = 0) -> ChainDenoiser:
    generator = torch.Generator().manual_seed(seed)
    table_VD = F.normalize(torch.randn(TOKENS, DIM, generator=generator), dim=-1)
    shape = (TOKENS,) * (order + 1)
    transition = torch.rand(shape, generator=generator, dtype=torch.float64) ** 3
    initial = torch.rand(shape[1:], generator=generator, dtype=torch.float64)
    return ChainDenoiser(
        table_VD, initial / initial.sum(), transition / transition.sum(-1, keepdim=True)
    )


@pytest.fixture(scope="module")
def drawn(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards that were drawn from a chain of order 1, fitted to those of `world`."""
    out = tmp_path_factory.mktemp("law") / "shards"
    law.execute(LawConfig(data=str(world / "data/shards"), out=str(out), order=1))
    return out


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda c: c.name)
@pytest.mark.parametrize("order", [1, 2])
def test_the_exact_posterior_has_no_gap_to_itself(order: int, condition: Condition) -> None:
    exact = chain(order)
    found = question.gaps(exact, exact.draw(9, LENGTH, 0), exact=exact, condition=condition, seed=0)
    assert np.abs(found["gap"]).max() < 1e-12
    assert found["entropy"].min() > 0


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda c: c.name)
def test_the_gap_is_the_excess_of_the_cross_entropy(condition: Condition) -> None:
    """In expectation over rows of the law: E[-log q(x)] - E[-log p(x)] = E[KL(p | q)]."""
    exact, other = chain(1), chain(1, seed=1)
    other.table_VD = exact.table_VD  # the same states, another belief
    rows_NL = exact.draw(4000, LENGTH, 0)
    how = {"condition": condition, "seed": 3}
    theirs, ours = (errors(denoiser, rows_NL, **how)["nats"] for denoiser in (other, exact))
    gap_N = question.gaps(other, rows_NL, exact=exact, **how)["gap"]
    excess_N = theirs - ours
    error = (excess_N - gap_N).std() / len(gap_N) ** 0.5
    assert gap_N.mean() > 0.1
    assert abs(excess_N.mean() - gap_N.mean()) < 5 * error


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda c: c.name)
def test_what_the_law_rules_out_adds_nothing(condition: Condition) -> None:
    cycle = torch.eye(TOKENS, dtype=torch.float64).roll(1, 1)  # each token has one successor
    other = chain(1)
    start = torch.full((TOKENS,), 1 / TOKENS, dtype=torch.float64)
    exact = ChainDenoiser(other.table_VD, start, cycle)
    how = {"exact": exact, "condition": condition, "seed": 0}
    rows_NL = exact.draw(9, LENGTH, 0)
    assert np.abs(question.gaps(exact, rows_NL, **how)["gap"]).max() < 1e-12
    found = question.gaps(other, rows_NL, **how)
    assert np.isfinite(found["entropy"]).all()
    assert found["gap"].min() > 0


def test_gaps_do_not_depend_on_batches() -> None:
    exact, other = chain(1), chain(1, seed=1)
    rows_NL = exact.draw(7, LENGTH, 0)
    how = {"exact": exact, "condition": AtSNR(snr=2.0), "seed": 5}
    whole = question.gaps(other, rows_NL, **how)["gap"]
    part = question.gaps(other, rows_NL[3:], first_row=3, **how)["gap"]
    assert part == pytest.approx(whole[3:], rel=1e-9)


def test_the_shards_hold_draws_of_the_law(world: Path, drawn: Path) -> None:
    text, made = (read_manifest(str(folder)) for folder in (world / "data/shards", drawn))
    assert {s: made.rows(s) for s in made.splits} == {s: text.rows(s) for s in text.splits}
    assert (made.length, made.vocabulary) == (text.length, text.vocabulary)
    size = made.vocabulary.size
    exact = law.read(Folder.at(str(drawn)))(torch.eye(size))
    rows_NL = torch.from_numpy(
        stream.holdout(Folder.at(str(drawn)), made, "train", made.rows("train"), 0)
    )
    assert len(rows_NL.unique(dim=0)) > 0.9 * len(rows_NL)
    nats_N = -exact.log_prob(rows_NL)
    again_N = -exact.log_prob(exact.draw(len(rows_NL), made.length, 12345))
    error = (nats_N.var() / len(nats_N) + again_N.var() / len(again_N)).sqrt()
    assert abs(nats_N.mean() - again_N.mean()) < 5 * error


def test_the_evaluation_tells_the_network_from_the_path(
    run: Run, world: Path, drawn: Path, tmp_path: Path
) -> None:
    code, _, err = run(
        f"models={{mdlm: {world / 'mdlm'}, dsl: {world / 'dsl'}}}", f"data={drawn}",
        "samples.rows=20", "paths={masked: {path: masked, budgets: [4]}, "
        "sde: {path: {kind: sentence_sde, gamma_max: 9}, budgets: [4]}}",
        "law={rows: 20, paths: [masked, sde]}",
    )  # fmt: skip
    assert code == 0, err
    tables = json.loads((tmp_path / "judged/report/evaluation.json").read_text())
    states = [(row["model"], row["state"]) for row in tables["law"]]
    assert states == [
        ("mdlm", "revealed 0"),
        ("mdlm", "revealed 0.5"),
        ("dsl", "revealed 0"),
        ("dsl", "revealed 0.5"),
        ("dsl", "SNR 1"),
        ("dsl", "SNR 4"),
    ]
    assert all(row["gap"] > 0 and row["entropy"] > 0 for row in tables["law"])
    real, *rows = tables["law_paths"]
    assert real["model"] == "real"
    assert 0 < real["path_nats"] < min(row["model_nats"] for row in rows)
    walks = [(row["model"], row["path"]) for row in rows]
    assert walks == [("mdlm", "masked"), ("dsl", "masked"), ("dsl", "sde")]
    # A random network writes texts that the law finds far less likely than the exact posterior's.
    assert all(row["model_nats"] > row["path_nats"] for row in rows)
    assert (tmp_path / "judged/report/law.png").exists()


def test_an_unknown_law_is_said(run: Run, world: Path) -> None:
    code, _, err = run(f"models={{dsl: {world / 'dsl'}}}", "law={}")
    assert code == ConfigError.exit_code
    assert LAW in err


@pytest.mark.parametrize("seed", [-1, 2**43])
def test_a_seed_that_has_no_draws_is_refused(seed: int) -> None:
    LawConfig(data="data", out="out", seed=2**43 - 1)
    with pytest.raises(ValueError, match="seed must lie in"):
        LawConfig(data="data", out="out", seed=seed)


def test_too_many_transitions_are_refused(world: Path, tmp_path: Path) -> None:
    config = LawConfig(data=str(world / "data/shards"), out=str(tmp_path / "out"), order=3)
    size = read_manifest(config.data).vocabulary.size
    assert size**4 > law.ELEMENTS
    with pytest.raises(ConfigError, match="transitions"):
        law.execute(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        '{"initial": [1.0], "transition": "x"}',
        '{"initial": 1.0, "transition": [[1.0]]}',
        '{"initial": [0.5, 0.5], "transition": [[1.0]]}',
        '{"initial": [0.5, 0.4], "transition": [[1.0, 0.0], [0.0, 1.0]]}',
    ],
)
def test_a_damaged_law_is_said(content: str, tmp_path: Path) -> None:
    (tmp_path / LAW).write_text(content)
    with pytest.raises(DataError, match=LAW):
        law.read(Folder.at(str(tmp_path)))


def test_a_network_is_asked_in_its_own_table(world: Path, drawn: Path) -> None:
    size = read_manifest(str(drawn)).vocabulary.size
    denoiser = network(size)
    tokens_BL = torch.from_numpy(rows_of(world, 3))
    exact = law.read(Folder.at(str(drawn)))(denoiser.table_VD.detach())
    found = question.gaps(denoiser, tokens_BL, exact=exact, condition=AtSNR(snr=1e6), seed=0)
    assert found["entropy"].max() < 1e-6  # at this SNR the tokens are known
