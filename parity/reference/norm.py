"""RMSNorm.      x [..., K] f32, weight [K] f32 -> [..., K] f32

The mean of squares is a sum of integers: 24 bits an element, counted from the row's largest."""

from typing import NamedTuple

import numpy as np

from exactmoe.parity.reference.numerics import F32, NAN, ONE, ZERO, exponent, nonfinite, pow2, quiet, require
from exactmoe.parity.reference.quantize import Activations, quantize


class NormedActivations(NamedTuple):
    """A normed row as f32 and quantised."""

    normed: F32
    activations: Activations


@quiet
def rms_norm(x: F32, weight: F32, eps: np.float32) -> F32:
    """(x * r) * weight with r = 1 / sqrt(mean(x^2) + eps)."""
    K = x.shape[-1]
    require(weight.shape == (K,), f"norm weight must have shape [{K}], got {list(weight.shape)}")
    bad = nonfinite(x)
    finite = np.where(bad[..., None], ZERO, x)
    e = np.maximum(exponent(np.max(np.abs(finite), axis=-1)), -100)
    i = (finite * pow2(23 - e)[..., None]).astype(np.int64)  # truncates
    total = np.sum(i * i, axis=-1).astype(np.float32)
    mean = ((total / np.float32(K)) * pow2(e - 23)) * pow2(e - 23)
    r = np.where(bad, NAN, ONE / np.sqrt(mean + np.float32(eps)))
    return (x * r[..., None]) * weight


def rms_norm_quantize(x: F32, weight: F32, eps: np.float32, profile: str) -> NormedActivations:
    """RMSNorm and the activations of its result."""
    y = rms_norm(x, weight, eps)
    return NormedActivations(y, quantize(y, profile))
