"""Bitwise comparison and digests of arrays.      left, right of any shape -> Comparison
Shape and dtype are judged first. Elements are compared as the integers their bits spell, so -0 is not +0, and no
tolerance exists; every NaN counts as one pattern, as the numerics contract says."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from exactmoe.kernels.errors import InvalidInput

Array = npt.NDArray[Any]

_NAN = {2: 0x7E00, 4: 0x7FC00000, 8: 0x7FF8000000000000}  # the one NaN of each float width, in bytes
_UNSIGNED = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8"}


class Hasher(Protocol):
    """What `absorb` feeds; hashlib's objects are such."""

    def update(self, data: bytes, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a bitwise comparison found; the verdict is `equal`."""

    name: str
    count: int  # elements compared; 0 where shape or dtype already differ
    differing: int  # elements whose bits differ
    first: tuple[int, ...] | None  # coordinates of the first of them, in C order
    left: str  # value and bits there; or dtype and shape, where those differ
    right: str
    empty_allowed: bool = False

    @property
    def same_form(self) -> bool:
        """Whether shape and dtype agree."""
        return self.first is not None or not self.left

    @property
    def equal(self) -> bool:
        """Same form and no differing element; comparing nothing is not equality unless it was allowed."""
        return self.same_form and self.differing == 0 and (self.count > 0 or self.empty_allowed)

    def __str__(self) -> str:
        if not self.same_form:
            return f"{self.left} != {self.right}"
        if self.first is None:
            return f"0/{self.count} differ" if self.count or self.empty_allowed else "nothing compared"
        return f"{self.differing}/{self.count} differ; first {self.first}: {self.left} != {self.right}"


def compare(name: str, left: Array, right: Array, *, empty_allowed: bool = False) -> Comparison:
    """Compare two arrays of any one shape and dtype (float, integer or bool), bit for bit.

    A different shape or dtype is a difference, reported as such. Raises InvalidInput, naming `name`, only for a dtype
    that has no bits to compare (object, text, complex)."""
    bits = canonical_bits(name, left), canonical_bits(name, right)
    if left.dtype != right.dtype or left.shape != right.shape:
        return Comparison(name, 0, 0, None, _form(left), _form(right), empty_allowed)
    unequal = bits[0] != bits[1]
    differing = int(np.count_nonzero(unequal))
    if not differing:
        return Comparison(name, left.size, 0, None, "", "", empty_allowed)
    first = tuple(int(i) for i in np.unravel_index(int(np.argmax(unequal)), left.shape))
    shown = [_element(array[first], int(b[first])) for array, b in zip((left, right), bits, strict=True)]
    return Comparison(name, left.size, differing, first, shown[0], shown[1], empty_allowed)


def canonical_bits(name: str, array: Array) -> Array:
    """The bits of `array` as unsigned integers of its width and shape, each NaN replaced by the one NaN."""
    if array.dtype.kind not in "fiub" or array.dtype.itemsize not in _UNSIGNED:
        raise InvalidInput(f"{name}: dtype {array.dtype} cannot be compared bit for bit")
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(array.shape)
    bits = little.view(_UNSIGNED[array.dtype.itemsize])
    if array.dtype.kind == "f":
        nan = np.isnan(little)
        if nan.any():
            bits = np.where(nan, np.array(_NAN[array.dtype.itemsize], bits.dtype), bits)
    return bits


def absorb(hasher: Hasher, name: str, array: Array) -> None:
    """Feed name, dtype, shape and canonical bits of `array` to `hasher`; the same on every machine."""
    head = f"{name}\0{array.dtype.name}\0{','.join(map(str, array.shape))}\0"
    hasher.update(head.encode())
    hasher.update(canonical_bits(name, array).tobytes())


def digest(arrays: Iterable[tuple[str, Array]]) -> str:
    """Hex SHA-256 over named arrays in the order given."""
    hasher = hashlib.sha256()
    for name, array in arrays:
        absorb(hasher, name, array)
    return hasher.hexdigest()


def _form(array: Array) -> str:
    return f"{array.dtype.name} {list(array.shape)}"


def _element(value: Any, bits: int) -> str:
    width = 2 * value.dtype.itemsize
    return f"{value!s} 0x{bits:0{width}x}"  # str keeps the shortest digits of the dtype, format would widen
