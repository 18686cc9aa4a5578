"""The network's contract: a posterior of the state and of nothing else, computed where asked.

Shapes: B rows, L positions, D table dimension, W width, V tokens.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dsl
from dsl.denoiser import Denoiser, DenoiserConfig
from dsl.dit import DiT, DiTConfig
from dsl.noise import generator
from dsl.objective import DSLObjective
from dsl.state import State
from dsl.support import Mixed

LENGTH, TOKENS, DIM = 7, 11, 6


def awake(seed: int = 0, *, causal: bool = False, tokens: int = TOKENS) -> Denoiser:
    """A denoiser whose zero-initialised layers are not zero, so that every part shows."""
    torch.manual_seed(seed)
    backbone = DiT(DiTConfig(tokens=tokens, width=16, blocks=2, heads=2, cond_dim=8, causal=causal))
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Denoiser(
        DenoiserConfig(backbone=backbone.config, embed_dim=DIM, beta=1.0, mask_prior=0.5), backbone
    ).eval()


def some_state(denoiser: Denoiser, rows: int = 3) -> State:
    """Masked, evidence and revealed tokens mixed."""
    torch.manual_seed(1)
    tokens_BL = torch.randint(TOKENS, (rows, LENGTH))
    gamma_BL = torch.tensor([0.0, 3.0, torch.inf])[torch.randint(3, (rows, LENGTH))]
    known_BL = torch.zeros(rows, LENGTH, dtype=torch.bool)
    return State.from_tokens(denoiser.table_VD, tokens_BL, known_BL, gamma_BL)


@pytest.fixture
def reference(references):
    return torch.load(references / "mdlm_dit_small_reference.pt", weights_only=True)


@pytest.mark.parametrize(
    ("mask_prior", "error"), [(1.0, 1e-5), (1 - 1e-9, 1e-5), (0.999, 1e-1)], ids=str
)
@torch.no_grad()
def test_at_the_endpoints_it_is_the_mdlm(reference, mask_prior, error):
    weights = reference["state_dict"]
    weights.pop("rotary_emb.inv_freq")
    for name in ("output_layer.linear.weight", "output_layer.linear.bias"):
        weights[name] = weights[name][:-1]
    mask = len(weights["output_layer.linear.bias"])
    backbone = DiT(DiTConfig(tokens=mask, width=64, blocks=2, heads=4, cond_dim=32))
    backbone.load_state_dict(weights)
    denoiser = Denoiser(
        DenoiserConfig(backbone=backbone.config, embed_dim=16, beta=None, mask_prior=mask_prior),
        backbone,
    )
    ids_BL = reference["input_ids"]
    masked_BL = ids_BL == mask
    state = State.from_tokens(
        denoiser.table_VD,
        ids_BL.masked_fill(masked_BL, 0),
        torch.zeros_like(masked_BL),
        torch.where(masked_BL, 0.0, torch.inf),
    )
    log_probs_BLV = denoiser.eval()(state).log_probs()
    expected_BLV = reference["subs_log_probs"][..., :-1]
    torch.testing.assert_close(
        log_probs_BLV[masked_BL], expected_BLV[masked_BL], atol=error, rtol=0
    )
    # Carried over, not predicted.
    assert torch.equal(log_probs_BLV[~masked_BL].argmax(-1), ids_BL[~masked_BL])


@torch.no_grad()
def test_the_posterior_is_normalised_and_one_hot_where_revealed():
    denoiser = awake()
    state = some_state(denoiser)
    posterior = denoiser(state)
    probs_BLV = posterior.log_probs().exp()
    torch.testing.assert_close(probs_BLV.sum(-1), torch.ones(3, LENGTH))
    assert torch.equal(
        probs_BLV[state.revealed_BL],
        torch.nn.functional.one_hot(state.tokens_BL[state.revealed_BL], TOKENS).float(),
    )
    torch.testing.assert_close(posterior.mean(), probs_BLV @ denoiser.table_VD)


@torch.no_grad()
def test_the_snr_itself_is_not_seen():
    denoiser = awake()
    state = some_state(denoiser)
    other = replace(state, gamma_BL=torch.where(state.evidence_BL, 17.0, state.gamma_BL))
    assert torch.equal(denoiser(state).log_probs(), denoiser(other).log_probs())
    louder = replace(state, z_BLD=2 * state.z_BLD)
    assert not torch.allclose(denoiser(state).log_probs(), denoiser(louder).log_probs())


@torch.no_grad()
def test_logits_are_what_the_head_makes_of_the_hidden_states():
    denoiser = awake()
    state = some_state(denoiser)
    logits_BLV = torch.nn.functional.linear(denoiser.hidden(state), *denoiser.backbone.head)
    logits_BLV += state.z_BLD @ denoiser.table_VD.T
    at_N = torch.tensor([9, 3, 20])
    unrevealed_N = ~state.revealed_BL.flatten()[at_N]
    torch.testing.assert_close(
        denoiser(state).log_probs_at(at_N)[unrevealed_N],
        logits_BLV.flatten(0, 1)[at_N].log_softmax(-1)[unrevealed_N],
    )


@torch.no_grad()
def test_the_skip_computes_nothing_where_there_is_no_evidence():
    denoiser = awake()
    at_N, state = torch.tensor([9, 3, 20]), some_state(denoiser)
    silent = Denoiser(replace(denoiser.config, skip=False), denoiser.backbone)
    z_ND, table_VD = denoiser.skip(state, at_N)
    assert torch.equal(z_ND, state.z_BLD.flatten(0, 1)[at_N])
    assert torch.equal(table_VD, denoiser.table_VD)
    masked = State.masked(3, LENGTH, DIM)
    for z_ND, table_VD in (denoiser.skip(masked, at_N), silent.skip(state, at_N)):
        assert (z_ND.shape, table_VD.shape) == ((3, 0), (TOKENS, 0))


class VocabularySized(TorchDispatchMode):
    """Counts results of at least so many elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.seen = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen += isinstance(result, Tensor) and result.numel() >= self.elements
        return result


@torch.no_grad()
def test_nobody_pays_for_logits_that_nobody_reads():
    tokens, rows = 3000, 64
    denoiser = awake(tokens=tokens)
    state = State.masked(rows, LENGTH, DIM)
    with VocabularySized(rows * LENGTH * tokens) as mode:
        posterior = denoiser(state)
        posterior.draw(torch.arange(10), torch.rand(10))
        assert mode.seen == 0
        posterior.log_probs()
        assert mode.seen > 0


@torch.no_grad()
def test_rows_do_not_see_each_other_and_can_be_renewed():
    denoiser = awake()
    state = some_state(denoiser)
    rows_R = torch.tensor([2, 0])
    log_probs_BLV = denoiser(state).log_probs()
    alone_RLV = denoiser(state.rows(rows_R)).log_probs()
    torch.testing.assert_close(alone_RLV, log_probs_BLV[rows_R])

    changed = replace(state, z_BLD=state.z_BLD + state.evidence_BL[..., None])
    fresh = denoiser(changed.rows(rows_R))
    renewed = denoiser(state).with_rows(changed, rows_R, fresh)
    assert renewed.state is changed
    expected_BLV = log_probs_BLV.index_copy(0, rows_R, fresh.log_probs())
    torch.testing.assert_close(renewed.log_probs(), expected_BLV)


@torch.no_grad()
def test_a_causal_denoiser_predicts_each_token_from_those_before_it():
    denoiser = awake(causal=True)
    tokens_BL = torch.randint(TOKENS, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    known_BL = torch.zeros(2, LENGTH, dtype=torch.bool)
    whole = State.from_tokens(
        denoiser.table_VD, tokens_BL, known_BL, torch.full((2, LENGTH), torch.inf)
    )
    taught_BLW = denoiser.hidden(whole)
    for position in range(LENGTH):
        known_BL[:, :position] = True
        prefix = State.from_tokens(denoiser.table_VD, tokens_BL, known_BL)
        torch.testing.assert_close(
            denoiser.hidden(prefix)[:, position], taught_BLW[:, position], atol=1e-5, rtol=1e-5
        )
    # The first answer knows nothing, the others know what came before.
    torch.testing.assert_close(taught_BLW[0, 0], taught_BLW[1, 0])
    assert not torch.allclose(taught_BLW[0, -1], taught_BLW[1, -1], atol=1e-2)


def test_every_parameter_learns():
    torch.manual_seed(0)
    denoiser = awake()
    log_probs_BLV = denoiser(some_state(denoiser)).log_probs_at(torch.arange(3 * LENGTH))
    log_probs_BLV[log_probs_BLV.isfinite()].square().sum().backward()
    still = [name for name, p in denoiser.named_parameters() if not p.grad.any()]
    assert still == []


@torch.no_grad()
def test_a_state_is_taken_to_the_network_s_precision():
    denoiser = awake().double()
    assert denoiser(State.masked(1, LENGTH, DIM)).log_probs().dtype == torch.float64
    assert awake().bfloat16()(State.masked(1, LENGTH, DIM)).log_probs().dtype == torch.float32


@pytest.mark.parametrize(
    "wrong", [{"embed_dim": 0}, {"beta": 0.0}, {"mask_prior": 0.0}, {"mask_prior": 1.5}]
)
def test_impossible_configurations_are_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        DenoiserConfig(backbone=DiTConfig(tokens=5, width=4, blocks=1, heads=1), **wrong)


class Bag(torch.nn.Module):
    """A backbone that is no transformer: each position sees itself and the mean of all."""

    def __init__(self, config: "BagConfig") -> None:
        super().__init__()
        self.values_UW = torch.nn.Parameter(torch.randn(config.tokens + 1, 5))
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(10, 3)])
        self.output = torch.nn.Linear(3, config.tokens)

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        return self.output.weight, self.output.bias

    def forward(self, inputs_BLW: Tensor) -> Tensor:
        mean_BLW = inputs_BLW.mean(1, keepdim=True).expand_as(inputs_BLW)
        return self.blocks[0](torch.cat([inputs_BLW, mean_BLW], dim=-1)).tanh()


@dataclass(frozen=True, kw_only=True)
class BagConfig:
    tokens: int
    blocks: int = 1
    causal: bool = False
    kind: str = "bag"

    def build(self) -> Bag:
        return Bag(self)


def test_any_backbone_of_the_protocol_trains_and_samples():
    """It shares neither sizes nor code with the DiT; its hidden width is not its input width."""
    torch.manual_seed(0)
    denoiser = Denoiser(DenoiserConfig(backbone=BagConfig(tokens=TOKENS), embed_dim=DIM))
    loss = DSLObjective(denoiser, Mixed())(torch.randint(TOKENS, (4, LENGTH)), generator(0, 0, 0))
    loss.value.backward()
    assert all(p.grad.isfinite().all() for p in denoiser.parameters())
    path = dsl.paths.Hybrid(dsl.paths.SentenceSDE(gamma_max=9.0), dsl.paths.Masked(), split=(2, 3))
    made = dsl.sample(denoiser, path, State.masked(4, LENGTH, DIM), budget=5, seed=0)
    assert ((made.tokens_BL >= 0) & (made.tokens_BL < TOKENS)).all()


@torch.no_grad()
def test_the_skip_is_the_exact_posterior_of_tokens_without_context():
    """With a silent backbone and the unigram as its bias, any SNR gives Bayes (003 A.1)."""
    torch.manual_seed(0)
    backbone = DiT(DiTConfig(tokens=4, width=8, blocks=1, heads=1))  # its head starts at zero
    unigram_V = torch.tensor([0.1, 0.2, 0.3, 0.4])
    backbone.head[1].copy_(unigram_V.log())
    denoiser = Denoiser(
        DenoiserConfig(backbone=backbone.config, embed_dim=3, beta=None, mask_prior=0.5), backbone
    )
    sequences_SL = torch.cartesian_prod(*[torch.arange(4)] * 3)
    law = dsl.ExactDenoiser(denoiser.table_VD, sequences_SL, unigram_V[sequences_SL].prod(1))
    gamma_BL = torch.tensor([[0.0, 0.5, 4.0], [30.0, torch.inf, 1.0]])
    tokens_BL = torch.tensor([[3, 1, 2], [0, 2, 1]])
    nothing_BL = torch.zeros(2, 3, dtype=torch.bool)
    state = State.from_tokens(denoiser.table_VD, tokens_BL, nothing_BL, gamma_BL)
    torch.testing.assert_close(denoiser(state).log_probs().exp(), law(state).log_probs().exp())
    plain = Denoiser(
        DenoiserConfig(
            backbone=backbone.config, embed_dim=3, beta=None, mask_prior=0.5, skip=False
        ),
        backbone,
    )  # what the skip is for: without it the evidence is not heard
    assert (plain(state).log_probs()[0, 2] - unigram_V.log()).abs().max() < 1e-6
