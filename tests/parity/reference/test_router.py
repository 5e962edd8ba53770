"""Router logits, and the choice of experts."""

from fractions import Fraction

import numpy as np
import pytest

from exactmoe.parity.reference.numerics import exp
from exactmoe.parity.reference.router import prepare_router, route, router_logits


def f32(x):
    return float(np.float32(x))


def fixed_in_steps(row, bits):
    """Integers and scale of one row."""
    amax = max(abs(float(v)) for v in row)
    e = max(int(np.floor(np.log2(amax))), -100) if amax > 0 else -100
    return [round(f32(float(v) * 2.0 ** (bits - 1 - e))) for v in row], 2.0 ** (e + 1 - bits)


BITS = {256: (21, 20), 2048: (21, 20), 2049: (20, 20), 16384: (19, 19)}  # width: bits of x and of w


@pytest.mark.parametrize("width", BITS)
def test_logits_are_integer_dots_in_any_order(width, rng, same):
    x = rng.standard_normal((2, width)).astype(np.float32)
    w = rng.standard_normal((3, width)).astype(np.float32)
    w[1] = 0
    expected = np.empty((2, 3), np.float32)
    for t in range(2):
        for e in range(3):
            (ix, sx), (iw, sw) = fixed_in_steps(x[t], BITS[width][0]), fixed_in_steps(w[e], BITS[width][1])
            dot = sum(ix[j] * iw[j] for j in rng.permutation(width))
            expected[t, e] = f32(f32(f32(dot) * sx) * sw)
    same(router_logits(x, prepare_router(w)), expected)


@pytest.mark.parametrize("width", BITS)
def test_the_largest_dots_fit_float64(width):
    below_two = np.nextafter(np.float32(2), np.float32(0))
    router = prepare_router(np.full((1, width), below_two))
    assert router.q.max() == 2 ** BITS[width][1]
    assert width * 2 ** sum(BITS[width]) <= 2**52
    assert router_logits(np.full((1, width), below_two), router).tolist() == [[4.0 * width]]


def test_logits_are_near_float64(rng):
    """Fixed point leaves 19 bits of the largest element: off by less than 2^-19 of the sum of the largest products."""
    x = rng.standard_normal((9, 2048)).astype(np.float32)
    w = (rng.standard_normal((16, 2048)) * 0.02).astype(np.float32)
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    bound = np.abs(x).max(axis=1)[:, None] * np.abs(w).max(axis=1) * 2048 * 2.0**-19
    error = np.abs(router_logits(x, prepare_router(w)) - exact)
    assert (error <= bound).all() and error.max() > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_row_has_only_nan_logits_and_no_other_has(bad, rng, same):
    x, w = rng.standard_normal((3, 256)).astype(np.float32), rng.standard_normal((4, 256)).astype(np.float32)
    good = router_logits(x, prepare_router(w))
    x[1, 6] = bad
    found = router_logits(x, prepare_router(w))
    assert np.isnan(found[1]).all()
    same(found[::2], good[::2])


def test_a_router_that_is_not_finite_or_not_f32_is_refused(rng):
    w = rng.standard_normal((4, 256))
    with pytest.raises(ValueError, match="router weight must be f32, got float64"):
        prepare_router(w)
    w[1, 2] = np.nan
    with pytest.raises(ValueError, match="holds a NaN or an infinity"):
        prepare_router(w.astype(np.float32))
    with pytest.raises(ValueError, match="widths up to 16384, got 16385"):
        prepare_router(np.zeros((1, 16385), np.float32))


def route_in_steps(logits, top_k):
    """One token."""
    m = max(logits)
    p = [float(v) for v in exp(np.float32([f32(float(v) - float(m)) for v in logits]))]
    den = f32(f32(sum(round(v * 2**20) for v in p)) * 2.0**-20)
    prob = [f32(v / den) for v in p]
    ids = sorted(range(len(prob)), key=lambda e: (-prob[e], e))[:top_k]
    s = 0.0
    for e in ids:
        s = f32(s + prob[e])
    return [f32(prob[e] / s) for e in ids], ids


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (6, 2), (16, 4), (128, 8), (12, 12)])
@pytest.mark.parametrize("size", [0.1, 2.0, 60.0])
def test_the_choice_follows_the_formula_step_by_step(experts, top_k, size, rng, same):
    logits = (rng.standard_normal((9, experts)) * size).astype(np.float32)
    logits[1] = np.rint(logits[1])  # ties
    found = route(logits, top_k)
    expected = [route_in_steps(row, top_k) for row in logits]
    same(found.weight, np.array([weight for weight, _ in expected], np.float32))
    same(found.expert, np.array([ids for _, ids in expected], np.int32))


def test_equal_probabilities_go_to_the_smaller_id():
    logits = np.float32([[1, 3, 3, 0, 3], [0, 0, -0.0, 0, 0], [5, 5, 9, 9, 5]])
    assert route(logits, 2).expert.tolist() == [[1, 2], [0, 1], [2, 3]]
    assert route(logits, 3).expert.tolist() == [[1, 2, 4], [0, 1, 2], [2, 3, 0]]


def test_a_tie_is_judged_by_probability_not_by_logit():
    assert route(np.float32([[0.5, 1e-9, 2e-9]]), 2).expert.tolist() == [[0, 1]]  # both lie 0.5 below the best


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_give_the_first_ids_and_nan_weights(bad, rng, same):
    logits = rng.standard_normal((3, 12)).astype(np.float32)
    good = route(logits, 3)
    logits[1, 8] = bad
    found = route(logits, 3)
    assert found.expert[1].tolist() == [0, 1, 2] and np.isnan(found.weight[1]).all()
    same(found.expert[::2], good.expert[::2])
    same(found.weight[::2], good.weight[::2])


def test_weights_sum_to_one_and_are_near_float64(rng):
    logits = (rng.standard_normal((200, 128)) * 2).astype(np.float32)
    found = route(logits, 8)
    exact = np.exp(np.take_along_axis(logits.astype(np.float64), found.expert.astype(np.int64), 1))
    exact /= exact.sum(axis=1, keepdims=True)
    assert np.abs(found.weight - exact).max() < 8 * 2.0**-24 + 2.0**-22
    sums = [sum(Fraction(float(w)) for w in row) for row in found.weight]
    assert max(abs(float(s - 1)) for s in sums) < 8 * 2.0**-24


@pytest.mark.parametrize("top_k", [0, 5, -1])
def test_more_experts_than_there_are_is_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k must be 1 to the 4 experts, got {top_k}"):
        route(np.zeros((2, 4), np.float32), top_k)


def test_no_tokens_give_no_choice():
    router = prepare_router(np.ones((4, 256), np.float32))
    logits = router_logits(np.empty((0, 256), np.float32), router)
    assert logits.shape == (0, 4)
    found = route(logits, 2)
    assert found.weight.shape == found.expert.shape == (0, 2)
