"""The median magnitude against a sort, value for value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from biassurgery.ops.median import median_magnitude

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def by_sorting(magnitude: Tensor, real: Tensor | None = None) -> list[float]:
    """Lower median of the real tokens of each row, in plain Python."""
    medians = []
    for row in range(magnitude.shape[0]):
        values = sorted(
            v
            for token in range(magnitude.shape[1])
            if real is None or real[row, token]
            for v in magnitude[row, token].double().tolist()
        )
        medians.append(values[(len(values) - 1) // 2] if values else 0.0)
    return medians


def spread(seed: int, *shape: int) -> Tensor:
    """Magnitudes over many orders, as in a residual stream with massive activations."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(shape, generator=generator)
        * torch.randn(shape, generator=generator).mul(3).exp()
    ).abs()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 1, 2), (1, 3, 1), (2, 5, 7), (3, 8, 16), (5, 11, 13), (1, 64, 33)]
)
def test_equals_a_sort(dtype, shape):
    for seed in range(3):
        magnitude = spread(seed, *shape).to(dtype)
        found = median_magnitude(magnitude)
        assert found.dtype == torch.float32
        assert found.shape == shape[:1]
        assert found.double().tolist() == by_sorting(magnitude)


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_does_not_count(dtype):
    magnitude = spread(4, 6, 9, 12).to(dtype)
    real = torch.rand(6, 9, generator=torch.Generator().manual_seed(5)) > 0.4
    magnitude[~real] = 0  # the caller clears padding; counted, it would pull the median down
    assert median_magnitude(magnitude, real).double().tolist() == by_sorting(magnitude, real)
    assert median_magnitude(magnitude, real).double().tolist() != by_sorting(magnitude)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_padding_has_median_zero_and_spoils_no_other(dtype):
    magnitude = spread(6, 4, 5, 8).to(dtype)
    real = torch.ones(4, 5, dtype=torch.bool)
    real[0] = False
    real[2] = False
    found = median_magnitude(magnitude, real).double().tolist()
    assert found[0] == 0
    assert found[2] == 0
    assert found == by_sorting(magnitude, real)
    assert median_magnitude(magnitude, torch.zeros(4, 5, dtype=torch.bool)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties(dtype):
    magnitude = torch.randint(0, 3, (7, 6, 5), generator=torch.Generator().manual_seed(7)).to(dtype)
    assert median_magnitude(magnitude).double().tolist() == by_sorting(magnitude)
    assert median_magnitude(torch.full((2, 3, 4), 1.5, dtype=dtype)).tolist() == [1.5, 1.5]


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_denormal_and_infinite_values(dtype):
    info = torch.finfo(dtype)
    steps = torch.arange(1, 10, dtype=torch.float64)
    denormal = (steps * info.smallest_normal / 16).to(dtype)
    assert (denormal > 0).all()
    for values in (
        denormal,
        torch.zeros(9, dtype=dtype),
        torch.cat([denormal, torch.zeros(9, dtype=dtype)]),
        torch.cat([denormal, torch.full((12,), torch.inf, dtype=dtype)]),
        torch.full((3,), info.max, dtype=dtype),
    ):
        magnitude = values.view(1, -1, 1)
        assert median_magnitude(magnitude).double().tolist() == by_sorting(magnitude)


@pytest.mark.parametrize("rows", [63, 64, 65, 130])
def test_many_rows(rows):
    magnitude = spread(8, rows, 3, 4)
    real = torch.rand(rows, 3, generator=torch.Generator().manual_seed(9)) > 0.3
    assert median_magnitude(magnitude).double().tolist() == by_sorting(magnitude)
    assert median_magnitude(magnitude, real).double().tolist() == by_sorting(magnitude, real)


def test_values_that_share_their_upper_bits():
    """Neighbouring float32 differ in the lower half of the pattern only, so the second counting
    pass decides.
    """
    base = torch.tensor(100.0).view(torch.int32)
    order = torch.randperm(4001, generator=torch.Generator().manual_seed(10)).to(torch.int32)
    magnitude = (base + order).view(torch.float32).view(1, 4001, 1)
    assert median_magnitude(magnitude).double().tolist() == by_sorting(magnitude)


def test_views_and_float64():
    magnitude = spread(11, 4, 10, 6)
    assert median_magnitude(magnitude[::2, 1::3, ::2]).double().tolist() == by_sorting(
        magnitude[::2, 1::3, ::2]
    )
    assert median_magnitude(magnitude.transpose(1, 2)).double().tolist() == by_sorting(magnitude)
    assert median_magnitude(magnitude.double()).tolist() == median_magnitude(magnitude).tolist()
