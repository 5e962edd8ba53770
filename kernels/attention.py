"""Causal grouped-query attention over an integer cache.      q [T, H, C] f32 -> [T, H*C] f32
Promised order: scores are exact integer dots, scaled; the row's maximum is exact; probabilities in fixed point make
the denominator and P.V sums of integers. So any cut of the keys gives the same bits: partial sums of `split` parts are
added as integers, and decode equals prefill.

Three launches: row maxima a part, sums a part, join. Integers ride in f64, which holds every sum (below 2^53)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels import tiles
from exactmoe.kernels.errors import require
from exactmoe.kernels.kv_cache import KVLayer, require_kv
from exactmoe.kernels.launch import FAITHFUL
from exactmoe.kernels.numerics import INF_BITS, P_ONE, exp, magnitude, nan_where, quantize_15, reciprocal, round_even
from exactmoe.kernels.tensors import require_f32

_MAX_KEYS = 262144  # the bound under which every integer sum stays below 2^53


def attend(q: Tensor, kv: KVLayer, start: int, tile: tiles.AttentionTile | None = None) -> Tensor:
    """Attention output [T, H*C] of queries at positions start..start+T-1, whose keys are in the cache already.

    Bit-equal to parity.reference.attention.attend."""
    T, H, C, G = _require_attention(q, kv, start)
    out = torch.empty(T, H * C, dtype=torch.float32, device=q.device)
    if T * H:
        tile = tile or tiles.attention(T, H // G, start + T)
        n = tile.split
        top = torch.empty(2, n, T, H, dtype=torch.float32, device=q.device)  # row maxima of scores, of value scales
        num = torch.empty(n, T, H, C, dtype=torch.float64, device=q.device)
        den = torch.empty(n, T, H, dtype=torch.int64, device=q.device)
        grid = (triton.cdiv(T, tile.queries), G, n)
        meta = _meta(H, G, C, tile)
        _maxima_kernel[grid](q, *kv, top, start, T, n, **meta)
        _sums_kernel[grid](q, *kv, top, num, den, start, T, n, N2=triton.next_power_of_2(n), **meta)
        M = tiles.heads(T * H)
        _join_kernel[(triton.cdiv(T * H, M),)](
            top, num, den, out, T * H, n, C=C, C2=triton.next_power_of_2(C), N2=triton.next_power_of_2(n), M=M,
            num_warps=4, **FAITHFUL,
        )  # fmt: skip
    return out


def attention_scores(q: Tensor, kv: KVLayer, start: int) -> Tensor:
    """Scaled scores [T, H, start+T], -inf at keys a query may not see; the numbers `attend` takes its maxima over."""
    return _emit(q, kv, start, softmax=False)


def attention_softmax(q: Tensor, kv: KVLayer, start: int) -> Tensor:
    """Softmax weights [T, H, start+T] as fixed point over its exact sum, 0 at keys a query may not see."""
    return _emit(q, kv, start, softmax=True)


def _emit(q: Tensor, kv: KVLayer, start: int, softmax: bool) -> Tensor:
    T, H, C, G = _require_attention(q, kv, start)
    out = torch.empty(T, H, start + T, dtype=torch.float32, device=q.device)
    if T * H:
        tile = tiles.attention(T, H // G, start + T)
        grid = (triton.cdiv(T, tile.queries), G)
        _emit_kernel[grid](q, *kv, out, start, T, SOFTMAX=softmax, **_meta(H, G, C, tile))
    return out


def _require_attention(q: Tensor, kv: KVLayer, start: int) -> tuple[int, int, int, int]:
    require_f32(q, "q", None, None, None)
    T, H, C = q.shape
    require(kv.k.ndim == 3, f"cache k must be [P, G, C], got {list(kv.k.shape)}")
    G = kv.k.shape[1]
    require_kv(kv, G, C)
    require(G > 0 and H % G == 0, f"{H} query heads are not a multiple of {G} kv heads")
    require(
        0 <= start and start + T <= kv.k.shape[0],
        f"positions {start}..{start + T - 1} lie outside the cache of {kv.k.shape[0]}",
    )
    require(start + T <= _MAX_KEYS, f"attention is exact up to {_MAX_KEYS} keys, got {start + T}")
    return T, H, C, G


def _meta(H: int, G: int, C: int, tile: tiles.AttentionTile) -> dict[str, object]:
    per = H // G
    return dict(
        H=H, G=G, C=C, C2=max(16, triton.next_power_of_2(C)), PER=per, Q=tile.queries, BK=tile.keys,
        M=max(16, triton.next_power_of_2(tile.queries * per)), num_warps=tile.warps, **FAITHFUL,
    )  # fmt: skip


@triton.jit
def _load_queries(
    q_ptr, start, T,
    H: tl.constexpr, C: tl.constexpr, C2: tl.constexpr, PER: tl.constexpr, M: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Query rows [M, C2] of this program as integers in f64; their score factor, position, flat row, mask: [M] each."""
    i = tl.arange(0, M)
    t = tl.program_id(0) * Q + i // PER
    h = tl.program_id(1) * PER + i % PER
    live = (i < Q * PER) & (t < T)
    row = t * H + h
    c = tl.arange(0, C2)
    x = tl.load(q_ptr + row.to(tl.int64)[:, None] * C + c[None, :], live[:, None] & (c < C)[None, :], 0.0)
    v, scale = quantize_15(x)
    root = reciprocal(tl.sqrt_rn(tl.full([M], C, tl.float32)))
    return v.to(tl.float64), scale * root, start + t, row, live


@triton.jit
def _wide(x):
    """i16 tile as f64. The sum over one element hides the 16-bit load, for which Triton picks a layout f64 lacks."""
    return tl.sum(x.to(tl.int32)[:, :, None], axis=2).to(tl.float64)


@triton.jit
def _scores(qi, factor, position, live, k_ptr, ks_ptr, s, end, G: tl.constexpr, C: tl.constexpr, C2: tl.constexpr):
    """Scores [M, K] of keys `s` [K] and which of them each query sees."""
    g = tl.program_id(1)
    c = tl.arange(0, C2)
    slot = s.to(tl.int64) * G + g
    k = tl.load(k_ptr + slot[None, :] * C + c[:, None], (s < end)[None, :] & (c < C)[:, None], 0)
    dot = tl.dot(qi, _wide(k), out_dtype=tl.float64).to(tl.float32)
    score = (dot * factor[:, None]) * tl.load(ks_ptr + slot, s < end, 0.0)[None, :]
    return score, live[:, None] & (s < end)[None, :] & (s[None, :] <= position[:, None])


@triton.jit
def _part(position, T, start, n, BK: tl.constexpr):
    """First and last-but-one key of this program's part of the keys, in whole key tiles."""
    keys = start + T
    length = ((keys + n * BK - 1) // (n * BK)) * BK
    begin = tl.program_id(2) * length
    # No query of this program sees past its last position.
    return begin, tl.minimum(tl.minimum(begin + length, keys), tl.max(position, axis=0) + 1)


@triton.jit(do_not_specialize=["start", "T", "n"])
def _maxima_kernel(
    q_ptr, k_ptr, ks_ptr, v_ptr, vs_ptr, top_ptr, start, T, n,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, C2: tl.constexpr,
    PER: tl.constexpr, M: tl.constexpr, Q: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    qi, factor, position, row, live = _load_queries(q_ptr, start, T, H, C, C2, PER, M, Q)
    begin, end = _part(tl.where(live, position, 0), T, start, n, BK)
    top = tl.full([M], float("-inf"), tl.float32)
    wide = tl.zeros([M], tl.float32)
    bad = tl.zeros([M], tl.int32)
    for at in range(begin, end, BK):
        s = at + tl.arange(0, BK)
        score, seen = _scores(qi, factor, position, live, k_ptr, ks_ptr, s, end, G, C, C2)
        vs = tl.load(vs_ptr + s.to(tl.int64) * G + tl.program_id(1), s < end, 0.0)[None, :]
        strange = (magnitude(score) >= INF_BITS) | (magnitude(vs) >= INF_BITS)
        bad = tl.maximum(bad, tl.max((seen & strange).to(tl.int32), axis=1))
        fine = seen & (strange == 0)
        top = tl.maximum(top, tl.max(tl.where(fine, score, float("-inf")), axis=1))
        wide = tl.maximum(wide, tl.max(tl.where(fine, vs, 0.0), axis=1))
    at = tl.program_id(2) * (T * H) + row
    tl.store(top_ptr + at, nan_where(bad > 0, top), live)
    tl.store(top_ptr + n * (T * H) + at, wide, live)


@triton.jit
def _join_maxima(top_ptr, row, live, rows, n, N2: tl.constexpr):
    """Row maximum of the scores, of the value scales, and whether any was NaN, over all parts: each [M]."""
    part = tl.arange(0, N2)
    mask = live[:, None] & (part < n)[None, :]
    at = part[None, :] * rows + row[:, None]
    top = tl.load(top_ptr + at, mask, float("-inf"))
    wide = tl.load(top_ptr + n * rows + at, mask, 0.0)
    bad = tl.max((top != top).to(tl.int32), axis=1) > 0
    top = tl.where(bad[:, None] | (top != top), 0.0, top)
    return tl.where(live, tl.max(top, axis=1), 0.0), tl.max(wide, axis=1), bad


@triton.jit
def fixed_point(score, seen, m):
    """exp(score - m) of the keys a query sees, 0 elsewhere; `m` has the shape of `score`, or 1 where it is the same."""
    return tl.where(seen, exp(tl.where(seen, score, 0.0) - m), 0.0)


@triton.jit(do_not_specialize=["start", "T", "n"])
def _sums_kernel(
    q_ptr, k_ptr, ks_ptr, v_ptr, vs_ptr, top_ptr, num_ptr, den_ptr, start, T, n, N2: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, C2: tl.constexpr,
    PER: tl.constexpr, M: tl.constexpr, Q: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    qi, factor, position, row, live = _load_queries(q_ptr, start, T, H, C, C2, PER, M, Q)
    begin, end = _part(tl.where(live, position, 0), T, start, n, BK)
    m, w, bad = _join_maxima(top_ptr, row, live, T * H, n, N2)
    # A row with a NaN takes no part in the sums; the join writes its NaN.
    active = live & (bad == 0)
    share = tl.where(w > 0.0, w, 1.0)[:, None]
    num = tl.zeros([M, C2], tl.float64)
    den = tl.zeros([M], tl.int64)
    c = tl.arange(0, C2)
    for at in range(begin, end, BK):
        s = at + tl.arange(0, BK)
        score, seen = _scores(qi, factor, position, active, k_ptr, ks_ptr, s, end, G, C, C2)
        p = fixed_point(score, seen, m[:, None])
        den += tl.sum(round_even(p * P_ONE), axis=1).to(tl.int64)
        slot = s.to(tl.int64) * G + tl.program_id(1)
        vs = tl.where(seen, tl.load(vs_ptr + slot, s < end, 0.0)[None, :], 0.0)
        weight = round_even((p * tl.div_rn(vs, tl.broadcast_to(share, vs.shape))) * P_ONE)
        v = tl.load(v_ptr + slot[:, None] * C + c[None, :], (s < end)[:, None] & (c < C)[None, :], 0)
        num = tl.dot(weight.to(tl.float64), _wide(v), num, out_dtype=tl.float64)
    at = tl.program_id(2).to(tl.int64) * (T * H) + row
    tl.store(num_ptr + at[:, None] * C + c[None, :], num, live[:, None] & (c < C)[None, :])
    tl.store(den_ptr + at, den, live)


@triton.jit(do_not_specialize=["rows", "n"])
def _join_kernel(
    top_ptr, num_ptr, den_ptr, out_ptr, rows, n, C: tl.constexpr, C2: tl.constexpr, N2: tl.constexpr, M: tl.constexpr
):
    row = tl.program_id(0) * M + tl.arange(0, M)
    live = row < rows
    _, w, bad = _join_maxima(top_ptr, row, live, rows, n, N2)
    c = tl.arange(0, C2)
    mask = live[:, None] & (c < C)[None, :]
    num = tl.zeros([M, C2], tl.float64)
    den = tl.zeros([M], tl.int64)
    for part in range(n):
        at = tl.cast(part, tl.int64) * rows + row
        num += tl.load(num_ptr + at[:, None] * C + c[None, :], mask, 0.0)
        den += tl.load(den_ptr + at, live, 0)
    below = tl.where(bad | (row >= rows), 1.0, den.to(tl.float32))[:, None]
    out = tl.div_rn(num.to(tl.float32), tl.broadcast_to(below, num.shape)) * w[:, None]
    tl.store(out_ptr + row.to(tl.int64)[:, None] * C + c[None, :], nan_where(bad[:, None], out), mask)


@triton.jit(do_not_specialize=["start", "T"])
def _emit_kernel(
    q_ptr, k_ptr, ks_ptr, v_ptr, vs_ptr, out_ptr, start, T, SOFTMAX: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, C2: tl.constexpr,
    PER: tl.constexpr, M: tl.constexpr, Q: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    qi, factor, position, row, live = _load_queries(q_ptr, start, T, H, C, C2, PER, M, Q)
    end = start + T
    top = tl.full([M], float("-inf"), tl.float32)
    den = tl.zeros([M], tl.int64)
    bad = tl.zeros([M], tl.int32)
    if SOFTMAX:
        for at in range(0, end, BK):
            s = at + tl.arange(0, BK)
            score, seen = _scores(qi, factor, position, live, k_ptr, ks_ptr, s, end, G, C, C2)
            strange = magnitude(score) >= INF_BITS
            bad = tl.maximum(bad, tl.max((seen & strange).to(tl.int32), axis=1))
            top = tl.maximum(top, tl.max(tl.where(seen & (strange == 0), score, float("-inf")), axis=1))
        top = tl.where(live & (bad == 0), top, 0.0)
        active = live & (bad == 0)
        for at in range(0, end, BK):
            s = at + tl.arange(0, BK)
            score, seen = _scores(qi, factor, position, active, k_ptr, ks_ptr, s, end, G, C, C2)
            den += tl.sum(round_even(fixed_point(score, seen, top[:, None]) * P_ONE), axis=1).to(tl.int64)
    below = tl.where(den > 0, den.to(tl.float32), 1.0)[:, None]
    for at in range(0, end, BK):
        s = at + tl.arange(0, BK)
        score, seen = _scores(qi, factor, position, live, k_ptr, ks_ptr, s, end, G, C, C2)
        if SOFTMAX:
            p = fixed_point(score, seen & (bad == 0)[:, None], top[:, None])
            fixed = round_even(p * P_ONE).to(tl.float32)
            y = nan_where((bad > 0)[:, None] & seen, tl.div_rn(fixed, tl.broadcast_to(below, fixed.shape)))
        else:
            y = tl.where(seen, score, float("-inf"))
        tl.store(out_ptr + row.to(tl.int64)[:, None] * end + s[None, :], y, live[:, None] & (s < end)[None, :])
