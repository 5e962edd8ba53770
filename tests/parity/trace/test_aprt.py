"""APRT files: what is written comes back bit for bit, and what is not as the header says is refused."""

import struct

import numpy as np
import pytest

from exactmoe.kernels.errors import InvalidInput
from exactmoe.parity.trace import aprt

BITS = np.array([0, 0x80000000, 1, 0x7FC00001, 0xFFC12345, 0x7F800000, 0x7F800001, 0x3F800000], np.uint32)


@pytest.mark.parametrize("layer", [0, 47, -1])
def test_values_come_back_bit_for_bit(layer: int) -> None:
    content = aprt.encode(layer, BITS.view(np.float32).reshape(2, 4), "q")
    found = aprt.decode(content, "q")
    assert found.layer == layer
    np.testing.assert_array_equal(found.values.view(np.uint32), BITS)


def test_the_header_is_what_the_format_says() -> None:
    content = aprt.encode(3, np.float32([1.0, -2.0]), "q")
    assert content == b"APRT" + struct.pack("<II", 3, 2) + struct.pack("<ff", 1.0, -2.0)
    assert aprt.encode(-1, np.float32([]), "q")[4:8] == b"\xff\xff\xff\xff"


def test_ids_are_stored_as_numbers_while_f32_holds_them() -> None:
    found = aprt.decode(aprt.encode(0, np.array([[5, 2**24 - 1]], np.int32), "ids"), "ids")
    np.testing.assert_array_equal(found.values, np.float32([5, 2**24 - 1]))
    with pytest.raises(InvalidInput, match="ids: APRT holds f32 alone"):
        aprt.encode(0, np.array([-(2**24)], np.int32), "ids")


def test_another_dtype_is_refused() -> None:
    with pytest.raises(InvalidInput, match="got float64"):
        aprt.encode(0, np.zeros(2), "q")


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda c: c[:11], "hold no APRT header"), (lambda c: b"APRX" + c[4:], "magic b'APRX'"),
     (lambda c: c[:-1], "7 bytes follow"), (lambda c: c + b"\0\0\0\0", "12 bytes follow"), (lambda c: b"", "0 bytes")],
)  # fmt: skip
def test_a_file_that_is_not_as_its_header_says_is_refused(change, said: str) -> None:
    content = aprt.encode(1, np.float32([1.0, 2.0]), "q")
    with pytest.raises(InvalidInput, match=said):
        aprt.decode(change(content), "some.aprt")
