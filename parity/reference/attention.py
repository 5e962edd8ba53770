"""Causal grouped-query attention over an integer cache.      q [T, H, C] f32 -> [T, H*C] f32

    score = (f32(isum q*k) * c) * k_scale        c = q_scale * (1 / sqrt(f32(C)))
    p     = exp(score - max),  P = rne(p * 2^20),  den = f32(isum P)
    out   = (f32(isum N*v) / den) * w            w = the largest v_scale,  N = rne((p * (v_scale / w)) * 2^20)

Sums and maxima are over the keys a query sees: its own position and those before it. Where a score or a v_scale among
these is not finite, the head's output is NaN."""

from typing import NamedTuple

import numpy as np

from exactmoe.parity.reference.kv_cache import KVLayer
from exactmoe.parity.reference.numerics import (
    F32,
    FIXED_ONE,
    I16,
    I32,
    I64,
    INF,
    NAN,
    ONE,
    ZERO,
    Bool,
    exp,
    isum_dot,
    nonfinite,
    quiet,
    require,
    rne,
)
from exactmoe.parity.reference.quantize import quantize_15

MAX_KEYS = 262144  # with more, a sum N*v could pass 2^53


class _Probabilities(NamedTuple):
    """Unnormalised probabilities of one head; queries that met a score not finite have only NaN."""

    p: F32  # [T, S], 0 where not seen
    fixed: I32  # [T, S], 0 where p is NaN
    den: F32  # [T]


def attend(q: F32, kv: KVLayer, start: int) -> F32:
    """Attention [T, H*C] of queries q [T, H, C] at positions start, start+1, ...; their keys are in the cache."""
    T, H, C = q.shape
    seen = _seen(q, kv, start)
    out = np.empty((T, H, C), np.float32)
    for h in range(H):
        g = _kv_head(h, q, kv)
        probabilities = _probabilities(_scores(q, kv, h, seen), seen)
        out[:, h] = _weighted_values(probabilities, kv.v[: seen.shape[1], g], kv.v_scale[: seen.shape[1], g], seen)
    return out.reshape(T, H * C)


def attention_scores(q: F32, kv: KVLayer, start: int) -> F32:
    """Scores [T, H, S] against keys 0..S-1, S = start + T; -infinity at keys the query does not see."""
    seen = _seen(q, kv, start)
    scores = np.empty((len(q), q.shape[1], seen.shape[1]), np.float32)
    for h in range(q.shape[1]):
        scores[:, h] = np.where(seen, _scores(q, kv, h, seen), -INF)
    return scores


@quiet
def attention_softmax(q: F32, kv: KVLayer, start: int) -> F32:
    """f32(P) / den [T, H, S]; 0 at keys the query does not see, NaN at those it sees if a score is not finite."""
    seen = _seen(q, kv, start)
    softmax = np.empty((len(q), q.shape[1], seen.shape[1]), np.float32)
    for h in range(q.shape[1]):
        p, fixed, den = _probabilities(_scores(q, kv, h, seen), seen)
        softmax[:, h] = np.where(seen, np.where(np.isnan(p), NAN, fixed.astype(np.float32) / den[:, None]), ZERO)
    return softmax


def _seen(q: F32, kv: KVLayer, start: int) -> Bool:
    """Whether the query at position start + t sees key s: s <= start + t.  [T, S]"""
    (T, H, _), (P, G, _) = q.shape, kv.k.shape
    S = start + T
    require(H % G == 0, f"{H} query heads do not share {G} kv heads evenly")
    require(0 <= start and S <= P, f"positions {start} to {S - 1} are not among the cache's {P}")
    require(S <= MAX_KEYS, f"attention is defined for up to {MAX_KEYS} keys, got {S}")
    return np.arange(S) <= np.arange(start, S)[:, None]


def _kv_head(h: int, q: F32, kv: KVLayer) -> int:
    """The kv head that query head `h` reads."""
    H, G = q.shape[1], kv.k.shape[1]
    return int(h // (H // G))


@quiet
def _scores(q: F32, kv: KVLayer, h: int, seen: Bool) -> F32:
    """Scores [T, S] of query head `h`, those at keys not seen among them."""
    S, g = seen.shape[1], _kv_head(h, q, kv)
    v, scale = quantize_15(q[:, h])
    c = scale * (ONE / np.sqrt(np.float32(q.shape[2])))
    dot = isum_dot(v, kv.k[:S, g].T).astype(np.float32)
    scores: F32 = (dot * c[:, None]) * kv.k_scale[:S, g]
    return scores


@quiet
def _probabilities(score: F32, seen: Bool) -> _Probabilities:
    bad = nonfinite(np.where(seen, score, ZERO))[:, None]
    m = np.max(np.where(seen, score, -INF), axis=1, keepdims=True, initial=-INF)
    p = np.where(seen, np.where(bad, NAN, exp(score - m)), ZERO)
    fixed = rne(np.where(np.isnan(p), ZERO, p) * FIXED_ONE)
    total: I64 = np.sum(fixed, axis=1, dtype=np.int64)
    return _Probabilities(p, fixed, total.astype(np.float32))


@quiet
def _weighted_values(probabilities: _Probabilities, v: I16, v_scale: F32, seen: Bool) -> F32:
    """Output [T, C] of one head from its values v [S, C] with scales [S]."""
    p, _, den = probabilities
    scale = np.where(seen, v_scale, ZERO)
    bad = nonfinite(p) | nonfinite(scale)
    w = np.max(scale, axis=1, initial=ZERO)[:, None]
    g = np.where(w > 0, scale / w, ZERO)
    n = rne(np.where(bad[:, None], ZERO, (p * g) * FIXED_ONE))
    sums = isum_dot(n, v).astype(np.float32)
    return np.where(bad[:, None], NAN, (sums / den[:, None]) * w)
