"""Where sampling starts: what is given, what is frozen, and what a state refuses."""

from __future__ import annotations

import math

import pytest
import torch

from dsl.state import State
from tests.dsl.laws import ring

TABLE = ring(5)
TOKENS = torch.tensor([[0, 1, 2, 3], [4, 4, 4, 4]])
NONE = torch.zeros(2, 4, dtype=torch.bool)
FIELDS = ("tokens_BL", "z_BLD", "gamma_BL", "frozen_BL")


def test_masked_knows_nothing() -> None:
    state = State.masked(3, 4, 2, dtype=torch.float64)
    assert [getattr(state, name).count_nonzero().item() for name in FIELDS] == [0] * 4
    assert state.masked_BL.all()
    assert not state.evidence_BL.any()
    assert not state.revealed_BL.any()
    assert state.z_BLD.shape == (3, 4, 2)
    assert state.gamma_BL.dtype == state.z_BLD.dtype == torch.float64
    assert state.tokens_BL.dtype == torch.int64


def test_from_tokens_by_kind_of_knowledge() -> None:
    gamma_BL = torch.tensor([[0.0, 0.5, math.inf, 2.0], [0.0, 0.0, 0.0, 1.0]])
    known_BL = torch.tensor([[False, False, False, True], [True, False, False, False]])
    state = State.from_tokens(TABLE, TOKENS, known_BL, gamma_BL)
    assert torch.equal(state.frozen_BL, known_BL)
    assert state.tokens_BL.tolist() == [[0, 0, 2, 3], [4, 0, 0, 0]]
    inf = math.inf
    assert state.gamma_BL.tolist() == [[0.0, 0.5, inf, inf], [inf, 0.0, 0.0, 1.0]]
    expected = torch.zeros(2, 4, 2).double()
    expected[0, 1], expected[1, 3] = 0.5 * TABLE[1], TABLE[4]
    torch.testing.assert_close(state.z_BLD, expected, atol=0, rtol=0)
    kinds = state.masked_BL.int() + state.evidence_BL.int() + state.revealed_BL.int()
    assert (kinds == 1).all()


def test_gamma_defaults_to_nothing_known() -> None:
    state = State.from_tokens(TABLE, TOKENS, NONE)
    blank = State.masked(2, 4, 2, dtype=torch.float64)
    for name in FIELDS:
        assert torch.equal(getattr(state, name), getattr(blank, name))


def test_ids_are_checked_where_they_count() -> None:
    outside = TOKENS.clone()
    outside[0, 0] = 5
    State.from_tokens(TABLE, outside, NONE)  # a placeholder at a masked position is no id
    known = NONE.clone()
    known[0, 0] = True
    for id_ in (5, -1):
        outside[0, 0] = id_
        with pytest.raises(ValueError, match=r"outside \[0, 5\)"):
            State.from_tokens(TABLE, outside, known)


def test_tokens_that_are_no_ids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"texts must be ids \[B, L\], got"):
        State.from_tokens(TABLE, TOKENS.double(), ~NONE)


@pytest.mark.parametrize("gamma", [-1.0, math.nan, -math.inf])
def test_gamma_outside_its_range_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma"):
        State.from_tokens(TABLE, TOKENS, NONE, torch.full((2, 4), gamma))


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="share one shape"):
        State.from_tokens(TABLE, TOKENS, NONE[:, :3])
    with pytest.raises(ValueError, match="share one shape"):
        State.from_tokens(TABLE, TOKENS, NONE, torch.ones(4))
    with pytest.raises(ValueError, match=r"share one shape \[B, L\]"):
        State.from_tokens(TABLE, TOKENS[0], NONE[0])


def test_trainable_table_leaves_no_graph() -> None:
    table_VD = TABLE.clone().requires_grad_()
    state = State.from_tokens(table_VD, TOKENS, NONE, torch.ones(2, 4))
    assert not state.z_BLD.requires_grad


def test_like_takes_the_dtype_of_a_table() -> None:
    state = State.from_tokens(TABLE, TOKENS, NONE, torch.ones(2, 4)).like(TABLE.float())
    assert state.z_BLD.dtype == state.gamma_BL.dtype == torch.float32
    assert state.tokens_BL.dtype == torch.int64


def test_a_state_of_other_dimensions_is_refused() -> None:
    """One dimension would be spread over all those of the table."""
    for dim in (1, 3):
        with pytest.raises(ValueError, match=f"z of {dim} dimensions, the table of 2"):
            State.masked(2, 4, dim).like(TABLE)


def test_rows_by_index_and_by_mask() -> None:
    state = State.from_tokens(TABLE, TOKENS, NONE, torch.rand(2, 4))
    by_index = state.rows(torch.tensor([1, 0, 1]))
    by_mask = state.rows(torch.tensor([False, True]))
    for name in FIELDS:
        whole = getattr(state, name)
        assert torch.equal(getattr(by_index, name), whole[[1, 0, 1]])
        assert torch.equal(getattr(by_mask, name), whole[1:])
