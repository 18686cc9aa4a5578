"""Floating-point operations on paper: matrix products alone, 2 for a multiply and an add.

Shapes: V tokens, D table dimension, W backbone width.
"""

from __future__ import annotations

from dsl.denoiser import DenoiserConfig

STEP = 3  # times a forward: the backward pass has every product twice


def backbone(config: DenoiserConfig, length: int) -> float:
    """Of one token's way through the blocks, the full attention square included."""
    dit = config.backbone
    weights = (4 + 2 * dit.mlp_ratio) * dit.width**2
    return dit.blocks * (2 * weights + 4 * length * dit.width)


def head(config: DenoiserConfig) -> float:
    """Of one position's logits."""
    dim = config.embed_dim if config.skip else 0
    return 2 * config.backbone.tokens * (config.backbone.width + dim)


def converter(config: DenoiserConfig) -> float:
    """Of one token's evidence: its scores and their mixture."""
    return 2 * config.backbone.tokens * (config.backbone.width + config.embed_dim)


def mean(config: DenoiserConfig) -> float:
    """Of one position's posterior mean, given its probabilities."""
    return 2 * config.backbone.tokens * config.embed_dim


def forward(
    config: DenoiserConfig, length: int, *, predicted: float = 1.0, evidence: float = 0.0
) -> float:
    """Of one token, where the shares ``predicted`` need logits and ``evidence`` the converter."""
    return backbone(config, length) + predicted * head(config) + evidence * converter(config)
