"""The gate: an alias that moves for a better model, and for no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsl.vocabulary import Vocabulary
from infra import registry, tracking
from infra.storage import Folder
from pipelines import models
from pipelines.verb import TrackingConfig
from tests.pipelines import tiny
from tests.pipelines.evaluation.conftest import Refused, Run
from tests.pipelines.evaluation.small import LENGTH, network

GATE = "gate={model: a, metric: {kind: likelihood}, guards: [{kind: words, path: p, budget: 4}]}"
QUICK = ["likelihood.rows=100", "paths={p: {path: masked, budgets: [4]}}", "samples.traced=0"]
Judged = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def registered(world: Path, tmp_path: Path) -> str:
    """A registry with two versions of `gated`: a uniform posterior, and a trained model."""
    config = TrackingConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    flat = Folder.at(str(tmp_path / "weights"))
    models.save(flat, network(28, uniform=True), Vocabulary.char(), kind="mdlm", length=LENGTH)
    given = ["train.steps=150", "train.optimizer.lr=0.02", "objective=mdlm_flat", "name=trained"]
    data = f"data={world / 'data/shards'}"
    trained = tiny.execute("pretrain", data, f"root={tmp_path / 'runs'}", *given)
    for name, made in (("one", flat), ("two", Folder.at(trained["model"]))):
        handle = tracking.start(
            config, root=str(tmp_path), name=name, params={}, tags={}, config_yaml=""
        )
        models.register(made, "gated", tracking.finish(handle), tags={})
    return config.uri or ""


def test_the_champion_is_whoever_is_shown_to_be_better(
    run: Run, registered: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(name: str, version: int) -> tuple[dict[str, Any], str]:
        made = f"models={{a: 'models:/gated/{version}'}}"
        argv = [f"name={name}", made, GATE, f"tracking.uri={registered}", *QUICK]
        code, result, err = run(*argv)
        assert code == 0, err
        return result, err

    def champion() -> int | None:
        found = registry.get_alias("gated", "champion", registered)
        return found.version if found else None

    # Worse than independent tokens: there is no champion yet, and it does not become one.
    refused, err = judge("flat", 1)
    assert refused["champion"]["moved"] is False
    assert "a does not replace unigram: worse in nats per token" in err
    assert champion() is None

    # Interrupted between the alias and the result: the same command says what was decided.
    with monkeypatch.context() as patch:
        patch.setattr(registry, "set_alias", interrupted(registry.set_alias))
        with pytest.raises(AssertionError, match="interrupted"):
            judge("trained", 2)
    assert champion() == 2

    accepted, err = judge("trained", 2)
    assert accepted["champion"]["moved"] is True, err
    assert champion() == 2
    tags = registry.describe("models:/gated/2", registered).tags
    assert tags["evaluation"] == accepted["run_id"]
    assert tags["evaluation_report"] == accepted["report"]
    assert judge("trained", 2)[0] == accepted

    # From now on the champion is asked beside every candidate.
    beaten, err = judge("again", 1)
    assert beaten["champion"]["moved"] is False
    assert beaten["models"]["champion"]["version"] == "models:/gated/2"
    assert "a does not replace champion" in err
    page = (tmp_path / "again/report/evaluation.md").read_text()
    assert "Gate to champion" in page

    # The champion has nobody to beat.
    same, err = judge("itself", 2)
    assert "champion" not in same
    assert "models:/gated/2 is the champion already" in err
    assert champion() == 2


def interrupted(action: Callable[..., None]) -> Callable[..., None]:
    """What is done, and then not returned from."""

    def done(*given: Any) -> None:
        action(*given)
        raise KeyboardInterrupt

    return done


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["models={a: WORLD/dsl}", GATE, *QUICK], 2, ["models.a", "not in the registry"]),
        (["models={b: WORLD/dsl}", GATE, *QUICK], 2, ["gate.model is a"]),
        (
            ["models={a: 'models:/tiny/1'}", *QUICK,
             "gate={model: a, metric: {kind: words, path: p, budget: 5}}"],
            2, ["gate", "0 walks of a along p with 5 calls", "p 4"],
        ),
        (
            ["models={a: 'models:/tiny/1'}", *QUICK,
             "gate={model: a, metric: {kind: mauve, path: p, budget: 4}}"],
            2, ["gate", "mauve", "not measured"],
        ),
        (
            ["models={a: 'models:/tiny/1'}", *QUICK,
             "gate={model: a, metric: {kind: generative_perplexity, path: p, budget: 4}}"],
            2, ["gate", "judge"],
        ),
        (
            ["models={a: 'models:/tiny/1'}", *QUICK, "judges={words: {kind: ngram}}",
             "gate={model: a, metric: {kind: judged_bits_per_byte, path: p, budget: 4, judge: x}}"],
            2, ["gate", "the judge x", "Name one of: words"],
        ),
        (
            ["models={a: 'models:/tiny/1'}", *QUICK,
             "gate={model: a, metric: {kind: likelihood, view: hybrid_bound_7}}"],
            2, ["gate", "hybrid_bound_7", "hybrid_bound_4"],
        ),
    ],
)  # fmt: skip
def test_a_gate_that_cannot_be_asked_is_one_message(
    refused: Refused, argv: list[str], code: int, words: list[str]
) -> None:
    refused(argv, code, words)
