"""`evaluate` from the command line to the files it leaves, on tiny untrained models."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsl import DenoiserConfig, DiTConfig, paths
from dsl.denoiser import Denoiser
from dsl.likelihood import path_integral
from dsl.vocabulary import Vocabulary
from infra import command, config, tracking
from infra.logger import connect
from infra.shards import read_manifest
from infra.storage import Folder
from infra.tracking import TrackingConfig
from pipelines import evaluate, models
from pipelines.evaluation import held_out, measures, metrics
from pipelines.evaluation.measures import LikelihoodConfig, PathConfig, SamplesConfig
from pipelines.runs import DATA_ERRORS
from tests.pipelines import tiny

LENGTH = 32
HYBRID = """{
    hybrid: {path: {kind: hybrid, first: {kind: sentence_sde, gamma_max: 9}, second: masked,
                    split: [2, 3]}},
}"""
PATHS = f"""{{
    masked: {{path: masked, budgets: [2, 4]}},
    sde: {{path: {{kind: sentence_sde, gamma_max: 9}}, budgets: [4]}},
    {HYBRID.strip("{}")}
    in_order: {{path: {{kind: order, order: left_to_right}}}},
}}"""
SETTINGS = [
    "name=judged", "batch=5", "split=validation",
    "likelihood={rows: 8, samples: 2, steps: 2, gamma_max: 9, gamma_star: [4, 9]}",
    "states={revealed: [0, 0.5], gammas: [1, 4]}", "samples={rows: 6}",
]  # fmt: skip
Run = Callable[..., tuple[int, dict[str, Any], str]]


def network(tokens: int, *, causal: bool = False, uniform: bool = False) -> Denoiser:
    """A fresh head is zero, so without the skip its posterior is uniform whatever the state."""
    torch.manual_seed(0)
    backbone = DiTConfig(
        tokens=tokens, width=16, blocks=1, heads=2, cond_dim=8, dropout=0.0, causal=causal
    )
    denoiser = Denoiser(DenoiserConfig(backbone=backbone, embed_dim=8, skip=not uniform))
    if not uniform:
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return denoiser.eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, a model of each kind, and one registered run: no test changes it."""
    world = tmp_path_factory.mktemp("world")
    data = tiny.shards(world / "data")
    vocabulary = models.vocabulary_of(read_manifest(data), Folder.at(data))

    def save(name: str, kind: str, vocabulary: Vocabulary = vocabulary, **how: bool) -> Folder:
        folder = Folder.at(str(world / name))
        denoiser = network(vocabulary.size, **how)
        models.save(folder, denoiser, vocabulary, kind=kind, length=LENGTH)
        return folder

    for kind in ("mdlm", "dsl", "ar"):
        save(kind, kind, causal=kind == "ar")
    save("flat", "dsl", uniform=True)
    save("flat_ar", "ar", uniform=True, causal=True)
    save("foreign", "dsl", Vocabulary.train_bpe(["x"], 257))
    made = save("runs/made/model", "dsl")
    handle = tracking.start(
        TrackingConfig(),
        root=str(world / "runs"),
        name="made",
        params={},
        tags={},
        config_yaml="finetune: {}",
    )
    with (world / "runs/made/metrics.jsonl").open("w") as journal:
        journal.writelines(
            json.dumps({"step": s, "time": 1.0, "loss": 3 / s, "validation/loss": 3 / s}) + "\n"
            for s in (1, 2, 3)
        )
    handle = tracking.finish(handle)
    models.register(made, "tiny", handle, tags={})
    return world


@pytest.fixture
def run(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit code, what was made, stderr) of `evaluate` with these settings, into `tmp_path`."""

    def run(*argv: str) -> tuple[int, dict[str, Any], str]:
        code = command.run(
            "evaluate",
            evaluate.EvaluateConfig,
            plan=evaluate.plan,
            execute=evaluate.execute,
            presets=tiny.PRESETS,
            doc="",
            argv=[
                *SETTINGS,
                f"data={world / 'data/shards'}",
                f"root={tmp_path}",
                f"tracking.uri=sqlite:///{world / 'runs/mlflow.db'}",
                *argv,
            ],
            data_errors=DATA_ERRORS,
        )
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if code == 0 else {}, err

    return run


def test_every_kind_of_model_through_one_door(run: Run, world: Path) -> None:
    given = {kind: world / kind for kind in ("mdlm", "ar", "flat")}
    chosen = ", ".join(f"{name}: {address}" for name, address in given.items())
    argv = [f"models={{{chosen}, dsl: 'models:/tiny@candidate'}}", f"paths={PATHS}"]
    argv.append(f"root={world / 'runs'}")  # where the run of the registered model is
    code, made, err = run(*argv)
    assert code == 0, err
    folder = world / "runs/judged"
    tables = json.loads((folder / "report/evaluation.json").read_text())

    # Where the models came from.
    assert tables["models"]["dsl"]["version"] == "models:/tiny/1"
    assert tables["models"]["dsl"]["run"] == str(world / "runs/made")
    assert [tables["models"][name]["kind"] for name in given] == ["mdlm", "ar", "dsl"]

    # A uniform posterior costs log V a token on every view, and the unigram less.
    views = {(row["model"], row["view"]): row for row in tables["likelihood"]}
    assert [view for model, view in views if model == "dsl"] == [
        "endpoint_bound",
        "path_integral",
        "hybrid_bound_4",
        "hybrid_bound_9",
    ]
    flat = views["flat", "endpoint_bound"]
    assert flat["nats_per_token"] == pytest.approx(math.log(28), rel=1e-5)
    assert flat["perplexity"] == pytest.approx(28, rel=1e-4)
    assert views["unigram", "exact"]["nats_per_token"] < math.log(28)
    rows_NL = rows_of(world, 8)
    text = metrics.text_bytes(rows_NL, Vocabulary.char()).sum()
    bits = math.log2(28) * rows_NL.size / text
    assert flat["bits_per_byte"] == pytest.approx(bits, rel=1e-5)

    # Every pair of a model and a path has its row, walked or with a reason.
    texts = {(row["model"], row.get("path"), row.get("budget")): row for row in tables["samples"]}
    assert len(texts) == 2 + 4 * 5
    assert texts["real", None, None]["words"] > 0.95
    assert {key[1] for key, row in texts.items() if "skipped" not in row and key[0] == "mdlm"} == {
        "masked",
        "in_order",
    }
    assert [key[1:] for key, row in texts.items() if "skipped" not in row and key[0] == "ar"] == [
        ("in_order", LENGTH)
    ]
    assert texts["dsl", "hybrid", 5]["calls"] == 5

    # All texts are there, and the figures are those of the texts.
    files = sorted((folder / "samples").iterdir())
    assert len(files) == sum("calls" in row for row in texts.values())
    lines = list(map(json.loads, (folder / "samples/dsl-masked-4.jsonl").read_text().splitlines()))
    assert [line["row"] for line in lines] == list(range(6))
    tokens_NL = np.array([line["tokens"] for line in lines])
    assert texts["dsl", "masked", 4]["distinct_2"] == metrics.distinct(tokens_NL, 2)
    assert texts["dsl", "masked", 4]["entropy"] == metrics.entropy(tokens_NL).value

    # The last line, the tables on paper and MLflow agree with the JSON.
    assert made["metrics"]["flat/endpoint_bound/nats_per_token"] == flat["nats_per_token"]
    assert made["metrics"]["dsl/SNR 4/squared_error"] == next(
        row["squared_error"]
        for row in tables["states"]
        if (row["model"], row["state"]) == ("dsl", "SNR 4")
    )
    paper = (folder / "report/evaluation.md").read_text()
    for row in tables["likelihood"]:
        bits, error = row["bits_per_byte"], row["bits_per_byte_stderr"]
        assert f"| {bits:.4f} ± {error:.4f}" in paper
        assert f"| {bits:.4f} ± {error:.4f}" in err
    client = connect(f"sqlite:///{world / 'runs/mlflow.db'}")
    logged = client.get_run(made["run_id"])
    assert logged.info.status == "FINISHED"
    assert logged.data.metrics == pytest.approx(made["metrics"])
    assert logged.data.tags["model.dsl.version"] == "models:/tiny/1"
    shown = {file.path for file in client.list_artifacts(made["run_id"], "report")}
    assert {f"report/{name}.png" for name in ("loss", "quality", "snr")} <= shown
    assert "report/report.html" in shown

    # The page holds the words of the models and no address.
    page = (folder / "report/report.html").read_text()
    assert "http:" not in page
    assert "https:" not in page

    # The same command again answers at once; with another model behind the name it refuses.
    assert run(*argv)[1] == made
    result = json.loads((folder / "result.json").read_text())
    result["models"]["dsl"]["version"] = "models:/tiny/0"
    (folder / "result.json").write_text(json.dumps(result))
    code, _, err = run(*argv)
    assert code == 2
    assert "existing=restart" in err


def rows_of(world: Path, rows: int) -> np.ndarray:
    return held_out.read(
        str(world / "data/shards"), "validation", rows, corpus_rows=100, seed=0
    ).rows_NL


def test_an_unreachable_server_does_not_stop_it(run: Run, world: Path, tmp_path: Path) -> None:
    with tiny.bare():
        code, made, err = run(
            f"models={{dsl: {world / 'flat'}}}",
            "samples={rows: 2}",
            "tracking.uri=http://127.0.0.1:9",
        )
    assert code == 0, err
    assert made["run_id"] is None
    # Nothing was walked and no run is known, so there is nothing to draw of either.
    shown = {file.name for file in (tmp_path / "judged/report").iterdir()}
    assert shown == {"evaluation.json", "evaluation.md", "report.html", "snr.png"}


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["models={a: WORLD/dls}"], 3, ["models.a", "no such model", "Did you mean", "/dsl?"]),
        (["models={a: 'models:/tyny@candidate'}"], 3, ["no model is named tyny", "tiny"]),
        (["models={a: 'models:/tiny@champion'}"], 3, ["no alias champion"]),
        (["models={a: WORLD/foreign}"], 3, ["models.a", "257 tokens, the data has 28"]),
        (["models={}"], 2, ["models must name"]),
        (["models={real: WORLD/dsl}"], 2, ["real"]),
        (["models={a/b: WORLD/dsl}"], 2, ["a/b"]),
        (["models={a: WORLD/dsl}", "likelihood.rows=100000"], 2, ["likelihood.rows", "100000 of"]),
        (["models={a: WORLD/dsl}", "samples.rows=100000"], 2, ["samples.rows", "100000 of"]),
        (["models={a: WORLD/dsl}", "samples.rows=1"], 2, ["samples", "at least 2"]),
        (["models={a: WORLD/dsl}", "split=trian"], 2, ["split", "trian"]),
        (["models={a: WORLD/dsl}", "data=WORLD/nowhere"], 3, ["no finished shards"]),
        (["models={a: WORLD/dsl}", "paths.p.path=maskd"], 2, ["maskd", "masked"]),
        (
            ["models={a: WORLD/dsl}", f"paths={HYBRID}", "paths.hybrid.budgets=[4]"],
            2,
            ["2 + 3", "budget is 4"],
        ),
        (
            ["models={a: WORLD/dsl}", "paths={p: {path: masked, budgets: [0]}}"],
            2,
            ["at least one call"],
        ),
        (["models={a: WORLD/dsl}", "likelihood.gamma_max=-1"], 2, ["gamma_max"]),
        (["models={a: WORLD/dsl}", "states.revealed=[1.0]"], 2, ["revealed"]),
        (["models={a: WORLD/dsl}", "samples.temperature=0"], 2, ["temperature"]),
        (["models={a: WORLD/dsl}", "samples.nucleus={p: 2}"], 2, ["nucleus"]),
    ],
)
def test_bad_input_is_one_message(
    run: Run, world: Path, tmp_path: Path, argv: list[str], code: int, words: list[str]
) -> None:
    found, _, err = run(*(argument.replace("WORLD", str(world)) for argument in argv))
    assert found == code, err
    assert [word for word in words if word not in err] == []
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "judged").exists()


def test_an_empty_split_and_another_length_are_refused(
    run: Run, world: Path, tmp_path: Path
) -> None:
    argv = [f"models={{a: {world / 'dsl'}}}"]
    data = tiny.shards(tmp_path / "bare", validation=0, length=16)
    code, _, err = run(*argv, f"data={data}")
    assert code == 2
    assert "validation" in err
    code, _, err = run(*argv, f"data={data}", "split=test")
    assert code == 3
    assert "trained on rows of 32 tokens, the data has 16" in err


def test_a_dry_run_counts_and_touches_nothing(run: Run, world: Path, tmp_path: Path) -> None:
    code, made, err = run(f"models={{a: {world / 'dsl'}}}", f"paths={PATHS}", "--dry-run")
    assert code == 0, err
    assert made["texts_per_model"] == 6 * 5
    assert made["calls_per_text_on_all_paths"] == 2 + 4 + 4 + 5 + LENGTH
    assert not (tmp_path / "judged").exists()


def test_a_killed_evaluation_starts_again(run: Run, world: Path, tmp_path: Path) -> None:
    argv = [f"models={{a: {world / 'flat'}}}", "samples={rows: 2}"]
    assert run(*argv)[0] == 0
    first = (tmp_path / "judged/report/evaluation.json").read_text()
    (tmp_path / "judged/result.json").unlink()
    shutil.rmtree(tmp_path / "judged/report")
    assert run(*argv)[0] == 0
    assert (tmp_path / "judged/report/evaluation.json").read_text() == first
    code, _, err = run(*argv, "seed=1")
    assert code == 2
    assert "seed" in err


@pytest.mark.parametrize("preset", [path.stem for path in sorted(tiny.PRESETS.glob("*.yaml"))])
def test_every_preset_can_be_read(preset: str) -> None:
    found = config.load(
        evaluate.EvaluateConfig, verb="evaluate", argv=[preset], presets=tiny.PRESETS
    )
    length = {"quickstart": 64, "text8": 256, "owt": 1024}[preset]
    assert all(entry.calls(length) for entry in found.paths.values())
    assert found.name == f"{preset}-evaluation"


# --- measures ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens_NL(world: Path) -> torch.Tensor:
    return torch.from_numpy(rows_of(world, 7))


ASKED = LikelihoodConfig(
    rows=7, samples=3, steps=3, gamma_max=9, gamma_star=(4, 9), contours=("diffusion", "staggered")
)


@pytest.mark.parametrize("nth", range(5), ids=lambda n: measures.views("dsl", ASKED, 0)[n].name)
def test_likelihoods_do_not_depend_on_batches(nth: int, tokens_NL: torch.Tensor) -> None:
    denoiser = network(28)
    view = measures.views("dsl", ASKED, 1)[nth]
    whole = measures.nats(view, denoiser, tokens_NL, batch=7)
    parts = measures.nats(view, denoiser, tokens_NL, batch=3)
    assert parts == pytest.approx(whole, rel=1e-5)
    reseeded = measures.views("dsl", ASKED, 2)[nth]
    other = measures.nats(reseeded, denoiser, tokens_NL, batch=7)
    assert np.abs(other - whole).min() > 1e-6


def test_errors_of_a_uniform_posterior_in_closed_form(tokens_NL: torch.Tensor) -> None:
    denoiser = network(28, uniform=True)
    table_VD = denoiser.table_VD.detach()
    squared_NL = (table_VD[tokens_NL] - table_VD.mean(0)).square().sum(-1)
    errors = measures.errors_at(denoiser, tokens_NL, 4.0, seed=0, batch=3)
    assert errors.nats_N == pytest.approx(np.full(7, math.log(28)), rel=1e-5)
    assert errors.squared_N == pytest.approx(squared_NL.mean(1).numpy(), rel=1e-4)


def test_errors_agree_with_the_path_integral(tokens_NL: torch.Tensor) -> None:
    denoiser = network(28)
    gammas = np.linspace(0.02, 1.98, 50)
    errors = [
        measures.errors_at(denoiser, tokens_NL, float(gamma), seed=n, batch=7).squared_N.mean()
        for n, gamma in enumerate(gammas)
    ]
    integral = path_integral(denoiser, tokens_NL, gamma_max=2.0, steps=50, seed=5, grid="linear")
    # Both are means over as many draws of the same noise.
    stderr = math.sqrt(2 * integral.stderr_B.square().sum().item()) / len(integral.mean_B)
    assert stderr < 0.05
    assert np.mean(errors) == pytest.approx(integral.mean_B.mean().item(), abs=4 * stderr)


def test_a_share_of_the_tokens_is_revealed(tokens_NL: torch.Tensor) -> None:
    class Watched:
        """Remembers the state that it is asked about."""

        def __init__(self) -> None:
            self.inner = network(28)
            self.table_VD = self.inner.table_VD

        def __call__(self, state: Any) -> Any:
            self.state = state
            return self.inner(state)

    denoiser = Watched()
    whole = measures.errors_revealed(denoiser, tokens_NL, 0.25, seed=0, batch=7)
    assert (denoiser.state.revealed_BL.sum(1) == LENGTH // 4).all()
    assert denoiser.state.masked_BL.sum(1).eq(LENGTH * 3 // 4).all()
    parts = measures.errors_revealed(denoiser, tokens_NL, 0.25, seed=0, batch=2)
    assert parts.nats_N == pytest.approx(whole.nats_N, rel=1e-5)


def test_texts_do_not_depend_on_batches() -> None:
    settings = SamplesConfig(rows=7)
    path = paths.Hybrid(paths.SentenceSDE(gamma_max=9.0), paths.Masked(), split=(2, 2))
    drawn = [
        measures.draw(network(28), path, budget=4, length=8, config=settings, seed=1, batch=batch)
        for batch in (7, 3)
    ]
    assert (drawn[0].tokens_NL == drawn[1].tokens_NL).all()
    assert drawn[0].calls == drawn[1].calls == 4


def test_who_can_walk_where() -> None:
    sde, masked = paths.SentenceSDE(gamma_max=9.0), paths.Masked()
    refused = {
        (kind, name)
        for kind in measures.REFUSALS
        for name, path in {
            "sde": sde,
            "masked": masked,
            "hybrid": paths.Hybrid(sde, masked, split=(2, 2)),
            "only_masked": paths.Hybrid(sde, masked, split=(0, 4)),
            "in_order": paths.Order("left_to_right"),
        }.items()
        if measures.refusal(kind, path, 4, 4)
    }
    assert refused == {
        ("mdlm", "sde"),
        ("mdlm", "hybrid"),
        ("ar", "sde"),
        ("ar", "masked"),
        ("ar", "hybrid"),
        ("ar", "only_masked"),
    }
    assert measures.refusal("ar", paths.Order("left_to_right"), 3, 4)
    assert PathConfig(path=masked).calls(11) == (11,)
    assert PathConfig(path=paths.Hybrid(sde, masked, split=(2, 3))).calls(11) == (5,)


def test_the_corpus_is_whole_and_in_order(world: Path) -> None:
    url = str(world / "data/shards")
    manifest = read_manifest(url)
    found = held_out.read(url, "validation", 2, corpus_rows=10**6, seed=0)
    train = " ".join(tiny.documents()).split()
    # The split ends somewhere in the last fifth, and the very first word may have been cut.
    assert set(train[1 : len(train) * 8 // 10]) <= found.words <= set(train)
    # There is no j in numbers: the least frequent of V = 28 has a count of one in T + V.
    assert 1 / found.unigram.p_V.min() == pytest.approx(manifest.rows("train") * LENGTH + 28)
    few = held_out.read(url, "validation", 2, corpus_rows=3, seed=0)
    assert 1 / few.unigram.p_V.min() == pytest.approx(3 * LENGTH + 28)
    assert few.words < found.words
