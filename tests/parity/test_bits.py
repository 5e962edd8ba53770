import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from exactmoe.kernels.errors import InvalidInput
from exactmoe.parity.bits import compare, digest

F32 = np.float32


def from_bits(*bits: int) -> np.ndarray:
    return np.array(bits, np.uint32).view(F32)


def test_equal_arrays_are_equal_and_every_element_is_counted():
    x = np.arange(24, dtype=F32).reshape(2, 3, 4)
    found = compare("x", x, x.copy())
    assert found.equal
    assert (found.count, found.differing, found.first) == (24, 0, None)
    assert str(found) == "0/24 differ"


def test_one_flipped_bit_is_found_with_its_place_and_both_values():
    left = np.zeros((7, 8), F32)
    left[3, 0] = 0.38205764
    right = left.copy()
    right[3:5, 0] = np.nextafter(right[3:5, 0], F32(1))
    found = compare("y", left, right)
    assert not found.equal
    assert (found.count, found.differing, found.first) == (56, 2, (3, 0))
    assert str(found) == "2/56 differ; first (3, 0): 0.38205764 0x3ec39d0f != 0.38205767 0x3ec39d10"


def test_minus_zero_is_not_plus_zero():
    found = compare("zero", F32([0.0]), F32([-0.0]))
    assert not found.equal
    assert str(found) == "1/1 differ; first (0,): 0.0 0x00000000 != -0.0 0x80000000"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_nan_is_one_pattern_but_no_number(dtype):
    quiet = np.array([np.nan, 1.0], dtype)
    other = -quiet
    other[1] = 1.0
    unsigned = f"u{quiet.itemsize}"
    assert quiet.view(unsigned)[0] != other.view(unsigned)[0]
    assert compare("nan", quiet, other).equal
    assert digest([("nan", quiet)]) == digest([("nan", other)])
    assert not compare("nan", quiet, np.array([np.inf, 1.0], dtype)).equal


def test_a_signalling_nan_equals_the_quiet_one():
    assert compare("nan", from_bits(0x7F800001), from_bits(0xFFC12345)).equal


def test_a_difference_in_nans_shows_the_canonical_bits():
    assert "nan 0x7fc00000" in str(compare("nan", from_bits(0xFFC12345), F32([1.0])))


@pytest.mark.parametrize(
    ("right", "text"),
    [
        (np.zeros((2, 3), np.float64), "float32 [2, 3] != float64 [2, 3]"),
        (np.zeros((3, 2), F32), "float32 [2, 3] != float32 [3, 2]"),
        (np.zeros((1, 3), F32), "float32 [2, 3] != float32 [1, 3]"),  # would broadcast
        (np.zeros((), F32), "float32 [2, 3] != float32 []"),
        (np.zeros((2, 3), np.int32), "float32 [2, 3] != int32 [2, 3]"),  # the same bits
    ],
    ids=["dtype", "shape", "broadcastable", "scalar", "same-bits"],
)
def test_another_shape_or_dtype_is_a_difference_and_no_exception(right, text):
    found = compare("x", np.zeros((2, 3), F32), right)
    assert not found.equal
    assert found.count == 0
    assert str(found) == text


def test_two_empty_arrays_of_another_shape_differ_even_where_empty_is_allowed():
    assert not compare("x", np.zeros((0, 3), F32), np.zeros((0, 4), F32), empty_allowed=True).equal


def test_nothing_compared_is_not_equal_unless_allowed():
    nothing = np.zeros((0, 4), F32)
    assert not compare("x", nothing, nothing).equal
    assert str(compare("x", nothing, nothing)) == "nothing compared"
    assert compare("x", nothing, nothing, empty_allowed=True).equal


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.bool_])
def test_integers_are_compared_too(dtype):
    left = np.array([0, 1, 1], dtype)
    right = np.array([0, 1, 0], dtype)
    assert compare("ids", left, left.copy()).equal
    found = compare("ids", left, right)
    assert (found.differing, found.first) == (1, (2,))


def test_a_negative_integer_shows_its_own_width():
    found = compare("cache", np.array([-2], np.int16), np.array([3], np.int16))
    assert str(found) == "1/1 differ; first (0,): -2 0xfffe != 3 0x0003"


def test_a_view_with_strides_is_compared_element_by_element():
    x = np.arange(12, dtype=F32).reshape(3, 4)
    assert compare("x", x.T, x.T.copy()).equal
    assert compare("x", x[:, ::2], x[:, ::2].copy()).count == 6
    assert digest([("x", x.T)]) == digest([("x", x.T.copy())])


def test_a_zero_dimensional_array_has_a_place_too():
    found = compare("scalar", np.array(1, F32), np.array(2, F32))
    assert (found.count, found.first) == (1, ())
    assert not found.equal
    assert found.same_form


def test_a_dtype_without_comparable_bits_is_refused_by_name():
    with pytest.raises(InvalidInput, match="logits: dtype complex64"):
        compare("logits", np.zeros(2, np.complex64), np.zeros(2, np.complex64))


@given(
    arrays.arrays(np.uint32, st.integers(1, 40)),
    st.data(),
)
def test_whatever_the_values_exactly_the_changed_elements_are_counted(bits, data):
    left = (bits & 0x7F7FFFFF).view(F32)  # finite and not negative: no two bit patterns are one value
    changed = data.draw(st.sets(st.integers(0, bits.size - 1)))
    right = left.copy()
    for at in changed:
        right[at] = -right[at]
    found = compare("x", left, right)
    assert found.differing == len(changed)
    assert found.first == ((min(changed),) if changed else None)
    assert found.equal == (not changed)
    assert (digest([("x", left)]) == digest([("x", right)])) == (not changed)


def test_a_digest_covers_name_dtype_shape_and_order():
    x = np.zeros((2, 3), F32)
    base = digest([("a", x), ("b", x)])
    assert base == digest([("a", x.copy()), ("b", x)])
    others = [
        digest([("b", x), ("a", x)]),
        digest([("a", x), ("c", x)]),
        digest([("a", x), ("b", x.view(np.int32))]),
        digest([("a", x), ("b", x.reshape(3, 2))]),
        digest([("a", x)]),
    ]
    assert len({base, *others}) == 6
