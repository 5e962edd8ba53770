"""Causal grouped-query attention over an integer cache.      q [T, H, C] f32 -> [T, H*C] f32

Scores are exact integer dots, scaled; probabilities are put into fixed point, so that the denominator and P.V are sums of
integers. A head's weights for its values carry the values' power-of-two scales."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from exactmoe.parity.reference.kv_cache import KVLayer
from exactmoe.parity.reference.numerics import F32, I32, NAN, ONE, P_ONE, ZERO, exp, isum_dot, nonfinite, quiet, require, rne
from exactmoe.parity.reference.quantize import quantize_15

MAX_KEYS = 262144


class _Head(NamedTuple):
    """One query head against its keys."""

    score: F32  # [T, S]
    seen: npt.NDArray[np.bool_]  # [T, S]
    p: F32  # [T, S] exp(score - max), 0 where not seen
    den: F32  # [T]


def attend(q: F32, kv: KVLayer, start: int) -> F32:
    """Attention output [T, H*C] of queries at positions start..start+T-1, keys in the cache."""
    T, H, C = q.shape
    out = np.empty((T, H, C), np.float32)
    for h in range(H):
        g = h // (H // kv.k.shape[1])
        out[:, h] = _attend_head(_head(q[:, h], kv, g, start), kv, g)
    return out.reshape(T, H * C)


def attention_scores(q: F32, kv: KVLayer, start: int) -> F32:
    """Scores [T, H, S], -inf at keys a query may not see."""
    return _per_head(q, kv, start, lambda head: np.where(head.seen, head.score, np.float32(-np.inf)))


def attention_softmax(q: F32, kv: KVLayer, start: int) -> F32:
    """Softmax weights [T, H, S] as the fixed-point numbers over their sum, 0 at keys a query may not see."""

    @quiet
    def weights(head: "_Head") -> F32:
        fixed = rne(np.where(np.isnan(head.p), ZERO, head.p) * P_ONE).astype(np.float32) / head.den[:, None]
        bad = nonfinite(np.where(head.seen, head.score, ZERO))
        return np.where(head.seen, np.where(bad[:, None], NAN, fixed), ZERO)

    return _per_head(q, kv, start, weights)


def _per_head(q: F32, kv: KVLayer, start: int, fn: object) -> F32:
    H = q.shape[1]
    heads = [fn(_head(q[:, h], kv, h // (H // kv.k.shape[1]), start)) for h in range(H)]  # type: ignore[operator]
    return np.stack(heads, axis=1) if len(q) else np.empty((0, H, start), np.float32)


@quiet
def _head(q: F32, kv: KVLayer, g: int, start: int) -> _Head:
    """Scores and probabilities of query rows q [T, C] against kv head `g`."""
    T, C = q.shape
    S = start + T
    require(S <= min(len(kv.k), MAX_KEYS), f"positions {start}..{S - 1} lie outside the cache of {len(kv.k)}")
    v, scale = quantize_15(q)
    c = scale * (ONE / np.sqrt(np.float32(C)))
    dot = isum_dot(v, kv.k[:S, g].T).astype(np.float32)
    score = (dot * c[:, None]) * kv.k_scale[:S, g]
    seen = np.arange(S) <= np.arange(start, S)[:, None]
    m = np.max(np.where(seen, score, np.float32(-np.inf)), axis=1, keepdims=True)
    p = np.where(seen, exp(score - m), ZERO)
    fixed = rne(np.where(np.isfinite(p), p, ZERO) * P_ONE)
    return _Head(score, seen, p, np.sum(fixed.astype(np.int64), axis=1).astype(np.float32))


@quiet
def _attend_head(head: _Head, kv: KVLayer, g: int) -> F32:
    """Output [T, C] of one head."""
    S = head.score.shape[1]
    vs = np.broadcast_to(kv.v_scale[:S, g], head.seen.shape)
    bad = nonfinite(np.where(head.seen, head.score, ZERO)) | nonfinite(np.where(head.seen, vs, ZERO))
    w = np.max(np.where(head.seen, vs, ZERO), axis=1)  # [T]
    share = np.where(w[:, None] > 0, vs / w[:, None], ZERO)
    weight: I32 = rne(np.where(head.seen & ~bad[:, None], (head.p * share) * P_ONE, ZERO))
    num = isum_dot(weight, kv.v[:S, g]).astype(np.float32)
    return np.where(bad[:, None], NAN, (num / head.den[:, None]) * w[:, None])
