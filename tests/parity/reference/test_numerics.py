"""The shared moves. Binary32 operations are repeated in binary64 and rounded once, which is exact for + - * /."""

import numpy as np
import pytest

from exactmoe.parity.reference.numerics import exp, exponent, isum_dot, largest, nonfinite, pow2, rne


def bits(pattern):
    return float(np.uint32(pattern).view(np.float32))


def f32(x):
    return float(np.float32(x))


def exp_in_steps(x):
    """The contract's formula, one number at a time."""
    x = min(max(x, -87.0), 88.0)
    n = round(f32(x * bits(0x3FB8AA3B)))  # Python rounds ties to even
    high = f32(n * bits(0x3F318000))
    assert high == n * bits(0x3F318000)
    rh, rl = f32(x - high), f32(n * bits(0xB95E8083))
    r = f32(rh - rl)
    q = bits(0x3AB50FB0)
    for c in (0x3C091E66, 0x3D2AAC82, 0x3E2AAA47, 0x3EFFFFFE):
        q = f32(f32(q * r) + bits(c))
    y = f32(1 + f32(rh + f32(f32(f32(r * r) * q) - rl)))
    return np.float32(y * 2.0**n)


def test_exp_follows_the_formula_step_by_step(rng, same):
    x = np.concatenate([rng.uniform(-100, 100, 3000), rng.uniform(-1, 1, 1000), [0.0, -0.0, 88, -87, 1e-30, -1e30]])
    x = x.astype(np.float32)
    same(exp(x), np.array([exp_in_steps(float(v)) for v in x], np.float32))


def test_exp_is_within_one_ulp_on_a_dense_grid_of_its_range():
    worst = 0.0
    for low in range(-87, 88):
        x = np.linspace(low, low + 1, 40001).astype(np.float32)
        exact = np.exp(x.astype(np.float64))
        ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
        worst = max(worst, float((np.abs(exp(x) - exact) / ulp).max()))
    assert 0.5 < worst < 0.9  # 0.881 on this grid; the promise is 1


def test_exp_of_both_zeros_is_one():
    assert exp(np.float32([0.0, -0.0])).tolist() == [1, 1]


def test_exp_clamps_beyond_its_range_and_keeps_nan(same):
    x = np.float32([-np.inf, -1000, -87.1, 88.1, 3e38, np.inf])
    same(exp(x), exp(np.float32([-87, -87, -87, 88, 88, 88])))
    assert exp(np.float32([np.nan, -np.nan])).view(np.uint32).tolist() == [0x7FC00000] * 2


def test_rne_takes_ties_to_even():
    assert rne(np.float32([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49999997])).tolist() == [0, 2, 2, 0, -2, -2, 0]


def test_powers_of_two_are_exact_over_the_normal_range():
    n = np.arange(-126, 128, dtype=np.int32)
    assert pow2(n).tolist() == [2.0 ** int(i) for i in n]


def test_exponent_is_the_floor_of_the_binary_logarithm():
    x = np.float32([1, 1.9999999, 2, -3, 2.0**-126, 3.4e38])
    assert exponent(x).tolist() == [0, 0, 1, 1, -126, 127]
    assert exponent(np.float32([0, 1e-40])).tolist() == [-127, -127]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_element_makes_its_row_nonfinite_and_no_other(bad):
    x = np.ones((3, 4), np.float32)
    x[1, 2] = bad
    assert nonfinite(x).tolist() == [False, True, False]


def test_the_largest_magnitude_of_an_empty_row_is_zero():
    assert largest(np.float32([[-3, 2]])).tolist() == [3]
    assert largest(np.empty((2, 0), np.float32)).tolist() == [0, 0]


def test_integer_dots_are_exact_up_to_the_bound_in_any_order(rng):
    a = rng.integers(-(2**21), 2**21, (3, 2048))
    b = rng.integers(-(2**20), 2**20, (2048, 5))
    a[0], b[:, 0] = 2**21, 2**20  # 2^52 in all
    exact = [[sum(int(u) * int(v) for u, v in zip(row, column, strict=True)) for column in b.T] for row in a]
    order = rng.permutation(2048)
    assert isum_dot(a, b).astype(np.int64).tolist() == exact
    assert isum_dot(a[:, order], b[order]).astype(np.int64).tolist() == exact
