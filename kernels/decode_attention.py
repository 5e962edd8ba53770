"""One token's attention, from its projections to the heads' outputs.      qkv [(H+2G)*C] f32 -> [H*C] f32
Promised order: as qk_norm_rope, append, attend and quantize, one after another.

A program takes every PARTS-th tile of keys of one kv head, for all its query heads. Probabilities need the largest
score of all keys, so there are two launches: scores, then weighted values. One tile needs only one.

Dots run on tensor cores, on slices. A key is its two bytes, 256h + l + 128 with l from -128 to 127, a query 128h + l,
all as int8. A value is its bytes too, with h within 32, but as f16 that carry integers, as do the slices of a weight,
1024h + l: a sum over 128 keys is at most 1024 * 128 * 128 = 2^24, exact in f32. What 128 adds is 128 times the sum of
the queries, or of the weights. Slices are joined, and parts added, in i64."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels import tiles
from exactmoe.kernels.atomics import add_integers, arrive
from exactmoe.kernels.attention import fixed_point
from exactmoe.kernels.dependent import DEPENDENT, finish_wait, release_next
from exactmoe.kernels.errors import require
from exactmoe.kernels.formats import BLOCK
from exactmoe.kernels.kv_cache import KVLayer, require_kv
from exactmoe.kernels.launch import FAITHFUL, interpreting
from exactmoe.kernels.matvec import Norm
from exactmoe.kernels.numerics import (
    INF_BITS,
    P_ONE,
    magnitude,
    nan_where,
    quantize_15,
    quantize_pow2,
    reciprocal,
    round_even,
)
from exactmoe.kernels.packed import operand_words, store_of_rows, store_operand
from exactmoe.kernels.prefetch import prefetch, prefetch_rows, spans
from exactmoe.kernels.rope import RopeTable, load_heads, load_turn, normed_rotated
from exactmoe.kernels.tensors import require_f32, slices


class Attended(NamedTuple):
    """What the output projection takes."""

    heads: Tensor  # [H*C] f32
    operand: Tensor | None  # i32, theirs, as kernels.packed describes it, where `whole_blocks`


_MAX_KEYS = 262144  # as kernels.attention
_MAX_WIDTH = 1024  # a head's sum of int8 products stays below 2^31
_INTERPRETED = tl.constexpr(interpreting())


def whole_blocks(heads_per_group: int, width: int) -> bool:
    """Whether the queries of a kv head are whole blocks of 256, so that its program can quantise their outputs."""
    return width >= 32 and width & (width - 1) == 0 and heads_per_group * width % BLOCK == 0


def decode_attention(
    qkv: Tensor,
    q_norm: Norm,
    k_norm: Norm,
    rope: RopeTable,
    kv: KVLayer,
    position: Tensor,
    profile: str,
    later: Sequence[Tensor] = (),
    most: int | None = None,
) -> Attended:
    """Outputs [H*C] of the token at `position` [1] i32, on the device, whose key and value are appended to `kv`.

    `qkv` holds the projections of H query heads, then G keys, then G values. The caller has checked that the position
    lies in the cache, and below `most` if that is given: where one tile holds so many, one launch does it. `later` is
    fetched ahead. Bit-equal to parity.reference.decode_attention.decode_attention."""
    P, G, C = kv.k.shape
    require_f32(qkv, "qkv", None)
    heads = qkv.shape[0] // C - 2 * G
    require(qkv.shape[0] % C == 0 and heads > 0, f"{qkv.shape[0]} projections are not heads of {C} with {G} kv heads")
    require(G > 0 and heads % G == 0, f"{heads} query heads are not a multiple of {G} kv heads")
    require(C <= _MAX_WIDTH, f"heads of at most {_MAX_WIDTH}, got {C}")
    require_kv(kv, G, C)
    require_f32(q_norm.weight, "q norm weight", C)
    require_f32(k_norm.weight, "k norm weight", C)
    require(P <= _MAX_KEYS, f"attention is exact up to {_MAX_KEYS} keys, the cache has {P}")
    require(rope.cos.shape[0] >= P and rope.cos.shape[1] * 2 == C, "the rope table does not fit the cache")
    require(position.dtype == torch.int32 and position.numel() == 1, "position must be one i32")
    C2 = _padded(C)
    most = P if most is None else min(most, P)
    tile = tiles.decode_attention(P, G, C2, most)
    one = most <= tile.keys
    per = heads // G
    sizes = {
        "H": heads, "G": G, "C": C, "C2": C2, "R": max(8, triton.next_power_of_2(per)),
        "BK": tile.keys, "PARTS": tile.parts, "S": slices(profile) if whole_blocks(per, C) else 0,
    }  # fmt: skip
    out = Attended(
        torch.empty(heads * C, dtype=torch.float32, device=qkv.device),
        torch.empty(operand_words(heads * C, slices(profile)), dtype=torch.int32, device=qkv.device)
        if sizes["S"] else None,
    )  # fmt: skip
    scores = tops = sums = arrived = None
    if not one:
        scores = torch.empty(heads, P, dtype=torch.float32, device=qkv.device)
        tops = torch.empty(heads + G, tile.parts, dtype=torch.float32, device=qkv.device)
        sums = torch.empty(heads * C + heads, dtype=torch.int64, device=qkv.device)
        arrived = torch.empty(G, dtype=torch.int32, device=qkv.device)
    queries = torch.empty(G, tile.parts, 2 * sizes["R"], C2, dtype=torch.int8, device=qkv.device)
    ahead = spans(later)
    _decode_scores_kernel[(G, tile.parts)](
        qkv, q_norm.weight, k_norm.weight, q_norm.eps, *rope, position, *kv,
        queries, scores, tops, sums, arrived, *out, *ahead[:2], P,
        **sizes, ONE=one, LATER=ahead[2], LATER2=ahead[3], WARPS=tile.warps,
        num_warps=tile.warps, num_stages=1, **DEPENDENT, **FAITHFUL,
    )  # fmt: skip
    if not one:
        _decode_values_kernel[(G, tile.parts)](
            position, kv.v, kv.v_scale, scores, tops, sums, arrived, *out, P,
            **sizes, PARTS2=triton.next_power_of_2(tile.parts),
            num_warps=tile.warps, num_stages=1, **DEPENDENT, **FAITHFUL,
        )  # fmt: skip
    return out


def _padded(width: int) -> int:
    """Columns of a tile of heads; a dot of int8 takes at least 32."""
    return max(32, int(triton.next_power_of_2(width)))


def keys_of_one_launch(kv: KVLayer) -> int:
    """Positions that a single launch can attend to."""
    P, G, C = kv.k.shape
    return tiles.decode_attention(P, G, _padded(C), P).keys


@triton.jit(do_not_specialize=["P"])
def _decode_scores_kernel(
    qkv_ptr, q_norm_ptr, k_norm_ptr, eps, cos_ptr, sin_ptr, position_ptr, k_ptr, ks_ptr, v_ptr, vs_ptr,
    queries_ptr, scores_ptr, tops_ptr, sums_ptr, arrived_ptr, out_ptr, operand_ptr, later_ptr, later2_ptr, P,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, C2: tl.constexpr, R: tl.constexpr,
    BK: tl.constexpr, PARTS: tl.constexpr, S: tl.constexpr, ONE: tl.constexpr,
    LATER: tl.constexpr, LATER2: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = H // G
    g, part = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, C2)
    r = tl.arange(0, R)
    one = tl.zeros([1], tl.int32)
    row = (r < PER)[:, None] & (c < C)[None, :]
    # The step before this one wrote them, so there is nothing to wait for; the new key and value come later.
    position = tl.load(position_ptr)
    count = 1  # tiles of keys
    if not ONE:
        count = position // BK + 1
    s = part * BK + tl.arange(0, BK)
    k, ks, vs = _load_keys(k_ptr, ks_ptr, vs_ptr, s, s < position, (0, 0.0, 0.0), g, G, C, C2)
    head = g * PER + r
    at = position + tl.zeros([R], tl.int32)
    turn = load_turn(q_norm_ptr + one, cos_ptr, sin_ptr, r < PER, at, C, C2)
    turn_k = load_turn(k_norm_ptr + one, cos_ptr, sin_ptr, r < R, at, C, C2)
    prefetch(later_ptr, LATER, part * G + g, G * PARTS, 32 * WARPS)
    prefetch(later2_ptr, LATER2, part * G + g, G * PARTS, 32 * WARPS)
    if not ONE:
        prefetch_rows(v_ptr, s, position, g, G, C)  # for the next launch, which cannot start before this one ends
    finish_wait()
    release_next()
    if part < count:
        heads = load_heads(qkv_ptr + head * C, r < PER, C, C2)
        # R times the same, so that each warp has a row of its own and waits for none.
        key_ptr = qkv_ptr + (H + g) * C + tl.zeros([R], tl.int32)
        key = load_heads(key_ptr, r < R, C, C2)
        value = tl.load(key_ptr[:, None] + G * C + c[None, :], (c < C)[None, :], 0.0)
        if ONE or (count - 1) % PARTS == part:
            new_slot = position.to(tl.int64) * G + g + tl.zeros([R], tl.int64)
            new_at = new_slot[:, None] * C + c[None, :]
            first = (r == 0)[:, None] & (c < C)[None, :]
            new, scale = quantize_15(normed_rotated(key, turn_k, eps, C, C2))
            tl.store(k_ptr + new_at, new.to(tl.int16), first)
            store_of_rows(ks_ptr + new_slot, scale, r == 0)
            new, scale = quantize_pow2(value)
            tl.store(v_ptr + new_at, new.to(tl.int16), first)
            store_of_rows(vs_ptr + new_slot, scale, r == 0)
        q, q_scale = quantize_15(normed_rotated(heads, turn, eps, C, C2))
        factor = q_scale * reciprocal(tl.sqrt_rn(tl.full([R], C, tl.float32)))
        q_sum = tl.sum(q, axis=1)
        q_high = (q + 64) >> 7
        rows_ptr = queries_ptr + (g * PARTS + part) * (2 * R * C2)
        slice_at = rows_ptr + r[:, None] * C2 + c[None, :]
        tl.store(slice_at, q_high.to(tl.int8))
        tl.store(slice_at + R * C2, (q - 128 * q_high).to(tl.int8))
        tl.debug_barrier()
        # Through memory, where the new key is too: then each comes back in the layout that its use wants.
        q_slices = tl.load(rows_ptr + tl.arange(0, 2 * R)[:, None] * C2 + c[None, :])
        if ONE:
            k, ks, vs = _load_keys(k_ptr, ks_ptr, vs_ptr, s, s == position, (k, ks, vs), g, G, C, C2)
            v = _load_tile(v_ptr, s, s <= position, 0, g, G, C, C2)
            score, marked, wide = _scores(q_slices, q_sum, factor, k, ks, vs, s, position, PER)
            top, w = tl.max(marked, axis=1), tl.max(wide)
            bad = top == float("inf")
            seen = (r < PER)[:, None] & (s <= position)[None, :] & (bad == 0)[:, None]
            den, num = _weighted(score, seen, tl.where(bad, 0.0, top), vs, w, v)
            _store(_quotient(num, den.to(tl.int64), bad, w), out_ptr, operand_ptr, g, H, PER, C, S)
        else:
            top = tl.full([R], float("-inf"), tl.float32)
            wide = tl.zeros([BK], tl.float32)
            for tile in range(part, count, PARTS):
                s = tile * BK + tl.arange(0, BK)
                k, ks, vs = _load_keys(k_ptr, ks_ptr, vs_ptr, s, s == position, (k, ks, vs), g, G, C, C2)
                score, marked, widths = _scores(q_slices, q_sum, factor, k, ks, vs, s, position, PER)
                top, wide = tl.maximum(top, tl.max(marked, axis=1)), tl.maximum(wide, widths)
                seen = (r < PER)[:, None] & (s <= position)[None, :]
                tl.store(scores_ptr + head[:, None].to(tl.int64) * P + s[None, :], score, seen)
                s += PARTS * BK
                k, ks, vs = _load_keys(k_ptr, ks_ptr, vs_ptr, s, s < position, (0, 0.0, 0.0), g, G, C, C2)
            store_of_rows(tops_ptr + head * PARTS + part, top, r < PER)
            tl.store(tops_ptr + (H + g) * PARTS + part, tl.max(wide))
            if part == 0:
                tl.store(sums_ptr + head[:, None] * C + c[None, :], tl.zeros([R, C2], tl.int64), row)
                tl.store(sums_ptr + H * C + head, tl.zeros([R], tl.int64), r < PER)
                tl.store(arrived_ptr + g, 0)


@triton.jit
def _scores(q_slices, q_sum, factor, k, ks, vs, s, position, PER: tl.constexpr):
    """Scores [R, BK] of keys `s`; the same, but -inf where a key is not seen and inf where a number is not finite; the
    values' scales [BK], 0 where they are not seen or not finite."""
    score = (_dots(q_slices, q_sum, k).to(tl.float32) * factor[:, None]) * ks[None, :]
    seen = (tl.arange(0, score.shape[0]) < PER)[:, None] & (s <= position)[None, :]
    far = magnitude(vs) >= INF_BITS
    strange = (magnitude(score) >= INF_BITS) | far[None, :]
    marked = tl.where(seen, tl.where(strange, float("inf"), score), float("-inf"))
    return score, marked, tl.where((s <= position) & (far == 0), vs, 0.0)


@triton.jit
def _load_keys(k_ptr, ks_ptr, vs_ptr, s, live, other, g, G: tl.constexpr, C: tl.constexpr, C2: tl.constexpr):
    """Keys `s`, their scales and those of their values, where `live`; else `other`."""
    slot = s.to(tl.int64) * G + g
    return (
        _load_tile(k_ptr, s, live, other[0], g, G, C, C2),
        tl.load(ks_ptr + slot, live, other[1]),
        tl.load(vs_ptr + slot, live, other[2]),
    )


@triton.jit
def _load_tile(ptr, s, live, other, g, G: tl.constexpr, C: tl.constexpr, C2: tl.constexpr):
    """Rows `s` of kv head `g`, i16 [BK, C2], where `live`; else `other`."""
    c = tl.arange(0, C2)[None, :]
    slot = (s.to(tl.int64) * G + g)[:, None]
    return tl.load(ptr + slot * C + c, live[:, None] & (c < C), other)


@triton.jit
def _bytes(x):
    """The bytes h and l, int8, of i16 x = 256h + l + 128."""
    if _INTERPRETED:
        return (x >> 8).to(tl.int8), ((x & 255) - 128).to(tl.int8)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, 0x7531; prmt.b32 $1, $2, $3, 0x6420; xor.b32 $1, $1, 0x80808080;",
            "=&r,=r,r,r", [x], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def _carried_bytes(x):
    """The same bytes as f16, |h| at most 128."""
    if _INTERPRETED:
        return (x >> 8).to(tl.float16), ((x & 255) - 128).to(tl.float16)
    else:  # 0x64 over a byte is 1024 more than it
        h, low = tl.inline_asm_elementwise(
            "xor.b32 $0, $2, 0x80008000; prmt.b32 $0, $0, 0x64, 0x4341; prmt.b32 $1, $2, 0x64, 0x4240;",
            "=&r,=r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
        return h - 1152.0, low - 1152.0


@triton.jit
def _stack(a, b):
    """Rows of `a` [M, N], then those of `b`."""
    M: tl.constexpr = a.shape[0]
    N: tl.constexpr = a.shape[1]
    return tl.reshape(tl.permute(tl.join(a, b), (2, 0, 1)), [2 * M, N])


@triton.jit
def _unstack(x):
    """What `_stack` put together. On a tensor core's result it moves nothing: a thread has row i and row i + 8."""
    M: tl.constexpr = x.shape[0] // 2
    N: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, [2, M, N]), (1, 2, 0)))


@triton.jit
def _dots(q_slices, q_sum, k):
    """Exact products [R, BK] i64 of queries, slices h and l [2R, C2] and sums [R], with keys [BK, C2] i16."""
    WORD: tl.constexpr = tl.int32 if k.shape[1] <= 512 else tl.int64  # 128 * 127 * 128 * 512 < 2^31
    k_high, k_low = _bytes(k)
    hh, lh = _unstack(tl.dot(q_slices, tl.trans(k_high), out_dtype=tl.int32))
    hl, ll = _unstack(tl.dot(q_slices, tl.trans(k_low), out_dtype=tl.int32))
    high, low = 128 * hh.to(WORD) + lh, 128 * hl.to(WORD) + ll
    return 256 * high.to(tl.int64) + (low.to(tl.int64) + 128 * q_sum.to(tl.int64)[:, None])


@triton.jit
def _weighted(score, seen, m, vs, w, v):
    """Sums over a tile of keys: of the probabilities, i32 [R], and of the weighted values, i64 [R, C2].

    `vs` are the values' scales [BK], `w` the largest of the context."""
    p = fixed_point(score, seen, m)
    den = tl.sum(round_even(p * P_ONE), axis=1)
    share = tl.div_rn(vs, tl.full(vs.shape, 1.0, tl.float32) * tl.where(w > 0.0, w, 1.0))
    weight = round_even((p * share[None, :]) * P_ONE)
    slices = _stack((weight >> 10).to(tl.float16), (weight & 1023).to(tl.float16))
    v_high, v_low = _carried_bytes(v)
    hh, lh = _unstack(tl.dot(slices, v_high))
    hl, ll = _unstack(tl.dot(slices, v_low))
    high, low = 1024 * _whole(hh) + _whole(lh), 1024 * _whole(hl) + _whole(ll)
    return den, 256 * high + low + 128 * tl.sum(weight, axis=1).to(tl.int64)[:, None]


@triton.jit
def _whole(x):
    """f32 that hold integers, as i64."""
    return x.to(tl.int32).to(tl.int64)


@triton.jit
def _quotient(num, den, bad, w):
    """Outputs [R, C2] from the sums over all keys; NaN in rows that are `bad`."""
    below = tl.where(bad | (den == 0), 1.0, den.to(tl.float32))[:, None]
    y = tl.div_rn(num.to(tl.float32), tl.broadcast_to(below, num.shape)) * w
    return nan_where(bad[:, None], y)


@triton.jit
def _store(y, out_ptr, operand_ptr, g, H: tl.constexpr, PER: tl.constexpr, C: tl.constexpr, S: tl.constexpr):
    """Store the outputs [R, C2] of kv head `g`, and where S is not 0 as an operand of S slices."""
    R: tl.constexpr = y.shape[0]
    r, c = tl.arange(0, R), tl.arange(0, y.shape[1])
    tl.store(out_ptr + (g * PER + r)[:, None] * C + c[None, :], y, (r < PER)[:, None] & (c < C)[None, :])
    if S > 0:
        M: tl.constexpr = R * C // 256
        own: tl.constexpr = PER * C // 256
        NB: tl.constexpr = H * C // 256
        m = tl.arange(0, M)
        blocks = tl.reshape(y, [M, 256])
        store_operand(blocks, tl.zeros([M], tl.int32), tl.where(m < own, g * own + m, NB), operand_ptr, NB, S, True)


@triton.jit(do_not_specialize=["P"])
def _decode_values_kernel(
    position_ptr, v_ptr, vs_ptr, scores_ptr, tops_ptr, sums_ptr, arrived_ptr, out_ptr, operand_ptr, P,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, C2: tl.constexpr, R: tl.constexpr,
    BK: tl.constexpr, PARTS: tl.constexpr, S: tl.constexpr, PARTS2: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = H // G
    g, part = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, C2)
    r = tl.arange(0, R)
    head = g * PER + r
    row = (r < PER)[:, None] & (c < C)[None, :]
    position = tl.load(position_ptr)
    count = position // BK + 1
    s = part * BK + tl.arange(0, BK)
    v = _load_tile(v_ptr, s, s < position, 0, g, G, C, C2)
    finish_wait()
    release_next()
    active = tl.minimum(count, PARTS)
    if part < active:
        i = tl.arange(0, PARTS2)
        tops = tl.load(
            tops_ptr + head[:, None] * PARTS + i[None, :], (r < PER)[:, None] & (i < active)[None, :], float("-inf")
        )
        top = tl.max(tops, axis=1)
        bad = top == float("inf")
        m = tl.where(bad, 0.0, top)
        w = tl.max(tl.load(tops_ptr + (H + g) * PARTS + i, i < active, 0.0))
        den = tl.zeros([R], tl.int64)
        num = tl.zeros([R, C2], tl.int64)
        for tile in range(part, count, PARTS):
            s = tile * BK + tl.arange(0, BK)
            seen = ((r < PER) & (bad == 0))[:, None] & (s <= position)[None, :]
            score = tl.load(scores_ptr + head[:, None].to(tl.int64) * P + s[None, :], seen, 0.0)
            vs = tl.load(vs_ptr + s.to(tl.int64) * G + g, s <= position, 0.0)
            v = _load_tile(v_ptr, s, s == position, v, g, G, C, C2)
            part_den, part_num = _weighted(score, seen, m, vs, w, v)
            den += part_den.to(tl.int64)
            num += part_num
            s += PARTS * BK
            v = _load_tile(v_ptr, s, s < position, 0, g, G, C, C2)
        sum_at = sums_ptr + head[:, None] * C + c[None, :]
        den_at = sums_ptr + H * C + head
        add_integers(sum_at, num, row)
        add_integers(den_at, den, r < PER)
        if arrive(arrived_ptr + g) == active - 1:  # the last part has all sums
            num = tl.load(sum_at, row, 0, cache_modifier=".cg")
            den = tl.load(den_at, r < PER, 1, cache_modifier=".cg")
            _store(_quotient(num, den, bad, w), out_ptr, operand_ptr, g, H, PER, C, S)
