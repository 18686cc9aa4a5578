"""`generate` from the command line to the files it leaves, on a tiny untrained model."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import dsl
from dsl.dit import DiTConfig
from dsl.paths import from_dict
from infra.errors import ConfigError, DataError, InfraError
from infra.storage import Folder
from pipelines import generate, models, prompts
from pipelines.examples import toys
from pipelines.watch import TerminalRecorder
from tests.pipelines.test_film import References

LENGTH = 12
HYBRID = "{kind: hybrid, first: {kind: sentence_sde, gamma_max: 9}, second: masked, split: [3, 5]}"
RANDOM, IN_ORDER = "{kind: order, order: random}", "{kind: order, order: left_to_right}"
Run = Callable[..., tuple[int, dict[str, Any], str]]


def tiny(tokens: int, *, causal: bool = False) -> dsl.Denoiser:
    torch.manual_seed(0)
    backbone = DiTConfig(
        tokens=tokens, width=16, blocks=1, heads=2, cond_dim=8, dropout=0.0, causal=causal
    )
    denoiser = dsl.Denoiser(dsl.DenoiserConfig(backbone=backbone, embed_dim=4))
    # A fresh head is zero: its posterior would be uniform whatever the state.
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return denoiser


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, vocabulary = tmp_path_factory.mktemp("model"), dsl.Vocabulary.char()
    denoiser = tiny(vocabulary.size)
    models.save(Folder.at(str(folder)), denoiser, vocabulary, kind="dsl", length=LENGTH)
    return folder


@pytest.fixture
def run(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit code, what was made, stderr) of `generate` with these settings."""

    def run(*settings: str) -> tuple[int, dict[str, Any], str]:
        named = any(s.startswith(("model=", "toy=")) for s in settings)
        argv = [*settings, f"out={tmp_path}/out", f"root={tmp_path}/runs"]
        given = argv if named else [f"model={model}", *argv]
        with mock.patch.object(sys, "argv", ["generate", *given]):
            code = generate.main()
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if code == 0 else {}, err

    return run


def rows_of(made: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(made["jsonl"]).read_text().splitlines()]


def test_draws_freely(run: Run) -> None:
    code, made, _ = run("rows=3")
    rows = rows_of(made)
    assert code == 0
    assert [row["row"] for row in rows] == [0, 1, 2]
    assert all(len(row["tokens"]) == LENGTH for row in rows)
    assert all(1 <= row["calls"] <= row["budget"] == LENGTH for row in rows)
    assert rows[0]["path"] == {"alpha": "linear", "kind": "masked"}
    assert len({row["text"] for row in rows}) == 3
    text = Path(made["txt"]).read_text()
    assert all(f"--- row {row['row']}\n{row['text']}\n" in text for row in rows)


def test_neither_batch_nor_neighbours_change_a_text(run: Run) -> None:
    def drawn(*settings: str) -> list[tuple[Any, ...]]:
        return [(row["row"], row["text"], row["calls"]) for row in rows_of(run(*settings)[1])]

    whole, parts = drawn("rows=5", "batch=5"), drawn("rows=5", "batch=2")
    later, other = drawn("rows=2", "first_row=3"), drawn("rows=5", "seed=1")
    assert whole == parts
    assert whole[3:] == later
    assert whole != other


def test_a_prompt_is_continued(run: Run) -> None:
    for row in rows_of(run("text='the cat'", "length=10")[1]):
        assert row["text"].startswith("the cat")
        assert len(row["tokens"]) == 10


@pytest.mark.parametrize("path", ["masked", HYBRID, RANDOM])
def test_only_blanks_are_filled(run: Run, path: str) -> None:
    rows = rows_of(run("text='a__d e_g'", f"path={path}")[1])
    encode = dsl.Vocabulary.char().encode
    for row in rows:
        kept = {at: token for at, token in enumerate(row["tokens"]) if at not in (1, 2, 6)}
        wanted = {at: encode([c])[0][0] for at, c in enumerate("a__d e_g") if c != "_"}
        assert kept == wanted
        assert "_" not in row["text"]
    assert len({row["text"] for row in rows}) > 1


def test_a_draft_may_be_overruled_and_is_heeded_at_high_snr(run: Run) -> None:
    def agreement(snr: float) -> float:
        rows = rows_of(run("mode=correct", "text='teh _ cat'", f"snr={snr}", "rows=16")[1])
        draft = dsl.Vocabulary.char().encode(["teh  cat"])[0]
        kept = [row["tokens"][:4] + row["tokens"][5:] for row in rows]
        return sum(a == b for row in kept for a, b in zip(row, draft, strict=True)) / (8 * 16)

    assert agreement(0.01) < 0.9
    assert agreement(0.01) < agreement(300)


def test_a_hybrid_takes_the_calls_that_it_splits(run: Run) -> None:
    code, made, _ = run(f"path={HYBRID}")
    assert (code, rows_of(made)[0]["budget"]) == (0, 8)
    code, _, err = run(f"path={HYBRID}", "budget=9")
    assert code == 2
    assert "3 + 5 = 8 calls but the budget is 9" in err


def test_an_input_file_of_texts_of_many_lengths(run: Run, tmp_path: Path) -> None:
    lines = ["a_c", "", "abc__f", "abc__f"]
    (tmp_path / "in.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    plain = rows_of(run(f"input={tmp_path}/in.txt", "rows=2")[1])
    assert [len(row["tokens"]) for row in plain] == [3, 3, 12, 12, 6, 6, 6, 6]
    objects = rows_of(run(f"input={tmp_path}/in.jsonl", "rows=2")[1])
    assert [row["text"] for row in plain] == [row["text"] for row in objects]


def test_an_input_file_has_the_lines_that_its_writer_saw(tmp_path: Path) -> None:
    """Not those of `splitlines`, which takes half a dozen other characters for line ends."""
    texts = ["a\u2028b\x85c", "d\x0ce\x1cf", "", " g "]
    plain, objects = tmp_path / "in.txt", tmp_path / "in.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    for mark in ("", "\ufeff"):  # which editors of Windows put in front
        for end in ("\n", "\r\n"):
            plain.write_bytes((mark + "".join(text + end for text in texts)).encode())
            objects.write_bytes((mark + f"{end}  {end}".join(lines)).encode())
            assert [text for _, text in prompts.read(str(plain))] == texts
            found = prompts.read(str(objects))
            assert [text for _, text in found] == texts
            assert [place.rpartition(" ")[2] for place, _ in found] == ["1", "3", "5", "7"]


def test_options_reach_the_sampler(run: Run) -> None:
    sharp = rows_of(run("rows=4", "temperature=1e-5", f"path={IN_ORDER}")[1])
    nucleus = rows_of(run("rows=4", "nucleus.p=1e-6", f"path={IN_ORDER}")[1])
    assert len({row["text"] for row in nucleus}) == 1
    assert [row["text"] for row in sharp] == [row["text"] for row in nucleus]


def test_an_autoregressive_model_goes_from_left_to_right(run: Run, tmp_path: Path) -> None:
    vocabulary, folder = dsl.Vocabulary.char(), tmp_path / "ar"
    denoiser = tiny(vocabulary.size, causal=True)
    models.save(Folder.at(str(folder)), denoiser, vocabulary, kind="ar", length=LENGTH)
    code, made, _ = run(f"model={folder}", "rows=1")
    assert (code, rows_of(made)[0]["path"]["order"]) == (0, "left_to_right")
    code, _, err = run(f"model={folder}", "path=masked")
    assert code == 2
    assert "left to right" in err


def test_weights_without_a_vocabulary_need_one_that_fits(tmp_path: Path) -> None:
    vocabulary = dsl.Vocabulary.char()
    vocabulary.save(tmp_path)
    bare = models.Model(
        denoiser=tiny(vocabulary.size),
        vocabulary=None,
        kind="mdlm",
        length=None,
        address="mdlm",
    )
    for place in (f"{tmp_path}/", f"{tmp_path}/tokenizer.json"):
        assert prompts.with_vocabulary(bare, place).vocabulary.sha256 == vocabulary.sha256
    Folder.at("memory://tokens").write_bytes("tokenizer.json", vocabulary.to_json().encode())
    assert prompts.with_vocabulary(bare, "memory://tokens/tokenizer.json").vocabulary
    with pytest.raises(ConfigError, match="mdlm comes without one"):
        prompts.with_vocabulary(bare, None)
    dsl.Vocabulary.train_bpe(["a"], 257).save(tmp_path)
    with pytest.raises(DataError, match="257 tokens, mdlm has 28"):
        prompts.with_vocabulary(bare, str(tmp_path))
    known = prompts.with_vocabulary(replace(bare, denoiser=tiny(257)), str(tmp_path))
    with pytest.raises(DataError, match="a prompt needs a length"):
        prompts.given([("text", "a")], known, mode="infill", snr=1.0, length=None)


def test_dry_run_plans_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    code, plan, _ = run("rows=5", "batch=2", "budget=7", "--dry-run")
    assert code == 0
    assert (plan["rows"], plan["tokens"], plan["batches"], plan["calls"]) == (5, 60, 3, 21)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        (["model=nowhere"], 3, "nowhere: no such model"),
        (["path=sentence_sde"], 2, "path.gamma_max"),
        (["path={kind: order, order: [1, 2]}"], 2, "2 keys but the text has 12 positions"),
        (["text='far longer than twelve'"], 3, "22 tokens, the row has room for 12"),
        (["mode=correct"], 3, "text: there is no text to correct; give one"),
        (["text=Upper"], 3, "text: text 0, character 0: 'U' is not in this vocabulary"),
        (["input=nowhere.txt"], 3, "nowhere.txt"),
        (["text=a", "input=b.txt"], 2, "either a text or an input"),
        (["toy=cyclic", "model=x"], 2, "either a model or a toy"),
        (["toy=cyclic", "film=film.html"], 2, "film is for a model"),
        (["toy=windows", "path=masked"], 2, "path is for a model"),
        (["temperature=0"], 2, "temperature must be positive"),
        (["mode=correct", "text=a", "snr=0"], 2, "snr must be positive"),
        (["rows=0"], 2, "rows"),
        (["tokenizer=x"], 2, "has its own"),
    ],
)
def test_bad_input_is_one_message(
    run: Run, tmp_path: Path, settings: list[str], code: int, said: str
) -> None:
    got, _, err = run(*settings)
    assert (got, err.count("\n")) == (code, 1), err
    assert said in err
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "a.jsonl, line 2: not an object"),
        ("a.jsonl", b"a\n", "line 1"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt", b"", "empty"),
        ("a.jsonl", b"\n", "empty"),
        ("a.txt", b"fine\nFine\n", "a.txt, line 2"),
    ],
)
def test_bad_files_name_the_line(
    run: Run, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    code, _, err = run(f"input={tmp_path / name}")
    assert code == 3
    assert said in err


def test_watching_shows_what_is_revealed_and_changes_nothing(run: Run) -> None:
    settings = ["rows=2", "text='a____b'", f"path={RANDOM}"]
    unwatched = [row["text"] for row in rows_of(run(*settings)[1])]
    _, made, err = run(*settings, "watch=true")
    assert [row["text"] for row in rows_of(made)] == unwatched
    frames = re.findall(r"call \d of 6\n(.*)\n", err)
    assert [frame.count("_") for frame in frames] == [3, 2, 1, 0]
    assert frames[-1] == unwatched[0]
    assert "\x1b" not in err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def watched(text: str) -> str:
    """What a terminal is sent while a text is drawn from left to right, byte by byte."""
    vocabulary = dsl.Vocabulary.train_bpe(["a \x1b[2J_ b"], 257)
    table_VD = torch.nn.functional.normalize(torch.randn(vocabulary.size, 4), dim=-1)
    (ids,) = vocabulary.encode([text])
    terminal, length = Terminal(), len(ids)
    dsl.sample(
        dsl.ExactDenoiser(table_VD, torch.tensor([ids])),
        dsl.paths.Order("left_to_right"),
        dsl.State.masked(1, length, 4),
        budget=length,
        seed=0,
        recorders=[TerminalRecorder(vocabulary, terminal)],
    )
    return terminal.getvalue()


def test_a_terminal_is_redrawn_and_not_obeying_the_text() -> None:
    shown = watched("a\x1b[2J_b")
    assert "\x1b[2J" not in shown
    assert shown.count("\x1b[2F\x1b[J") == 6
    assert shown.splitlines()[-1] == "a·[2J_b"


@pytest.mark.parametrize("text", ["模型" * 9, "ab模型c" * 6, "a" + "🙂" * 15])
def test_wide_characters_fit_the_lines_of_a_terminal(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Else the terminal breaks them itself, and a redraw goes back too few lines."""
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "20")
    *_, last = watched(text).split("\x1b[J")
    lines = last.splitlines()[1:]
    assert "".join(lines) == text
    assert 16 < max(sum(1 + (c > "z") for c in line) for line in lines) < 20


def test_the_film_of_a_run_is_written_where_asked(run: Run, tmp_path: Path) -> None:
    code, made, _ = run("text='a_c'", f"film={tmp_path}/film.html", "rows=3", "batch=2")
    assert code == 0
    film = json.loads(References.of(Path(made["film"]).read_text()).scripts[0])
    assert film["given"] == [[1, 0, 1]] * 2
    assert film["title"]["text"] == "a_c"
    assert film["title"]["budget"] == "3 calls"
    assert "masked" in film["title"]["path"]
    texts = ["".join(film["texts"][str(i)] for i in row) for row in film["frames"][-1]["tokens"]]
    assert texts == [row["text"] for row in rows_of(made)[:2]]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"film": "file/film.html"}, "a file is where a folder should be"),
        ({"film": "folder"}, "a folder has this name"),
        ({"out": "file/out"}, "a file is where a folder should be"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_before_the_first_row(
    model: Path, tmp_path: Path, place: dict[str, str], said: str
) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    places = {"out": "out"} | place
    given = {key: str(tmp_path / name) for key, name in places.items()}
    config = generate.GenerateConfig(model=str(model), root=str(tmp_path), **given)
    drawn: list[Any] = []
    with pytest.raises(InfraError, match=said):
        generate.execute(config, show=drawn.append)
    assert drawn == []


def test_texts_and_film_go_to_a_store_as_well(model: Path, tmp_path: Path) -> None:
    places = {"out": "memory://drawn/out", "film": "memory://drawn/film.html"}
    config = generate.GenerateConfig(model=str(model), root=str(tmp_path), rows=1, **places)
    generate.execute(config, show=lambda row: None)
    assert Folder.at("memory://drawn").exists("film.html")
    assert Folder.at(places["out"]).names() == ["samples.jsonl", "samples.txt"]


def test_until_all_is_drawn_earlier_texts_stay(run: Run, tmp_path: Path) -> None:
    kept = [(tmp_path / name) for name in ("out/samples.txt", "out/samples.jsonl", "film.html")]
    (tmp_path / "out").mkdir()
    for path in kept:
        path.write_text("earlier")
    given = ("path={kind: order, order: [1, 2]}", f"film={tmp_path}/film.html")
    assert run(*given)[0] == 2
    assert [path.read_text() for path in kept] == ["earlier"] * 3
    assert len(list(tmp_path.rglob("*"))) == 4


@pytest.fixture
def toy(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    def play(name: str) -> dict[str, Any]:
        monkeypatch.setattr(toys, "ROWS", 400)
        code, made, _ = run(f"toy={name}")
        assert code == 0
        assert Path(made["figure"]).read_bytes().startswith(b"\x89PNG")
        return made

    return play


def test_corrected_words_meet_their_exact_posterior(toy: Any) -> None:
    made = toy("cyclic")
    assert made["free"]["share_valid"] == 1
    for found in made["corrected"]:
        assert found["share_valid"] == 1
        # About 3.5 standard errors, and the error of 51 Euler steps at the lowest SNR.
        tolerance = 0.14 if found["snr"] < 1 else 0.09
        assert abs(found["share_original"] - found["share_exact"]) < tolerance
    assert found["share_exact"] == pytest.approx(0.53, abs=0.01)  # 003 C.1: "about 50 percent"
    assert made["remasked"]["calls"] == 10
    assert made["remasked"]["share_original"] > 0.4


def test_two_bits_meet_their_exact_posterior(toy: Any) -> None:
    for pair in toy("two_bit")["pairs"]:
        assert pair["share_valid"] == 1
        assert abs(pair["share_11"] - pair["share_exact"]) < 0.09


def test_windows_take_few_calls_along_finite_snr(toy: Any) -> None:
    made = toy("windows")
    found = {(row["path"], row["calls"]): row for row in made["drawn"]}
    assert found["masked", 4]["share_valid"] < 0.3
    assert found["hybrid", 8]["share_valid"] > 0.9
    assert found["sentence_sde", 4]["share_valid"] > 0.9
    assert found["sentence_sde", 16]["distinct"] > 0.9 * made["distinct_if_exact"]


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ("masked", dsl.paths.Masked()),
        ({"kind": "order", "order": [2, 1]}, dsl.paths.Order((2, 1))),
        (
            {"kind": "sentence_sde", "gamma_max": 3, "grid": {"kind": "log"}},
            dsl.paths.SentenceSDE(gamma_max=3, grid=dsl.paths.Log()),
        ),
        (
            {
                "kind": "hybrid",
                "first": {"kind": "second_order", "path": {"kind": "sentence_sde", "gamma_max": 3}},
                "second": {"kind": "remask", "rule": "cap", "eta": None},
                "split": [1, 2],
            },
            dsl.paths.Hybrid(
                dsl.paths.SecondOrder(dsl.paths.SentenceSDE(gamma_max=3)),
                dsl.paths.Remask(rule="cap"),
                split=(1, 2),
            ),
        ),
    ],
)
def test_a_path_from_plain_values(spec: Any, path: Any) -> None:
    assert from_dict(spec) == path


HALVES = {"kind": "hybrid", "first": "masked", "second": "masked"}
INFORMATION = {"kind": "information", "nats": [0, 1]}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("maskd", "Did you mean 'masked'"),
        (3, "path: 3 does not fit"),
        ({"kind": "sentence_sde"}, "needs gamma_max"),
        ({"kind": "sentence_sde", "gama_max": 3}, "Did you mean 'gamma_max'"),
        (
            {"kind": "sentence_sde", "gamma_max": "3"},
            "'3' does not fit. Give float",
        ),
        ({"kind": "sentence_sde", "gamma_max": -3}, "must be positive"),
        ({"kind": "sentence_sde", "gamma_max": 3, "grid": "lag"}, "Did you mean 'log'"),
        ({"kind": "hybrid", "first": "hybrid", "second": "masked", "split": [1, 1]}, "path.first"),
        ({"kind": "hybrid", "first": "masked", "second": "masked", "split": 2}, "path.split: 2"),
        (HALVES | {"split": ["a", "b"]}, "path.split: ('a', 'b')"),
        (HALVES | {"split": [1, 2, 3]}, "path.split: (1, 2, 3)"),
        (HALVES | {"split": [1, True]}, "path.split: (1, True)"),
        ({"kind": "order", "order": ["a", "b"]}, "path.order: ('a', 'b')"),
        (
            {"kind": "sentence_sde", "gamma_max": 3, "grid": INFORMATION | {"gammas": [0, "x"]}},
            "path.grid.gammas: (0, 'x')",
        ),
    ],
)
def test_a_bad_path_says_where(spec: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        from_dict(spec)
