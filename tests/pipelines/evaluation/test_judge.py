"""Perplexity against closed forms and by hand; every token once, padding and marks never."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dsl.state import State
from dsl.vocabulary import END_OF_TEXT, Vocabulary
from infra.errors import ConfigError, DataError
from pipelines.evaluation import metrics
from pipelines.evaluation.ngram import NGram
from pipelines.evaluation.questions import judge
from pipelines.evaluation.questions.judge import (
    HubJudge,
    Judged,
    NGramJudge,
    OwnJudge,
    Read,
    windows,
)
from tests.pipelines import tiny
from tests.pipelines.evaluation import strangers
from tests.pipelines.evaluation.small import own

TEXTS = [
    "one", "", "two thousand three", f"{END_OF_TEXT}forty{END_OF_TEXT}five{END_OF_TEXT}",
    *tiny.documents(3),
]  # fmt: skip
NO_TOKENS = np.zeros((len(TEXTS), 0), np.int64)


def judged(folder: Path, texts: list[str], **settings: Any) -> Read:
    return HubJudge(model=str(folder), **settings).load("judge", "cpu")(texts, NO_TOKENS)


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A model that predicts one and the same law everywhere, and that law's logits."""
    from transformers import AutoModelForCausalLM

    folder = strangers.gpt2(
        tmp_path_factory.mktemp("models") / "unigram", tie_word_embeddings=False
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        # The last norm answers (1, 0, …, 0) whatever it reads, so the head's first column decides.
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()[0] = 1.0
    model.save_pretrained(folder)
    return folder, model.lm_head.weight[:, 0].detach()


# --- a stranger's model --------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [strangers.POSITIONS, 7])
def test_a_known_unigram_gives_its_own_nats(unigram: tuple[Path, Any], max_tokens: int) -> None:
    folder, logits_V = unigram
    found = judged(folder, TEXTS, max_tokens=max_tokens)
    nats_V = -logits_V.double().log_softmax(0)
    encoder = strangers.tokenizer()
    ids = [[i for i in encoder(text)["input_ids"] if i != encoder.eos_token_id] for text in TEXTS]
    np.testing.assert_allclose(found.nats_N, [nats_V[i].sum() for i in ids], rtol=1e-6)
    np.testing.assert_array_equal(found.tokens_N, [len(i) for i in ids])


@pytest.mark.parametrize("batch", [2, 64])
def test_batches_do_not_change_figures(folder: Path, batch: int) -> None:
    alone = judged(folder, TEXTS, max_tokens=9, batch=1)
    together = judged(folder, TEXTS, max_tokens=9, batch=batch)
    np.testing.assert_allclose(together.nats_N, alone.nats_N, rtol=1e-5)
    np.testing.assert_array_equal(together.tokens_N, alone.tokens_N)


def test_in_bfloat16_the_logits_stay_in_float32(unigram: tuple[Path, Any], folder: Path) -> None:
    full, half = (
        judged(folder, TEXTS, max_tokens=9, precision=name) for name in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(half.nats_N, full.nats_N, rtol=0.02)
    assert not np.array_equal(half.nats_N, full.nats_N)
    # Where the head alone decides, nothing is lost.
    full, half = (
        judged(unigram[0], TEXTS, max_tokens=9, precision=name) for name in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(half.nats_N, full.nats_N, rtol=1e-6)


def test_windows_of_a_long_text_by_hand(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    size = 8
    model = AutoModelForCausalLM.from_pretrained(folder)
    encoder = strangers.tokenizer()
    text = tiny.documents(1)[0] * 3
    tokens = [encoder.bos_token_id, *encoder(text)["input_ids"]]
    assert len(tokens) > 3 * size
    nats = 0.0
    for target in range(1, len(tokens)):
        # The first window of eight that ends at or behind what is predicted; they begin every four.
        first = 0 if target <= size else math.ceil((target - size) / 4) * 4
        context = torch.tensor([tokens[first:target]])
        assert target <= size or 5 <= context.shape[1] <= size
        with torch.no_grad():
            logits_V = model(input_ids=context).logits[0, -1].double()
        nats -= logits_V.log_softmax(0)[tokens[target]].item()
    found = judged(folder, [text], max_tokens=size)
    assert found.nats_N[0] == pytest.approx(nats, rel=1e-5)
    assert found.tokens_N[0] == len(tokens) - 1


@given(count=st.integers(1, 60), size=st.integers(2, 20))
def test_windows_predict_every_token_once(count: int, size: int) -> None:
    tokens = list(range(count))
    predicted = []
    for window, done in windows(tokens, size):
        assert len(window) <= size + 1
        assert window == tokens[window[0] : window[0] + len(window)]
        fresh = window[1 + done :]
        assert fresh
        assert fresh[0] <= size or fresh[0] - window[0] > size // 2
        predicted += fresh
    assert predicted == tokens[1:]


def test_ends_of_texts_are_context_alone(folder: Path) -> None:
    plain, marked, both = judged(
        folder, ["forty", f"{END_OF_TEXT}forty", f"forty{END_OF_TEXT}"], max_tokens=20
    ).nats_N
    assert plain == pytest.approx(marked, rel=1e-6)
    assert plain == pytest.approx(both, rel=1e-6)
    split, joined = judged(folder, [f"one{END_OF_TEXT}one", "oneone"], max_tokens=20).nats_N
    assert split != pytest.approx(joined, rel=1e-3)


def test_the_mark_is_read_as_the_judges_own(tmp_path: Path) -> None:
    encoder = strangers.tokenizer()
    folder = strangers.gpt2(tmp_path / "gpt2")
    text = (folder / "tokenizer.json").read_text().replace(END_OF_TEXT, "</s>")
    (folder / "tokenizer.json").write_text(text)
    settings = (folder / "tokenizer_config.json").read_text().replace(END_OF_TEXT, "</s>")
    (folder / "tokenizer_config.json").write_text(settings)
    found = judged(folder, [f"one{END_OF_TEXT}two", "one</s>two"], max_tokens=20)
    assert found.tokens_N.tolist() == [len(encoder("one")[0]) + len(encoder("two")[0])] * 2
    assert found.nats_N[0] == found.nats_N[1]


def test_a_model_that_sees_its_targets_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    encoder = strangers.tokenizer()
    settings = BertConfig(
        vocab_size=len(encoder), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=48, initializer_range=0.3,
    )  # fmt: skip
    folder = strangers.save(BertForMaskedLM(settings), encoder, tmp_path / "bert")
    with pytest.raises(DataError, match="sees the tokens that it is to predict"):
        judged(folder, ["one"], max_tokens=20)


def test_a_model_of_another_trade_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    settings = T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    folder = strangers.save(
        T5ForConditionalGeneration(settings), strangers.tokenizer(), tmp_path / "t5"
    )
    with pytest.raises(DataError, match="of type t5, which is not a causal one"):
        HubJudge(model=str(folder), max_tokens=20).check("judge", "")


def test_weights_without_a_head_of_their_own_judge_as_well(folder: Path, tmp_path: Path) -> None:
    """The form of gpt2-large: the body's weights, to which the head is tied, and old buffers."""
    from safetensors.torch import load_file, save_file

    body = strangers.gpt2(tmp_path / "gpt2", head=False)
    whole = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in whole.items()}
    assert "wte.weight" in tensors
    assert not any("lm_head" in name for name in tensors)
    buffers = {f"h.{i}.attn.bias": torch.ones(1, 1, 48, 48).tril() for i in (0, 1)}
    save_file(tensors | buffers, body / "model.safetensors", {"format": "pt"})
    expected = judged(folder, TEXTS, max_tokens=20)
    np.testing.assert_array_equal(judged(body, TEXTS, max_tokens=20).nats_N, expected.nats_N)


# --- a model of our own --------------------------------------------------------------------------


def test_own_judge_multiplies_conditionals() -> None:
    model = own("ar")
    tokens_NL = np.random.default_rng(1).integers(0, 28, (3, 12))
    workspace: Any = SimpleNamespace(own_reader=lambda _: model)
    read = OwnJudge(model="ar", batch=2).load_in("judge", workspace)
    found = read(["x", f"é{END_OF_TEXT}", ""], tokens_NL)
    tokens_BL = torch.from_numpy(tokens_NL)
    nats_B = torch.zeros(3, dtype=torch.float64)
    for place in range(12):
        known_BL = (torch.arange(12) < place).expand(3, -1)
        with torch.no_grad():
            state = State.from_tokens(model.denoiser.table_VD, tokens_BL, known_BL)
            log_probs_BV = model.denoiser(state).log_probs()[:, place].double()
        nats_B += F.nll_loss(log_probs_BV, tokens_BL[:, place], reduction="none")
    np.testing.assert_allclose(found.nats_N, nats_B.numpy(), rtol=1e-5)
    assert found.tokens_N.tolist() == [12] * 3


@pytest.mark.parametrize("kind", ["mdlm", "dsl"])
def test_only_ar_models_judge(kind: str) -> None:
    workspace: Any = SimpleNamespace(own_reader=own)
    with pytest.raises(DataError, match=f"{kind} is a {kind} model, and only an ar model"):
        OwnJudge(model=kind).load_in("judge", workspace)


def test_judges_say_which_models_they_need(folder: Path) -> None:
    HubJudge(model=str(folder), max_tokens=20).check("judge", "")
    assert OwnJudge(model="runs/ar").addresses() == ("runs/ar",)
    assert HubJudge().addresses() == ()


# --- n-grams of the training split ---------------------------------------------------------------


def test_ngram_judge_finds_what_its_model_says() -> None:
    generator = np.random.default_rng(0)
    training_RL, tokens_NL = generator.integers(0, 28, (50, 8)), generator.integers(0, 28, (2, 8))
    workspace: Any = SimpleNamespace(vocabulary=Vocabulary.char(), training_RL=training_RL)
    found = NGramJudge(order=3).load_in("judge", workspace)([f"é{END_OF_TEXT}", "ab"], tokens_NL)
    np.testing.assert_array_equal(found.nats_N, NGram(training_RL, 28, 3).nats(tokens_NL).sum(1))
    assert found.tokens_N.tolist() == [8, 8]
    by_default = NGramJudge().load_in("judge", workspace)(["", ""], tokens_NL)
    six = NGram(training_RL, 28, 6).nats(tokens_NL).sum(1)
    np.testing.assert_array_equal(by_default.nats_N, six)


@pytest.mark.parametrize(
    ("order", "length", "size", "why"),
    [(9, 8, 28, "rows hold 8 tokens"), (4, 8, 2**20, "counted up to order 3")],
)
def test_an_order_without_counts_is_refused(order: int, length: int, size: int, why: str) -> None:
    data: Any = SimpleNamespace(
        training_RL=np.zeros((1, length), int), vocabulary=SimpleNamespace(size=size)
    )
    NGramJudge().check_data("judge", data)
    NGramJudge(order=order - 1).check_data("judge", data)
    with pytest.raises(ConfigError, match=f"judge.order: .*{why}"):
        NGramJudge(order=order).check_data("judge", data)


# --- bytes ---------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_ids_even_where_a_text_tears_a_character() -> None:
    vocabulary = Vocabulary.train_bpe(["abc"] * 20, 300)
    (ids,) = vocabulary.encode(["aé"])
    tokens_NL = np.array([[*ids[:2], vocabulary.eos], [*ids]])
    texts = [vocabulary.decode(row) for row in tokens_NL]
    assert "\ufffd" in texts[0]  # which is three bytes of its own

    def reader(*_: Any) -> Any:
        return lambda texts, tokens_NL: Read(np.array([1.0, 2.0]), np.array([3, 3]))

    workspace: Any = SimpleNamespace(reader=reader, vocabulary=vocabulary)
    found = judge.judged("judge", NGramJudge(), workspace, texts, tokens_NL)
    assert found["bytes_N"].tolist() == [2, 3]
    assert (found["nats_N"].tolist(), found["tokens_N"].tolist()) == ([1.0, 2.0], [3, 3])


@pytest.mark.parametrize("nats", [math.nan, math.inf])
def test_a_judge_that_gives_no_numbers_is_said(nats: float) -> None:
    """Instead of texts that were found to be diverse like none of the frontier."""
    read = Read(np.array([1.0, nats]), np.array([8, 8]))
    workspace: Any = SimpleNamespace(
        reader=lambda *_: lambda texts, tokens_NL: read, vocabulary=Vocabulary.char()
    )
    with pytest.raises(DataError, match=r"judge.model: .*runs/broken.* infinite or NaN"):
        judge.judged(
            "judge", OwnJudge(model="runs/broken"), workspace, ["", ""], np.zeros((2, 8), int)
        )


# --- figures -------------------------------------------------------------------------------------


def test_figures_are_of_all_texts_together() -> None:
    found = Judged(np.array([2.0, 9.0]), np.array([1, 2]), np.array([4, 7]))
    assert judge.perplexity(found).value == pytest.approx(math.exp(11 / 3))
    stderr = metrics.ratio(found.nats_N, found.tokens_N).stderr
    assert judge.perplexity(found).stderr == pytest.approx(math.exp(11 / 3) * stderr)
    assert judge.bits_per_byte(found).value == pytest.approx(11 / 11 / math.log(2))
    without_bytes = Judged(np.array([2.0, 3.0]), np.array([1, 1]), np.array([0, 4]))
    assert judge.bits_per_byte(without_bytes).value == pytest.approx(5 / 4 / math.log(2))
    empty = Judged(np.zeros(2), np.zeros(2, int), np.zeros(2, int))
    assert math.isnan(judge.perplexity(empty).value)
    assert math.isnan(judge.bits_per_byte(empty).value)
