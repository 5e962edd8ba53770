"""Quantise activation rows.      x [T, K] f32 -> slices [S, T, K] i8, scale [T, K/256] f32"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from exactmoe.parity.reference.numerics import F32, I32, NAN, ONE, ZERO, nonfinite, quiet, require, rne

BLOCK = 256
PROFILES = ("q8_k", "q16_k")
TINY = np.float32(2.0**-100)


class Activations(NamedTuple):
    """Quantised rows: x = scale * q (q8_k), or scale * (128*q[0] + q[1]) (q16_k)."""

    q: npt.NDArray[np.int8]  # [S, T, K]
    scale: F32  # [T, K/256]


class Group(NamedTuple):
    """Rows of integers with one scale each."""

    v: I32  # [..., N]
    scale: F32  # [...]


def quantize(x: F32, profile: str) -> Activations:
    """Quantise rows x [T, K] in blocks of 256."""
    require(profile in PROFILES, f"activation profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    require(x.dtype == np.float32 and x.ndim == 2, f"x must be f32 [T, K], got {x.dtype} {list(x.shape)}")
    require(x.shape[1] % BLOCK == 0, f"activation width must be a multiple of {BLOCK}, got {x.shape[1]}")
    T, K = x.shape
    blocks = x.reshape(T, K // BLOCK, BLOCK)
    if profile == "q8_k":
        v, scale = quantize_8(blocks)
        slices = v[None]
    else:
        v, scale = quantize_15(blocks)
        hi = (v + 64) >> 7  # floor((v + 64) / 128)
        slices = np.stack([hi, v - 128 * hi])
    return Activations(slices.reshape(-1, T, K).astype(np.int8), scale)


@quiet
def quantize_8(x: F32) -> Group:
    """ggml's Q8_K rule on rows x [..., N]: the first element of largest magnitude maps to -127."""
    amax, live, bad = _amax(x)
    first = np.argmax(np.abs(np.where(bad[..., None], ZERO, x)), axis=-1)  # the smallest index among equals
    m = np.where(live, np.take_along_axis(x, first[..., None], -1)[..., 0], ONE)
    s = np.float32(-127) / m
    v = np.minimum(rne(np.where(live[..., None], x, ZERO) * s[..., None]), 127)
    return Group(v, np.where(bad, NAN, np.where(live, ONE / s, ZERO)))


@quiet
def quantize_15(x: F32) -> Group:
    """15-bit integers in -16256..16256 of rows x [..., N], scale amax / 16256."""
    amax, live, bad = _amax(x)
    s = np.float32(16256) / np.where(live, amax, ONE)
    v = np.clip(rne(np.where(live[..., None], x, ZERO) * s[..., None]), -16256, 16256)
    return Group(v, np.where(bad, NAN, np.where(live, amax / np.float32(16256), ZERO)))


def _amax(x: F32) -> tuple[F32, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Largest magnitude, whether the row quantises to more than zero, and whether it is not finite."""
    bad = nonfinite(x)
    amax = np.max(np.abs(np.where(bad[..., None], ZERO, x)), axis=-1, initial=ZERO)
    return amax, ~bad & (amax >= TINY), bad
