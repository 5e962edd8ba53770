"""The moves of numerics-v1 in numpy: every float operation is one elementwise binary32 operation, every sum an integer's.

Dots of integers go through `isum_dot`: float64 holds integers below 2^53 exactly, so its `@` is exact whatever the order
and whatever the BLAS. numpy's own exp, log, sin and float sums change bits with the CPU and are not used."""

from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

NAN = np.float32(np.nan)
ZERO, ONE = np.float32(0), np.float32(1)
P_ONE = np.float32(2**20)  # probabilities in fixed point

quiet = np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore")
"""Decorates ops whose inputs may overflow or be NaN: the contract says what comes out, so numpy need not warn."""


def constant(bits: int) -> np.float32:
    """The binary32 with these bits."""
    return np.uint32(bits).view(np.float32)


LOG2E = constant(0x3FB8AA3B)
LN2_HI, LN2_LO = constant(0x3F318000), constant(0xB95E8083)
EXP_Q = tuple(constant(b) for b in (0x3AB50FB0, 0x3C091E66, 0x3D2AAC82, 0x3E2AAA47, 0x3EFFFFFE))


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition`."""
    if not condition:
        raise ValueError(message)


def rne(x: F32) -> I32:
    """Nearest integer, ties to even."""
    return np.rint(x).astype(np.int32)


def pow2(n: Array) -> F32:
    """2^n exactly, n an integer array in -126..127."""
    return ((np.asarray(n, np.int32) + 127) << 23).astype(np.int32).view(np.float32)


def exponent(x: F32) -> I32:
    """floor(log2 |x|) of normal finite x."""
    return ((x.view(np.int32) >> 23) & 255) - 127


def nonfinite(x: F32, axis: int = -1) -> npt.NDArray[np.bool_]:
    """Whether a row holds a NaN or an infinity."""
    return ~np.isfinite(x).all(axis)


def isum_dot(a: Array, b: Array) -> npt.NDArray[np.float64]:
    """a [M, K] @ b [K, N] of integers whose every partial sum stays below 2^53: exact, as float64."""
    return a.astype(np.float64) @ b.astype(np.float64)


@quiet
def exp(x: F32) -> F32:
    """exp, within 1 ulp on [-87, 88] and clamped outside; NaN gives NaN."""
    nan = np.isnan(x)
    x = np.minimum(np.maximum(np.where(nan, ZERO, x), np.float32(-87)), np.float32(88))
    n = np.rint(x * LOG2E)
    rh = x - n * LN2_HI
    rl = n * LN2_LO
    r = rh - rl
    q = EXP_Q[0]
    for c in EXP_Q[1:]:
        q = q * r + c
    y = ONE + (rh + ((r * r) * q - rl))
    scaled = (y.view(np.int32) + (n.astype(np.int32) << 23)).view(np.float32)
    return np.where(nan, NAN, scaled)
