"""ReMDM's rules: the step of public code, the limits of each rule, and what `conf` remembers.

Shapes: B rows, L positions, V tokens, U = V + 1 with the mask last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsl.noise import Draws
from dsl.paths import Clock, Masked, Remask
from dsl.paths.remask import RULES, Memory
from dsl.sampling import sample
from dsl.state import State
from dsl.truncation import Truncated
from tests.dsl.laws import Written, cyclic, random_law

MASK = 100
PUBLIC = {
    "cap": "remdm-cap",
    "rescale": "remdm-rescale",
    "conf": "remdm-conf",
    "loop": "remdm-loop",
    "forward_backward": "forward-backward",
}
CASES = [(rule, "0.6") for rule in PUBLIC] + [("loop", "0.3"), ("loop", "0.04")]
# Here public code takes the step of MDLM: q is saved without its factor, and for revealed
# positions it is not used.
ANCESTRAL = {("loop", "0.6"), ("loop", "0.04")}


@pytest.fixture(scope="module")
def reference(references: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(references / "remdm_step_reference.pt", weights_only=True)
    return saved


def clock_at(t: float, dt: float) -> Clock:
    """Public time runs down from 1 in steps of dt."""
    budget = round(1 / dt)
    return Clock(call=round((1 - t) * budget), budget=budget, draws=Draws(0, 0, 0))


def posterior_of(reference: dict[str, Any], nucleus: str) -> Tensor:
    probs_BLV = reference["remdm.p_x0_nucleus1"][..., :MASK]
    if nucleus == "1.0":
        return probs_BLV
    options = Truncated(cyclic(3).denoiser(), nucleus=float(nucleus), convention="drop")
    return options.cut(probs_BLV.log().flatten(0, 1)).softmax(-1).view_as(probs_BLV)


@pytest.mark.parametrize("nucleus", ["1.0", "0.9"])
@pytest.mark.parametrize(("rule", "time"), CASES)
def test_q_is_that_of_public_remdm(
    reference: dict[str, Any], rule: Any, time: str, nucleus: str
) -> None:
    """``q(x_s | x_t)`` to 1e-5, every rule, with the nucleus that drops the crossing token."""
    key = f"remdm.{PUBLIC[rule]}|p{nucleus}|t{time}"
    saved_BLU = reference[f"{key}.q_xs"]
    saved_BLU = saved_BLU / saved_BLU.sum(-1, keepdim=True)
    tokens_BL = reference["input_ids"]
    masked_BL = tokens_BL == MASK

    doubt_BL = reference[f"{key}.conf_in"].double() if rule == "conf" else None
    clock = clock_at(*reference[f"{key}.t_dt"].tolist())
    reveal, remask = Remask(rule=rule).chances(clock, doubt_BL)
    reveal_BL, remask_BL = (torch.as_tensor(c).expand(tokens_BL.shape) for c in (reveal, remask))
    probs_BLV = posterior_of(reference, nucleus)
    one_hot_BLV = F.one_hot(tokens_BL.clamp_max(MASK - 1), MASK)
    ours_BLV = torch.where(
        masked_BL[..., None],
        probs_BLV * reveal_BL[..., None],
        one_hot_BLV * (1 - remask_BL)[..., None],
    )
    to_mask_BL = torch.where(masked_BL, 1 - reveal_BL, remask_BL)
    ours_BLU = torch.cat([ours_BLV, to_mask_BL[..., None]], dim=-1).float()

    where_BL = masked_BL if (rule, time) in ANCESTRAL else torch.ones_like(masked_BL)
    torch.testing.assert_close(ours_BLU[where_BL], saved_BLU[where_BL], rtol=0, atol=1e-5)
    if (rule, time) in ANCESTRAL:
        assert remask == 0.0


def saved(state: State, probs_BLV: Tensor) -> Written:
    return Written(state, torch.zeros(probs_BLV.shape[-1], 1), probs_BLV.flatten(0, 1).log())


def state_of(tokens_BL: Tensor) -> State:
    masked_BL = tokens_BL == MASK
    return State(
        tokens_BL=tokens_BL.masked_fill(masked_BL, 0),
        z_BLD=torch.zeros(*tokens_BL.shape, 1),
        gamma_BL=torch.where(masked_BL, 0.0, torch.inf),
        frozen_BL=torch.zeros_like(masked_BL),
    )


@pytest.mark.parametrize("nucleus", ["1.0", "0.9"])
def test_confidence_is_that_of_public_remdm(reference: dict[str, Any], nucleus: str) -> None:
    """What public ReMDM-conf remembers after its step: minus the probability after nucleus."""
    key = f"remdm.remdm-conf|p{nucleus}|t0.6"
    before, after = state_of(reference["input_ids"]), state_of(reference[f"{key}.x"])
    posterior = saved(before, posterior_of(reference, nucleus))
    memory = Memory(reference[f"{key}.conf_in"].double(), before.revealed_BL, posterior)
    doubt_BL = memory.update(after, saved(after, posterior_of(reference, "1.0"))).doubt_BL
    torch.testing.assert_close(doubt_BL.float(), reference[f"{key}.conf_out"], rtol=0, atol=1e-5)


LAW = random_law(tokens=3, length=4, dim=2, seed=3)


def draw(path: Any, budget: int = 24, state: State | None = None, seed: int = 4) -> Tensor:
    state = State.masked(64, 4, 2) if state is None else state
    return sample(LAW.denoiser(), path, state, budget=budget, seed=seed).tokens_BL


@pytest.mark.parametrize("alpha", ["linear", "cosine"])
@pytest.mark.parametrize("rule", ["cap", "rescale"])
def test_eta_0_is_masked_diffusion_draw_for_draw(rule: Any, alpha: Any) -> None:
    masked = draw(Masked(alpha=alpha))
    assert torch.equal(draw(Remask(rule=rule, eta=0, alpha=alpha)), masked)
    assert not torch.equal(draw(Remask(rule=rule, eta=0.2, alpha=alpha)), masked)


@pytest.mark.parametrize("rule", RULES)
def test_the_default_eta_is_the_published_one(rule: Any) -> None:
    published = {"cap": 0.008, "rescale": 0.015, "loop": 0.02}
    if rule in published:
        assert torch.equal(draw(Remask(rule=rule)), draw(Remask(rule=rule, eta=published[rule])))
    else:
        with pytest.raises(ValueError, match="has no eta"):
            Remask(rule=rule, eta=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "confidence"},
        {"rule": "cap", "eta": -0.1},
        {"rule": "cap", "eta": 1.5},
        {"rule": "loop", "alpha": "cosine"},
        {"rule": "cap", "alpha": "cosin"},
    ],
)
def test_bad_options_are_told(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"got|schedule"):
        Remask(**options)


def test_masked_refuses_an_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="alpha must be one of linear, cosine, got 'cosin'"):
        Masked(alpha="cosin")  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("budget", [1, 2, 7, 20, 101])
def test_chances_are_probabilities(rule: Any, budget: int) -> None:
    doubt_BL = torch.tensor([[-0.2, -torch.inf, -1.0], [-torch.inf, -torch.inf, -torch.inf]])
    for eta in (None, 0.0, 1.0) if RULES[rule].eta is not None else (None,):
        for call in range(budget):
            clock = Clock(call=call, budget=budget, draws=Draws(0, 0, call))
            for chance in Remask(rule=rule, eta=eta).chances(clock, doubt_BL.double()):
                chance_BL = torch.as_tensor(chance)
                assert ((chance_BL >= -1e-12) & (chance_BL <= 1 + 1e-12)).all()


def test_conf_masks_the_least_sure_first_and_only_what_it_may() -> None:
    doubt_BL = torch.tensor([[-0.1, -0.9, -torch.inf, -0.5]], dtype=torch.float64)
    clock = Clock(call=2, budget=4, draws=Draws(0, 0, 0))
    _, remask = Remask(rule="conf").chances(clock, doubt_BL)
    assert isinstance(remask, Tensor)
    assert remask[0].argsort(descending=True).tolist() == [0, 3, 1, 2]
    assert remask[0, 2] == 0
    # Half is revealed and half of the rest comes next: sigma_max = (1 - 3/4) / (1/2).
    torch.testing.assert_close(remask.sum(), torch.tensor(0.5, dtype=torch.float64))


def test_frozen_tokens_take_no_share_of_the_re_masking() -> None:
    known_BL = torch.tensor([[True, False, True, False]])
    start = State.from_tokens(LAW.table_VD, LAW.draw(1, 0), known_BL, torch.full((1, 4), torch.inf))
    memory = Remask(rule="conf").init(start)
    assert memory is not None
    doubt_BL = memory.update(start, LAW.denoiser()(start)).doubt_BL
    assert torch.equal(doubt_BL.isinf(), known_BL)


def test_loop_exchanges_tokens_for_half_of_the_calls() -> None:
    """From t = .55 (included) down to t = .05 (excluded), t = 1 - clock."""
    clocks = [Clock(call=call, budget=20, draws=Draws(0, 0, call)) for call in range(20)]
    remasks = [Remask(rule="loop").chances(clock)[1] for clock in clocks]
    assert remasks == [0.0] * 9 + [0.02] * 10 + [0.0]
