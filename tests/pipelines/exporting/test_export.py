"""An exported folder is the model: for strangers, for `dsl`, and as the start of another run."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

import dsl
from dsl import conditioning
from dsl.truncation import Truncated
from infra import registry, tracking
from infra.errors import InfraError
from infra.storage import Folder
from pipelines import export, models
from pipelines.export import ExportConfig
from pipelines.exporting import card, package
from pipelines.kinds import KINDS
from pipelines.models import ConverterConfig
from pipelines.verb import TrackingConfig
from tests.dsl import hubs
from tests.pipelines.exporting.made import LENGTH, saved, stranger

SDE = {"kind": "sentence_sde", "gamma_max": 9.0}
PATHS: list[Any] = [
    "masked",
    {"kind": "masked", "alpha": "cosine"},
    *({"kind": "remask", "rule": rule} for rule in ("cap", "rescale", "conf", "loop")),
    {"kind": "remask", "rule": "forward_backward"},
    {"kind": "order", "order": "random"},
    {"kind": "order", "order": "left_to_right"},
    {"kind": "entropy_bounded", "bound": 2.0},
    SDE,
    SDE | {"grid": "log"},
    {"kind": "token_sde", "gamma_max": 9.0, "delta": 0.05},
    {"kind": "token_sde", "gamma_max": 9.0, "delta": 0.05, "curvature": "jvp"},
    {"kind": "second_order", "path": SDE},
    {"kind": "hybrid", "first": SDE, "second": "masked", "split": [3, 4]},
]
BUDGET, SEED = 7, 3
SHARP = {"temperature": 0.8, "nucleus": 0.9}
TEXTS = ("the ", "t_e c_t", "teh cat")
CODE = f"""
model = opened(given["folder"])
tokenizer = AutoTokenizer.from_pretrained(given["folder"], trust_remote_code=True)
print(f"opened a {{type(model).__name__}}")

def ids(text):
    text = text.replace("_", tokenizer.mask_token)
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids

def drawn(*given, **settings):
    return model.generate(*given, seed={SEED}, **settings).tolist()

prompt, blanks, draft = map(ids, given["texts"])
masked = ids("the c_t sat")
fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
labels = torch.where(masked == tokenizer.mask_token_id, 1, -100)
found = {{
    "paths": [drawn(rows=2, path=path, budget={BUDGET}) for path in given["paths"]],
    "default": drawn(rows=2),
    "sharp": drawn(rows=2, path=given["paths"][0], budget={BUDGET}, **given["sharp"]),
    "later": drawn(rows=1, first_row=1, path=given["paths"][0], budget={BUDGET}),
    "texts": [drawn(prompt), drawn(blanks), drawn(draft, snr=2.0)],
    "decoded": tokenizer.batch_decode(drawn(rows=2)),
    "logits": model(masked).logits.tolist(),
    "loss": model(masked, labels=labels).loss.item(),
    "filled": fill("the c[MASK]t sat", top_k=3),
    "reader": opened(given["ar"]).generate(rows=2, seed={SEED}).tolist(),
}}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    for objective in KINDS:
        saved(folder / "made" / objective, objective=objective)
        exported(folder, f"made/{objective}", objective)
    return folder


@pytest.fixture(scope="module")
def found(place: Path) -> dict[str, Any]:
    """What a stranger sees."""
    given = {"folder": str(place / "dsl"), "ar": str(place / "ar")}
    given |= {"paths": PATHS, "texts": TEXTS, "sharp": SHARP}
    return stranger(CODE, given, place, HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def denoiser(place: Path) -> dsl.Denoiser:
    return dsl.load(place / "made" / "dsl")


def exported(folder: Path, model: str, out: str, **settings: Any) -> dict[str, Any]:
    config = ExportConfig(
        model=str(folder / model), out=str(folder / out), root=str(folder / "runs"), **settings
    )
    return export.execute(config)


def drawn(denoiser: Any, path: Any, *, rows: int = 2, budget: int = BUDGET) -> list[list[int]]:
    state = dsl.State.masked(rows, LENGTH, denoiser.table_VD.shape[1])
    walked = dsl.paths.from_dict(path)
    return dsl.sample(denoiser, walked, state, budget=budget, seed=SEED).tokens_BL.tolist()


def test_a_stranger_draws_the_same_texts_along_every_path(
    found: dict[str, Any], denoiser: dsl.Denoiser
) -> None:
    known = {path if isinstance(path, str) else path["kind"] for path in PATHS}
    kinds = [*dsl.paths.Stage.__args__, dsl.paths.Hybrid]
    assert known == {kind.__dataclass_fields__["kind"].default for kind in kinds}
    for path, texts in zip(PATHS, found["paths"], strict=True):
        assert texts == drawn(denoiser, path), path
    masked = PATHS[0]
    assert found["default"] == drawn(denoiser, masked, budget=LENGTH)
    sharp = Truncated(denoiser, SHARP["temperature"], SHARP["nucleus"])
    assert found["sharp"] == drawn(sharp, masked)
    assert found["later"] == drawn(denoiser, masked)[1:]


def test_prompts_blanks_and_drafts_are_those_of_dsl(
    found: dict[str, Any], denoiser: dsl.Denoiser
) -> None:
    vocabulary, modes = dsl.Vocabulary.char(), ("infill", "infill", "correct")
    for text, mode, ids in zip(TEXTS, modes, found["texts"], strict=True):
        given = conditioning.read(text, vocabulary, mode=mode, otherwise=LENGTH)
        state = conditioning.state([given], denoiser.table_VD)
        path = dsl.paths.Masked()
        sample = dsl.sample(denoiser, path, state, budget=LENGTH, seed=SEED)
        assert ids == sample.tokens_BL.tolist(), text
    decoded = [vocabulary.decode(ids) for ids in found["default"]]
    assert found["decoded"] == decoded


def test_it_is_a_masked_language_model(found: dict[str, Any], denoiser: dsl.Denoiser) -> None:
    vocabulary = dsl.Vocabulary.char()
    (ids,) = vocabulary.encode(["the cat sat"])
    tokens_BL, at = torch.tensor([ids]), 5
    known_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
    known_BL[0, at] = False
    state = dsl.State.from_tokens(denoiser.table_VD, tokens_BL, known_BL)
    log_probs_V = denoiser(state).log_probs()[0, at]
    logits_BLV = torch.tensor(found["logits"])
    assert logits_BLV.shape == (1, len(ids), vocabulary.size)
    torch.testing.assert_close(logits_BLV[0, at].log_softmax(-1), log_probs_V)
    assert found["loss"] == pytest.approx(-log_probs_V[1].item(), rel=1e-5)
    best = log_probs_V.topk(3)
    assert [each["token"] for each in found["filled"]] == best.indices.tolist()
    assert [each["score"] for each in found["filled"]] == pytest.approx(best.values.exp().tolist())


def test_an_autoregressive_model_reads_from_left_to_right(
    found: dict[str, Any], place: Path
) -> None:
    denoiser = dsl.load(place / "made" / "ar")
    path = {"kind": "order", "order": "left_to_right"}
    assert found["reader"] == drawn(denoiser, path, budget=LENGTH)
    assert "budget" not in json.loads((place / "ar" / "generation_config.json").read_text())


def test_the_folder_is_a_model_of_this_code_too(place: Path) -> None:
    again = models.load(str(place / "dsl"), converter=ConverterConfig(), tracking_uri="")
    made = dsl.load(place / "made" / "dsl")
    assert (again.kind, again.length) == ("dsl", LENGTH)
    assert again.vocabulary
    assert again.vocabulary.sha256 == dsl.Vocabulary.char().sha256
    assert again.denoiser.config == made.config
    for name, tensor in made.state_dict().items():
        assert torch.equal(again.denoiser.get_parameter(name), tensor)


def test_what_transformers_saves_again_is_a_model_of_this_code_too(place: Path) -> None:
    code = """
    model = opened(given)
    model.denoiser.backbone.head[1].data.add_(1)
    model.save_pretrained("again")
    AutoTokenizer.from_pretrained(given, trust_remote_code=True).save_pretrained("again")
    print((opened("again").generate(rows=2) == model.generate(rows=2)).all().int().item())
    """
    assert stranger(textwrap.dedent(code), str(place / "dsl"), place, HF_HUB_OFFLINE="1")
    again, made = dsl.load(place / "again"), dsl.load(place / "made" / "dsl")
    assert torch.equal(again.backbone.head[1], made.backbone.head[1] + 1)
    assert torch.equal(again.table_VD, made.table_VD)
    opened = models.load(str(place / "again"), converter=ConverterConfig(), tracking_uri="")
    assert opened.vocabulary  # without the mask token, which is now in the tokenizer's file
    assert opened.vocabulary.size == dsl.Vocabulary.char().size
    assert opened.vocabulary.encode(["the cat"]) == dsl.Vocabulary.char().encode(["the cat"])


def test_a_trainer_trains_it_in_parts_of_a_batch_and_from_a_checkpoint_on(place: Path) -> None:
    code = """
    from transformers import Trainer, TrainingArguments

    def weights(model):
        return torch.cat([tensor.detach().flatten() for tensor in model.parameters()])

    def trained(parts=1, **settings):
        model = opened(given)
        known = torch.arange(12) % 2 == 0
        masked = torch.where(known, 1, model.config.mask_token_id)
        rows = [
            {"input_ids": masked, "labels": torch.where(known, -100, label)} for label in range(12)
        ]
        args = TrainingArguments(
            "trained", per_device_train_batch_size=4 // parts, gradient_accumulation_steps=parts,
            max_steps=3, save_steps=2, optim="sgd", learning_rate=0.1, max_grad_norm=0.0,
            use_cpu=True, report_to=[],
        )
        Trainer(model=model, args=args, train_dataset=rows).train(**settings)
        return weights(model)

    whole = trained()
    resumed = trained(resume_from_checkpoint="trained/checkpoint-2")
    others = resumed, trained(parts=2), weights(opened(given))
    print(json.dumps([(whole - other).abs().max().item() for other in others]))
    """
    given = str(place / "dsl")
    resumed, parts, moved = stranger(textwrap.dedent(code), given, place, HF_HUB_OFFLINE="1")
    assert max(resumed, parts) < 1e-3 * moved, (resumed, parts, moved)


def test_a_unigram_vocabulary_is_exported(tmp_path: Path) -> None:
    """As T5 and XLM-R have one: a list of pairs, where others are mappings."""
    spelled = Tokenizer(Unigram([("<unk>", 0.0), ("</s>", -1.0), ("a", -2.0), ("b", -3.0)], 0))
    saved(tmp_path / "made", vocabulary=dsl.Vocabulary.from_json(spelled.to_str()))
    exported(tmp_path, "made", "out")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert tokenizer("ab[MASK]a", add_special_tokens=False).input_ids == [2, 3, 4, 2]


def test_a_mask_token_of_the_vocabulary_keeps_its_ways(tmp_path: Path) -> None:
    """RoBERTa's takes in the space before it, and so does the exported tokenizer's."""
    base, made = tmp_path / "base", tmp_path / "made"
    hubs.saved(base, "roberta")
    spelled = json.loads((base / "tokenizer.json").read_text())
    (mask,) = (token for token in spelled["added_tokens"] if token["content"] == "[MASK]")
    mask["lstrip"] = True
    (base / "tokenizer.json").write_text(json.dumps(spelled))
    denoiser = dsl.from_transformers(base, embed_dim=4)
    metadata = {"objective": "dsl", "length": LENGTH}
    dsl.save(denoiser, made, dsl.Vocabulary.load(base), metadata=metadata)
    exported(tmp_path, "made", "out")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert tokenizer.mask_token_id == mask["id"] == denoiser.config.backbone.mask
    assert (
        json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"]
        == (spelled["added_tokens"])
    )


def test_path_and_budget_are_named(tmp_path: Path) -> None:
    saved(tmp_path / "made")
    path = dsl.paths.from_dict(PATHS[-1])
    exported(tmp_path, "made", "out", path=path)
    named = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert dsl.paths.from_dict(named["path"]) == path
    assert named["budget"] == BUDGET
    # A second export replaces the first.
    exported(tmp_path, "made", "out", budget=5)
    named = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (named["path"]["kind"], named["budget"]) == ("masked", 5)


def test_an_export_that_was_cut_off_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the code stands in the listing of the folder that is copied."""
    exported(tmp_path, str(saved(tmp_path / "made")), "staging")
    files = sorted((tmp_path / "staging").iterdir())
    write, out = Folder.write_bytes, tmp_path / "out"

    def one_file(folder: Folder, name: str, content: bytes) -> None:
        if folder.names():
            raise InfraError(name, "the disk is full")
        write(folder, name, content)

    staging: Any = SimpleNamespace(iterdir=lambda: iter(files))
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write_bytes", one_file)
        with pytest.raises(InfraError):
            package.copy(staging, Folder.at(str(out)))
    assert len(list(out.iterdir())) == 1
    exported(tmp_path, "made", "out")
    assert [path.name for path in sorted(out.iterdir())] == [path.name for path in files]


def test_the_code_of_a_card_runs_and_shows_what_the_model_can(place: Path) -> None:
    """Also where the vocabulary lacks capital letters, and where no length is known."""
    made = saved(place / "made")
    dsl.save(dsl.load(made), made, dsl.Vocabulary.char(), metadata={"objective": "dsl"})
    exported(place, "made", "unsized")
    names = (*KINDS, "unsized")
    texts = {name: (place / name / "README.md").read_text() for name in names}
    code = [text.split("```python")[1].split("```")[0] for text in texts.values()]
    assert stranger("for code in given: exec(code)\nprint(1)", code, place, HF_HUB_OFFLINE="1")
    assert [name for name, text in texts.items() if "snr=" in text] == ["dsl", "unsized"]
    assert [name for name, text in texts.items() if "upper bounds" not in text] == ["ar"]


def test_a_prompt_begins_with_a_capital_where_the_vocabulary_has_it(tmp_path: Path) -> None:
    saved(tmp_path / "made", vocabulary=dsl.Vocabulary.train_bpe(["The cat"], 257))
    exported(tmp_path, "made", "out")
    assert 'tokenizer("The ",' in (tmp_path / "out" / "README.md").read_text()


def test_a_card_is_named_after_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "made")
    for here, out in (("mine", "."), ("mine/below", "..")):
        (tmp_path / here).mkdir()
        monkeypatch.chdir(tmp_path / here)
        export.execute(ExportConfig(model=str(tmp_path / "made"), out=out, root=str(tmp_path)))
        text = (tmp_path / "mine" / "README.md").read_text()
        assert "# mine\n" in text
        assert 'name = "mine"\n' in text


def test_the_card_shows_the_tables_of_an_evaluation(tmp_path: Path) -> None:
    saved(tmp_path / "made")
    report = tmp_path / "judged" / "report" / card.REPORT
    report.parent.mkdir(parents=True)
    report.write_text(
        "# Evaluation judged\n\non held-out text\n\n## Texts\n\n| a |\n| - |\n| 1 |\n\n"
        "## Time\n\n| b |\n\n## Likelihood of held-out text\n\n| c |\n"
    )
    exported(tmp_path, "made", "out", evaluation=str(tmp_path / "judged"), licence="mit")
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\nlibrary_name: transformers\n")
    assert "on held-out text\n\n### Texts\n\n| a |\n| - |\n| 1 |" in text
    assert "| c |" in text
    assert "| b |" not in text
    assert "| Licence of the base | mit |" in text


def test_the_card_says_where_a_model_comes_from(tmp_path: Path) -> None:
    """From the registry and from the run directory alike, with the evaluation that was tagged."""
    data = {"name": "a corpus", "digest": "d1" * 32, "source": str(tmp_path)}
    tags = {"commit": "c0ffee", "dirty": "true", "parent_model": "runs/mdlm"}
    root = tmp_path / "runs"
    handle = tracking.start(
        TrackingConfig(), root=str(root), name="run", params={}, tags=tags, config_yaml="",
        dataset=data,
    )  # fmt: skip
    saved(root / "run" / "model")
    version = models.register(Folder.at(str(root / "run" / "model")), "tiny", handle, tags={})
    report = tmp_path / "judged" / "report"
    report.mkdir(parents=True)
    (report / card.REPORT).write_text("# E\n\nsubtitle\n\n## Texts\n\n| a figure |\n")
    shown = {"evaluation_report": str(report / "report.html")}
    registry.set_alias(version.uri, "champion", handle.uri)
    registry.tag(version.uri, shown, handle.uri)
    for out, model in (("one", "models:/tiny@champion"), ("two", str(root / "run"))):
        made = export.execute(ExportConfig(model=model, out=str(tmp_path / out), root=str(root)))
        text = (tmp_path / out / "README.md").read_text()
        for said in (data["name"], data["digest"], "c0ffee, with changes", "runs/mdlm"):
            assert said in text, (model, said)
        assert f"| Run | {handle.run_id} |" in text
        assert ("a figure" in text) == (made["version"] == version.uri) == (out == "one")


def test_the_card_is_of_the_weights_though_the_alias_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, load = tmp_path / "runs", models.load
    handle = tracking.start(
        TrackingConfig(), root=str(root), name="run", params={}, tags={}, config_yaml=""
    )
    versions = []
    for objective in ("dsl", "mdlm"):
        saved(tmp_path / objective, objective=objective)
        made = Folder.at(str(tmp_path / objective))
        versions.append(models.register(made, "moving", handle, tags={}))
    one, two = (version.uri for version in versions)

    def moved(*given: Any, **how: Any) -> models.Model:
        model = load(*given, **how)
        registry.set_alias(two, "champion", handle.uri)
        return model

    registry.set_alias(one, "champion", handle.uri)
    monkeypatch.setattr(models, "load", moved)
    config = ExportConfig(
        model="models:/moving@champion", out=str(tmp_path / "out"), root=str(root)
    )
    assert export.execute(config)["version"] == one
    assert "Discrete Stochastic Localization" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"out": "full"}, "out: .*holds other files"),
        ({"push": "user/name"}, "push: there is no token, so nothing is pushed"),
        ({"push": "name"}, "push: 'name' is no name on the hub"),
        ({"push": "a/b/c"}, "push: 'a/b/c' is no name on the hub"),
        ({"evaluation": "nowhere"}, "evaluation: there is no evaluation.md"),
        ({"path": dsl.paths.from_dict(PATHS[-1]), "budget": 9}, "path: .*the budget is 9"),
        ({"tokenizer": "other"}, "tokenizer: .*has its own"),
        ({"model": "nowhere"}, "nowhere: no such model"),
    ],
)
def test_what_does_not_fit_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    saved(tmp_path / "made")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    given = {"model": "made", "out": "out", "root": "runs"} | settings
    with pytest.raises(Exception, match=said) as caught:
        export.execute(ExportConfig(**given))
    assert caught.value.exit_code in (2, 3)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
