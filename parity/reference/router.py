"""Router: logits over experts, then softmax, top-k, renormalise.      x [T, D] f32 -> weight [T, A] f32, expert [T, A] i32"""

import math
from typing import NamedTuple

import numpy as np

from exactmoe.parity.reference.numerics import (
    F32, I32, NAN, ONE, P_ONE, ZERO, exp, exponent, isum_dot, nonfinite, pow2, quiet, require, rne,
)  # fmt: skip


class RouterWeight(NamedTuple):
    """Router rows in fixed point."""

    q: I32  # [E, D]
    scale: F32  # [E]


class Routing(NamedTuple):
    """Where each token goes, best first."""

    weight: F32  # [T, A]
    expert: I32  # [T, A]


def router_bits(width: int) -> tuple[int, int]:
    """Bits (x, w) of the fixed-point operands: width * 2^x * 2^w <= 2^52."""
    lg = math.ceil(math.log2(width))
    w = min(20, (52 - lg) // 2)
    return min(21, 52 - lg - w), w


@quiet
def fix(v: F32, bits: int) -> RouterWeight:
    """Rows of v in fixed point: integers of `bits` bits from the row's largest, and their power-of-two scale."""
    finite = np.where(nonfinite(v)[..., None], ZERO, v)
    e = np.maximum(exponent(np.max(np.abs(finite), axis=-1)), -100)
    return RouterWeight(rne(finite * pow2(bits - 1 - e)[..., None]), pow2(e + 1 - bits))


def prepare_router(weight: F32) -> RouterWeight:
    """Put F32 router rows [E, D] into fixed point."""
    require(weight.dtype == np.float32, f"router weight must be f32, got {weight.dtype}")
    return fix(weight, router_bits(weight.shape[1])[1])


@quiet
def router_logits(x: F32, weight: RouterWeight) -> F32:
    """Logits [T, E] of normed rows x [T, D]."""
    require(x.shape[1] == weight.q.shape[1], f"x must have shape [T, {weight.q.shape[1]}], got {list(x.shape)}")
    q, scale = fix(x, router_bits(x.shape[1])[0])
    logits = (isum_dot(q, weight.q.T).astype(np.float32) * scale[:, None]) * weight.scale
    return np.where(nonfinite(x)[:, None], NAN, logits)


@quiet
def route(logits: F32, top_k: int) -> Routing:
    """The `top_k` most probable experts a token, equal ones in order of id, weights renormalised."""
    T, E = logits.shape
    require(1 <= top_k <= E, f"top_k must be 1 to the {E} experts, got {top_k}")
    bad = nonfinite(logits)
    calm = np.where(bad[:, None], ZERO, logits)
    p = exp(calm - np.max(calm, axis=1, keepdims=True))
    den = np.sum(rne(p * P_ONE).astype(np.int64), axis=1).astype(np.float32) * (ONE / P_ONE)
    prob = p / den[:, None]
    expert = np.argsort(-prob, axis=1, kind="stable")[:, :top_k].astype(np.int32)
    chosen = np.take_along_axis(prob, expert, axis=1)
    total = np.zeros(T, np.float32)
    for k in range(top_k):
        total = total + chosen[:, k]
    none = (total <= 0)[:, None]
    weight = np.where(none, ONE / np.float32(top_k), chosen / np.where(none, ONE, total[:, None]))
    return Routing(np.where(bad[:, None], NAN, weight), expert)
