"""The table stays on the sphere whatever an optimizer does, and its report tells collapse."""

from __future__ import annotations

import math

import pytest
import torch

from dsl.denoiser import TokenTable, geometry_report
from tests.dsl.laws import ring


def lengths(table_VD: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(table_VD.double(), dim=1)


@pytest.mark.parametrize("dim", [1, 2, 64])
def test_rows_are_unit_from_the_start(dim: int) -> None:
    torch.manual_seed(0)
    torch.testing.assert_close(
        lengths(TokenTable(50, dim)()), torch.ones(50).double(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_no_step_leaves_the_sphere(optimizer: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    table = TokenTable(20, 8)
    steps = optimizer(table.parameters(), lr=3.0)
    before_VD = table().detach().clone()
    for _ in range(5):
        steps.zero_grad()
        (table() * torch.randn(20, 8)).sum().backward()
        steps.step()
    after_VD = table().detach()
    assert (after_VD - before_VD).abs().max() > 0.1
    torch.testing.assert_close(lengths(after_VD), torch.ones(20).double(), atol=1e-6, rtol=0)


def test_gradient_is_tangent_to_the_sphere() -> None:
    torch.manual_seed(0)
    table = TokenTable(20, 8)
    (table() * torch.randn(20, 8)).sum().backward()
    assert table.direction_VD.grad is not None
    radial_V = (table.direction_VD.grad * table()).sum(1)
    assert radial_V.abs().max() < 1e-5
    assert table.direction_VD.grad.abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_low_precision_directions_are_normalised_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = TokenTable(20, 8).to(dtype)
    rows_VD = table()
    assert rows_VD.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(lengths(rows_VD), torch.ones(20).double(), atol=1e-6, rtol=0)


def test_report_in_closed_form() -> None:
    orthogonal = geometry_report(torch.eye(5))
    assert orthogonal["mean_cosine"] == pytest.approx(0)
    assert orthogonal["effective_rank"] == pytest.approx(5)
    collapsed = geometry_report(torch.eye(5)[:1].expand(7, 5))
    assert collapsed["mean_cosine"] == pytest.approx(1)
    assert collapsed["effective_rank"] == pytest.approx(1)
    # V rows on the circle sum to zero and fill both dimensions evenly.
    circle = geometry_report(ring(7))
    assert circle["mean_cosine"] == pytest.approx(-1 / 6)
    assert circle["effective_rank"] == pytest.approx(2)


def test_report_of_unequal_shares() -> None:
    report = geometry_report(torch.eye(2)[[0, 0, 0, 1]])
    assert report["mean_cosine"] == pytest.approx(3 / 6)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert report["effective_rank"] == pytest.approx(math.exp(entropy))


def test_report_of_a_single_row() -> None:
    assert geometry_report(torch.eye(3)[:1]) == {"mean_cosine": 0.0, "effective_rank": 1.0}
