"""Activation rows as integers.      x [T, K] f32 -> q i8 [S, T, K], scale f32 [T, K/256]

Profile q8_k: 8 bits, one slice. Profile q16_k: 15 bits, two slices, x = scale * (128*q[0] + q[1])."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from exactmoe.parity.reference.numerics import (
    F32,
    I32,
    NAN,
    ONE,
    TINY,
    ZERO,
    Bool,
    largest,
    nonfinite,
    quiet,
    require,
    rne,
)

BLOCK = 256  # activations that share a scale
PROFILES = ("q8_k", "q16_k")

_MAX_8 = np.float32(127)
_MAX_15 = np.float32(16256)  # 127 * 128


class Activations(NamedTuple):
    """Quantised rows."""

    q: npt.NDArray[np.int8]  # [S, T, K]: S = 1 (q8_k), or 2 (q16_k: high, low)
    scale: F32  # [T, K/256]


class Group(NamedTuple):
    """Integers that share a scale: x = scale * v."""

    v: I32  # [..., N]
    scale: F32  # [...]


def quantize(x: F32, profile: str) -> Activations:
    """Quantise rows x [T, K] in blocks of 256. Raises ValueError for another width or profile."""
    require_profile(profile)
    require(x.dtype == np.float32 and x.ndim == 2, f"x must be f32 [T, K], got {x.dtype} {list(x.shape)}")
    T, K = x.shape
    require(K > 0 and K % BLOCK == 0, f"activation width must be a multiple of {BLOCK}, got {K}")
    blocks = x.reshape(T, K // BLOCK, BLOCK)
    if profile == "q8_k":
        v, scale = quantize_8(blocks)
        slices = v[None]
    else:
        v, scale = quantize_15(blocks)
        hi = (v + 64) // 128  # floor: hi in -127..127
        slices = np.stack([hi, v - 128 * hi])  # lo in -64..63
    return Activations(slices.reshape(len(slices), T, K).astype(np.int8), scale)


def require_profile(profile: str) -> None:
    """Refuse a profile there is not."""
    require(profile in PROFILES, f"activation profile must be one of {', '.join(PROFILES)}, got {profile!r}")


@quiet
def quantize_8(x: F32) -> Group:
    """ggml's Q8_K rule for groups x [..., N]: the first element of largest magnitude becomes -127."""
    bad = nonfinite(x)
    x = np.where(bad[..., None], ZERO, x)
    live = largest(x) >= TINY
    first = np.argmax(np.abs(x), axis=-1, keepdims=True)  # the smallest index of several
    m = np.take_along_axis(x, first, axis=-1)[..., 0]
    s: F32 = np.divide(-_MAX_8, np.where(live, m, ONE))
    v = np.minimum(rne(s[..., None] * x), 127)
    return Group(np.where(live[..., None], v, 0), _scale(bad, live, np.divide(ONE, s)))


@quiet
def quantize_15(x: F32) -> Group:
    """15-bit integers -16256..16256 for groups x [..., N]."""
    bad = nonfinite(x)
    x = np.where(bad[..., None], ZERO, x)
    amax = largest(x)
    live = amax >= TINY
    s: F32 = np.divide(_MAX_15, np.where(live, amax, ONE))
    v = np.minimum(16256, np.maximum(-16256, rne(s[..., None] * x)))
    return Group(np.where(live[..., None], v, 0), _scale(bad, live, amax / _MAX_15))


def _scale(bad: Bool, live: Bool, scale: F32) -> F32:
    """The scale of a group: NaN where it is not finite, 0 where it is all but zero."""
    return np.where(bad, NAN, np.where(live, scale, ZERO))
