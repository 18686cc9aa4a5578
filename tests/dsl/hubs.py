"""Small models of the `transformers` library with random weights, saved as their makers would."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file

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


def gemma(vocab_size: int) -> Any:
    from transformers import GemmaConfig

    return GemmaConfig(vocab_size=vocab_size, num_key_value_heads=2, head_dim=8, **SIZES)


def gemma2(vocab_size: int) -> Any:
    from transformers import Gemma2Config

    return Gemma2Config(vocab_size=vocab_size, num_key_value_heads=2, head_dim=8, **SIZES)


def gemma3(vocab_size: int) -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(vocab_size=vocab_size, num_key_value_heads=2, head_dim=8, **SIZES)


def gpt2(vocab_size: int) -> Any:
    from transformers import GPT2Config

    return GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=64, **IDS)


def mamba(vocab_size: int) -> Any:
    from transformers import MambaConfig

    return MambaConfig(vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2)


def ibert(vocab_size: int) -> Any:
    from transformers import IBertConfig

    return IBertConfig(vocab_size=vocab_size, **IDS, **SIZES)


MASKED: Mapping[str, Callable[[int], Any]] = MappingProxyType(
    {f.__name__: f for f in (bert, roberta, distilbert, modernbert, eurobert, untied)}
)
CAUSAL: Mapping[str, Callable[[int], Any]] = MappingProxyType(
    {f.__name__: f for f in (llama, qwen, gemma, gemma3, gpt2)}
)
# Its embeddings are of a class of its own, whose look-ups are counted as products.
UNCOUNTED: Mapping[str, Callable[[int], Any]] = MappingProxyType({"ibert": ibert})
# Models that cannot be taken.
REFUSED: Mapping[str, Callable[[int], Any]] = MappingProxyType(
    {f.__name__: f for f in (gemma2, mamba)}
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
    masked = family in MASKED | UNCOUNTED
    config = (MASKED | UNCOUNTED | CAUSAL | REFUSED)[family](size)
    auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    for weight in model.parameters():  # so that biases and norms, which start at 0 and 1, matter
        weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return model


# A masked model that the library does not know, as LLaDA is one: its blocks are those of Llama
# under other names, its configuration names its mask token, and one of its files reads another.
CODED = {
    "configuration_coded.py": '''
from transformers import PretrainedConfig


class CodedConfig(PretrainedConfig):
    model_type = "coded"

    def __init__(self, d_model=32, n_layers=2, vocab_size=22, one_sided=False, **kwargs):
        super().__init__(**kwargs)
        self.d_model, self.n_layers = d_model, n_layers
        self.vocab_size, self.one_sided = vocab_size, one_sided
''',
    "modeling_coded.py": '''
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_coded import CodedConfig


class CodedBlock(nn.Module):
    def __init__(self, width, one_sided):
        super().__init__()
        self.one_sided = one_sided
        self.attn_norm, self.ff_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.attn_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ff_proj, self.ff_out = nn.Linear(width, 48), nn.Linear(48, width)

    def forward(self, x):
        query, key, value = self.qkv(self.attn_norm(x)).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.one_sided)
        x = x + self.attn_out(mixed)
        return x + self.ff_out(F.silu(self.ff_proj(self.ff_norm(x))))


class CodedForCausalLM(PreTrainedModel):
    config_class = CodedConfig

    def __init__(self, config):
        super().__init__(config)
        width = config.d_model
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, width),
            "blocks": nn.ModuleList(
                CodedBlock(width, config.one_sided) for _ in range(config.n_layers)
            ),
            "ff_out": nn.Linear(width, config.vocab_size, bias=False),
        })
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer["wte"]

    def get_output_embeddings(self):
        return self.transformer["ff_out"]

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        x = self.transformer["wte"](input_ids) if inputs_embeds is None else inputs_embeds
        for block in self.transformer["blocks"]:
            x = block(x)
        return CausalLMOutput(logits=self.transformer["ff_out"](x))
''',
}  # fmt: skip


def coded(folder: Path, *, one_sided: bool = False) -> Any:
    """A model that only the code in its folder knows."""
    import transformers

    tokenizer = words(folder, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<|mdm_mask|>"])
    for name, text in CODED.items():
        (folder / name).write_text(text)
    config = {
        "model_type": "coded",
        "architectures": ["CodedForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_coded.CodedConfig",
            "AutoModelForCausalLM": "modeling_coded.CodedForCausalLM",
        },
        "mask_token_id": tokenizer.convert_tokens_to_ids("<|mdm_mask|>"),
        "one_sided": one_sided,
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    known = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    auto = transformers.AutoModelForCausalLM
    model = auto.from_config(known, trust_remote_code=True).eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return model


def marked(folder: Path) -> Path:
    """A file that appears beside a folder when its code, which this changes, is run."""
    marker = folder.with_name("was-run")
    with (folder / "configuration_coded.py").open("a") as code:
        code.write(f"\n\nopen({str(marker)!r}, 'w').close()\n")
    return marker
