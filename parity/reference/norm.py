"""RMSNorm.      x [..., K] f32, weight [K] f32 -> [..., K] f32

The mean of squares is a sum of integers: every element as a whole number of 2^-23 of the power of two that its row's
largest magnitude begins with."""

from typing import NamedTuple

import numpy as np

from exactmoe.parity.reference.numerics import (
    F32,
    I64,
    NAN,
    ONE,
    ZERO,
    exponent,
    largest,
    nonfinite,
    pow2,
    quiet,
    require,
)
from exactmoe.parity.reference.quantize import Activations, quantize


class NormedActivations(NamedTuple):
    """Normed rows, as they are and quantised."""

    normed: F32  # [T, K]
    activations: Activations


@quiet
def rms_norm(x: F32, weight: F32, eps: np.float32) -> F32:
    """(x*r)*weight with r = 1 / sqrt(mean of squares + eps), K up to 16384."""
    K = x.shape[-1]
    require(weight.shape == (K,), f"norm weight must have shape [{K}], got {list(weight.shape)}")
    bad = nonfinite(x)
    finite = np.where(bad[..., None], ZERO, x)
    e = np.maximum(exponent(largest(finite)), -100)
    i: I64 = (finite * pow2(23 - e)[..., None]).astype(np.int64)  # truncated, |i| < 2^24
    total: I64 = np.sum(i * i, axis=-1)  # at most 2^14 * 2^48
    mean = ((total.astype(np.float32) / np.float32(K)) * pow2(e - 23)) * pow2(e - 23)
    r = np.where(bad, NAN, ONE / np.sqrt(mean + np.float32(eps)))
    return (x * r[..., None]) * weight


def rms_norm_quantize(x: F32, weight: F32, eps: np.float32, profile: str) -> NormedActivations:
    """RMSNorm of x [T, K], and its result quantised."""
    normed = rms_norm(x, weight, eps)
    return NormedActivations(normed, quantize(normed, profile))
