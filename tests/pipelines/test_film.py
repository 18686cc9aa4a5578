"""The film of a sample: what it records on any path, and the page that plays it."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from tokenizers import Tokenizer, decoders, models

import dsl
from dsl import conditioning
from dsl.paths import AnyPath, Masked, Order
from dsl.recorders import Rewrites, Schedule, Sharpening, Trajectory
from dsl.state import State
from pipelines.film import Film
from pipelines.watch import TerminalRecorder
from tests.dsl.walks import LAW, PATHS, states, walks
from tests.pipelines import browser

VOCABULARY = dsl.Vocabulary.char()


def recorders() -> list[dsl.sampling.Recorder]:
    return [Film(VOCABULARY, {}), Schedule(), Rewrites(), Sharpening(), Trajectory()]


@settings(max_examples=120)
@given(walk=walks(), state=states)
def test_every_recorder_sees_any_walk_to_its_end(walk: tuple[AnyPath, int], state: State) -> None:
    """Also where the budget outlasts the work, and where there is none."""
    path, budget = walk
    watching = recorders()
    made = dsl.sample(LAW.denoiser(), path, state, budget=budget, seed=0, recorders=watching)
    assert made.calls <= budget
    film = watching[0]
    assert isinstance(film, Film)
    assert made.recorded["trajectory"]["tokens_TBL"][-1].equal(made.tokens_BL)
    steps = len(made.recorded["schedule"]["masked"])
    assert len(made.recorded["film"]["frames"]) - 1 == steps == len(film.frames)
    assert len(made.recorded["sharpening"]["entropy"]) == steps
    last = json.loads(References.of(film.page()).scripts[0])["frames"][-1]
    assert last["tokens"] == made.tokens_BL.tolist()


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_nothing_to_do_costs_nothing(path: AnyPath) -> None:
    kept = State.from_tokens(LAW.table_VD, torch.tensor([[0, 1, 2, 0]]), torch.ones(1, 4).bool())
    made = dsl.sample(LAW.denoiser(), path, kept, budget=3, seed=0, recorders=recorders())
    assert made.calls == 0
    assert made.tokens_BL.tolist() == [[0, 1, 2, 0]]


def test_words_of_any_tokenizer_stand_apart() -> None:
    """A film spells its tokens one by one, where BERT's would run together."""
    named = {"[SEP]": 0, "the": 1, "cat": 2, "##s": 3}
    tokenizer = Tokenizer(models.WordPiece(named, unk_token="[SEP]"))
    tokenizer.decoder = decoders.WordPiece()
    vocabulary, ids = dsl.Vocabulary.from_json(tokenizer.to_str()), [1, 2, 3, 1]
    table_VD = torch.nn.functional.normalize(torch.randn(4, 4), dim=-1)
    film, terminal = Film(vocabulary, {}), io.StringIO()
    law, state = dsl.ExactDenoiser(table_VD, torch.tensor([ids])), State.masked(1, 4, 4)
    watching = [film, TerminalRecorder(vocabulary, terminal)]
    dsl.sample(law, Order((0, 3, 2, 1)), state, budget=4, seed=0, recorders=watching)
    made = film.result()
    last = made["frames"][-1]["tokens"][0]
    assert "".join(made["texts"][str(token)] for token in last) == " the cats the"
    assert "the__ the\n" in terminal.getvalue()
    assert terminal.getvalue().endswith("the cats the\n")


def test_a_budget_that_outlasts_the_work() -> None:
    """One blank and eight calls: the film goes on when everything is revealed."""
    film = Film(VOCABULARY, {})
    known = torch.tensor([[True, False, True, True]])
    state = State.from_tokens(LAW.table_VD, torch.tensor([[0, 1, 2, 0]]), known)
    dsl.sample(LAW.denoiser(), Masked(), state, budget=8, seed=0, recorders=[film])
    assert len(film.frames) == 8
    assert film.frames[-1]["sure"] == [[100] * 4]


def test_a_step_of_two_calls_counts_twice() -> None:
    film = Film(VOCABULARY, {})
    state = State.masked(1, 4, LAW.table_VD.shape[1])
    path = dsl.paths.TokenSDE(gamma_max=9.0, delta=0.2, curvature="jvp")
    made = dsl.sample(LAW.denoiser(), path, state, budget=7, seed=0, recorders=[film])
    assert film.result()["calls"] == [0, 1, 3, 5, 6, 7]
    assert made.calls == 7


def test_a_film_is_bounded_and_keeps_its_ends() -> None:
    bounded = Film(VOCABULARY, {}, rows=1, tokens=13)  # three frames of a row of 4 tokens
    whole = Film(VOCABULARY, {})
    for film in (bounded, whole):
        state, path = (
            State.masked(2, 4, LAW.table_VD.shape[1]),
            dsl.paths.SentenceSDE(gamma_max=9.0),
        )
        dsl.sample(LAW.denoiser(), path, state, budget=9, seed=0, recorders=[film])
    short, long = bounded.result(), whole.result()
    assert long["calls"] == list(range(10))
    assert short["calls"] == [0, 4, 9]
    for call, frame in zip(short["calls"], short["frames"], strict=True):
        assert frame == {key: value[:1] for key, value in long["frames"][call].items()}
    assert short["given"] == [[0] * 4]


class References(HTMLParser):
    """What a page would load, and the content of its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.scripts: list[str] = []
        self.inside = False

    @classmethod
    def of(cls, page: str) -> References:
        parsed = cls()
        parsed.feed(page)
        return parsed

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "action")]
        self.inside = tag == "script"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts.append(data)
            self.inside = False


HOSTILE = "</script><script>alert(1)</script>"
IDS = [2, 1, 1]


@pytest.fixture(scope="module")
def filmed() -> tuple[str, dsl.sampling.Sample]:
    """The page of a film of two rows of IDS, in whose vocabulary 1 is HOSTILE; and the sample."""
    spelled = dsl.Vocabulary.char().to_json().replace('"a"', json.dumps(HOSTILE))
    vocabulary = dsl.Vocabulary.from_json(spelled)
    table_VD = torch.nn.functional.normalize(torch.randn(vocabulary.size, 4), dim=-1)
    film, path = Film(vocabulary, {"text": HOSTILE}), dsl.paths.SentenceSDE(gamma_max=9.0)
    law = dsl.ExactDenoiser(table_VD, torch.tensor([IDS]))
    given = conditioning.read("_" * len(IDS), vocabulary)
    state = conditioning.state([given, given], table_VD)
    sampled = dsl.sample(law, path, state, budget=4, seed=0, recorders=[film])
    return film.page(), sampled


def test_the_film_refers_to_nothing_and_obeys_no_text(
    filmed: tuple[str, dsl.sampling.Sample],
) -> None:
    page, sampled = filmed
    parsed = References.of(page)
    assert not parsed.found
    assert not re.search(r"https?:|//[a-z]|url\(|@import", page)
    assert len(parsed.scripts) == 2, "a text has ended the script it lies in"
    data = json.loads(parsed.scripts[0])
    assert data["autoplay"] is True
    assert len(data["frames"]) == sampled.calls + 1
    first, last = data["frames"][0], data["frames"][-1]
    assert first["tokens"] == [IDS, IDS], "what is likeliest, where nothing is known yet"
    assert last["tokens"] == sampled.tokens_BL.tolist() == [IDS, IDS]
    assert "".join(data["texts"][str(i)] for i in IDS) == "b" + 2 * HOSTILE
    assert {g for row in last["gamma"] for g in row} == {None}
    assert [frame["gamma"][0][0] for frame in data["frames"]] == [0, 3, 6, 9, None]
    assert all(
        0 <= sure <= 100 for frame in data["frames"] for row in frame["sure"] for sure in row
    )


def test_the_film_plays_to_its_end_in_a_browser(
    filmed: tuple[str, dsl.sampling.Sample], tmp_path: Path
) -> None:
    """Where one is installed."""
    (tmp_path / "film.html").write_text(filmed[0])
    dumped, console = browser.dump(tmp_path / "film.html", tmp_path / "profile")
    assert console == []
    assert "call 4 of 4" in dumped
    shown = re.sub(r"<[^>]+>", "", dumped.split('id="reels"')[1])
    assert HOSTILE.replace("<", "&lt;").replace(">", "&gt;") in shown
