"""Router.      x [T, D] f32, normed -> logits [T, E] f32 -> weight [T, A] f32, expert [T, A] i32

Logits are exact integer dots of fixed-point rows. Then softmax over all experts, the A best, and their weights
renormalised; equal probabilities go to the smaller id."""

from typing import NamedTuple

import numpy as np

from exactmoe.parity.reference.numerics import (
    F32,
    FIXED_ONE,
    I32,
    I64,
    NAN,
    ONE,
    ZERO,
    exp,
    exponent,
    isum_dot,
    largest,
    nonfinite,
    pow2,
    quiet,
    require,
    rne,
)

MAX_WIDTH = 16384


class RouterWeight(NamedTuple):
    """Router rows in fixed point: w = scale * q."""

    q: I32  # [E, D]
    scale: F32  # [E] powers of two


class Routing(NamedTuple):
    """Experts of each token, best first, with the weight of each."""

    weight: F32  # [T, A]
    expert: I32  # [T, A]


class _Bits(NamedTuple):
    """Bits of the fixed-point operands: D * 2^x * 2^w <= 2^52."""

    x: int
    w: int


def prepare_router(weight: F32) -> RouterWeight:
    """Put the F32 router [E, D] into fixed point. Raises ValueError for another dtype, and for NaN or infinity."""
    require(weight.dtype == np.float32, f"router weight must be f32, got {weight.dtype}")
    require(bool(np.isfinite(weight).all()), "router weight holds a NaN or an infinity")
    return _fix(weight, _bits(weight.shape[1]).w)


@quiet
def router_logits(x: F32, weight: RouterWeight) -> F32:
    """Logits [T, E] of normed rows x [T, D]; NaN where the row is not finite."""
    E, D = weight.q.shape
    require(x.ndim == 2 and x.shape[1] == D, f"x must have shape [T, {D}], got {list(x.shape)}")
    bad = nonfinite(x)[:, None]
    fixed = _fix(np.where(bad, ZERO, x), _bits(D).x)
    logits = (isum_dot(fixed.q, weight.q.T).astype(np.float32) * fixed.scale[:, None]) * weight.scale
    return np.where(np.broadcast_to(bad, (len(x), E)), NAN, logits)


@quiet
def route(logits: F32, top_k: int) -> Routing:
    """The `top_k` most probable experts of each token; logits not finite give ids 0, 1, ... and NaN weights."""
    T, E = logits.shape
    require(1 <= top_k <= E, f"top_k must be 1 to the {E} experts, got {top_k}")
    bad = nonfinite(logits)[:, None]
    finite = np.where(bad, ZERO, logits)  # equal logits: the stable sort leaves ids 0, 1, ... first
    p = exp(finite - np.max(finite, axis=1, keepdims=True))
    total: I64 = np.sum(rne(p * FIXED_ONE), axis=1, dtype=np.int64)
    den: F32 = total[:, None].astype(np.float32) * np.float32(2.0**-20)
    prob = p / den
    expert = np.argsort(-prob, axis=1, kind="stable")[:, :top_k].astype(np.int32)
    chosen = np.take_along_axis(prob, expert, axis=1)
    s = np.zeros((T, 1), np.float32)
    for k in range(top_k):
        s = s + chosen[:, k : k + 1]
    weight = np.where(s <= 0, ONE / np.float32(top_k), chosen / s)
    return Routing(np.where(bad, NAN, weight), expert)


def _bits(width: int) -> _Bits:
    require(0 < width <= MAX_WIDTH, f"the router is defined for widths up to {MAX_WIDTH}, got {width}")
    lg = (width - 1).bit_length()  # ceil(log2 width)
    w = min(20, (52 - lg) // 2)
    return _Bits(x=min(21, 52 - lg - w), w=w)


def _fix(v: F32, bits: int) -> RouterWeight:
    """Finite rows as integers of `bits` bits and sign, scaled by the power of two above the row's largest magnitude."""
    e = np.maximum(exponent(largest(v)), -100)
    return RouterWeight(rne(v * pow2(bits - 1 - e)[..., None]), pow2(e + 1 - bits))
