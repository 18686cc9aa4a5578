"""The files of an exported model: its weights as `dsl` keeps them, and what `transformers` asks for
beside them. `dsl.load` opens the same folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsl import weights
from dsl.foreign import ForeignConfig
from dsl.vocabulary import Vocabulary
from infra.storage import Folder
from pipelines.exporting.assemble import assemble
from pipelines.models import CONFIG, Model

CODE = Path(__file__).with_name("modeling_dsl.py")
CARD = "README.md"
MASKS = ("[MASK]", "<|mask|>", "<|dsl_mask|>")  # the first that the vocabulary has not got


def mask_of(model: Model) -> tuple[str, int]:
    """The token that marks what is to be drawn, and its id: the model's own, or a new one behind
    all others."""
    vocabulary, backbone = model.vocabulary, model.denoiser.config.backbone
    assert vocabulary is not None
    if isinstance(backbone, ForeignConfig) and backbone.mask is not None:
        return vocabulary.decode([backbone.mask]), backbone.mask
    return next(mask for mask in MASKS if vocabulary.id_of(mask) is None), vocabulary.size


def write(model: Model, folder: Path, *, generation: Mapping[str, Any], card: str) -> None:
    """All files, into an empty local folder."""
    vocabulary = model.vocabulary
    assert vocabulary is not None
    metadata = {"objective": model.kind, "length": model.length}
    weights.save(model.denoiser, folder, vocabulary, metadata=metadata)
    mask, mask_id = mask_of(model)
    config = weights.read_config(folder) | {
        "model_type": "dsl",
        "architectures": ["DSLForMaskedLM"],
        "auto_map": {
            "AutoConfig": f"{CODE.stem}.DSLConfig",
            "AutoModelForMaskedLM": f"{CODE.stem}.DSLForMaskedLM",
        },
        "mask_token_id": mask_id,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "vocab_size": max(mask_id + 1, vocabulary.size),
        "dtype": "float32",
    }
    files = {
        CODE.name: assemble(CODE),
        CARD: card,
        CONFIG: _json(config),
        "generation_config.json": _json(generation),
        "tokenizer_config.json": _json(_tokenizer(model, vocabulary, mask, mask_id)),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def copy(staging: Path, out: Folder) -> None:
    """Put the files where they belong: the code first, which marks the folder as one to export
    into, and `config.json`, without which it is no model, last."""
    out.remove(CONFIG)
    order = {CODE.name: -1, CONFIG: 1}
    for path in sorted(staging.iterdir(), key=lambda path: order.get(path.name, 0)):
        out.write_bytes(path.name, path.read_bytes())


def _tokenizer(model: Model, vocabulary: Vocabulary, mask: str, mask_id: int) -> dict[str, Any]:
    """What turns `tokenizer.json`, which stays as it was, into a tokenizer with a mask token. One
    that it has keeps its ways: RoBERTa's, for example, takes in the space before it."""
    ways = ("normalized", "lstrip", "rstrip", "single_word")
    as_mask: dict[str, Any] = dict.fromkeys(ways, False)
    for token in json.loads(vocabulary.to_json())["added_tokens"]:
        if token["id"] == mask_id:
            as_mask |= {way: token[way] for way in ways}
    as_mask |= {"content": mask, "special": True}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(mask_id): as_mask},
        "mask_token": mask,
        "bos_token": vocabulary.decode([vocabulary.bos]),
        "eos_token": vocabulary.decode([vocabulary.eos]),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **({"model_max_length": model.length} if model.length else {}),
    }


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
