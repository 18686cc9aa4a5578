"""Start from a public masked-diffusion checkpoint (MDLM, ReMDM and Duo share one DiT).

Shapes: V tokens, U = V + 1 slots (the last is [MASK]), W backbone width.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsl.denoiser import Denoiser, DenoiserConfig
from dsl.dit import DiT, DiTConfig, rotary_frequencies
from dsl.errors import WeightsError
from dsl.lightning import read_ema
from dsl.weights import CONFIG, WEIGHTS, read_json, read_safetensors, set_weights, some

EMBEDDING = "vocab_embed.embedding"
INV_FREQ = "rotary_emb.inv_freq"
# Files hold a row for [MASK] in the head too, which no posterior over real tokens needs.
HEAD = ("output_layer.linear.weight", "output_layer.linear.bias")


def from_mdlm(
    path: str | os.PathLike[str],
    *,
    embed_dim: int = 64,
    beta: float | None = None,
    mask_prior: float = 0.99,
    skip: bool = True,
) -> Denoiser:
    """A denoiser around a pretrained backbone, float32 on the CPU, in evaluation mode.

    The converter's values are the checkpoint's input embedding, mask row included, so that at
    gamma in {0, inf} and ``mask_prior`` -> 1 the posterior is the MDLM's own (its mask logit
    removed, renormalised). The table is new and random.

    Args:
        path: a folder with ``model.safetensors`` and ``config.json`` (which says ``n_heads``), or
            a Lightning ``.ckpt``, of which the EMA weights are taken.
        embed_dim: D of the new table.
        beta, mask_prior: where the converter starts (see `dsl.converter.Converter`).
        skip: whether evidence skips the backbone (see `dsl.converter.ConverterConfig`).

    Raises:
        WeightsError: anything but a whole MDLM DiT whose [MASK] is the last of its ids.
        ValueError: ``embed_dim``, ``beta`` or ``mask_prior`` out of range.
    """
    path = Path(path)
    if path.is_dir():
        where, declared = path / WEIGHTS, read_json(path / CONFIG)
        tensors = read_safetensors(where)
    else:
        where, declared = path, {}
        tensors = read_ema(path)
    backbone = read_backbone(tensors, declared, where=where)
    config = DenoiserConfig(
        backbone=backbone.config, embed_dim=embed_dim, beta=beta, mask_prior=mask_prior, skip=skip
    )
    return Denoiser(config, backbone).eval()


def read_backbone(
    tensors: Mapping[str, Tensor], declared: Mapping[str, Any], *, where: Path
) -> DiT:
    """A DiT from the tensors of a file; sizes are read off them and must match ``declared``."""
    held = {name.removeprefix("backbone."): tensor.detach() for name, tensor in tensors.items()}
    inv_freq = held.pop(INV_FREQ, None)
    weights = {name: tensor.float().clone() for name, tensor in held.items()}
    config = read_sizes(weights, inv_freq, declared, where=where)
    for name in HEAD:
        if name in weights and weights[name].shape[:1] == (config.tokens + 1,):
            weights[name] = weights[name][:-1].clone()
    with torch.device("meta"):
        backbone = DiT(config)
    set_weights(backbone, weights, where=where)
    return backbone


def read_sizes(
    weights: Mapping[str, Tensor],
    inv_freq: Tensor | None,
    declared: Mapping[str, Any],
    *,
    where: Path,
) -> DiTConfig:
    """The backbone's sizes, from the shapes of its weights, and the dropout that is ``declared``.

    A Lightning file declares dropout in objects that are not opened, so it is 0 there.

    Raises:
        WeightsError: a size is missing, or differs from the one declared.
    """
    try:
        slots, width = weights[EMBEDDING].shape
        inner, _ = weights["blocks.0.mlp.0.weight"].shape
        ratio = inner // width
        cond_dim, _ = weights["sigma_map.mlp.2.weight"].shape
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise WeightsError(
            f"{where}: not an MDLM DiT: {error} is missing or not a matrix among "
            f"{some(weights)}. Give a checkpoint of the public MDLM, ReMDM or Duo."
        ) from error
    found: dict[str, int] = {
        "hidden_dim": width,
        "cond_dim": cond_dim,
        "n_blocks": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
    }
    if inv_freq is not None and inv_freq.numel():
        found["n_heads"] = width // (2 * inv_freq.numel())
    differing = [
        f"{key} is {size} in the weights and {declared[key]} in {CONFIG}"
        for key, size in found.items()
        if declared.get(key, size) != size
    ]
    heads = found.get("n_heads", declared.get("n_heads", 0))
    if not heads:
        differing.append(f"neither {INV_FREQ} nor n_heads in {CONFIG} says how many heads it has")
    if type(heads) is not int:
        differing.append(f"n_heads in {CONFIG} is {heads!r}")
    if inv_freq is not None:
        # Files in half precision hold them rounded.
        expected = rotary_frequencies(2 * inv_freq.numel(), inv_freq.device).to(inv_freq)
        if inv_freq.shape != expected.shape or not torch.allclose(inv_freq, expected):
            differing.append(f"{INV_FREQ} is not that of base 10000")
    if differing:
        raise WeightsError(
            f"{where}: {'; '.join(differing)}. "
            "Take weights and configuration from one and the same checkpoint."
        )
    try:
        return DiTConfig(
            tokens=slots - 1,
            width=width,
            blocks=found["n_blocks"],
            heads=heads,
            cond_dim=cond_dim,
            mlp_ratio=ratio,
            dropout=declared.get("dropout", 0.0),
        )
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{where}: not an MDLM DiT: {error}.") from error
