"""The backbone is the public DiT to the last digit that float32 holds, and only that.

Shapes: B rows, L positions, W width, V tokens.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dsl.dit import DiT, DiTConfig, Norm

CONFIG = DiTConfig(tokens=11, width=16, blocks=2, heads=2, cond_dim=8)


def awake(config: DiTConfig = CONFIG, seed: int = 0) -> DiT:
    """A DiT whose zero-initialised layers are not zero, so that every part shows."""
    torch.manual_seed(seed)
    backbone = DiT(config)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return backbone.eval()


@torch.no_grad()
def test_logits_equal_the_public_code(references):
    reference = torch.load(references / "mdlm_dit_small_reference.pt", weights_only=True)
    weights = reference["state_dict"]
    weights.pop("rotary_emb.inv_freq")
    slots, width = weights["vocab_embed.embedding"].shape
    for name in ("output_layer.linear.weight", "output_layer.linear.bias"):
        weights[name] = weights[name][:-1]
    backbone = DiT(DiTConfig(tokens=slots - 1, width=width, blocks=2, heads=4, cond_dim=32)).eval()
    backbone.load_state_dict(weights)
    weight_VW, bias_V = backbone.head
    hidden_BLW = backbone(backbone.values_UW[reference["input_ids"]])
    expected_BLV = reference["logits_sigma0"][..., :-1]
    torch.testing.assert_close(hidden_BLW @ weight_VW.T + bias_V, expected_BLV, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_new_backbone_is_the_identity_up_to_the_norm_and_its_logits_are_zero():
    torch.manual_seed(0)
    backbone, inputs_BLW = DiT(CONFIG), torch.randn(2, 5, 16)
    weight_VW, bias_V = backbone.head
    hidden_BLW = backbone(inputs_BLW)
    torch.testing.assert_close(hidden_BLW, torch.nn.functional.layer_norm(inputs_BLW, (16,)))
    assert not weight_VW.any()
    assert not bias_V.any()


@pytest.mark.parametrize("start", ["zero", "open"])
def test_what_a_first_step_can_teach_the_blocks(start):
    """Nothing, where gates and head are zero; every part of an open one."""
    torch.manual_seed(0)
    backbone = DiT(replace(CONFIG, start=start))
    hidden_BLW = backbone(torch.randn(2, 5, 16))
    weight_VW, bias_V = backbone.head
    (hidden_BLW @ weight_VW.T + bias_V).log_softmax(-1)[..., 0].sum().backward()
    taught = {bool(parameter.grad.any()) for parameter in backbone.blocks.parameters()}
    assert taught == {start == "open"}
    assert bias_V.grad.any()


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_only_a_causal_backbone_keeps_the_future_out(causal):
    backbone = awake(DiTConfig(tokens=11, width=16, blocks=2, heads=2, cond_dim=8, causal=causal))
    inputs_BLW = torch.randn(1, 6, 16)
    changed_BLW = inputs_BLW.clone()
    changed_BLW[:, 4] += torch.randn(16)
    same_L = torch.isclose(backbone(inputs_BLW), backbone(changed_BLW), atol=1e-6).all(-1)[0]
    assert same_L.tolist() == ([True] * 4 + [False] * 2 if causal else [False] * 6)


@torch.no_grad()
def test_position_matters_only_through_attention_and_relatively():
    # Rotary position: equal inputs stay equal along the sequence.
    hidden_BLW = awake()(torch.randn(1, 1, 16).expand(1, 7, 16))
    torch.testing.assert_close(hidden_BLW, hidden_BLW[:, :1].expand(1, 7, 16))
    inputs_BLW = torch.randn(1, 7, 16)
    order_L = torch.tensor([1, 0, 2, 3, 4, 5, 6])
    swapped_BLW = awake()(inputs_BLW[:, order_L])[:, order_L]
    assert not torch.allclose(swapped_BLW, awake()(inputs_BLW), atol=1e-3)


def test_dropout_acts_in_training_only():
    backbone = awake(DiTConfig(tokens=11, width=16, blocks=2, heads=2, cond_dim=8, dropout=0.5))
    inputs_BLW = torch.randn(1, 6, 16)
    assert torch.equal(backbone(inputs_BLW), backbone(inputs_BLW))
    assert torch.equal(backbone(inputs_BLW), awake()(inputs_BLW))
    backbone.train()
    assert not torch.equal(backbone(inputs_BLW), backbone(inputs_BLW))


def test_norm_is_float32_whatever_comes_in():
    norm, hidden_BLW = Norm(64).bfloat16(), (100 + torch.randn(2, 3, 64)).bfloat16()
    shift_W, scale_W = torch.randn(2, 64).bfloat16()
    found_BLW = norm(hidden_BLW, shift_W, scale_W)
    exact_BLW = Norm(64)(hidden_BLW.float(), shift_W.float(), scale_W.float())
    assert torch.equal(found_BLW, exact_BLW.bfloat16())


def test_shift_and_scale_follow_the_norm():
    norm, hidden_BLW = Norm(8).double(), torch.randn(2, 3, 8, dtype=torch.float64)
    norm.weight.data.normal_()
    shift_W, scale_W = torch.randn(2, 8, dtype=torch.float64)
    centred_BLW = hidden_BLW - hidden_BLW.mean(-1, keepdim=True)
    normed_BLW = centred_BLW / (hidden_BLW.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    expected_BLW = normed_BLW * norm.weight * (1 + scale_W) + shift_W
    torch.testing.assert_close(norm(hidden_BLW, shift_W, scale_W), expected_BLW)


def test_low_precision_weights_and_autocast_both_run():
    backbone, inputs_BLW = awake(), torch.randn(2, 5, 16)
    exact_BLW = backbone(inputs_BLW)
    with torch.autocast("cpu", torch.bfloat16):
        cast_BLW = backbone(inputs_BLW)
    low_BLW = backbone.bfloat16()(inputs_BLW.bfloat16())
    assert cast_BLW.dtype == low_BLW.dtype == torch.bfloat16
    for other_BLW in (cast_BLW, low_BLW):
        assert (other_BLW - exact_BLW).norm() / exact_BLW.norm() < 0.05


@pytest.mark.parametrize("length", [8, 32])
def test_flops_count_the_matrix_products(length):
    backbone = awake()
    inputs_BLW = torch.randn(2, length, 16, requires_grad=True)
    weight_VW, bias_V = backbone.head
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.nn.functional.linear(backbone(inputs_BLW), weight_VW, bias_V).sum().backward()
    counted = counter.get_total_flops()
    # The conditioning is computed once a batch, not once a token; it is all that may differ.
    assert 0 <= counted - 2 * length * backbone.flops_per_token(length) < 100_000 < counted


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 18},
        {"heads": 3},
        {"blocks": 0},
        {"tokens": 0},
        {"dropout": 1.0},
        {"start": "opened"},
    ],
)
def test_impossible_sizes_are_refused(wrong):
    sizes = {"tokens": 11, "width": 16, "blocks": 2, "heads": 2, "cond_dim": 8}
    with pytest.raises(ValueError, match="must"):
        DiTConfig(**{**sizes, **wrong})
