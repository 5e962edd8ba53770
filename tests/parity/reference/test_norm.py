"""RMSNorm against Python's integers, against float64, and at its edges."""

import numpy as np
import pytest

from exactmoe.parity.reference.norm import rms_norm, rms_norm_quantize
from exactmoe.parity.reference.quantize import quantize

EPS = np.float32(1e-6)


def f32(x):
    return float(np.float32(x))


def r_in_steps(row, eps, order=None):
    """1 / sqrt(mean + eps), the sum of squares by Python's integers in any order."""
    amax = max(abs(float(v)) for v in row)
    e = max(int(np.floor(np.log2(amax))), -100) if amax > 0 else -100
    i = [int(float(v) * 2.0 ** (23 - e)) for v in row]
    total = sum(i[j] * i[j] for j in (order if order is not None else range(len(i))))
    mean = f32(f32(f32(f32(total) / len(i)) * 2.0 ** (e - 23)) * 2.0 ** (e - 23))
    return f32(1 / f32(np.sqrt(f32(mean + float(eps)))))


def in_steps(x, weight, eps, orders=None):
    r = [r_in_steps(row, eps, None if orders is None else orders[t]) for t, row in enumerate(x)]
    return np.array(
        [[f32(f32(float(v) * r[t]) * float(w)) for v, w in zip(row, weight, strict=True)] for t, row in enumerate(x)],
        np.float32,
    )


def rows(rng, t, k, size=1.0):
    return (rng.standard_normal((t, k)) * size).astype(np.float32), rng.standard_normal(k).astype(np.float32)


@pytest.mark.parametrize("eps", [EPS, np.float32(1e-38)], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-18, 1e-20, 1e-34, 1e-41, 1e15])
def test_norm_follows_the_formula_step_by_step(size, eps, rng, same):
    x, weight = rows(rng, 6, 300, size)
    x[3, 7] *= np.float32(1000)
    same(rms_norm(x, weight, eps), in_steps(x, weight, eps))


def test_any_order_of_the_sum_gives_the_same_bits(rng, same):
    x, weight = rows(rng, 4, 2048)
    same(rms_norm(x, weight, EPS), in_steps(x, weight, EPS, [rng.permutation(2048) for _ in x]))
    order = rng.permutation(2048)
    same(rms_norm(x[:, order], weight[order], EPS), rms_norm(x, weight, EPS)[:, order])


@pytest.mark.parametrize("k", [1, 128, 2048, 16384])
def test_norm_is_near_float64(k, rng):
    """Off by what truncation to 24 bits can lose, sqrt(K) * 2^-23, and six roundings."""
    x, weight = rows(rng, 9, k)
    wide = x.astype(np.float64)
    exact = wide / np.sqrt((wide * wide).mean(axis=1, keepdims=True) + float(EPS)) * weight
    found = rms_norm(x, weight, EPS)
    assert (np.abs(found - exact) <= np.abs(exact) * (np.sqrt(k) * 2.0**-23 + 6 * 2.0**-24)).all()
    assert np.abs(exact).max() > 0.1


def test_a_sum_of_squares_beyond_binary32_does_no_harm_while_their_mean_is_within():
    x = np.full((1, 16384), np.nextafter(np.float32(2.0**64), np.float32(0)))
    assert rms_norm(x, np.ones(16384, np.float32), EPS) == pytest.approx(1, abs=1e-6)


def test_a_mean_of_squares_beyond_binary32_gives_zeros(same):
    x = np.float32([[3e38, -3e38, 1]])
    same(rms_norm(x, np.ones(3, np.float32), EPS), np.float32([[0.0, -0.0, 0.0]]))


def test_rows_of_zeros_stay_zeros_of_their_sign(same):
    x = np.float32([[0.0, -0.0, 0.0]])
    same(rms_norm(x, np.float32([1, 1, -1]), EPS), np.float32([[0.0, -0.0, -0.0]]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_element_makes_its_row_nan_and_no_other(bad, rng, same):
    x, weight = rows(rng, 3, 256)
    good = rms_norm(x, weight, EPS)
    x[1, 9] = bad
    found = rms_norm(x, weight, EPS)
    assert np.isnan(found[1]).all()
    same(found[::2], good[::2])


def test_norm_and_quantise_is_norm_then_quantise(rng, same):
    x, weight = rows(rng, 3, 512)
    both = rms_norm_quantize(x, weight, EPS, "q16_k")
    same(both.normed, rms_norm(x, weight, EPS))
    same(both.activations.q, quantize(both.normed, "q16_k").q)
    same(both.activations.scale, quantize(both.normed, "q16_k").scale)


def test_a_weight_of_another_width_is_refused(rng):
    with pytest.raises(ValueError, match=r"norm weight must have shape \[256\], got \[255\]"):
        rms_norm(*rows(rng, 2, 256)[:1], np.ones(255, np.float32), EPS)


def test_no_rows_give_no_rows():
    assert rms_norm(np.empty((0, 256), np.float32), np.ones(256, np.float32), EPS).shape == (0, 256)
