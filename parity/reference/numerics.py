"""The moves of numerics-v1: every float operation is one elementwise binary32 operation, every sum one of integers.

Dots of integers go through `isum_dot`: float64 holds every integer up to 2^53, so while the magnitudes of the terms add
up to no more, its `@` is exact on any CPU, in any BLAS, in any order. numpy's own exp, log and sin, and its sums of
floats, change bits with the CPU and are not used."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I16 = npt.NDArray[np.int16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
U8 = npt.NDArray[np.uint8]


def constant(bits: int) -> np.float32:
    """The binary32 with these bits."""
    return np.uint32(bits).view(np.float32)


NAN = constant(0x7FC00000)
INF = constant(0x7F800000)
ZERO, ONE = np.float32(0), np.float32(1)
TINY = np.float32(2.0**-100)  # a group whose largest magnitude is below this quantises to zeros
FIXED_ONE = np.float32(2**20)  # 1.0 of a probability in fixed point

_EXP_LOW, _EXP_HIGH = np.float32(-87), np.float32(88)
_LOG2_E = constant(0x3FB8AA3B)
_LN2_HIGH, _LN2_LOW = constant(0x3F318000), constant(0xB95E8083)
_EXP_POLYNOMIAL = tuple(constant(bits) for bits in (0x3AB50FB0, 0x3C091E66, 0x3D2AAC82, 0x3E2AAA47, 0x3EFFFFFE))

quiet = np.errstate(all="ignore")
"""Decorates ops that may meet NaN or overflow: the contract says what comes out, so numpy need not warn."""


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition`."""
    if not condition:
        raise ValueError(message)


def rne(x: F32) -> I32:
    """Nearest integer of |x| < 2^31, ties to even."""
    return np.rint(x).astype(np.int32)


def pow2(n: I32) -> F32:
    """2^n exactly, for n in -126..127."""
    return ((n.astype(np.int32) + np.int32(127)) << 23).view(np.float32)


def exponent(x: F32) -> I32:
    """floor(log2 |x|) of normal x, -127 of zeros and subnormals: the exponent field minus 127."""
    return ((x.view(np.int32) >> 23) & 255) - 127


def nonfinite(x: F32) -> Bool:
    """Whether a row [..., N] holds a NaN or an infinity."""
    bad: Bool = np.any(~np.isfinite(x), axis=-1)
    return bad


def largest(x: F32) -> F32:
    """The largest magnitude of each row [..., N] of finite numbers; 0 of an empty row."""
    amax: F32 = np.max(np.abs(x), axis=-1, initial=ZERO)
    return amax


def isum_dot(a: Array, b: Array) -> F64:
    """a [M, K] @ b [K, N] of integers, exact, as float64; the caller owes that K*max|a|*max|b| <= 2^53."""
    return a.astype(np.float64) @ b.astype(np.float64)


@quiet
def exp(x: F32) -> F32:
    """e^x within 1 ulp on [-87, 88], x clamped to that range; NaN gives NaN."""
    nan = np.isnan(x)
    x = np.minimum(np.maximum(np.where(nan, ZERO, x), _EXP_LOW), _EXP_HIGH)
    n = np.rint(x * _LOG2_E)
    rh = x - n * _LN2_HIGH
    rl = n * _LN2_LOW
    r = rh - rl
    q = np.broadcast_to(_EXP_POLYNOMIAL[0], r.shape)
    for coefficient in _EXP_POLYNOMIAL[1:]:
        q = q * r + coefficient
    y = ONE + (rh + ((r * r) * q - rl))
    bits = y.view(np.int32) + (n.astype(np.int32) << 23)
    return np.where(nan, NAN, bits.view(np.float32))
