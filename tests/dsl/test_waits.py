"""How often the CPU waits for a GPU, and what it asks of one, on the stand-in of `tests.gpu`.

Shapes: B rows, L positions.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dsl.denoiser import Denoiser, DenoiserConfig
from dsl.dit import DiTConfig
from dsl.exact import ExactDenoiser
from dsl.noise import generator
from dsl.objective import ARObjective, DSLObjective, MDLMObjective
from dsl.paths import (
    AnyPath,
    EntropyBounded,
    Hybrid,
    Masked,
    Order,
    Remask,
    SecondOrder,
    SentenceSDE,
    TokenSDE,
)
from dsl.posterior import Posterior
from dsl.sampling import sample
from dsl.state import State, send
from dsl.support import Mixed
from dsl.truncation import Truncated
from tests.dsl.laws import random_law
from tests.gpu import GPU, OnGpu, standing_in

B, L, TOKENS, DIM = 4, 8, 13, 4
LAW = random_law(tokens=3, length=4, dim=2, seed=3)
SDE = SentenceSDE(gamma_max=20.0)
ENDPOINT: list[AnyPath] = [
    Masked(),
    Remask(rule="cap"),
    Remask(rule="conf"),
    Order("random"),
    EntropyBounded(bound=0.5),
]
CONTINUOUS: list[AnyPath] = [
    SDE,
    SecondOrder(SDE),
    TokenSDE(gamma_max=20.0, delta=0.1),
    Hybrid(SDE, Masked(), split=(5, 4)),
]


def network(causal: bool = False) -> Denoiser:
    torch.manual_seed(0)
    backbone = DiTConfig(tokens=TOKENS, width=16, blocks=1, heads=2, cond_dim=8, causal=causal)
    denoiser = Denoiser(DenoiserConfig(backbone=backbone, embed_dim=DIM))
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.4)
    return denoiser


@pytest.fixture
def tokens_BL() -> Tensor:
    return torch.randint(TOKENS, (B, L), generator=generator(9, 0, 0))


# What decides on their next step is known before the posterior is.
NOTHING_READ = {
    *(Masked(), Remask(rule="cap"), Order("random"), SDE, SecondOrder(SDE)),
    Hybrid(SDE, Masked(), split=(5, 4)),
}

OBJECTIVES = {
    "dsl": lambda: DSLObjective(network(), Mixed(roar_share=0.5)),
    "mdlm": lambda: MDLMObjective(network()),
    "ar": lambda: ARObjective(network(causal=True)),
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_loss_and_its_gradient_wait_for_nothing(kind: str, tokens_BL: Tensor) -> None:
    expected = OBJECTIVES[kind]()(tokens_BL, generator(1, 2, 3))
    with standing_in() as waits:
        objective, there_BL = OBJECTIVES[kind]().to(GPU), tokens_BL.to(GPU)
        waits.found.clear()
        loss = objective(there_BL, generator(1, 2, 3))
        loss.value.backward()
        assert waits.found == []
        assert all(isinstance(p.grad, OnGpu) for p in objective.parameters() if p.requires_grad)
        metrics = {name: value.item() for name, value in loss.metrics.items()}
    shares = {name: value.item() for name, value in expected.metrics.items() if "share" in name}
    assert {name: metrics[name] for name in shares} == shares
    if kind != "dsl":  # whose noise is another on a GPU
        torch.testing.assert_close(loss.value.cpu(), expected.value)


@pytest.mark.parametrize("nucleus", [1.0, 0.9])
@pytest.mark.parametrize("path", ENDPOINT + CONTINUOUS, ids=repr)
def test_a_call_of_a_sampler_hardly_waits(path: AnyPath, nucleus: float, tokens_BL: Tensor) -> None:
    """Once per chunk, which all positions are here, to know whether a nucleus is whole. Else only
    for what a path reads of the posterior to decide on its next step: three times in all."""
    budget = 9
    known_BL = torch.zeros(B, L, dtype=torch.bool)
    known_BL[:, ::4] = True
    start = State.from_tokens(network().table_VD, tokens_BL, known_BL)
    plain = Truncated(network().eval().requires_grad_(False), 1.0, nucleus)
    expected = sample(plain, path, start, budget=budget, seed=1)
    with standing_in() as waits:
        sharp = Truncated(network().eval().requires_grad_(False).to(GPU), 1.0, nucleus)
        state = start.like(sharp.table_VD)
        waits.found.clear()
        made = sample(sharp, path, state, budget=budget, seed=1)
        found, tokens = waits.found.copy(), made.tokens_BL.tolist()
    most = 3 * budget
    if path in NOTHING_READ:
        most = budget if nucleus < 1 else 0
    assert len(found) <= most, found
    assert made.calls == expected.calls
    if path in ENDPOINT:  # which draw no normals: a GPU's are others
        assert tokens == expected.tokens_BL.tolist()


def test_only_pinned_memory_is_sent_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """From other memory the copy would wait until the GPU has nothing left to compute."""
    pinned, sent = [], []

    def pin_memory(tensor: Tensor) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    def to(tensor: Tensor, device: torch.device, *, non_blocking: bool) -> Tensor:
        sent.append((tensor, device.type, non_blocking))
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", to)
    send(torch.ones(2), torch.device("cuda"))
    send(torch.ones(2), torch.device("cpu"))
    assert [(kind, waits_not) for _, kind, waits_not in sent] == [("cuda", True), ("cpu", True)]
    assert [tensor is pinned[0] for tensor, *_ in sent] == [True, False]


class Spy:
    """A denoiser that counts the rows of every call."""

    def __init__(self, table_VD: Tensor) -> None:
        self.inner = ExactDenoiser(table_VD, LAW.sequences_SL, LAW.p_S)
        self.table_VD = table_VD
        self.rows: list[int] = []

    def __call__(self, state: State) -> Posterior:
        self.rows.append(len(state.gamma_BL))
        return self.inner(state)


@pytest.mark.parametrize(
    "path", [Masked(), Hybrid(Masked(), Remask(rule="conf"), split=(8, 8))], ids=repr
)
def test_a_gpus_partial_batches_have_few_sizes_and_the_same_texts(path: AnyPath) -> None:
    """With more calls than tokens most of them are for some of the rows. Rule ``conf`` reads the
    answers for rows that the first stage has finished, which no other row may have renewed."""
    rows = 12
    start = State.masked(rows, 4, 2, dtype=torch.float64)
    here = Spy(LAW.table_VD)
    expected = sample(here, path, start, budget=16, seed=7)
    with standing_in():
        there = Spy(LAW.table_VD.to(GPU))
        made = sample(there, path, start, budget=16, seed=7)
        assert made.tokens_BL.tolist() == expected.tokens_BL.tolist()
    assert set(there.rows) <= {1, 2, 4, 8, rows}
    assert {3, 5, 6, 7} & set(here.rows)
    assert torch.equal(made.row_calls_B, expected.row_calls_B)
    assert made.calls == expected.calls


def test_the_stand_in_tells_what_waits_and_what_does_not_fit() -> None:
    here = torch.arange(6.0)
    with standing_in() as waits:
        there = here.to(GPU, non_blocking=True)
        assert (there + 1).mul_(2).sum().device == GPU
        assert waits.found == []
        for wait in (
            lambda: there[there > 2],
            lambda: bool(there.any()),
            lambda: there.nonzero(),
            lambda: there.cpu(),
            lambda: there.tolist(),
            lambda: here.to(GPU),
            lambda: torch.tensor([1.0], device=GPU),
            lambda: there.new_tensor(1.0),
        ):
            waits.found.clear()
            wait()
            assert len(waits.found) == 1
        with pytest.raises(AssertionError, match="tensors of the CPU"):
            there + here
