"""Models of transformers, made DSL and exported: a stranger opens them as any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dsl
from pipelines import export
from pipelines.export import ExportConfig
from tests.dsl import hubs
from tests.pipelines.exporting.made import LENGTH, stranger

BARE = ["[UNK]", "[CLS]", "[SEP]"]
CODE = """
found = {}
for family, folder in given.items():
    model = opened(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    text = f"the cat {tokenizer.mask_token} on a mat"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    paths = "masked", {"kind": "sentence_sde", "gamma_max": 9.0}
    found[family] = {
        "drawn": [model.generate(rows=3, path=p, budget=5, seed=1).tolist() for p in paths],
        "filled": model.generate(ids, path="masked", budget=5, seed=1).tolist(),
        "logits": model(ids).logits[0, 2].tolist(),
    }
print(json.dumps(found))
"""


@pytest.mark.long
@torch.no_grad()
def test_every_family_is_exported(tmp_path: Path) -> None:
    denoisers, folders = {}, {}
    for family in (*hubs.MASKED, *hubs.CAUSAL, "coded"):
        base, made, out = (str(tmp_path / family / name) for name in ("base", "made", "out"))
        causal = family in hubs.CAUSAL
        if trusted := family == "coded":
            hubs.coded(Path(base))
        else:
            hubs.saved(Path(base), family, special=BARE if causal else hubs.SPECIAL)
        denoiser = dsl.from_transformers(
            base,
            embed_dim=4,
            adapt="shift" if causal else None,
            trust_remote_code=trusted,
        )
        metadata = {"objective": "dsl", "length": LENGTH}
        dsl.save(denoiser, made, dsl.Vocabulary.load(base), metadata=metadata)
        root = str(tmp_path / "runs")
        export.execute(ExportConfig(model=made, out=out, root=root, trust_remote_code=trusted))
        denoisers[family], folders[family] = denoiser, out
    found = stranger(CODE, folders, tmp_path, HF_HUB_OFFLINE="1")
    paths = (dsl.paths.Masked(), dsl.paths.SentenceSDE(gamma_max=9.0))
    for family, denoiser in denoisers.items():
        free = dsl.State.masked(3, LENGTH, 4)
        drawn = [dsl.sample(denoiser, path, free, budget=5, seed=1) for path in paths]
        assert found[family]["drawn"] == [each.tokens_BL.tolist() for each in drawn], family
        (ids,) = dsl.Vocabulary.load(folders[family]).encode(["the cat the on a mat"])
        known_BL = torch.arange(len(ids))[None] != 2
        state = dsl.State.from_tokens(denoiser.table_VD, torch.tensor([ids]), known_BL)
        filled = dsl.sample(denoiser, paths[0], state, budget=5, seed=1)
        assert found[family]["filled"] == filled.tokens_BL.tolist(), family
        logits_V = torch.tensor(found[family]["logits"])
        log_probs_V = denoiser(state).log_probs()[0, 2]
        torch.testing.assert_close(logits_V.log_softmax(-1), log_probs_V)
