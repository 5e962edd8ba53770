"""What the cache keeps of keys and values."""

import numpy as np
import pytest

from exactmoe.parity.reference.kv_cache import KVCache, append, quantize_pow2
from exactmoe.parity.reference.quantize import quantize_15

TINY = 2.0**-100


def values_in_steps(x):
    x = [float(v) for v in x]
    if not np.isfinite(x).all():
        return [0] * len(x), np.nan
    amax = max(abs(v) for v in x)
    if amax < TINY:
        return [0] * len(x), 0.0
    e = int(np.floor(np.log2(amax)))
    return [round(v * 2.0 ** (12 - e)) for v in x], 2.0 ** (e - 12)


@pytest.fixture
def cache(weights):
    return KVCache.allocate(weights.dims, 10)


def keys_and_values(rng, t, g=2, c=128):
    return rng.standard_normal((t, g, c)).astype(np.float32), rng.standard_normal((t, g * c)).astype(np.float32)


def test_values_follow_the_formula_step_by_step(rng, same):
    x = rng.standard_normal((40, 96)) * np.exp2(rng.integers(-120, 100, (40, 1)))
    x[3], x[4, 5], x[5, 5], x[6, 5] = 0, np.nan, np.inf, -np.inf
    x[7], x[8] = 0, 0
    x[7, 2], x[8, 2] = np.nextafter(np.float32(TINY), np.float32(0)), -TINY
    x[9, :2] = 8191.5, -8192  # a power of two as the largest magnitude, and a tie
    x = x.astype(np.float32)
    found, expected = quantize_pow2(x), [values_in_steps(row) for row in x]
    same(found.v, np.array([v for v, _ in expected], np.int32))
    same(found.scale, np.array([d for _, d in expected], np.float32))


def test_values_are_within_14_bits_and_reach_them():
    largest = np.nextafter(np.float32(2), np.float32(0))
    assert quantize_pow2(np.float32([[largest, -largest, 1]])).v.tolist() == [[8192, -8192, 4096]]


def test_value_scales_are_powers_of_two(rng):
    scale = quantize_pow2(rng.standard_normal((100, 64)).astype(np.float32)).scale
    assert (np.frexp(scale)[0] == 0.5).all()


def test_append_writes_its_positions_and_no_other(cache, rng, same):
    for array in (cache.k, cache.v):
        array[:] = -7
    for array in (cache.k_scale, cache.v_scale):
        array[:] = -7
    k, v = keys_and_values(rng, 3)
    append(k, v, cache.layer(1), 4)
    expected = (*quantize_15(k), *quantize_pow2(v.reshape(k.shape)))
    for array, part in zip((cache.k, cache.k_scale, cache.v, cache.v_scale), expected, strict=True):
        same(array[1, 4:7], part.astype(array.dtype))
        rest = np.delete(array[1], np.s_[4:7], axis=0)
        assert (rest == -7).all() and (array[[0, 2]] == -7).all()


def test_a_token_is_kept_alike_alone_and_in_a_batch(cache, rng, same):
    k, v = keys_and_values(rng, 5)
    append(k, v, cache.layer(0), 0)
    for t in range(5):
        append(k[t : t + 1], v[t : t + 1], cache.layer(1), t)
    for array in (cache.k, cache.k_scale, cache.v, cache.v_scale):
        same(array[1, :5], array[0, :5])


def test_a_bad_element_marks_its_head_and_no_other(cache, rng):
    k, v = keys_and_values(rng, 2)
    k[0, 1, 5], v[1, 5] = np.nan, np.inf
    append(k, v, cache.layer(0), 0)
    assert np.isnan(cache.k_scale[0, :2]).tolist() == [[False, True], [False, False]]
    assert np.isnan(cache.v_scale[0, :2]).tolist() == [[False, False], [True, False]]
    assert not cache.k[0, 0, 1].any() and not cache.v[0, 1, 0].any()


def test_positions_outside_the_cache_are_refused(cache, rng):
    for start in (-1, 8):
        with pytest.raises(ValueError, match="are not among the cache's 10"):
            append(*keys_and_values(rng, 3), cache.layer(0), start)


@pytest.mark.parametrize("capacity", [0, -1, 41])
def test_a_cache_beyond_the_context_is_refused(weights, capacity):
    with pytest.raises(ValueError, match=f"cache capacity must be 1 to 40, got {capacity}"):
        KVCache.allocate(weights.dims, capacity)
