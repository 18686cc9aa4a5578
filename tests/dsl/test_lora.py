"""Adapters change nothing at first, are trained in the place of the backbone, and can be merged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import dsl
from dsl import lora
from dsl.denoiser import Denoiser, DenoiserConfig
from dsl.dit import DiTConfig
from dsl.errors import AdaptationError
from dsl.lora import Lora, merged
from dsl.objective import DSLObjective
from dsl.support import Mixed
from tests.dsl import hubs

FAMILIES = ("bert", "modernbert", "llama", "coded", "dit")


def made(folder: Path, family: str) -> Denoiser:
    if family == "dit":
        torch.manual_seed(0)
        backbone = DiTConfig(tokens=22, width=16, blocks=2, heads=2, cond_dim=8, start="open")
        return Denoiser(DenoiserConfig(backbone=backbone, embed_dim=4)).eval()
    trusted = family == "coded"
    hubs.coded(folder) if trusted else hubs.saved(folder, family)
    adapt = "shift" if family in hubs.CAUSAL else None
    return dsl.from_transformers(folder, embed_dim=4, adapt=adapt, trust_remote_code=trusted)


def said(denoiser: Denoiser) -> torch.Tensor:
    """Of a draft: every position has evidence, so every weight takes part."""
    tokens_BL = torch.arange(18).view(2, 9)
    gamma_BL = torch.linspace(0.5, 9, 18).view(2, 9)
    known_BL = torch.zeros_like(tokens_BL, dtype=torch.bool)
    state = dsl.State.from_tokens(denoiser.table_VD.detach(), tokens_BL, known_BL, gamma_BL)
    with torch.no_grad():
        return denoiser(state).log_probs()


@pytest.mark.parametrize("family", FAMILIES)
def test_new_adapters_change_nothing_and_trained_ones_can_be_merged(
    tmp_path: Path, family: str
) -> None:
    pytest.importorskip("peft", reason="the extra `hub` is not installed")
    denoiser = made(tmp_path, family)
    weights = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    before, drawn = said(denoiser), torch.get_rng_state()
    denoiser = Lora(rank=3, alpha=6).attached(denoiser, seed=1)
    assert torch.equal(said(denoiser), before)
    assert torch.equal(torch.get_rng_state(), drawn)

    learner = DSLObjective(denoiser, Mixed(roar_share=0.5)).train()
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=0.05)
    for step in range(3):
        loss = learner(torch.arange(5, 19).view(2, 7), torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    trained = {name for name, p in denoiser.named_parameters() if p.requires_grad}
    backbone = {name for name in trained if name.startswith("backbone")}
    assert trained - backbone == {n for n in weights if n.startswith(("table", "converter"))}
    assert len(backbone) == 2 * len(Lora().names(made(tmp_path / "again", family).backbone))
    assert all("lora_" in name for name in backbone)
    assert all(p.grad is None for p in denoiser.parameters() if not p.requires_grad)

    unmerged = said(denoiser.eval())
    assert (unmerged - before)[before.isfinite()].abs().max() > 1e-2
    now = merged(denoiser).state_dict()
    torch.testing.assert_close(said(denoiser), unmerged, rtol=0, atol=1e-5)
    assert now.keys() == weights.keys()
    changed = {name for name in now if not torch.equal(now[name], weights[name])}
    adapted = {name.partition(".lora_")[0].replace(".base_layer", "") for name in backbone}
    assert changed == (trained - backbone) | {f"{name}.weight" for name in adapted}


def test_new_adapters_leave_the_gates_of_a_dit(tmp_path: Path) -> None:
    """Gates are multiplied into weights, or into the answer of a map with an adapter: up to
    rounding that is the same, also where gates are not 1."""
    pytest.importorskip("peft", reason="the extra `hub` is not installed")
    denoiser = made(tmp_path, "dit")
    for block in denoiser.backbone.blocks:
        torch.nn.init.normal_(block.adaLN_modulation.bias)
    before = said(denoiser)
    found = said(Lora().attached(denoiser, seed=1))
    torch.testing.assert_close(found, before, rtol=0, atol=1e-5)


def test_targets_are_the_ends_of_names(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the extra `hub` is not installed")
    backbone = made(tmp_path, "llama").backbone
    found = Lora(targets=("q_proj", "mlp.up_proj")).names(backbone)
    ends = ("self_attn.q_proj", "mlp.up_proj")
    assert found == [f"network.model.layers.{i}.{end}" for i in range(2) for end in ends]
    with pytest.raises(AdaptationError, match=r"'proj' is no linear map .* self_attn.q_proj, "):
        Lora(targets=("q_proj", "proj")).names(backbone)


def test_the_same_seed_gives_the_same_adapters(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the extra `hub` is not installed")
    one, two, other = (
        Lora().attached(made(tmp_path / str(i), "bert"), seed).state_dict()
        for i, seed in enumerate((1, 1, 2))
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_without_peft_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(AdaptationError, match="need the library peft, which is not installed"):
        Lora().attached(made(tmp_path, "dit"), seed=1)


def test_a_network_without_linear_maps_is_refused(tmp_path: Path) -> None:
    """GPT-2's maps are a class of the library's own."""
    pytest.importorskip("peft", reason="the extra `hub` is not installed")
    with pytest.raises(AdaptationError, match="no linear map in its blocks"):
        Lora().attached(made(tmp_path, "gpt2"), seed=1)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0}])
def test_sizes_must_be_positive(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="rank and alpha must be at least 1"):
        Lora(**wrong)
