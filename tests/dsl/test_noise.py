"""Draws depend on their key and on nothing else, and have the law that they claim."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsl import philox
from dsl.noise import Draws, Stream, generator, standard_normal
from tests.dsl.laws import chi_square_p, normal_p
from tests.gpu import GPU, standing_in

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 5))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 10**6),
    first=st.integers(0, 10**9),
    shape=SHAPES,
    data=st.data(),
)
def test_any_sub_batch_draws_the_same(
    seed: int, step: int, first: int, shape: tuple[int, int, int], data: st.DataObject
) -> None:
    rows, length, dim = shape
    whole = Draws(seed, first, step)
    start = data.draw(st.integers(0, rows - 1))
    part = Draws(seed, first + start, step)
    normal = whole.normal(torch.Size(shape), torch.float64)
    sub = part.normal(torch.Size((rows - start, length, dim)), torch.float64)
    assert torch.equal(normal[start:], sub)
    for stream in Stream:
        uniform = whole.uniform(rows, length, stream)
        assert torch.equal(uniform[start:], part.uniform(rows - start, length, stream))
        assert uniform.shape == (rows, length)
        assert ((uniform >= 0) & (uniform < 1)).all()


def test_every_part_of_the_key_matters() -> None:
    base = Draws(3, 5, 7).uniform(1, 8, Stream.TOKEN)
    others = [
        Draws(4, 5, 7).uniform(1, 8, Stream.TOKEN),
        Draws(3, 6, 7).uniform(1, 8, Stream.TOKEN),
        Draws(3, 5, 8).uniform(1, 8, Stream.TOKEN),
        Draws(3, 5, 7).uniform(1, 8, Stream.PATH),
        Draws(3, 5, 7).uniform(1, 8, Stream.MOVE),
    ]
    for other in others:
        assert not torch.isin(other, base).any()


@pytest.mark.parametrize("key", [(-1, 0, 0), (2**64, 0, 0), (0, -1, 0), (0, 0, -1), (0, 0, 2**32)])
def test_a_key_that_would_be_another_is_refused(key: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"^(seed|first_row|step) must "):
        Draws(*key)


def test_no_number_is_used_twice() -> None:
    """Rows, steps and streams share no draws: overlapping counters would repeat them."""
    drawn = torch.cat(
        [
            Draws(1, 0, step).uniform(64, 10, stream).flatten()
            for step in range(16)
            for stream in Stream
        ]
    )
    assert len(drawn.unique()) == len(drawn)


def test_uniforms_are_uniform() -> None:
    drawn = Draws(11, 0, 0).uniform(2000, 50, Stream.PATH)
    counts = torch.histc(drawn.flatten(), bins=64, min=0, max=1)
    assert chi_square_p(counts, torch.ones(64)) > 1e-4


@pytest.mark.parametrize("count", [5, 6])  # an odd count leaves one of a Box-Muller pair unused
def test_normals_are_normal_and_independent(count: int) -> None:
    rows = 40_000
    drawn = Draws(12, 0, 0).normal(torch.Size((rows, count, 1)), torch.float64).squeeze(2)
    assert normal_p(drawn) > 1e-4
    # Each entry of the covariance has standard error at most sqrt(2 / rows).
    covariance = drawn.T @ drawn / rows
    assert (covariance - torch.eye(count)).abs().max() < 5 * (2 / rows) ** 0.5


def test_normals_are_rounded_once() -> None:
    shape = torch.Size((4, 3, 2))
    exact = Draws(1, 2, 3).normal(shape, torch.float64)
    assert torch.equal(Draws(1, 2, 3).normal(shape, torch.float32), exact.float())
    assert torch.isfinite(exact).all()


def test_training_generator_is_keyed_by_seed_step_and_lane() -> None:
    def draw(*key: int) -> list[float]:
        return torch.rand(4, generator=generator(*key)).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    keys = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2), (2**63, 2, 3)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


def test_a_gpus_normals_of_training_are_keyed_by_the_generator_of_the_cpu() -> None:
    def draw(*key: int) -> tuple[float, ...]:
        with standing_in():
            drawn = standard_normal(torch.Size((2, 3)), torch.float64, GPU, generator(*key))
            return tuple(drawn.flatten().tolist())

    assert draw(1, 2, 3) == draw(1, 2, 3)
    keys = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]
    assert len({draw(*key) for key in keys}) == len(keys)


# --- what a GPU draws, on the CPU ------------------------------------------------------------

WORDS = [  # counter, key, answer: the test vectors of the generator's authors
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((philox.WORD,) * 4, (philox.WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), WORDS)
def test_words_are_those_of_the_published_generator(
    counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    found = philox.words(tuple(torch.tensor([word]) for word in counter), key)  # type: ignore[arg-type]
    assert tuple(word.item() for word in found) == answer


def on_gpu(shape: tuple[int, ...], seed: int = 0, first_row: int = 0, step: int = 0) -> Tensor:
    key = {"seed": seed, "first_row": first_row, "step": step}
    return philox.normal(torch.Size(shape), torch.device("cpu"), **key)


def test_a_gpus_draws_are_keyed_by_seed_row_and_step() -> None:
    shape = torch.Size((2, 3, 2))
    with standing_in():
        found = Draws(3, 5, 7).normal(shape, torch.float64, GPU).cpu()
    assert torch.equal(found, on_gpu(shape, seed=3, first_row=5, step=7))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**32 - 1),
    first=st.integers(0, 2**40),
    shape=SHAPES,
    data=st.data(),
)
def test_a_gpus_rows_do_not_depend_on_the_batch_either(
    seed: int, step: int, first: int, shape: tuple[int, int, int], data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, shape[0] - 1))
    whole = on_gpu(shape, seed, first, step)
    part = on_gpu((shape[0] - start, *shape[1:]), seed, first + start, step)
    assert torch.equal(whole[start:], part)
    assert torch.isfinite(whole).all()


@pytest.mark.parametrize("count", [5, 8])  # an odd count leaves some of a quadruple unused
def test_a_gpus_normals_are_normal_and_independent(count: int) -> None:
    rows = 40_000
    drawn = on_gpu((rows, count, 1), seed=12).squeeze(2)
    assert normal_p(drawn) > 1e-4
    covariance = drawn.T @ drawn / rows
    assert (covariance - torch.eye(count)).abs().max() < 5 * (2 / rows) ** 0.5
    # Neither are neighbours in row, step or seed alike, nor their sizes.
    for key in ({"first_row": 1}, {"step": 1}, {"seed": 13}):
        other = on_gpu((rows, count, 1), **{"seed": 12, **key})
        for power in (1, 2):
            pair = torch.stack([drawn.flatten() ** power, other.flatten() ** power])
            assert abs(torch.corrcoef(pair)[0, 1]) < 5 / (rows * count) ** 0.5


def test_a_gpu_uses_no_number_twice() -> None:
    keys = [(seed, step) for seed in (1, 2**32 + 1) for step in range(8)]
    drawn = torch.cat([on_gpu((64, 10, 4), seed, 0, step).flatten() for seed, step in keys])
    assert len(drawn.unique()) == len(drawn)
