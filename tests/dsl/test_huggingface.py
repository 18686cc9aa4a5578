"""Models of the `transformers` library are the same models behind the denoiser's contract."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dsl
from dsl import foreign, huggingface, objective
from dsl.errors import AdaptationError, WeightsError
from dsl.foreign import ForeignBackbone
from dsl.support import Mixed
from tests.dsl import hubs
from tests.gpu import GPU, standing_in

LENGTH = 9


def tokens(rows: int = 3) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(len(hubs.SPECIAL), len(hubs.SPECIAL) + len(hubs.WORDS), (rows, LENGTH))


def seen(denoiser: dsl.Denoiser, tokens_BL: torch.Tensor, known_BL: torch.Tensor) -> dsl.State:
    return dsl.State.from_tokens(denoiser.table_VD, tokens_BL, known_BL)


def flops(backbone: ForeignBackbone) -> int:
    """Of the matrix products of three rows, forward and backward, with the head."""
    inputs_BLW = torch.randn(3, LENGTH, backbone.values_UW.shape[1], requires_grad=True)
    weight_VH, _ = backbone.head
    # The counter knows matrix products, and no fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        (backbone(inputs_BLW) @ weight_VH.T).sum().backward()
    return counter.get_total_flops()


@torch.no_grad()
@pytest.mark.parametrize("family", hubs.MASKED)
def test_at_the_endpoints_it_is_the_model(tmp_path: Path, family: str) -> None:
    model = hubs.saved(tmp_path, family)
    denoiser = dsl.from_transformers(tmp_path, mask_prior=1.0, embed_dim=4)
    tokens_BL = tokens()
    known_BL = torch.rand(tokens_BL.shape) < 0.5
    ids_BL = torch.where(known_BL, tokens_BL, hubs.SPECIAL.index("[MASK]"))
    logits_BLV = model(ids_BL).logits[..., : denoiser.config.backbone.tokens]
    state = seen(denoiser, tokens_BL, known_BL)
    ours_BLV = torch.nn.functional.linear(denoiser.hidden(state), *denoiser.backbone.head)
    drawable_V = denoiser.backbone.head[1].isfinite()
    assert (~drawable_V).nonzero().squeeze(1).tolist() == [
        hubs.SPECIAL.index(name) for name in ("[PAD]", "[MASK]")
    ]
    difference = (ours_BLV - logits_BLV)[~known_BL][:, drawable_V].abs().max()
    assert difference < 1e-4
    # What it says of tokens that no text holds is left out, and the rest sums to 1.
    log_probs_BLV = denoiser(state).log_probs()
    wanted_BLV = logits_BLV.masked_fill(~drawable_V, -torch.inf).log_softmax(-1)
    torch.testing.assert_close(log_probs_BLV[~known_BL], wanted_BLV[~known_BL])


@torch.no_grad()
@pytest.mark.parametrize("adapt", ["shift", "no_shift"])
@pytest.mark.parametrize("family", hubs.CAUSAL)
def test_a_causal_model_sees_both_sides(tmp_path: Path, family: str, adapt: str) -> None:
    model = hubs.saved(tmp_path, family, special=["[UNK]", "[CLS]", "[SEP]"])
    denoiser = dsl.from_transformers(tmp_path, mask_prior=1.0, embed_dim=4, adapt=adapt)
    tokens_BL = tokens() - 2
    known_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
    known_BL[:, 4] = False
    embedding = model.get_input_embeddings()
    rows_UW = embedding(torch.arange(embedding.num_embeddings))
    inputs_BLW = torch.where(known_BL[..., None], rows_UW[tokens_BL], rows_UW.mean(0))
    start_B1W = rows_UW[1].expand(len(inputs_BLW), 1, -1)
    if adapt == "shift":
        inputs_BLW = torch.cat([start_B1W, inputs_BLW], 1)
    everything = torch.ones(1, 1, inputs_BLW.shape[1], inputs_BLW.shape[1], dtype=torch.bool)
    logits_BLV = model(inputs_embeds=inputs_BLW, attention_mask=everything).logits
    logits_BLV = logits_BLV[:, : tokens_BL.shape[1], : denoiser.config.backbone.tokens]
    state = seen(denoiser, tokens_BL, known_BL)
    ours_BLV = torch.nn.functional.linear(denoiser.hidden(state), *denoiser.backbone.head)
    assert (ours_BLV - logits_BLV).abs().max() < 1e-4
    # The last token changes what is said of the first.
    other_BL = tokens_BL.clone()
    other_BL[:, -1] = (other_BL[:, -1] + 1) % denoiser.config.backbone.tokens
    known_BL[:, 0] = False
    before, after = (
        denoiser(seen(denoiser, each_BL, known_BL)).log_probs()[:, 0]
        for each_BL in (tokens_BL, other_BL)
    )
    assert (before - after).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", hubs.CAUSAL)
def test_a_causal_model_reads_a_text_as_its_own(tmp_path: Path, family: str) -> None:
    model = hubs.saved(tmp_path, family, special=["[UNK]", "[CLS]", "[SEP]"])
    denoiser = dsl.from_transformers(tmp_path, mask_prior=1.0, embed_dim=4, adapt="no_shift")
    tokens_BL = tokens() - 2
    everything = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    logits_BLV = model(input_ids=tokens_BL, attention_mask=everything).logits
    state = seen(denoiser, tokens_BL, torch.ones_like(tokens_BL, dtype=torch.bool))
    ours_BLV = torch.nn.functional.linear(denoiser.hidden(state), *denoiser.backbone.head)
    apart_BLV = ours_BLV - logits_BLV[..., : denoiser.config.backbone.tokens]
    assert apart_BLV.abs().max() < 1e-4


@torch.no_grad()
def test_a_model_that_only_its_code_knows(tmp_path: Path) -> None:
    """It is the model at the endpoints, and a saved one opens again without the folder."""
    base = tmp_path / "base"
    model = hubs.coded(base)
    denoiser = dsl.from_transformers(base, mask_prior=1.0, embed_dim=4, trust_remote_code=True)
    tokens_BL, mask = tokens(), denoiser.config.backbone.mask
    known_BL = torch.rand(tokens_BL.shape) < 0.5
    logits_BLV = model(torch.where(known_BL, tokens_BL, mask)).logits
    state = seen(denoiser, tokens_BL, known_BL)
    ours_BLV = torch.nn.functional.linear(denoiser.hidden(state), *denoiser.backbone.head)
    drawable_V = denoiser.backbone.head[1].isfinite()
    assert (~drawable_V).nonzero().flatten().tolist() == [0, mask]
    logits_BLV = logits_BLV[..., : len(drawable_V)]
    assert (ours_BLV - logits_BLV)[~known_BL][:, drawable_V].abs().max() < 1e-4
    assert len(denoiser.backbone.blocks) == denoiser.config.backbone.blocks == 2
    assert set(denoiser.config.backbone.code) == set(hubs.CODED)
    dsl.save(denoiser, tmp_path / "kept")
    shutil.rmtree(base)
    again = dsl.load(tmp_path / "kept", trust_remote_code=True)
    assert again.config == denoiser.config
    assert torch.equal(again(state).log_probs(), denoiser(state).log_probs())


def test_untrusted_code_is_not_run(tmp_path: Path) -> None:
    hubs.coded(tmp_path / "base")
    marker = hubs.marked(tmp_path / "base")
    with pytest.raises(AdaptationError, match="if you trust it, have it run by"):
        dsl.from_transformers(tmp_path / "base")
    assert not marker.exists()
    denoiser = dsl.from_transformers(tmp_path / "base", embed_dim=4, trust_remote_code=True)
    assert marker.exists()
    dsl.save(denoiser, tmp_path / "kept")
    with pytest.raises(AdaptationError, match="code that came with its weights: configuration_cod"):
        dsl.load(tmp_path / "kept")


@pytest.mark.parametrize("family", [*hubs.MASKED, *hubs.CAUSAL])
def test_it_trains_and_is_kept(tmp_path: Path, family: str) -> None:
    """Every weight of the network has a gradient, and a saved denoiser is the same one."""
    hubs.saved(tmp_path / "base", family)
    adapt = "shift" if family in hubs.CAUSAL else None
    denoiser = dsl.from_transformers(tmp_path / "base", embed_dim=4, adapt=adapt)
    learner = objective.DSLObjective(denoiser, Mixed(roar_share=0.5))
    loss = learner(tokens(), torch.Generator().manual_seed(0))
    loss.value.backward()
    assert loss.value.isfinite()
    idle = {name for name, p in denoiser.named_parameters() if p.grad is None}
    # The library's own BERT does not read this bias where the projection has one of its own.
    assert idle <= ({"backbone.network.cls.predictions.bias"} if family == "untied" else set())
    assert all(p.grad.isfinite().all() for p in denoiser.parameters() if p.grad is not None)
    backbone = denoiser.backbone
    assert isinstance(backbone, ForeignBackbone)
    assert len(backbone.blocks) == denoiser.config.backbone.blocks == 2
    least, most = (3 * n * backbone.flops_per_token(n) for n in (LENGTH, LENGTH + 1))
    if backbone.config.start is None:
        assert flops(backbone) == least
    else:  # the mark of the start is read before each row
        assert least < flops(backbone) < most
    dsl.save(denoiser, tmp_path / "kept")
    again = dsl.load(tmp_path / "kept")
    assert again.config == denoiser.config
    state = dsl.State.masked(2, LENGTH, 4)
    path = dsl.paths.SentenceSDE(gamma_max=9.0)
    drawn, redrawn = (
        dsl.sample(each, path, state, budget=4, seed=0).tokens_BL for each in (denoiser, again)
    )
    assert torch.equal(drawn, redrawn)


def test_weights_that_a_pattern_ties_are_kept(tmp_path: Path) -> None:
    """I-BERT names the source of its tied weights by a pattern."""
    hubs.saved(tmp_path / "base", "ibert")
    denoiser = dsl.from_transformers(tmp_path / "base", embed_dim=4)
    dsl.save(denoiser, tmp_path / "kept")
    state = dsl.State.masked(2, LENGTH, 4)
    found = dsl.load(tmp_path / "kept")(state).log_probs()
    assert torch.equal(found, denoiser(state).log_probs())


def test_a_network_that_cannot_be_built_again_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: object) -> None:
        raise ValueError("no model can be built")

    hubs.saved(tmp_path, "bert")
    monkeypatch.setattr(foreign, "network", fail)
    with pytest.raises(AdaptationError, match="no model can be built, so a saved denoiser could"):
        dsl.from_transformers(tmp_path)


def test_special_tokens_are_never_drawn(tmp_path: Path) -> None:
    hubs.saved(tmp_path, "bert")
    denoiser = dsl.from_transformers(tmp_path, embed_dim=4)
    with torch.no_grad():  # were they allowed, nothing else would be drawn
        denoiser.backbone.bias_V[[hubs.SPECIAL.index(name) for name in ("[PAD]", "[MASK]")]] = 99.0
    state = dsl.State.masked(16, LENGTH, 4)
    for path in (dsl.paths.Masked(), dsl.paths.SentenceSDE(gamma_max=9.0)):
        drawn = dsl.sample(denoiser, path, state, budget=5, seed=0).tokens_BL
        assert not torch.isin(drawn, torch.tensor([0, 4])).any()


def test_its_head_waits_for_nothing(tmp_path: Path) -> None:
    """It is asked for in every call of a sampler and in every step of training."""
    hubs.saved(tmp_path, "bert")
    backbone = dsl.from_transformers(tmp_path, embed_dim=4).backbone
    assert isinstance(backbone, ForeignBackbone)
    with standing_in() as waits:
        backbone.to(GPU)
        waits.found.clear()
        assert backbone.head[1].device == GPU
        assert waits.found == []


def test_its_tokenizer_is_a_vocabulary(tmp_path: Path) -> None:
    tokenizer = hubs.words(tmp_path, hubs.SPECIAL)
    vocabulary = dsl.Vocabulary.load(tmp_path)
    assert vocabulary.size == len(tokenizer)
    assert (vocabulary.bos, vocabulary.eos) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    text = "the cat sat on no mat"
    assert vocabulary.encode([text])[0] == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("elsewhere", ["gone", "named"])
def test_code_of_another_place_is_refused(tmp_path: Path, elsewhere: str) -> None:
    hubs.coded(tmp_path)
    if elsewhere == "gone":
        for name in hubs.CODED:
            (tmp_path / name).unlink()
    else:
        remake(tmp_path, "config.json", auto_map={"AutoConfig": "a/b--configuration_coded.C"})
    with pytest.raises(WeightsError, match="lies in another place"):
        dsl.from_transformers(tmp_path, trust_remote_code=True)


def test_a_network_that_stays_one_sided_is_refused(tmp_path: Path) -> None:
    hubs.coded(tmp_path, one_sided=True)
    for adapt in ("shift", "no_shift", None):
        with pytest.raises(AdaptationError, match="does not look at the tokens behind a position"):
            dsl.from_transformers(tmp_path, adapt=adapt, trust_remote_code=True)


def remake(folder: Path, name: str, **changes: object) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    ("family", "adapt", "spoil", "error", "said"),
    [
        ("llama", None, lambda f: None, AdaptationError, "Say how to adapt it: adapt=shift"),
        ("bert", "shift", lambda f: None, AdaptationError, "needs no adaptation"),
        ("gemma2", "no_shift", lambda f: None, AdaptationError, "such as a cap on its logits"),
        ("mamba", "shift", lambda f: None, AdaptationError, "does not run without its embedding"),
        ("bert", None, lambda f: hubs.words(f, hubs.SPECIAL[:-1]), WeightsError, "no mask token"),
        ("bert", None, lambda f: (f / "tokenizer.json").unlink(), WeightsError, "no tokenizer"),
        (
            "bert",
            None,
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            WeightsError,
            "pytorch_model.bin alone, a pickle; only safetensors are read",
        ),
        ("bert", None, lambda f: (f / "model.safetensors").unlink(), WeightsError, "cannot open"),
        (
            "bert",
            None,
            lambda f: remake(f, "config.json", model_type="llada", auto_map={"AutoModel": "x.Y"}),
            AdaptationError,
            "known only to code that comes with the weights",
        ),
        (
            "bert",
            None,
            lambda f: remake(f, "config.json", model_type="vit"),
            WeightsError,
            "no masked or causal language model",
        ),
        (
            "bert",
            None,
            lambda f: remake(f, "config.json", num_hidden_layers=3),
            WeightsError,
            "no weights for bert.encoder.layer.2",
        ),
        (
            "bert",
            None,
            lambda f: hubs.words(f, [*hubs.SPECIAL, *map(str, range(9))]),
            WeightsError,
            "has 28 tokens, its embedding 22 rows",
        ),
    ],
)
def test_what_cannot_be_taken_is_told(
    tmp_path: Path, family: str, adapt: str, spoil, error: type[Exception], said: str
) -> None:
    hubs.saved(tmp_path, family)
    spoil(tmp_path)
    with pytest.raises(error, match=said) as caught:
        dsl.from_transformers(tmp_path, adapt=adapt)
    assert str(tmp_path) in str(caught.value)


def test_there_is_no_other_adaptation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapt must be None or one of"):
        huggingface.from_transformers(tmp_path, adapt="shifted")  # type: ignore[arg-type]


def test_folders_are_told_apart(tmp_path: Path) -> None:
    hubs.saved(tmp_path / "hub", "distilbert")
    assert huggingface.is_folder_of(tmp_path / "hub")
    assert not huggingface.is_folder_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mdlm", "n_blocks": 12}))
    assert not huggingface.is_folder_of(tmp_path)


def test_a_saved_configuration_that_lies_is_refused(tmp_path: Path) -> None:
    hubs.saved(tmp_path / "base", "bert")
    dsl.save(dsl.from_transformers(tmp_path / "base", embed_dim=4), tmp_path / "kept")
    content = json.loads((tmp_path / "kept" / "config.json").read_text())
    backbone = content["denoiser"]["backbone"]
    settings = backbone["settings"]
    misfits = {"num_hidden_layers": "2", "num_attention_heads": 0, "vocab_size": 3}
    for change in (
        *({"settings": settings | {name: value}} for name, value in misfits.items()),
        {"blocks": 3},
        {"code": {"../outside.py": ""}},
        {"code": {"c.py": ""}, "settings": {"auto_map": {"AutoConfig": "a/b--c.D"}}},
        {"never": [99]},
        {"settings": {"model_type": "nothing"}},
        {"settings": {}},
        {"settings": settings | {"num_hidden_layers": 10**9}},
    ):
        shutil.copytree(tmp_path / "kept", tmp_path / "spoilt", dirs_exist_ok=True)
        content["denoiser"]["backbone"] = backbone | change
        (tmp_path / "spoilt" / "config.json").write_text(json.dumps(content))
        with pytest.raises(WeightsError, match="does not describe a denoiser"):
            dsl.load(tmp_path / "spoilt")
