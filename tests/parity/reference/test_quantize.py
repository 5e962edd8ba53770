"""Activation quantisers against the contract's formula, one number at a time."""

import numpy as np
import pytest

from exactmoe.parity.reference.quantize import PROFILES, quantize, quantize_15

TINY = 2.0**-100


def f32(x):
    return float(np.float32(x))


def q8_in_steps(x):
    x = [float(v) for v in x]
    if not np.isfinite(x).all():
        return [0] * len(x), np.nan
    amax = max(abs(v) for v in x)
    if amax < TINY:
        return [0] * len(x), 0.0
    m = next(v for v in x if abs(v) == amax)
    s = f32(-127 / m)
    return [min(127, round(f32(s * v))) for v in x], f32(1 / s)


def q15_in_steps(x):
    x = [float(v) for v in x]
    if not np.isfinite(x).all():
        return [0] * len(x), np.nan
    amax = max(abs(v) for v in x)
    if amax < TINY:
        return [0] * len(x), 0.0
    s = f32(16256 / amax)
    return [min(16256, max(-16256, round(f32(s * v)))) for v in x], f32(amax / 16256)


STEPS = {"q8_k": q8_in_steps, "q16_k": q15_in_steps}


def joined(q):
    """The integers that the slices stand for."""
    q = q.astype(np.int64)
    return q[0] if len(q) == 1 else 128 * q[0] + q[1]


def assert_follows(x, profile, same):
    found = quantize(x, profile)
    T, K = x.shape
    rows = [[STEPS[profile](x[t, i : i + 256]) for i in range(0, K, 256)] for t in range(T)]
    same(joined(found.q), np.array([[v for block, _ in row for v in block] for row in rows], np.int64))
    same(found.scale, np.array([[d for _, d in row] for row in rows], np.float32))


def normal(rng):
    return rng.standard_normal((7, 512)).astype(np.float32)


def halves(rng):  # s is exactly -1 (q8_k): every product a tie
    x = (rng.integers(-126, 126, (7, 512)) + np.float32(0.5)).astype(np.float32)
    x[:, ::256] = 127
    return x


def twins(rng):  # the largest magnitude with both signs, the negative one first in every other row
    x = np.clip(rng.standard_normal((8, 256)), -2, 2).astype(np.float32)
    x[:, 17], x[:, 40] = 3, -3
    x[::2] *= -1
    return x


def around_the_threshold(rng):
    x = np.zeros((6, 256), np.float32)
    x[0, 3] = np.nextafter(np.float32(TINY), np.float32(0))
    x[1, 3] = TINY
    x[2, 3] = -TINY
    x[3] = 1e-42  # subnormal
    x[4, 200], x[4, 201] = 2 * TINY, 1e-42
    x[5] = -0.0
    return x


def huge(rng):
    x = (rng.standard_normal((3, 256)) * 1e38).clip(-3.4e38, 3.4e38).astype(np.float32)
    x[0, 5] = np.finfo(np.float32).max
    x[1, 5] = -np.finfo(np.float32).max
    return x


def nonfinite(rng):
    x = rng.standard_normal((5, 768)).astype(np.float32)
    x[0, 0], x[1, 300], x[2, 767] = np.nan, np.inf, -np.inf
    return x


def wide(rng):
    return (rng.standard_normal((5, 256)) * np.exp2(rng.integers(-110, 30, (5, 256)))).astype(np.float32)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("make", [normal, halves, twins, around_the_threshold, huge, nonfinite, wide])
def test_quantisation_follows_the_formula_step_by_step(make, profile, rng, same):
    assert_follows(make(rng), profile, same)


def test_the_first_of_equal_magnitudes_becomes_minus_127():
    x = np.zeros((2, 256), np.float32)
    x[0, 10], x[0, 20] = 5, -5
    x[1, 10], x[1, 20] = -5, 5
    found = quantize(x, "q8_k")
    assert found.q[0, :, [10, 20]].tolist() == [[-127, -127], [127, 127]]
    assert (found.scale[:, 0] * found.q[0, :, 10]).tolist() == [5, -5]


def test_a_block_below_the_threshold_is_zero_and_one_at_it_is_not():
    x = np.zeros((2, 256), np.float32)
    x[0, 7], x[1, 7] = np.nextafter(np.float32(TINY), np.float32(0)), TINY
    for profile in PROFILES:
        found = quantize(x, profile)
        assert found.scale[0, 0] == 0 and not found.q[:, 0].any()
        assert found.scale[1, 0] != 0 and found.q[:, 1].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("profile", PROFILES)
def test_one_bad_element_makes_its_block_nan_and_no_other(profile, bad, rng, same):
    x = rng.standard_normal((2, 768)).astype(np.float32)
    good = quantize(x, profile)
    x[1, 300] = bad
    found = quantize(x, profile)
    assert np.isnan(found.scale).tolist() == [[False, False, False], [False, True, False]]
    assert not found.q[:, 1, 256:512].any()
    same(found.q[:, 0], good.q[:, 0])
    same(found.q[:, 1, 512:], good.q[:, 1, 512:])


def test_the_two_slices_hold_every_integer_within_their_ranges():
    v = np.arange(-16256, 16257)
    v = np.concatenate([v, np.zeros(-len(v) % 255, v.dtype)]).reshape(-1, 255)
    x = np.concatenate([np.full((len(v), 1), 16256), v], axis=1).astype(np.float32)  # scale 1
    found = quantize(x, "q16_k")
    assert (found.scale == 1).all()
    assert joined(found.q)[:, 1:].tolist() == v.tolist()
    hi, lo = found.q
    assert (hi.min(), hi.max(), lo.min(), lo.max()) == (-127, 127, -64, 63)


@pytest.mark.parametrize(("profile", "steps"), [("q8_k", 127), ("q16_k", 16256)])
def test_no_element_is_off_by_more_than_half_a_step(profile, steps, rng):
    x = rng.standard_normal((64, 1024)).astype(np.float32)
    found = quantize(x, profile)
    scale = np.repeat(np.abs(found.scale.astype(np.float64)), 256, axis=1)
    error = np.abs(x - joined(found.q) * np.repeat(found.scale.astype(np.float64), 256, axis=1))
    assert (error <= scale * (0.5 + 2e-7 * steps)).all()  # half a step, and the rounding of s, s*x and d
    assert error.max() > 0


def test_blocks_and_rows_do_not_know_of_each_other(rng, same):
    x = rng.standard_normal((5, 1024)).astype(np.float32)
    for profile in PROFILES:
        whole, part = quantize(x, profile), quantize(np.ascontiguousarray(x[3:4, 512:768]), profile)
        same(whole.q[:, 3:4, 512:768], part.q)
        same(whole.scale[3:4, 2:3], part.scale)


def test_groups_of_any_length_take_15_bits(rng, same):
    x = rng.standard_normal((3, 2, 96)).astype(np.float32)
    found = quantize_15(x)
    expected = [[q15_in_steps(group) for group in row] for row in x]
    same(found.v, np.array([[v for v, _ in row] for row in expected], np.int32))
    same(found.scale, np.array([[d for _, d in row] for row in expected], np.float32))


def test_no_rows_give_no_rows():
    found = quantize(np.empty((0, 512), np.float32), "q16_k")
    assert found.q.shape == (2, 0, 512) and found.scale.shape == (0, 2)


@pytest.mark.parametrize(
    ("x", "profile", "said"),
    [
        (np.zeros((2, 300), np.float32), "q8_k", "multiple of 256, got 300"),
        (np.zeros((2, 0), np.float32), "q8_k", "multiple of 256, got 0"),
        (np.zeros((2, 256)), "q8_k", "must be f32"),
        (np.zeros(256, np.float32), "q8_k", "must be f32"),
        (np.zeros((2, 256), np.float32), "q4_k", "got 'q4_k'"),
    ],
)
def test_what_cannot_be_quantised_is_refused(x, profile, said):
    with pytest.raises(ValueError, match=said):
        quantize(x, profile)
