"""Low-rank adapters (LoRA, arXiv 2106.09685) for a backbone that is too large to be trained whole.

Each chosen linear map W of the blocks becomes ``W + (alpha / rank) B A``, of which A and B alone
are trained. B starts at zero, so a network with new adapters answers as it did without. The library
`peft` holds them; `merged` adds the products to the weights, and nothing of `peft` remains.
"""

import re
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import nn

from dsl.backbone import Backbone
from dsl.denoiser import Denoiser
from dsl.errors import AdaptationError


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Which linear maps get adapters, and how large these are.

    rank: of the product B A, at least 1. alpha: B A is multiplied by alpha / rank; at least 1.
    targets: names of linear maps, or their ends, such as ``q_proj``; empty for all of the blocks.

    Raises:
        ValueError: rank or alpha is below 1.
    """

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha < 1:
            raise ValueError(f"rank and alpha must be at least 1, got {self.rank} and {self.alpha}")

    def names(self, backbone: Backbone) -> list[str]:
        """Names of the linear maps in a backbone that get adapters.

        Raises:
            AdaptationError: a target matches none, the blocks have none at all, or `peft` is not
                installed.
        """
        if find_spec("peft") is None:
            raise AdaptationError(
                "adapters need the library peft, which is not installed. "
                "Run: pip install 'discrete-stochastic-localization[hub]'"
            )
        assert isinstance(backbone, nn.Module)
        inside = {module for block in backbone.blocks for module in block.modules()}
        maps = [
            name
            for name, module in backbone.named_modules()
            if isinstance(module, nn.Linear) and module in inside
        ]
        if not maps:
            raise AdaptationError(
                "this network has no linear map in its blocks. Train it whole: leave lora out"
            )
        for target in self.targets:
            if not any(_ends(name, target) for name in maps):
                known = dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name) for name in maps)
                raise AdaptationError(
                    f"{target!r} is no linear map in the blocks of this network. "
                    f"Known: {', '.join(known)}"
                )
        targets = self.targets
        return [name for name in maps if not targets or any(_ends(name, t) for t in targets)]

    def attached(self, denoiser: Denoiser, seed: int) -> Denoiser:
        """Add adapters to a denoiser, in place, and freeze all other weights of its backbone.

        The same seed gives the same adapters. Table and converter are left as they are.

        Raises:
            AdaptationError: as `names` does.
        """
        backbone, names = denoiser.backbone, self.names(denoiser.backbone)
        import peft  # after `names`, which says so if it is not installed

        assert isinstance(backbone, nn.Module)
        backbone.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(
                peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=names), backbone
            )
        return denoiser


@torch.no_grad()
def merged(denoiser: Denoiser) -> Denoiser:
    """Add the products of a denoiser's adapters to its weights, in place; no adapters remain."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(denoiser.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge()
                setattr(parent, name, child.get_base_layer())
    return denoiser


def _ends(name: str, target: str) -> bool:
    """Whether a dotted name is the target, or ends with it."""
    return f".{name}".endswith(f".{target}")
