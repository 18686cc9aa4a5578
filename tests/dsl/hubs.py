"""Small models of the `transformers` library with random weights, saved as their makers would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "no", "one", "in", "it"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 64}
IDS = {
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "cls_token_id": 2,
    "sep_token_id": 3,
}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def bert(vocab_size: int) -> Any:
    from transformers import BertConfig

    return BertConfig(vocab_size=vocab_size, **SIZES)


def roberta(vocab_size: int) -> Any:
    from transformers import RobertaConfig

    return RobertaConfig(vocab_size=vocab_size, **IDS, **SIZES)


def distilbert(vocab_size: int) -> Any:
    from transformers import DistilBertConfig

    return DistilBertConfig(
        vocab_size=vocab_size, dim=32, n_layers=2, n_heads=4, hidden_dim=48,
        max_position_embeddings=64, sinusoidal_pos_embds=True,
    )  # fmt: skip


def modernbert(vocab_size: int) -> Any:
    from transformers import ModernBertConfig

    return ModernBertConfig(vocab_size=vocab_size, local_attention=4, **IDS, **SIZES)


def eurobert(vocab_size: int) -> Any:
    from transformers import EuroBertConfig

    return EuroBertConfig(vocab_size=vocab_size, **IDS, **SIZES)


def untied(vocab_size: int) -> Any:
    from transformers import BertConfig

    return BertConfig(vocab_size=vocab_size, tie_word_embeddings=False, **SIZES)


def llama(vocab_size: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=vocab_size, num_key_value_heads=2, **SIZES)


def qwen(vocab_size: int) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=vocab_size, num_key_value_heads=2, tie_word_embeddings=True, **SIZES
    )


MASKED: Mapping[str, Callable[[int], Any]] = MappingProxyType(
    {f.__name__: f for f in (bert, roberta, distilbert, modernbert, eurobert, untied)}
)
CAUSAL: Mapping[str, Callable[[int], Any]] = MappingProxyType(
    {f.__name__: f for f in (llama, qwen)}
)


def words(folder: Path, special: list[str]) -> Any:
    """A tokenizer of whole words, saved into a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    named = {word: id for id, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(named, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = ("pad", "unk", "cls", "sep", "mask")
    known = {
        f"{name}_token": f"[{name.upper()}]" for name in names if f"[{name.upper()}]" in special
    }
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **known)
    made.save_pretrained(folder)
    return made


def saved(folder: Path, family: str, special: list[str] = SPECIAL, spare: int = 3) -> Any:
    """The model of a family, saved with its tokenizer; its embedding has some rows to spare."""
    import transformers

    torch.manual_seed(0)
    words(folder, special)
    size = len(special) + len(WORDS) + spare
    masked = family in MASKED
    config = (MASKED | CAUSAL)[family](size)
    auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    for weight in model.parameters():  # so that biases and norms, which start at 0 and 1, matter
        weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return model
