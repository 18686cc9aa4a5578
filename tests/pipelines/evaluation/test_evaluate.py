"""`evaluate` from the command line to the files it leaves, on tiny untrained models."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dsl.vocabulary import END_OF_TEXT, Vocabulary
from infra import config
from infra.storage import Folder
from infra.tracking import connect
from pipelines import evaluate, models
from pipelines.evaluation import held_out, metrics, questions
from pipelines.evaluation.ngram import NGram
from pipelines.evaluation.question import Question
from tests.pipelines import tiny
from tests.pipelines.evaluation.conftest import Refused, Run
from tests.pipelines.evaluation.small import LENGTH, network, rows_of

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

    # The folder of references holds what the report says: likelihood.rows, which are the more.
    kept = pq.read_table(folder / "samples/references")["row"].to_pylist()
    assert tables["data"]["references"].startswith(f"the first {len(kept)} rows of the split")
    assert len(kept) == 8

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

    # DSL models stand side by side at every SNR, from none on.
    converter = {(row["model"], row["state"]): row for row in tables["converter"]}
    assert list(converter) == [
        (model, state) for model in ("flat", "dsl") for state in ("SNR 0", "SNR 1", "SNR 4")
    ]
    nothing = converter["flat", "SNR 0"]
    assert nothing["token_weight"] == pytest.approx((1 - nothing["mask_weight"]) / 28, rel=1e-4)
    assert 0 < nothing["converter_entropy"] < math.log(29)

    # Every pair of a model and a path has its row, walked or with a reason.
    texts = {(row["model"], row.get("path"), row.get("budget")): row for row in tables["samples"]}
    # (one row for all the paths of one reason)
    assert len(texts) == 2 + 5 + 5 + (3 + 1) + (1 + 1)
    assert texts["mdlm", "sde, hybrid", None]["skipped"] == "mdlm was not trained on finite SNR"
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
    cells = {path.name for path in (folder / "samples").iterdir()}
    assert len(cells - {"unigram", "real", "references"}) == sum(
        "calls" in r for r in texts.values()
    )
    drawn = pq.read_table(folder / "samples/dsl-masked-4")
    assert drawn["row"].to_pylist() == list(range(6))
    tokens_NL = np.array(drawn["tokens"].to_pylist())
    assert drawn["text"].to_pylist() == [Vocabulary.char().decode(t) for t in tokens_NL.tolist()]
    row = texts["dsl", "masked", 4]
    assert row["distinct_2"] == metrics.distinct(tokens_NL, 2)
    assert row["entropy"] == pytest.approx(metrics.entropies(tokens_NL).mean())
    assert row["calls"] == pytest.approx(np.mean(drawn["calls"].to_pylist()))

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
    client = connect(f"sqlite:///{world / 'runs/mlflow.db'}")
    logged = client.get_run(made["run_id"])
    assert logged.info.status == "FINISHED"
    assert logged.data.metrics == pytest.approx(made["metrics"])
    assert logged.data.tags["model.dsl.version"] == "models:/tiny/1"
    shown = {file.path for file in client.list_artifacts(made["run_id"], "report")}
    drawn_plots = ("loss", "course", "words_by_calls", "snr", "converter", "schedule")
    assert {f"report/{name}.png" for name in drawn_plots} <= shown
    assert "report/report.html" in shown

    # The page begins with a verdict and a film through finite SNR, says nothing twice, and holds
    # the words of the models and no address.
    page = (folder / "report/report.html").read_text()
    assert re.search(r'class="verdict">Words in corpus: \w+ along .+ No gate decided', page)
    assert re.search(r'"One text as it is drawn":"\w+ along (sde|hybrid), \d calls"', page)
    assert page.count('"gamma":') > 4
    bodies = re.findall(r"<tbody>.*?</tbody>", page, re.DOTALL)
    assert len(bodies) == len(set(bodies))
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


def test_what_others_say_of_the_texts(run: Run, world: Path, tmp_path: Path) -> None:
    data = tiny.shards(tmp_path / "more", validation=0.5)
    own = f"{{kind: own, model: {world / 'flat_ar'}}}"
    code, _, err = run(
        f"data={data}",
        f"models={{flat: {world / 'flat'}}}",
        "paths={masked: {path: masked, budgets: [1], nucleus: {p: 0.5}}}",
        "samples={rows: 500, repeats: 2, traced: 0}",
        "batch=250",
        f"judge={own}",
        f"mauve={{featurizer: {{kind: own, model: {world / 'ar'}}}}}",
    )
    assert code == 0, err
    folder = tmp_path / "judged"
    tables = json.loads((folder / "report/evaluation.json").read_text())
    rows = {row["model"]: row for row in tables["samples"]}
    # Who has read them is told as exactly as who has written them.
    assert tables["readers"].keys() == {str(world / "flat_ar"), str(world / "ar")}
    assert tables["readers"][str(world / "flat_ar")]["weights"]
    assert len({reader["weights"] for reader in tables["readers"].values()}) == 2

    # A judge that finds every token as likely as any other; each token counts, first and last too.
    for row in rows.values():
        assert row["perplexity"] == pytest.approx(28, rel=1e-4)
    judged = pq.read_table(folder / "parts/judged/flat-masked-1")
    assert judged["tokens_N"].to_pylist() == [LENGTH] * 1000

    # Real text is drawn once, without replacement, and apart from what it is compared with.
    kept = {
        name: np.array(pq.read_table(folder / f"samples/{name}")["tokens"].to_pylist())
        for name in ("references", "real")
    }
    assert {name: len(rows_NL) for name, rows_NL in kept.items()} == {
        "references": 500,
        "real": 500,
    }
    found = held_out.read(data, "validation", 1000, corpus_rows=100, seed=0).rows_NL
    assert (np.concatenate([kept["references"], kept["real"]]) == found).all()
    assert rows["real"]["mauve"] > rows["flat"]["mauve"] + 0.2
    assert rows["flat"]["mauve_stderr"] >= 0  # over the repeats
    assert "mauve_stderr" not in rows["real"] or math.isnan(
        rows["real"]["mauve_stderr"] or math.nan
    )
    assert rows["flat"]["nucleus"] == 0.5
    assert "stand-in" in (folder / "report/evaluation.md").read_text()


def test_the_training_split_judges(run: Run, world: Path, tmp_path: Path) -> None:
    code, made, err = run(
        f"models={{flat: {world / 'flat'}}}",
        "judge={kind: ngram, order: 3}",
        "judges.short={kind: ngram, order: 1}",
        f"judges.ar={{kind: own, model: {world / 'flat_ar'}}}",
        "paths={masked: {path: masked, budgets: [1]}}",
    )
    assert code == 0, err
    tables = json.loads((tmp_path / "judged/report/evaluation.json").read_text())
    rows = {row["model"]: row for row in tables["samples"]}
    data = held_out.read(str(world / "data/shards"), "validation", 6, corpus_rows=20_000, seed=0)
    drawn = pq.read_table(tmp_path / "judged/samples/real")
    tokens_NL = np.array(drawn["tokens"].to_pylist())
    nats = NGram(data.training_RL, 28, 3).nats(tokens_NL)
    assert rows["real"]["perplexity"] == pytest.approx(math.exp(nats.mean()))
    texts = drawn["text"].to_pylist()
    written = sum(len(text.replace(END_OF_TEXT, "")) for text in texts)
    expected = nats.sum() / math.log(2) / written
    assert rows["real"]["judged_bits_per_byte"] == pytest.approx(expected)
    assert rows["real"]["perplexity"] < rows["unigram"]["perplexity"]
    assert made["metrics"]["real/judged_bits_per_byte"] == pytest.approx(expected)

    # Others beside it, by their names.
    alone = NGram(data.training_RL, 28, 1).nats(tokens_NL).sum() / math.log(2) / written
    assert rows["real"]["bits_per_byte_short"] == pytest.approx(alone)
    uniform = math.log2(28) * tokens_NL.size / written
    assert rows["real"]["bits_per_byte_ar"] == pytest.approx(uniform, rel=1e-5)
    assert made["metrics"]["flat/masked/1/bits_per_byte_ar"] > 4
    shown = {file.name for file in (tmp_path / "judged/report").iterdir()}
    assert "bits_per_byte_short_by_calls.png" in shown
    assert "Bits per byte by ar" in (tmp_path / "judged/report/evaluation.md").read_text()


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
    assert {"evaluation.json", "evaluation.md", "report.html", "nll.png", "snr.png"} <= shown
    assert not {"loss.png", "course.png", "schedule.png"} & shown
    assert not [name for name in shown if "_by_" in name]


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ("a: WORLD/dls", 3, ["models.a", "no such model", "Did you mean", "/dsl?"]),
        ("a: 'models:/tyny@candidate'", 3, ["no model is named tyny", "tiny"]),
        ("a: 'models:/tiny@champion'", 3, ["no alias champion"]),
        ("a: WORLD/foreign", 3, ["models.a", "257 tokens, the data has 28"]),
        ("", 2, ["models must name"]),
        ("real: WORLD/dsl", 2, ["real"]),
        ("champion: WORLD/dsl", 2, ["champion"]),
        ("a/b: WORLD/dsl", 2, ["a/b"]),
    ],
)
def test_a_bad_model_is_one_message(
    refused: Refused, model: str, code: int, words: list[str]
) -> None:
    refused([f"models={{{model}}}"], code, words)


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        ("likelihood.rows=100000", 2, ["likelihood.rows", "100000 of"]),
        ("samples.rows=100000", 2, ["samples.rows", "100000 of"]),
        ("samples.rows=1", 2, ["samples", "at least 2"]),
        ("split=trian", 2, ["split", "trian"]),
        ("data=WORLD/nowhere", 3, ["no finished shards"]),
        ("paths.p.path=maskd", 2, ["maskd", "masked"]),
        (f"paths={HYBRID} paths.hybrid.budgets=[4]", 2, ["2 + 3", "budget is 4"]),
        ("paths={p: {path: masked, budgets: [0]}}", 2, ["at least one call"]),
        ("likelihood.gamma_max=-1", 2, ["gamma_max"]),
        ("states.revealed=[1.0]", 2, ["revealed"]),
        ("likelihood.gamma_star=[4,9,4]", 2, ["likelihood", "gamma_star holds 4 twice"]),
        ("drafts.revealed=[0.5,0.5]", 2, ["drafts", "revealed holds 0.5 twice"]),
        ("states.revealed=[0.5,0.25,0.5]", 2, ["states", "revealed holds 0.5 twice"]),
        ("states.gammas=[1,4,1.0000001]", 2, ["states", "gammas holds 1 twice"]),
        ("robustness.replaced=[0.1,0.10000001]", 2, ["robustness", "replaced holds 0.1 twice"]),
        ("samples.temperature=0", 2, ["temperature"]),
        ("samples.nucleus={p: 2}", 2, ["nucleus"]),
        ("mauve={}", 2, ["MAUVE", "below 500", "samples.rows is 6"]),
        ("judge={kind: hub, model: WORLD/nobody}", 3, ["judge.model", "nobody"]),
        ("judge={kind: own, model: WORLD/dsl}", 3, ["judge.model", "only an ar model can judge"]),
        ("judge={kind: ngram, order: 0}", 2, ["judge", "at least 1"]),
        ("judge={kind: ngram, order: 33}", 2, ["judge.order", "At most 13"]),
        ("judges={a/b: {kind: ngram}}", 2, ["a/b"]),
        ("judges={a: {kind: ngram, order: 33}}", 2, ["judges.a.order", "At most 13"]),
        (
            "judges={a: {kind: own, model: WORLD/dsl}}",
            3, ["judges.a.model", "only an ar model", "judges.a.kind=hub"],
        ),
        ("judges={a: {kind: own, model: WORLD/judge}}", 3, ["/judge: no such model"]),
        ("published=[owt]", 2, ["published", "owt_mauve"]),
        (
            "models={a: WORLD/dsl, a-b: WORLD/dsl} paths={b-c: {path: masked}, c: {path: masked}}",
            2, ["two walks would be named a-b-c"],
        ),
        (
            "law={rows: 9, paths: [p]} paths={p: {path: masked}}",
            2, ["law.rows is 9", "only 6 texts"],
        ),
        (
            "law={rows: 19, paths: [p]} paths={p: {path: masked}} samples.rows=20",
            2, ["law.rows is 19", "at least 20 texts"],
        ),
        (
            "law={rows: 2, paths: [maskd]} paths={masked: {path: masked}}",
            2, ["law.paths", "no path is named maskd", "Did you mean masked?"],
        ),
        (
            "mauve={buckets: 600} samples.rows=512",
            2, ["mauve.buckets", "600 are too many for samples.rows=512"],
        ),
    ],
)  # fmt: skip
def test_a_bad_setting_is_one_message(
    refused: Refused, given: str, code: int, words: list[str]
) -> None:
    argv = re.split(r" (?=paths[.=]|samples.)", given)
    refused(["models={a: WORLD/dsl}", *argv], code, words)


@pytest.mark.parametrize("key", ["judge", "judges.other", "mauve.featurizer"])
def test_a_reader_of_other_rows_is_told_by_its_own_key(
    run: Run, world: Path, tmp_path: Path, key: str
) -> None:
    longer = Folder.at(str(tmp_path / "longer"))
    ar = network(28, causal=True)
    models.save(longer, ar, Vocabulary.char(), kind="ar", length=2 * LENGTH)
    data = tiny.shards(tmp_path / "more", validation=0.5)
    argv = [f"data={data}", "samples.rows=500", f"models={{a: {world / 'dsl'}}}"]
    code, _, err = run(*argv, f"{key}={{kind: own, model: {longer.url}}}")
    assert code == 3
    assert f"{key}.model: {longer.url} was trained on rows of 64 tokens" in err


def test_every_question_has_a_file_and_an_entry_in_the_list() -> None:
    files = {path.stem for path in Path(questions.__file__).parent.glob("*.py")} - {"__init__"}
    listed = [type(question).__module__.rpartition(".")[2] for question in questions.QUESTIONS]
    assert sorted(listed) == sorted(files)


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


@pytest.mark.parametrize("preset", ["quickstart", "small", "frequent", "text8", "owt"])
def test_every_preset_can_be_read(preset: str) -> None:
    found = config.load(
        evaluate.EvaluateConfig, verb="evaluate", argv=[preset], presets=tiny.PRESETS
    )
    length = {"text8": 256, "owt": 1024}.get(preset, 64)
    assert all(entry.walks(length) for entry in found.paths.values())
    assert found.name == f"{preset}-evaluation"


def test_what_a_question_shows_has_a_heading_of_its_own() -> None:
    """Its tables and plots are folded under its title on the page."""
    base = vars(Question)
    shows = [
        question.title
        for question in questions.QUESTIONS
        if any(getattr(type(question), name) is not base[name] for name in ("tables", "plots"))
    ]
    assert all(shows)
    assert len(shows) == len(set(shows))
