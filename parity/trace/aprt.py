"""APRT files, the stage files of the aprender project: a header of 12 bytes and a flat f32 vector.

    magic "APRT" | u32 layer, 0xFFFFFFFF for the whole model | u32 count | count x f32, all little-endian

The header has no shape: what is read is a vector. i32 ids are written as f32, which holds them below 2^24."""

import struct
from typing import NamedTuple

import numpy as np

from exactmoe.kernels.errors import InvalidInput, require
from exactmoe.model.stages import WHOLE_MODEL
from exactmoe.parity.bits import Array

MAGIC = b"APRT"
_HEADER = struct.Struct("<4sII")
_WHOLE_MODEL = 0xFFFFFFFF


class AprtTensor(NamedTuple):
    """One file's content."""

    layer: int  # WHOLE_MODEL where the header says so
    values: Array  # [count] f32, bits as stored


def encode(layer: int, values: Array, name: str) -> bytes:
    """The file for `values`, f32 of any shape, or i32 below 2^24; raises InvalidInput naming `name` for others."""
    if values.dtype == np.int32:
        largest = int(np.abs(values.astype(np.int64)).max(initial=0))
        require(largest < 2**24, f"{name}: APRT holds f32 alone, in which {largest} may not be exact")
        values = values.astype(np.float32)
    require(values.dtype == np.float32, f"{name}: APRT holds f32 alone, got {values.dtype}")
    require(values.size < 2**32, f"{name}: {values.size} values exceed APRT's count")
    number = _WHOLE_MODEL if layer == WHOLE_MODEL else layer
    return _HEADER.pack(MAGIC, number, values.size) + values.astype("<f4", copy=False).tobytes()


def decode(content: bytes, name: str) -> AprtTensor:
    """Read a file's bytes; raises InvalidInput naming `name` for another magic, or a count that is not the size's."""
    if len(content) < _HEADER.size:
        raise InvalidInput(f"{name}: {len(content)} bytes hold no APRT header of {_HEADER.size}")
    magic, layer, count = _HEADER.unpack_from(content)
    require(magic == MAGIC, f"{name}: magic {magic!r} at byte 0, expected {MAGIC!r}")
    held = len(content) - _HEADER.size
    require(held == 4 * count, f"{name}: the header counts {count} values of 4 bytes, {held} bytes follow it")
    values = np.frombuffer(content, "<f4", count, _HEADER.size).astype(np.float32, copy=False)
    return AprtTensor(WHOLE_MODEL if layer == _WHOLE_MODEL else layer, values)
