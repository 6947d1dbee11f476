"""Products in tiles and mixtures: every size, no bits from a neighbour, none read past an end."""

import numpy as np
import pytest
from numba import njit

from nano_moe.inference.step_kernels import linear
from nano_moe.inference.tiles import mix

RNG = np.random.default_rng(0)


def drawn(*sizes: int) -> np.ndarray:
    return RNG.standard_normal(sizes).astype(np.float32)


@pytest.mark.parametrize("n_in", [1, 15, 16, 37, 128, 300])
@pytest.mark.parametrize("n_out", [1, 3, 4, 5, 16, 51])
def test_products_are_those_of_float64_and_of_each_row_alone(n_in, n_out):
    whole = np.full((11, n_in), np.nan, np.float32)  # rows before and behind are not numbers
    whole[1:10] = drawn(9, n_in)
    x, w, y = whole[1:10], drawn(n_out, n_in), np.empty((9, n_out), np.float32)
    linear.alone(x, w, y)
    np.testing.assert_allclose(y, x.astype(np.float64) @ w.T, rtol=1e-5, atol=1e-5)
    for n in range(1, 9):
        some = np.empty((n, n_out), np.float32)
        linear.alone(x[:n], w, some)
        assert np.array_equal(some, y[:n])


@njit
def mixed(shares, values, y, scale):
    for h in range(len(y)):
        mix(shares, values, y, h, scale)


@pytest.mark.parametrize("n_places", [1, 3, 4, 18])
@pytest.mark.parametrize("width", [1, 6, 16, 40])
def test_mixtures_are_those_of_float64(n_places, width):
    """Shares of places that are not seen are not numbers."""
    shares = np.full((3, n_places + 5), np.nan, np.float32)
    shares[:, :n_places] = drawn(3, n_places)
    values, y = drawn(n_places, width), np.full((3, width + 9), np.nan, np.float32)
    out = y[:, :width]
    mixed(shares, values, out, np.float32(0.5))
    expected = 0.5 * shares[:, :n_places].astype(np.float64) @ values
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert np.isnan(y[:, width:]).all()
