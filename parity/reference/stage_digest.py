"""A hash of every token's row of a stage.      values [T, ...] f32 or i32 -> [T] i64

    hash(row) = sum over i of mix(2^32 * (i + 1) + bits_i)   mod 2^64, read as a signed integer

bits are the 32 bits of an element, every NaN as 0x7fc00000; mix is the finaliser of SplitMix64 (Steele, Lea, Flood,
"Fast splittable pseudorandom number generators", 2014)."""

import numpy as np

from exactmoe.parity.reference.numerics import I64, Array, require

_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def stage_digest(values: Array) -> I64:
    """Hash [T] of the rows of `values` [T, ...]. Raises ValueError for another dtype than f32 and i32."""
    require(values.dtype in (np.float32, np.int32), f"a stage must be f32 or i32, got {values.dtype}")
    require(values.ndim > 0, "a stage must have an axis of tokens")
    T = len(values)
    rows = np.ascontiguousarray(values).reshape(T, -1) if values.size else np.zeros((T, 0), values.dtype)
    bits = rows.view(np.uint32)
    if values.dtype == np.float32:
        bits = np.where(np.isnan(rows), np.uint32(0x7FC00000), bits)
    place = np.arange(1, bits.shape[1] + 1, dtype=np.uint64) << np.uint64(32)
    terms = _mix(place + bits.astype(np.uint64))
    return np.asarray(np.sum(terms, axis=1, dtype=np.uint64)).view(np.int64)


def _mix(z: Array) -> Array:
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    mixed: Array = z ^ (z >> np.uint64(31))
    return mixed
