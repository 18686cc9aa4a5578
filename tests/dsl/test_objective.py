"""Losses equal their definitions, summed the naive way, and never hold positions x vocabulary."""

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsl.channel import observe
from dsl.denoiser import Denoiser, DenoiserConfig
from dsl.dit import DiTConfig
from dsl.noise import generator
from dsl.objective import EPS, ARObjective, DSLObjective, MDLMObjective
from dsl.state import State
from dsl.support import LogNormal, Mixed, Roar, stratified

V, B, L = 11, 6, 5


@dataclass(frozen=True)
class Given:
    """A support whose draw the test chooses."""

    gamma_BL: Tensor

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Tensor:
        assert self.gamma_BL.shape == (rows, length)
        return self.gamma_BL


def make(*, tokens: int = V, causal: bool = False, dtype: torch.dtype = torch.float64) -> Denoiser:
    """A small denoiser with no layer left at its zero start."""
    torch.manual_seed(0)
    backbone = DiTConfig(tokens=tokens, width=16, blocks=2, heads=2, cond_dim=8, causal=causal)
    denoiser = Denoiser(DenoiserConfig(backbone=backbone, embed_dim=4, beta=0.7))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return denoiser.to(dtype)


@pytest.fixture
def tokens_BL() -> Tensor:
    return torch.randint(V, (B, L), generator=generator(9, 0, 0))


def naive(denoiser: Denoiser, state: State, tokens_BL: Tensor) -> Tensor:
    """``[B, L]`` nats through all the logits, 0 where revealed."""
    logits_BLV = F.linear(denoiser.hidden(state), *denoiser.backbone.head)
    logits_BLV = logits_BLV + state.z_BLD @ denoiser.table_VD.T
    log_probs_BLV = logits_BLV.log_softmax(-1)
    nats_BL = -log_probs_BLV.gather(-1, tokens_BL[..., None]).squeeze(-1)
    return nats_BL.masked_fill(state.revealed_BL, 0)


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def assert_same(value, gradient, expected, expected_gradient):
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert gradient.keys() == expected_gradient.keys()
    for name in gradient:
        torch.testing.assert_close(
            gradient[name], expected_gradient[name], rtol=1e-9, atol=1e-12, msg=name
        )


def masks_of(objective: MDLMObjective, tokens_BL: Tensor, seed: int) -> Tensor:
    """The gamma that an objective's forward shows its denoiser."""
    seen = []
    hidden = objective.denoiser.hidden
    objective.denoiser.hidden = lambda state: seen.append(state.gamma_BL) or hidden(state)
    objective(tokens_BL, generator(seed, 0, 0))
    del objective.denoiser.hidden
    return seen[0]


@pytest.mark.parametrize(
    "support", [Roar(), Roar(gamma_min=1, c=0.8, gamma_max=100), LogNormal(), Mixed(roar_share=0.5)]
)
def test_dsl_equals_the_naive_cross_entropy(tokens_BL, support):
    objective = DSLObjective(make(), support)
    loss = objective(tokens_BL, generator(1, 2, 3))
    loss.value.backward()
    gradient = gradients(objective)

    source = generator(1, 2, 3)
    state = observe(objective.denoiser.table_VD, tokens_BL, support.sample(B, L, source), source)
    nats_BL = naive(objective.denoiser, state, tokens_BL)
    nats_BL.mean().backward()
    assert_same(loss.value, gradient, nats_BL.mean(), gradients(objective))

    parts = loss.metrics
    torch.testing.assert_close(parts["masked_nats"] + parts["evidence_nats"], loss.value.detach())
    torch.testing.assert_close(parts["masked_nats"], nats_BL[state.masked_BL].sum() / (B * L))
    for name, where_BL in (("masked", state.masked_BL), ("evidence", state.evidence_BL)):
        torch.testing.assert_close(parts[f"{name}_share"], where_BL.double().mean())


def test_mdlm_equals_the_naive_weighted_cross_entropy(tokens_BL):
    objective = MDLMObjective(make())
    gamma_BL = masks_of(objective, tokens_BL, seed=4)
    loss = objective(tokens_BL, generator(4, 0, 0))
    loss.value.backward()
    gradient = gradients(objective)

    t_B = 1 - (1 - EPS) * stratified(B, generator(4, 0, 0))
    assert ((t_B > EPS) & (t_B <= 1)).all()
    state = observe(objective.denoiser.table_VD, tokens_BL, gamma_BL, generator(0, 0, 0))
    expected = (naive(objective.denoiser, state, tokens_BL) / t_B[:, None]).mean()
    expected.backward()
    assert_same(loss.value, gradient, expected, gradients(objective))


def test_mdlm_is_unbiased():
    """Against the integral over t of the sum over all eight masks of three tokens."""
    objective = MDLMObjective(make())
    tokens_L = torch.tensor([2, 7, 7])
    masks_ML = torch.tensor(list(itertools.product([False, True], repeat=3)))
    gamma_ML = torch.where(masks_ML, 0.0, torch.inf)
    tokens_ML = tokens_L.expand(8, 3)
    nodes, node_weights = np.polynomial.legendre.leggauss(4)  # exact to degree 7
    t_T = torch.from_numpy(EPS + (1 - EPS) * (nodes + 1) / 2)
    mean_T = torch.from_numpy(node_weights / 2)
    with torch.no_grad():
        state = observe(objective.denoiser.table_VD, tokens_ML, gamma_ML, generator(0, 0, 0))
        nats_M = naive(objective.denoiser, state, tokens_ML).sum(-1) / 3
        masked_M1 = masks_ML.sum(-1, keepdim=True)
        # The mask's probability over t, as a polynomial: t^(m-1) (1-t)^(L-m).
        weight_MT = t_T ** (masked_M1 - 1) * (1 - t_T) ** (3 - masked_M1)
        exact = ((weight_MT * mean_T).sum(-1) * nats_M)[1:].sum()
        value_C = torch.stack(
            [objective(tokens_L.expand(4096, 3), generator(0, c, 0)).value for c in range(60)]
        )
    stderr = value_C.std() / len(value_C) ** 0.5
    assert stderr < 0.005 * exact
    assert abs(value_C.mean() - exact) < 4 * stderr


def test_ar_is_a_normalised_law():
    objective = ARObjective(make(tokens=3, causal=True))
    every_N3 = torch.tensor(list(itertools.product(range(3), repeat=3)))
    with torch.no_grad():
        nats_N = torch.stack(
            [objective(row[None], generator(0, 0, 0)).value * 3 for row in every_N3]
        )
    torch.testing.assert_close((-nats_N).exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    assert nats_N.std() > 0.01


def test_ar_refuses_a_backbone_that_sees_the_answer():
    with pytest.raises(ValueError, match="causal=True"):
        ARObjective(make())


@pytest.mark.parametrize(
    "objective",
    [
        DSLObjective(make(dtype=torch.float32), Mixed()),
        MDLMObjective(make(dtype=torch.float32)),
        ARObjective(make(causal=True, dtype=torch.float32)),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_equal_keys_give_equal_losses_bit_for_bit(objective, tokens_BL):
    values = [objective(tokens_BL, generator(1, 2, lane)).value for lane in (0, 0, 1)]
    assert values[0].dtype == torch.float32
    assert torch.equal(values[0], values[1])
    assert isinstance(objective, ARObjective) or not torch.equal(values[0], values[2])


ENDPOINTS_BL = torch.where(torch.arange(B * L).view(B, L) % 2 == 0, 0.0, torch.inf)


@pytest.mark.parametrize(
    "gamma_BL",
    [ENDPOINTS_BL, torch.full((B, L), 3.0), torch.full((B, L), torch.inf)],
    ids=["endpoints", "evidence", "nothing to predict"],
)
def test_every_parameter_takes_part_in_every_dsl_batch(gamma_BL, tokens_BL):
    """Or ranks of one reduction would wait for gradients that others do not have."""
    objective = DSLObjective(make(), Given(gamma_BL))
    loss = objective(tokens_BL, generator(0, 0, 0))
    loss.value.backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())
    if gamma_BL.isinf().all():
        assert loss.value == 0
        assert all(not parameter.grad.any() for parameter in objective.parameters())
    if gamma_BL.isfinite().all():
        assert objective.denoiser.table.direction_VD.grad.any()
        assert objective.denoiser.converter.beta.grad.any()


@pytest.mark.parametrize("objective", [MDLMObjective(make()), ARObjective(make(causal=True))])
def test_baselines_freeze_the_table_and_the_converter_and_train_the_rest(objective, tokens_BL):
    objective(tokens_BL, generator(0, 0, 0)).value.backward()
    frozen = {name.split(".")[1] for name, p in objective.named_parameters() if p.grad is None}
    assert frozen == {"table", "converter"}
    assert all(p.requires_grad is (p.grad is not None) for p in objective.parameters())


def test_bfloat16_stays_close_and_returns_float32(tokens_BL):
    wide = DSLObjective(make(dtype=torch.float32), Mixed())
    narrow = DSLObjective(make(dtype=torch.bfloat16), Mixed())
    value = narrow(tokens_BL, generator(0, 0, 0)).value
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, wide(tokens_BL, generator(0, 0, 0)).value, rtol=0.03, atol=0)


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_float16_stays_close_and_returns_float32(how, tokens_BL):
    exact = DSLObjective(make(dtype=torch.float32), Mixed())
    objective = DSLObjective(make(dtype=torch.float32), Mixed())
    if how == "weights":
        objective.half()
    with torch.autocast("cpu", torch.float16, enabled=how == "autocast"):
        value = objective(tokens_BL, generator(0, 0, 0)).value
    value.backward()
    assert value.dtype == torch.float32
    expected = exact(tokens_BL, generator(0, 0, 0)).value
    torch.testing.assert_close(value, expected, rtol=0.01, atol=0)
    assert all(parameter.grad.isfinite().all() for parameter in objective.parameters())


MEMORY = """
import resource, torch
from tests.dsl.test_objective import make, generator
from dsl.objective import DSLObjective
from dsl.support import LogNormal
torch.set_num_threads(1)
objective = DSLObjective(make(tokens=50257, dtype=torch.float32), LogNormal())
peak = []
for rows in (1, 4):
    objective(torch.zeros(rows, 512, dtype=torch.int64), generator(0, 0, 0)).value.backward()
    peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peak[1] - peak[0])
"""


def test_peak_memory_does_not_grow_with_positions_times_vocabulary():
    """With evidence everywhere each position pays twice for V: in the converter and the head."""
    root = Path(__file__).resolve().parents[2]
    # Freed blocks return to the system at once, so that the peak is what was held together.
    environment = os.environ | {"PYTHONPATH": str(root), "MALLOC_MMAP_THRESHOLD_": "1000000"}
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    growth = int(ran.stdout) * 1024
    more_positions = 2048 - 512
    assert growth < 0.1 * more_positions * 50257 * 4, f"{growth / 2**20:.0f} MiB"


def test_flat_weights_leave_the_plain_cross_entropy_of_the_same_masks(tokens_BL):
    flat = MDLMObjective(make(), weighting="flat")(tokens_BL, generator(1, 2, 3))
    bound = MDLMObjective(make())(tokens_BL, generator(1, 2, 3))
    torch.testing.assert_close(flat.value.detach(), flat.metrics["masked_nats"])
    assert torch.equal(flat.metrics["masked_nats"], bound.metrics["masked_nats"])
    assert bound.value > flat.value
    with pytest.raises(ValueError, match="weighting must be 'bound' or 'flat'"):
        MDLMObjective(make(), weighting="none")


@pytest.mark.parametrize(
    ("objective", "predicted", "evidence"),
    [
        (lambda: ARObjective(make(causal=True)), 1.0, 0.0),
        (lambda: MDLMObjective(make()), (1 + EPS) / 2, 0.0),
        (lambda: DSLObjective(make(), LogNormal()), 1.0, 1.0),
        (lambda: DSLObjective(make(), Roar()), (L + 1) / (2 * L), 0.0),
    ],
    ids=["ar", "mdlm", "dsl of evidence", "dsl of endpoints"],
)
def test_flops_are_of_the_positions_that_are_predicted(objective, predicted, evidence):
    """Against counts of the products: the backbone everywhere, head and converter where needed."""
    objective = objective()
    config = objective.denoiser.config
    width, dim, tokens = config.backbone.width, config.embed_dim, config.backbone.tokens
    body = 3 * config.backbone.blocks * (2 * 12 * width**2 + 4 * L * width)
    skip = dim if evidence else 0
    head, mixture = 6 * tokens * (width + skip), 6 * tokens * (width + dim)
    expected = body + predicted * head + evidence * mixture
    assert objective.flops_per_token(L) == pytest.approx(expected)
