"""A backbone that is a model of the `transformers` library ("the library" below).

The model's own network is kept, without its two ends: the rows of its input embedding become the
converter's values, and its vocabulary projection becomes the head. `dsl.huggingface` opens the
folders of such models.

Shapes: B rows, L positions, W input width, H hidden width, V tokens, U = V + 1 slots (the last is
[MASK]), X rows of the model's own embedding, N special tokens.
"""

import json
import pathlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dsl.state import send

# What the network was trained for, and the library's class for it.
Trained = Literal["masked", "causal"]
OPENED_BY: Mapping[Trained, str] = {
    "masked": "AutoModelForMaskedLM",
    "causal": "AutoModelForCausalLM",
}
# The classes that code beside the weights may say it defines, the most fitting first.
NAMED_BY_CODE = (*OPENED_BY.values(), "AutoModel")


@dataclass(frozen=True, kw_only=True)
class ForeignConfig:
    """A model of the library by its own configuration, and how it is used.

    tokens: V, all ids of its tokenizer; special ones, its own mask token included, are among them.
    blocks: how many the network has.
    settings: its configuration, as the library writes it into `config.json`.
    trained: the network's training task. A causal network is used with attention to both sides.
    start: None, or the id whose row is put in front of the text. The answer for a position is then
        the network's output one position before, which is what it was trained to predict.
    mask: the id of its own mask token, if it has one.
    never: ids of special tokens that no text holds, and that are therefore never predicted.
    code: source files that came with the weights, by name, of a network that the library does not
        know. Building the network runs them, so whoever reads a configuration from a file first
        asks whether that is wanted, as `dsl.load` does.

    Raises:
        ValueError: an id outside [0, V), or code that is not a file beside the weights.
    """

    kind: Literal["transformers"] = "transformers"
    tokens: int
    blocks: int
    settings: Mapping[str, Any]
    trained: Trained = "masked"
    start: int | None = None
    mask: int | None = None
    never: tuple[int, ...] = ()
    code: Mapping[str, str] = field(default_factory=dict)

    causal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        named = [*self.never, *(id for id in (self.start, self.mask) if id is not None)]
        if self.tokens < 1 or not all(0 <= id < self.tokens for id in named):
            raise ValueError(f"the special tokens {named} are not all in [0, {self.tokens})")
        if strange := [name for name in self.code if not is_source(name)]:
            raise ValueError(f"{strange[0]!r} is no name of a source file")
        if self.code and "--" in str(self.settings.get("auto_map")):
            raise ValueError("auto_map must name files beside the weights, not another repository")

    def build(self) -> "ForeignBackbone":
        return ForeignBackbone(self, network(self))


class ForeignBackbone(nn.Module):
    """``[B, L, W]`` inputs to ``[B, L, H]`` hidden states, the last before the vocabulary.

    Args:
        network: a masked or causal language model of the library. It is changed in place: its input
            embedding and its vocabulary projection are taken out.

    Raises:
        ValueError: the embedding has fewer rows than there are tokens.
    """

    def __init__(self, config: ForeignConfig, network: Any) -> None:
        super().__init__()
        self.config = config
        taken = embedding, projection = (
            network.get_input_embeddings(),
            network.get_output_embeddings(),
        )
        values_XW, weight_XH = _values(embedding), projection.weight
        bias_X = getattr(projection, "bias", None)
        tokens = config.tokens
        if len(values_XW) < tokens:
            raise ValueError(f"the embedding has {len(values_XW)} rows for {tokens} tokens")
        tied = weight_XH is values_XW
        # The row of [MASK] is that of the network's own mask token, or else the mean of all rows.
        mask_W = values_XW.mean(0) if config.mask is None else values_XW[config.mask]
        with torch.no_grad():
            self.values_UW = nn.Parameter(torch.cat([values_XW[:tokens], mask_W[None]]))
            self.weight_VH = None if tied else nn.Parameter(weight_XH[:tokens].clone())
            bias_V = torch.zeros(tokens) if bias_X is None else bias_X[:tokens].clone()
            self.bias_V = nn.Parameter(bias_V)
        _take_out(network, *taken)
        self.network = network

    @property
    def blocks(self) -> nn.ModuleList:
        """The list of as many modules as the network has blocks; empty where there is none."""
        lists = (found for found in _lists(self.network) if len(found) == self.config.blocks)
        return next(lists, nn.ModuleList())

    @property
    def positions(self) -> int | None:
        """How many tokens a row has at most; None where the network does not say."""
        most = getattr(self.network.config, "max_position_embeddings", None)
        if not most or most < 1:
            return None
        tables = [m for m in self.network.modules() if isinstance(m, nn.Embedding)]
        padded = [m.padding_idx for m in tables if m.num_embeddings == most]
        # The first position of RoBERTa is in the row behind that of the padding.
        unused = max((row + 1 for row in padded if row is not None), default=0)
        return int(most) - unused - (self.config.start is not None)

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        """``weight_VH, bias_V``; the bias of tokens that are never predicted is minus infinity."""
        weight_VH = self.values_UW[:-1] if self.weight_VH is None else self.weight_VH
        never_N = send(torch.tensor(self.config.never, dtype=torch.int64), self.bias_V.device)
        return weight_VH, self.bias_V.index_fill(0, never_N, -torch.inf)

    def forward(self, inputs_BLW: Tensor) -> Tensor:
        """Hidden states, in the network's dtype."""
        start = self.config.start
        if start is not None:
            start_B1W = self.values_UW[start].to(inputs_BLW).expand(len(inputs_BLW), 1, -1)
            inputs_BLW = torch.cat([start_B1W, inputs_BLW], dim=1)
        hidden_BLH: Tensor = self.network(inputs_embeds=inputs_BLW).logits
        return hidden_BLH if start is None else hidden_BLH[:, :-1]

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations of one token's forward and backward pass, head included.

        Counts matrix products, as `dsl.dit.DiT.flops_per_token` does. Parameters that are vectors,
        and embeddings, which are looked up, are no factors of one.
        """
        width: int = self.head[0].shape[1]
        factors = (
            parameter.numel()
            for module in self.network.modules()
            if not isinstance(module, nn.Embedding)
            for parameter in module.parameters(recurse=False)
            if parameter.dim() > 1
        )
        weights: int = sum(factors) + self.config.tokens * width
        return 3 * (2 * weights + 4 * self.config.blocks * length * width)


@torch.no_grad()
def _values(embedding: Any) -> Tensor:
    """``[X, W]``: what an embedding returns for every id. This need not be its weight: Gemma's
    embedding scales its rows."""
    weight_XW: Tensor = embedding.weight
    if not isinstance(embedding, nn.Embedding) or type(embedding).forward is nn.Embedding.forward:
        return weight_XW
    values_XW: Tensor = embedding(torch.arange(len(weight_XW), device=weight_XW.device))
    return values_XW


def network(config: ForeignConfig) -> Any:
    """The network of a configuration on the CPU, its weights not set.

    Raises:
        ValueError: neither the library nor the code can build such a network, or its number of
            blocks differs from ``config.blocks``.
    """
    import transformers
    from transformers.initialization import no_init_weights

    files = {**config.code, "config.json": json.dumps(dict(config.settings))}
    trusted = {"trust_remote_code": bool(config.code)}
    try:
        with tempfile.TemporaryDirectory() as place:
            # The library names the modules of the code after the folder.
            folder = pathlib.Path(place) / "model"
            folder.mkdir()
            for name, text in files.items():
                (folder / name).write_text(text, encoding="utf-8")
            known = transformers.AutoConfig.from_pretrained(folder, **trusted)
            if (count := getattr(known, "num_hidden_layers", config.blocks)) != config.blocks:
                raise ValueError(f"settings have {count} blocks, not {config.blocks}")
            opener = getattr(transformers, opened_by(config.settings, config.trained, config.code))
            # Not on the meta device: the network computes buffers that no file holds.
            with torch.device("cpu"), no_init_weights():
                made = opener.from_config(known, **trusted)
        _tie(made)
    except Exception as error:  # the library raises whatever settings make it stumble over
        raise ValueError(f"no model can be built from backbone.settings ({error!r})") from error
    return bidirectional(made)


def opened_by(settings: Mapping[str, Any], trained: Trained, code: Mapping[str, str]) -> str:
    """The library's class for a network, or the one that code beside the weights names."""
    given = settings.get("auto_map", {}) if code else {}
    return next((name for name in NAMED_BY_CODE if name in given), OPENED_BY[trained])


def is_source(name: str) -> bool:
    """Whether a name is that of a Python file, and of no other place."""
    return name.endswith(".py") and name.removesuffix(".py").isidentifier()


def count_blocks(network: Any) -> int:
    """How many blocks a network has: by its configuration, or else the length of its `ModuleList`
    with the most weights."""

    def weights(modules: nn.ModuleList) -> int:
        return sum(weight.numel() for weight in modules.parameters())

    found = len(max(_lists(network), key=weights, default=()))
    return int(getattr(network.config, "num_hidden_layers", found))


def _lists(network: nn.Module) -> list[nn.ModuleList]:
    return [module for module in network.modules() if isinstance(module, nn.ModuleList)]


def bidirectional(network: Any) -> Any:
    """The same network with attention to both sides, and without a cache of keys and values."""
    network.config.is_causal = network.config.use_cache = False
    for module in network.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    return network


def _tie(network: Any) -> None:
    """Share the weights that the network's class declares as tied. The library does so only after
    it has loaded weights."""
    tied = getattr(network.config, "tie_word_embeddings", False)
    for name, source in (network._tied_weights_keys or {}).items() if tied else ():
        parent, _, own = name.rpartition(".")
        # Some classes give the source as a pattern, which ends in a dollar sign.
        shared = network.get_parameter(source.removesuffix("$"))
        setattr(network.get_submodule(parent), own, shared)


def _take_out(network: Any, *modules: nn.Module) -> None:
    """Replace modules by the identity, and remove their weights wherever else these are
    registered."""
    gone = {id(weight) for module in modules for weight in module.parameters()}
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if any(child is module for module in modules):
                setattr(parent, name, nn.Identity())
        for name, weight in list(parent.named_parameters(recurse=False)):
            if id(weight) in gone:
                parent.register_parameter(name, None)
