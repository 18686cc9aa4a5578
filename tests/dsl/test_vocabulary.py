"""Every vocabulary gives text back, counts its bytes, and refuses what it cannot hold."""

import json
import pickle
import pydoc_data.topics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dsl import conditioning
from dsl.errors import TextError, VocabularyError
from dsl.vocabulary import CHARACTERS, Vocabulary

CORPUS = list(pydoc_data.topics.topics.values())[:20]
CHAR = Vocabulary.char()
BPE = Vocabulary.train_bpe(CORPUS, 400)


@given(st.lists(st.text(), max_size=4))
def test_bytes_round_trip_any_text(texts):
    assert [BPE.decode(ids) for ids in BPE.encode(texts)] == texts
    assert [BPE.bytes_of(ids) for ids in BPE.encode(texts)] == [t.encode() for t in texts]


@given(st.text(alphabet=CHARACTERS))
def test_characters_round_trip_text8(text):
    (ids,) = CHAR.encode([text])
    assert len(ids) == len(text)
    assert CHAR.decode(ids) == text
    assert CHAR.bytes_of(ids) == text.encode()


@given(text=st.text(min_size=1), cut=st.integers(0, 50))
def test_bytes_add_up_across_any_cut(text, cut):
    (ids,) = BPE.encode([text])
    assert BPE.bytes_of(ids[:cut]) + BPE.bytes_of(ids[cut:]) == text.encode()


def test_the_characters_ids_are_documented():
    assert CHAR.encode([" abz"]) == [[0, 1, 2, 26]]
    assert (CHAR.size, CHAR.eos, CHAR.bos) == (28, 27, 27)


def test_a_bpe_has_its_end_first_and_its_size_as_asked():
    assert (BPE.size, BPE.eos, BPE.bos) == (400, 0, 0)
    assert Vocabulary.train_bpe(["aaaa"], 400).size < 400
    (ids,) = BPE.encode([CORPUS[0]])
    assert len(ids) < 0.6 * len(CORPUS[0].encode())
    with pytest.raises(VocabularyError, match="at least 257"):
        Vocabulary.train_bpe(CORPUS, 256)


def test_training_is_deterministic():
    assert Vocabulary.train_bpe(iter(CORPUS), 400).sha256 == BPE.sha256
    assert Vocabulary.train_bpe(CORPUS[1:], 400).sha256 != BPE.sha256


def test_gpt2_is_gpt2(test_data):
    gpt2 = Vocabulary.gpt2(test_data / "gpt2")
    assert gpt2.encode(["Hello world", " naïve\n\n日本"])[0] == [15496, 995]
    assert (gpt2.size, gpt2.eos, gpt2.bos) == (50257, 50256, 50256)
    assert gpt2.decode([15496, 995, gpt2.eos]) == "Hello world<|endoftext|>"
    assert gpt2.bytes_of([15496, 995, gpt2.eos]) == b"Hello world"
    assert Vocabulary.load(test_data / "gpt2").sha256 == gpt2.sha256
    text = " naïve\n\n日本 <|endoftext|>  'll"
    assert gpt2.decode(gpt2.encode([text])[0]) == text


@pytest.mark.parametrize("vocabulary", [CHAR, BPE], ids=["char", "bpe"])
def test_a_file_and_a_pickle_are_the_same_vocabulary(vocabulary, tmp_path):
    vocabulary.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    for copy in (
        Vocabulary.load(tmp_path),
        Vocabulary.load(tmp_path / "tokenizer.json"),
        pickle.loads(pickle.dumps(vocabulary)),
    ):
        assert copy.sha256 == vocabulary.sha256
        assert (copy.size, copy.eos) == (vocabulary.size, vocabulary.eos)
        assert copy.encode(["the cat"]) == vocabulary.encode(["the cat"])
        assert copy.decode(copy.encode(["the cat"])[0]) == "the cat"


@pytest.mark.parametrize("copy", [lambda v: v, lambda v: pickle.loads(pickle.dumps(v))])
def test_text_cannot_forge_the_end_of_a_document(copy):
    (ids,) = copy(BPE).encode(["a<|endoftext|>b"])
    assert BPE.eos not in ids
    assert BPE.decode([*ids, BPE.eos]) == "a<|endoftext|>b<|endoftext|>"
    assert BPE.bytes_of([*ids, BPE.eos]) == b"a<|endoftext|>b"


def test_a_character_outside_is_one_message():
    with pytest.raises(VocabularyError, match=r"text 1, character 3: 'D' is not in this"):
        CHAR.encode(["fine", "a cDE", "é"])
    # Half a surrogate pair has no bytes, so no vocabulary holds it.
    for vocabulary in (CHAR, BPE):
        with pytest.raises(VocabularyError, match=r"text 0, character 4: '\\ud800'"):
            vocabulary.encode(["ab c\ud800"])


def test_a_word_outside_is_one_message():
    """The letters of known words are no tokens, and not to blame."""
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "cat": 1, "dog": 2}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(VocabularyError, match=r"text 1: the vocabulary cannot spell it \(Word"):
        Vocabulary(tokenizer).encode(["cat dog", "cat dgo"])
    with pytest.raises(VocabularyError, match="text 1, character 4: 'x' is not in this"):
        Vocabulary(tokenizer).encode(["cat dog", "cat xdog"])


@pytest.mark.parametrize("bytewise", [False, True])
def test_a_bpe_that_lacks_a_character_drops_none(bytewise):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bytewise:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator(["hello world"], trainer)
    file = json.dumps(json.loads(tokenizer.to_str()), sort_keys=True, ensure_ascii=False)
    vocabulary = Vocabulary.from_json(file)
    for copy in (vocabulary, pickle.loads(pickle.dumps(vocabulary)), vocabulary.first(99)):
        assert copy.to_json() == file
        assert len(copy.encode(["hello world"])[0]) == 2
        with pytest.raises(VocabularyError, match="text 1, character 7: 'é' is not in this"):
            copy.encode(["hello", "hello hé"])


def test_any_tokenizer_file_with_an_end_will_do(tmp_path):
    tokens = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "cat": 4, "##s": 5}
    tokenizer = Tokenizer(models.WordPiece(tokens, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "bert.json"))
    vocabulary = Vocabulary.load(tmp_path / "bert.json")
    assert (vocabulary.size, vocabulary.bos, vocabulary.eos) == (6, 1, 2)
    # Neither padded nor cut: lengths are the caller's business.
    assert vocabulary.encode(["cats"]) == [[4, 5]]
    # A text begins behind [CLS] or [SEP]; before these, a word has others before it.
    assert vocabulary.bytes_of([1, 4, 2, 4]) == b"catcat"
    assert vocabulary.bytes_of([4, 2]) == b" cat"


PIECES = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])


@pytest.mark.parametrize(
    ("decoder", "begins", "goes_on"),
    [(decoders.WordPiece(), "cat", "##s"), (PIECES, "▁cat", "s"), (None, "cat", "▁")],
)
def test_words_behind_others_keep_their_space(decoder, begins, goes_on):
    """As BERT spells words, as Llama does, and where nobody says how."""
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, begins: 1, goes_on: 2}))
    tokenizer.add_special_tokens(["</s>"])
    if decoder:
        tokenizer.decoder = decoder
    vocabulary = Vocabulary.from_json(tokenizer.to_str())
    assert vocabulary.decode([1]) == begins.removeprefix("▁")
    assert vocabulary.decode_behind([1]) == " cat"
    ids = [1, 2, 1]
    joined = "".join(vocabulary.decode_behind([id]) for id in ids)
    assert joined.removeprefix(" ") == vocabulary.decode(ids)


WRITTEN = "the cat sat on the mat; the dog sat on a log, and the bird sang in the tree"


@pytest.fixture(params=["first", "always", "normalised"])
def spaced(request):
    """A vocabulary that puts a space before a text, as Llama does: in one of three ways."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    scheme = request.param if request.param != "normalised" else "first"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(
        vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([WRITTEN] * 9, trainer)
    if request.param == "normalised":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.pre_tokenizer, tokenizer.decoder = None, PIECES
    return Vocabulary.from_json(tokenizer.to_str())


def test_text_behind_a_blank_gets_no_space_of_its_own(spaced):
    blank = spaced.encode_behind("a")[0]
    for text in ("the c_t sat on", "the c__ sat", "_t s_t", "the _, and _ og"):
        given = conditioning.read(text, spaced)
        assert given.gamma.count(0.0) == text.count("_")
        ids = [id if snr else blank for id, snr in zip(given.tokens, given.gamma, strict=True)]
        assert spaced.decode_behind(ids).removeprefix(" ") == text.replace("_", "a")


@pytest.mark.parametrize("text", ["", "__"])
def test_nothing_is_no_text_to_correct(text):
    for length in (None, 5):
        with pytest.raises(TextError, match="no text to correct"):
            conditioning.read(text, BPE, mode="correct", length=length)
    assert conditioning.read("a_", BPE, mode="correct", length=5).gamma == (2, 0, 0, 0, 0)


def test_rows_of_a_text_keep_their_space(spaced):
    (ids,) = spaced.encode([WRITTEN])
    assert spaced.decode(ids) == WRITTEN
    marked, once = [spaced.eos, *ids], WRITTEN.encode()
    for length in (2, 8, 16):
        rows = [marked[i : i + length] for i in range(0, len(marked), length)]
        assert b"".join(map(spaced.bytes_of, rows)) == once
    assert spaced.bytes_of([*marked, *marked, spaced.eos]) == 2 * once


@given(st.text())
def test_bytes_and_characters_read_alike_everywhere(text):
    if text:
        assert BPE.encode_behind(text) == BPE.encode([text])[0]
    ids = BPE.encode([text])[0]
    assert BPE.decode_behind(ids) == BPE.decode(ids)
    assert [CHAR.decode_behind([id]) for id in range(CHAR.size)] == [
        CHAR.decode([id]) for id in range(CHAR.size)
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not a tokenizer"),
        ("{}", "not a tokenizer"),
        ('{"model": {"type": "Martian"}}', "not a tokenizer"),
        (Tokenizer(models.WordLevel({"a": 0})).to_str(), "no end-of-document"),
        (Tokenizer(models.WordLevel({"a": 0, "</s>": 5})).to_str(), "no gaps"),
        (Tokenizer(models.BPE()).to_str(), "no gaps|no end-of-document"),
    ],
)
def test_other_files_are_one_message(tmp_path, content, reason):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(VocabularyError, match=reason) as caught:
        Vocabulary.load(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


def test_missing_and_damaged_files_are_one_message(tmp_path):
    with pytest.raises(VocabularyError, match=r"neither tokenizer\.json nor encoder\.json"):
        Vocabulary.load(tmp_path)
    with pytest.raises(VocabularyError, match=r"absent\.json"):
        Vocabulary.load(tmp_path / "absent.json")
    (tmp_path / "encoder.json").write_text(json.dumps({"a": 0}))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nx y\n")
    with pytest.raises(VocabularyError, match="not GPT-2's pair"):
        Vocabulary.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(VocabularyError, match=r"tokenizer\.json"):
        Vocabulary.load(tmp_path)
