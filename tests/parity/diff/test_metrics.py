import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exactmoe.kernels.errors import InvalidInput
from exactmoe.parity.diff import metrics
from exactmoe.parity.diff.metrics import Tolerance, bucket_label, distance, measure

BITS = st.integers(0, 2**32 - 1)


def f32(*values):
    return np.array(values, np.float32)


def from_bits(*bits):
    return np.array(bits, np.uint32).view(np.float32)


def test_equal_arrays_differ_nowhere_and_have_cosine_one():
    x = np.random.default_rng(0).standard_normal((3, 70)).astype(np.float32)
    found = measure(x, x.copy())
    assert (found.count, found.differing, found.outside, found.ulp) == (210, 0, 0, (210,))
    assert (found.worst_ulp, found.max_abs, found.max_rel, found.rms, found.cosine) == (0, 0, 0, 0, 1)
    assert found.first is None


def test_the_numbers_are_those_of_a_plain_float64_computation():
    rng = np.random.default_rng(1)
    a = rng.standard_normal(1000).astype(np.float32)
    b = (a * rng.uniform(0.9, 1.1, 1000)).astype(np.float32)
    found, x, y = measure(a, b), a.astype(float), b.astype(float)
    assert found.max_abs == np.abs(x - y).max()
    assert found.max_rel == (np.abs(x - y) / np.maximum(np.abs(x), np.abs(y))).max()
    assert found.rms == pytest.approx(np.sqrt(np.mean((x - y) ** 2)), rel=1e-12)
    assert found.cosine == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)), rel=1e-12)
    assert found.worst_ulp == np.abs(a.view(np.int32).astype(int) - b.view(np.int32).astype(int)).max()


@pytest.mark.parametrize(
    ("left", "right", "apart"),
    [
        (0.0, -0.0, 1),
        (0.0, 2.0**-149, 1),
        (-0.0, -(2.0**-149), 1),
        (1.0, 1 + 2.0**-23, 1),
        (-1.0, -1 - 2.0**-23, 1),
        (1.0, 2.0, 2**23),
        (np.inf, np.finfo(np.float32).max, 1),
    ],
)
def test_the_distance_counts_bit_patterns_along_the_number_line(left, right, apart):
    assert distance(f32(left), f32(right)) == distance(f32(right), f32(left)) == apart


@given(BITS, BITS)
def test_only_equal_bits_are_at_distance_zero(left, right):
    a, b = from_bits(left), from_bits(right)
    if not (np.isnan(a) or np.isnan(b)):
        assert (distance(a, b)[0] == 0) == (left == right)


@given(st.lists(st.tuples(BITS, BITS), min_size=1, max_size=20))
def test_every_pair_is_counted_once(pairs):
    a, b = from_bits(*[p[0] for p in pairs]), from_bits(*[p[1] for p in pairs])
    found = measure(a, b)
    nan = found.nan_left + found.nan_right + found.nan_both
    infinite = int((~np.isfinite(a) | ~np.isfinite(b)).sum()) - nan
    assert sum(found.ulp) + nan + infinite == found.count == len(pairs)
    assert found.differing >= found.infinite + found.zero_sign + found.nan_left + found.nan_right


@pytest.mark.parametrize(("apart", "bucket"), [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (7, 3), (8, 4), (2**20, 21)])
def test_a_distance_falls_in_the_bucket_of_its_power_of_two(apart, bucket):
    found = measure(from_bits(0x3F800000), from_bits(0x3F800000 + apart))
    assert found.ulp == (0,) * bucket + (1,)
    assert found.worst_ulp == apart


def test_buckets_are_named_by_the_distances_they_hold():
    assert [bucket_label(i) for i in (0, 1, 2, 3, 4, 10, 11)] == [
        "0", "1", "2-3", "4-7", "8-15", "512-1023", "2^10 to 2^11-1",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.int16, np.int32, np.int64, np.uint8])
def test_neighbours_of_every_dtype_are_one_apart(dtype):
    top = np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else None
    a = np.array([1 if top is None else top - 1], dtype)
    b = np.nextafter(a, np.array([2], dtype)) if top is None else np.array([top], dtype)
    assert distance(a, b) == 1
    assert measure(a, b).ulp == (0, 1)


def test_integers_are_as_far_apart_as_their_difference():
    a, b = np.array([-(2**31), 5], np.int32), np.array([2**31 - 1, -5], np.int32)
    assert distance(a, b).tolist() == [2**32 - 1, 10]


def test_a_zero_of_the_other_sign_differs_and_is_counted_as_such():
    found = measure(f32(0, -0.0, 1, -0.0), f32(-0.0, 0, 1, -0.0))
    assert (found.differing, found.zero_sign, found.max_abs, found.max_rel, found.cosine) == (2, 2, 0, 0, 1)
    assert found.ulp == (2, 2)


def test_nan_is_counted_by_its_side_and_every_nan_is_one_pattern():
    nan = from_bits(0x7FC00000, 0xFFC00001)
    found = measure(np.concatenate([nan, f32(1, np.nan)]), np.concatenate([nan[::-1], f32(np.nan, 2)]))
    assert (found.nan_left, found.nan_right, found.nan_both, found.differing) == (1, 1, 2, 2)
    assert (found.first, found.first_nan) == (2, "right")
    assert (found.ulp, found.worst_ulp, found.max_abs, found.rms, found.cosine) == ((), None, None, None, None)


def test_an_infinity_against_a_number_is_its_own_class_and_has_no_cosine():
    found = measure(f32(np.inf, np.inf, 1, -np.inf), f32(np.inf, 3, 1, np.inf))
    assert (found.infinite, found.differing, found.ulp) == (2, 2, (1,))
    assert found.max_abs == found.max_rel == math.inf
    assert (found.rms, found.cosine) == (0, None)


def test_infinities_that_agree_leave_the_rest_measured():
    found = measure(f32(-np.inf, 3, 4), f32(-np.inf, 3, 4))
    assert (found.cosine, found.max_abs, found.ulp) == (1, 0, (2,))


@pytest.mark.parametrize(
    ("left", "right", "cosine"),
    [((0, 0), (0, -0.0), 1), ((0, 0), (1, 0), 0), ((1, 0), (0, 1), 0), ((1, 1), (-1, -1), -1)],
)
def test_cosine_is_defined_for_zero_vectors(left, right, cosine):
    assert measure(f32(*left), f32(*right)).cosine == pytest.approx(cosine, abs=1e-15)


def test_the_first_difference_is_found_in_a_later_chunk(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 8)
    a = np.ones(30, np.float32)
    b = a.copy()
    b[[21, 29]] = 2, np.nan
    found = measure(a, b)
    assert (found.first, found.count, found.differing, found.first_nan) == (21, 30, 2, "right")


def test_a_chunked_measurement_equals_one_in_a_single_chunk(monkeypatch):
    rng = np.random.default_rng(5)
    a = rng.integers(-9, 9, 100).astype(np.float32)
    b = a + rng.integers(0, 2, 100).astype(np.float32)
    whole = measure(a, b)
    monkeypatch.setattr(metrics, "CHUNK", 7)
    assert measure(a, b) == whole


def test_within_a_tolerance_is_judged_by_both_bounds_and_never_for_nan():
    a, b = f32(100, 1, np.nan, np.inf, 0), f32(101, 1.5, np.nan, -np.inf, -0.0)
    assert measure(a, b, Tolerance(rtol=0.01)).outside == 2
    assert measure(a, b, Tolerance(atol=0.5)).outside == 2
    assert measure(a, b, Tolerance(0.5, 0.01)).outside == 1
    assert measure(a, b, Tolerance(1e30, 1)).outside == 1
    assert measure(f32(1), f32(np.nan), Tolerance(1e30, 1)).outside == 1
    assert measure(a, b, Tolerance(0.5, 0.01)).differing == 4


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_tolerance_that_is_no_bound_is_refused(bad):
    with pytest.raises(InvalidInput, match="rtol must be a finite number"):
        Tolerance(rtol=bad)


def test_arrays_of_another_form_are_refused():
    with pytest.raises(InvalidInput, match=r"float32 \[2\] and float32 \[1\]"):
        measure(f32(1, 2), f32(1))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int32])
def test_the_quick_way_for_equal_bytes_gives_what_the_long_way_gives(monkeypatch, dtype):
    x = np.array([1, -2, 0, 3, 5], dtype)
    if x.dtype.kind == "f":
        x = np.concatenate([x, np.array([np.nan, np.inf, -np.inf, -0.0], dtype)])
    quick = measure(x, x.copy())
    taken = []
    monkeypatch.setattr(
        metrics._Totals, "add_same", lambda self, part: taken.append(1) or self.add(0, part, part, None)
    )
    assert measure(x, x.copy()) == quick
    assert taken
