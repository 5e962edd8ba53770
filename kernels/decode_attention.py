"""One token's attention, from its projections to the heads' outputs.      qkv [(H+2G)*C] f32 -> [H*C] f32
Promised order: as qk_norm_rope, append, attend and quantize, one after another.

A program takes every PARTS-th tile of keys of one kv head, for HB of its query heads. Probabilities need the largest
score of all keys, and outputs all parts, so there are three launches: scores, weighted values, and the sum of the
parts. One tile needs only one. Among the scores' programs the new key has one of its own, or a tile's would have to
append it first, and all would wait for that one.

Dots run on tensor cores, on slices; keys, and then the values' columns, are the rows, and a head's two slices are
columns side by side, so that a thread has both. A query is 128h + l with l from -64 to 63, a key 128h + l with l from 0
to 127, all as int8. A value is 128h + l too, with h within 64, but as f16 that carry integers, as do the slices of a
weight, 1024h + l: a sum over 128 keys is below 1024 * 128 * 128 = 2^24, exact in f32. Slices are joined, and parts
added, in i64.

The new key and value are no part of a tile, so tiles are loaded, and taken apart, before the wait."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels import tiles
from exactmoe.kernels.attention import fixed_point
from exactmoe.kernels.dependent import DEPENDENT, finish_wait, release_next
from exactmoe.kernels.errors import require
from exactmoe.kernels.formats import BLOCK
from exactmoe.kernels.kv_cache import KVLayer, require_kv
from exactmoe.kernels.launch import FAITHFUL, interpreting
from exactmoe.kernels.matvec import Norm, issue
from exactmoe.kernels.numerics import (
    INF_BITS,
    P_ONE,
    exponent,
    magnitude,
    nan_where,
    pow2,
    quantize_15,
    quantize_pow2,
    reciprocal,
    round_even,
)
from exactmoe.kernels.packed import operand_words, store_of_rows, store_operand
from exactmoe.kernels.prefetch import prefetch, prefetch_rows, spans
from exactmoe.kernels.rope import RopeTable, load_heads, load_pair, load_turn, normed_rotated
from exactmoe.kernels.tensors import require_f32, slices


class Attended(NamedTuple):
    """What the output projection takes."""

    heads: Tensor  # [H*C] f32
    operand: Tensor | None  # i32, theirs, as kernels.packed describes it, where `whole_blocks`


_MAX_KEYS = 262144  # as kernels.attention
_MAX_WIDTH = 1024  # 128 times a head's sum of int8 products stays below 2^31
_REGISTERS = 128  # so that a program finds room beside one of the kernel before, and loads its keys early
_LATER = tl.constexpr(5)  # tensors that are fetched ahead: four planes of weights and the router
_AHEAD = 36  # partial sums that a thread has in flight, of two registers each
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
    per = heads // G
    tile = tiles.decode_attention(P, G, per, C2, most)
    one = most <= tile.keys
    whole = whole_blocks(per, C)
    HB = max(tile.heads, BLOCK // C) if whole else tile.heads
    groups = G * triton.cdiv(per, HB)
    rows = max(HB, tile.warps)
    sizes = {
        "H": heads, "G": G, "C": C, "C2": C2, "HB": HB,
        "BK": tile.keys, "PARTS": tile.parts, "S": slices(profile) if whole else 0,
    }  # fmt: skip
    out = Attended(
        torch.empty(heads * C, dtype=torch.float32, device=qkv.device),
        torch.empty(operand_words(heads * C, slices(profile)), dtype=torch.int32, device=qkv.device)
        if sizes["S"] else None,
    )  # fmt: skip
    scores = tops = sums = None
    if not one:
        scores = torch.empty(heads, P, dtype=torch.float32, device=qkv.device)
        tops = torch.empty(heads + G, 1 + tile.parts, dtype=torch.float32, device=qkv.device)
        sums = torch.empty(heads * (C + 1) * tile.parts, dtype=torch.int64, device=qkv.device)
    words = HB * C2 // 2 + C2 // 2 + 3 * rows + 2
    words += words % 2  # what is i64 in it lies at a multiple of 8 bytes
    programs = (groups, tile.parts if one else 1 + tile.parts)
    scratch = torch.empty(programs[0] * programs[1], words, dtype=torch.int32, device=qkv.device)
    ahead, sizes_ahead = spans(later, _LATER.value)
    _decode_scores_kernel[programs](
        qkv, q_norm.weight, k_norm.weight, q_norm.eps, *rope, position, *kv,
        scratch, scores, tops, *out, *ahead, P,
        **sizes, RT=rows, WORDS=words, ONE=one, LATER=sizes_ahead, WARPS=tile.warps,
        num_warps=tile.warps, num_stages=1, maxnreg=_REGISTERS, **DEPENDENT, **FAITHFUL,
    )  # fmt: skip
    if not one:
        S = sizes.pop("S")  # only the last of them has whole outputs to quantise
        _decode_values_kernel[(groups, tile.parts)](
            position, kv.v, kv.v_scale, scores, tops, sums, *ahead, P,
            **sizes, LATER=sizes_ahead, WARPS=tile.warps,
            num_warps=tile.warps, num_stages=1, maxnreg=_REGISTERS, **DEPENDENT, **FAITHFUL,
        )  # fmt: skip
        _decode_combine_kernel[(triton.cdiv(heads * C2, BLOCK),)](
            position, tops, sums, *out, H=heads, G=G, C=C, C2=C2, BK=tile.keys, PARTS=tile.parts, S=S,
            AHEAD=min(tile.parts, _AHEAD),
            num_warps=8, num_stages=1, maxnreg=_REGISTERS, **DEPENDENT, **FAITHFUL,
        )  # fmt: skip
    return out


def _padded(width: int) -> int:
    """Columns of a tile of heads; a dot of int8 takes at least 32."""
    return max(32, int(triton.next_power_of_2(width)))


def keys_of_one_launch(kv: KVLayer) -> int:
    """Positions that a single launch can attend to."""
    P, G, C = kv.k.shape
    return tiles.decode_attention(P, G, 1, _padded(C), P).keys


@triton.jit(do_not_specialize=["P"])
def _decode_scores_kernel(
    qkv_ptr, q_norm_ptr, k_norm_ptr, eps, cos_ptr, sin_ptr, position_ptr, k_ptr, ks_ptr, v_ptr, vs_ptr,
    scratch_ptr, scores_ptr, tops_ptr, out_ptr, operand_ptr,
    later_ptr, later2_ptr, later3_ptr, later4_ptr, later5_ptr, P,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, C2: tl.constexpr, HB: tl.constexpr, RT: tl.constexpr,
    BK: tl.constexpr, PARTS: tl.constexpr, S: tl.constexpr, WORDS: tl.constexpr, ONE: tl.constexpr,
    LATER: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = H // G
    SPLIT: tl.constexpr = (PER + HB - 1) // HB
    group, part = tl.program_id(0), tl.program_id(1)
    g = group // SPLIT
    first = group % SPLIT * HB  # of the queries of this kv head
    later = (later_ptr, later2_ptr, later3_ptr, later4_ptr, later5_ptr)
    # The step before this one wrote them, so there is nothing to wait for; the new key and value come later.
    position = tl.load(position_ptr)
    count = 1  # tiles of keys
    start = part * BK
    if not ONE:
        count = _tiles_of(position, BK)
        appends = part == 0  # and has no tile
        part -= 1
        start = tl.where(appends, P, part * BK)
    if part < count:
        s = start + tl.arange(0, BK)
        # All loads before what is made of one, which would be waited for before the next is on its way.
        # A warp has whole rows, each of a query beside the new key and value, and waits for no other.
        r = tl.arange(0, RT)
        query = (r < HB) & (first + r < PER)
        one = tl.zeros([1], tl.int32)
        turn = load_turn(q_norm_ptr + one, cos_ptr, sin_ptr, r < RT, position + tl.zeros([RT], tl.int32), C, C2)
        weight, pair = load_pair(k_norm_ptr + one, C, C2)
        turn_k = (weight, pair, turn[2], turn[3])
        k, ks, vs = _load_keys(k_ptr, ks_ptr, vs_ptr, s, s < position, g, G, C, C2)
        issue(scratch_ptr)
        if ONE:  # last, for Triton moves it to the layout of its dot at once
            v = _load_tile(v_ptr, s, s < position, g, G, C, C2)
            _fetch_later(later, LATER, part * tl.num_programs(0) + group, G * SPLIT * PARTS, 32 * WARPS)
            tl.debug_barrier()  # or the assembler would begin to take tiles apart before it has asked for all
        k_high, k_low = _slices(k)
        if not ONE:  # only now: what is asked for is in the way of keys that are waited for
            prefetch_rows(v_ptr, s, position, g, G, C)  # for the next launch, which cannot start before this one ends
        wide = _widest(_load_scales(vs_ptr, s, s < position, g, G))  # anew: no barrier holds back what needs no memory
        if ONE:
            v_high, v_low = _carried_slices(tl.trans(v))
        finish_wait()
        release_next()
        c = tl.arange(0, C2)[None, :]
        # What is known of the new token goes through memory: then it comes back in the layout that its use wants.
        own_ptr = scratch_ptr + (tl.program_id(1) * tl.num_programs(0) + group) * WORDS
        dot_ptr = own_ptr.to(tl.pointer_type(tl.int64), bitcast=True)
        factor_ptr = (own_ptr + 2 * RT).to(tl.pointer_type(tl.float32), bitcast=True)
        scale_ptr = factor_ptr + RT
        q_ptr = (own_ptr + 3 * RT + 2).to(tl.pointer_type(tl.int8), bitcast=True)
        new_ptr = (own_ptr + 3 * RT + 2 + HB * C2 // 2).to(tl.pointer_type(tl.int16), bitcast=True)
        key_ptr = qkv_ptr + (H + g) * C + tl.zeros([RT], tl.int32)
        value = tl.load(key_ptr[:, None] + G * C + c, c < C, 0.0)
        key = load_heads(key_ptr, r < RT, C, C2)
        issue(own_ptr)
        heads = load_heads(qkv_ptr + (g * PER + first + r) * C, query, C, C2)
        q, scale = quantize_15(normed_rotated(heads, turn, eps, C, C2))
        high = (q + 64) >> 7
        slice_at = (2 * r)[:, None] * C2 + c
        tl.store(q_ptr + slice_at, high.to(tl.int8), (r < HB)[:, None])
        tl.store(q_ptr + C2 + slice_at, (q - 128 * high).to(tl.int8), (r < HB)[:, None])
        store_of_rows(factor_ptr + r, scale * reciprocal(tl.sqrt_rn(tl.full([RT], C, tl.float32))), r < HB)
        places = (k_ptr, ks_ptr, v_ptr, vs_ptr, dot_ptr, scale_ptr, new_ptr)
        if ONE:
            _append(q, key, turn_k, eps, value, places, position.to(tl.int64) * G + g, first, HB, C)
        else:  # noqa: PLR5501 - Triton decides the outer test when it compiles
            if appends:
                _append(q, key, turn_k, eps, value, places, position.to(tl.int64) * G + g, first, HB, C)
        tl.debug_barrier()
        j = tl.arange(0, HB)
        own = first + j < PER
        slices = tl.load(q_ptr + tl.arange(0, 2 * HB)[:, None] * C2 + c)
        factor = tl.load(factor_ptr + j)
        if ONE:
            new_score, new_vs = _score_one(places, factor, j)
            top, w = _marked(new_score, new_vs, own)
            seen = (s < position)[:, None] & own[None, :]
            score, tile_top = _scores(slices, factor, k_high, k_low, ks, vs, seen)
            top, w = tl.maximum(top, tile_top), tl.maximum(w, wide)
            bad = top == float("inf")
            m = tl.where(bad, 0.0, top)
            den, num = _weighted(score, seen & (bad == 0)[None, :], m[None, :], vs, w, v_high, v_low)
            new_v = tl.load(new_ptr + tl.arange(0, C2))
            new_den, new_num = _weighted_one(new_score, own & (bad == 0), m, new_vs, w, new_v)
            y = _quotient(num + new_num, (den + new_den).to(tl.int64)[None, :], bad[None, :], w[None, :])
            _store(y, out_ptr, operand_ptr, g, first, H, PER, C, S, WARPS)
        else:
            head = g * PER + first + j
            top = tl.full([HB], float("-inf"), tl.float32)
            w = tl.zeros([HB], tl.float32)
            if appends:
                new_score, new_vs = _score_one(places, factor, j)
                top, w = _marked(new_score, new_vs, own)
                tl.store(scores_ptr + head.to(tl.int64) * P + position, new_score, own)
            score_ptr = scores_ptr + head[None, :].to(tl.int64) * P
            tile_top = _score_tile(score_ptr, slices, factor, (k_high, k_low, ks, vs), s, position, own)
            top, w = tl.maximum(top, tile_top), tl.maximum(w, wide)
            for tile in range(part + PARTS, tl.where(appends, 0, count), PARTS):
                s = tile * BK + tl.arange(0, BK)
                k, ks, vs = _load_keys(k_ptr, ks_ptr, vs_ptr, s, s < position, g, G, C, C2)
                k_high, k_low = _slices(k)
                tile_top = _score_tile(score_ptr, slices, factor, (k_high, k_low, ks, vs), s, position, own)
                top, w = tl.maximum(top, tile_top), tl.maximum(w, _widest(vs))
            top_ptr = tops_ptr + 1 + part  # the new key's comes first
            tl.store(top_ptr + head * (1 + PARTS), top, own)
            tl.store(top_ptr + (H + g) * (1 + PARTS) + 0 * j, w, j == 0)
    else:
        if ONE:
            _fetch_later(later, LATER, part * tl.num_programs(0) + group, G * SPLIT * PARTS, 32 * WARPS)
        finish_wait()
        release_next()


@triton.jit
def _tiles_of(position, BK: tl.constexpr):
    """Tiles that the keys before `position` take."""
    return (position + BK - 1) // BK


@triton.jit
def _fetch_later(later, LATER: tl.constexpr, part, PARTS: tl.constexpr, THREADS: tl.constexpr):
    """Ask for share `part`, of PARTS, of what a later kernel reads: LATER bytes of each."""
    for i in tl.static_range(_LATER):
        prefetch(later[i], LATER[i], part, PARTS, THREADS)


@triton.jit
def _append(q, key, turn, eps, value, places, slot, first, HB: tl.constexpr, C: tl.constexpr):
    """Append the new key and value, the same in every row [RT, C2], and leave for this program what it needs of them:
    the key's product with each query `q`, its scale and the value's, and the value."""
    k_ptr, ks_ptr, v_ptr, vs_ptr, dot_ptr, scale_ptr, new_ptr = places
    C2: tl.constexpr = q.shape[1]
    r = tl.arange(0, q.shape[0])
    c = tl.arange(0, C2)[None, :]
    mine = (r == 0) & (first == 0)  # of several programs one appends
    at = slot * C + c + 0 * r[:, None]
    row = mine[:, None] & (c < C)
    k, scale = quantize_15(normed_rotated(key, turn, eps, C, C2))
    store_of_rows(dot_ptr + r, tl.sum((q * k).to(tl.int64), axis=1), r < HB)  # below 2^28, and the sum below 2^38
    store_of_rows(scale_ptr + 0 * r, scale, r == 0)
    tl.store(k_ptr + at, k.to(tl.int16), row)
    store_of_rows(ks_ptr + slot + 0 * r, scale, mine)
    v, scale = quantize_pow2(value)
    tl.store(new_ptr + c + 0 * r[:, None], v.to(tl.int16), (r == 0)[:, None])
    store_of_rows(scale_ptr + 1 + 0 * r, scale, r == 0)
    tl.store(v_ptr + at, v.to(tl.int16), row)
    store_of_rows(vs_ptr + slot + 0 * r, scale, mine)


@triton.jit
def _score_one(places, factor, j):
    """Scores [HB] of the new key, and the new value's scale, [HB] times, from what `_append` left."""
    dot_ptr, scale_ptr = places[4], places[5]
    dot = tl.load(dot_ptr + j)
    return (dot.to(tl.float32) * factor) * tl.load(scale_ptr + 0 * j), tl.load(scale_ptr + 1 + 0 * j)


@triton.jit
def _marked(score, vs, seen):
    """`score` where `seen`, but inf where it, or the value's scale, is not finite, and -inf elsewhere; and that scale,
    0 where it is not finite, or it would hide what `_weights` divides by. All have one shape."""
    strange = (magnitude(score) >= INF_BITS) | (magnitude(vs) >= INF_BITS)
    return tl.where(seen, tl.where(strange, float("inf"), score), float("-inf")), _finite(vs)


@triton.jit
def _finite(x):
    """`x` where it is finite, else 0."""
    return tl.where(magnitude(x) < INF_BITS, x, 0.0)


@triton.jit
def _scores(q, factor, k_high, k_low, ks, vs, seen):
    """Scores [BK, HB] of a tile of keys, and each head's largest by `_marked`; `vs` [BK] is 0 where there is no key."""
    score = (_dots(q, k_high, k_low).to(tl.float32) * factor[None, :]) * ks[:, None]
    marked, _ = _marked(score, vs[:, None], seen)
    return score, tl.max(marked, axis=0)


@triton.jit
def _score_tile(score_ptr, q, factor, keys, s, position, own):
    """Store the scores of keys `s` [BK], rows of `score_ptr` [1, HB], and return each head's largest.

    `keys` are their slices, their scales, and those of the values."""
    seen = (s < position)[:, None] & own[None, :]
    score, top = _scores(q, factor, keys[0], keys[1], keys[2], keys[3], seen)
    tl.store(score_ptr + s[:, None], score, seen)
    return top


@triton.jit
def _load_keys(k_ptr, ks_ptr, vs_ptr, s, live, g, G: tl.constexpr, C: tl.constexpr, C2: tl.constexpr):
    """Keys `s`, their scales and those of their values, where `live`; else 0."""
    k = _load_tile(k_ptr, s, live, g, G, C, C2)
    return k, _load_scales(ks_ptr, s, live, g, G), _load_scales(vs_ptr, s, live, g, G)


@triton.jit
def _load_values(v_ptr, vs_ptr, s, live, g, G: tl.constexpr, C: tl.constexpr, C2: tl.constexpr):
    """`_carried_slices` of values `s` as columns, [C2, BK], and their scales, where `live`; else 0."""
    high, low = _carried_slices(tl.trans(_load_tile(v_ptr, s, live, g, G, C, C2)))
    return high, low, _load_scales(vs_ptr, s, live, g, G)


@triton.jit
def _load_scales(ptr, s, live, g, G: tl.constexpr):
    """Scales [BK] of rows `s` of kv head `g`, where `live`; else 0."""
    return tl.load(ptr + s.to(tl.int64) * G + g, live, 0.0)


@triton.jit
def _load_tile(ptr, s, live, g, G: tl.constexpr, C: tl.constexpr, C2: tl.constexpr):
    """Rows `s` of kv head `g`, i16 [BK, C2], where `live`; else 0."""
    c = tl.arange(0, C2)[None, :]
    slot = (s.to(tl.int64) * G + g)[:, None]
    return tl.load(ptr + slot * C + c, live[:, None] & (c < C), 0)


@triton.jit
def _widest(vs):
    """The largest of the finite scales `vs` [BK]; what is not finite must not hide what `_weights` divides by."""
    return tl.max(_finite(vs))


@triton.jit
def _slices(x):
    """h and l, int8, of i16 x = 128h + l with |h| at most 127.

    Impure, or Triton would move `x` to the layout of its dot where it is loaded; so the slices lie in shared memory
    until the dot, and take no registers."""
    if _INTERPRETED:
        return (x >> 7).to(tl.int8), (x & 127).to(tl.int8)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b;
            shr.u32 a, $2, 7; shr.u32 b, $3, 7;
            prmt.b32 $0, a, b, 0x6420;
            prmt.b32 $1, $2, $3, 0x6420; and.b32 $1, $1, 0x7f7f7f7f;
            }""",
            "=&r,=&r,r,r", [x], dtype=(tl.int8, tl.int8), is_pure=False, pack=4,
        )  # fmt: skip


@triton.jit
def _carried_slices(x):
    """The same of |x| at most 2^14 as f16."""
    if _INTERPRETED:
        return (x >> 7).to(tl.float16), (x & 127).to(tl.float16)
    else:  # 0x6400 plus an integer below 2^10 is the f16 that is 1024 more than it; the highest bit of h is turned
        h, low = tl.inline_asm_elementwise(
            """{
            .reg .b32 a;
            shr.u32 a, $2, 7;
            lop3.b32 $0, a, 0x01ff01ff, 0x65006500, 0x6a;
            lop3.b32 $1, $2, 0x007f007f, 0x64006400, 0xea;
            }""",
            "=&r,=r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
        return h - 1280.0, low - 1024.0


@triton.jit
def _beside(a, b):
    """Columns of `a` [M, N] and `b` by turns."""
    return tl.reshape(tl.join(a, b), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def _apart(x):
    """What `_beside` put together. On a tensor core's result it moves nothing: a thread has two columns."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def _dots(q, k_high, k_low):
    """Exact products [BK, HB] i64 of keys, by `_slices` [BK, C2], with the slices of queries by turns [2*HB, C2]."""
    hh, lh = _apart(tl.dot(k_high, tl.trans(q), out_dtype=tl.int32))
    hl, ll = _apart(tl.dot(k_low, tl.trans(q), out_dtype=tl.int32))
    return 128 * (128 * hh + lh).to(tl.int64) + (128 * hl + ll)


@triton.jit
def _weights(score, seen, m, vs, w):
    """Probabilities and weights of keys as integers, i32; all have one shape. `vs` is the values' scale, `w` the
    inverse of the largest of the context: they are powers of two, so the product with it is the quotient."""
    p = fixed_point(score, seen, m)
    vs = _finite(vs)  # a head that sees one not finite is `bad`
    return round_even(p * P_ONE), round_even((p * (vs * w)) * P_ONE)


@triton.jit
def _inverse(w):
    """1 / w of a power of two; 1 of 0."""
    return pow2(0 - tl.where(w > 0.0, exponent(magnitude(w)), 0))


@triton.jit
def _weighted(score, seen, m, vs, w, v_high, v_low):
    """Sums over a tile of keys: of the probabilities, i32 [HB], and of the weighted values, i64 [C2, HB].

    `vs` are the values' scales [BK], `w` [HB] is the largest of the context; the values [C2, BK] come as
    `_carried_slices`."""
    vs = tl.broadcast_to(vs[:, None], score.shape)
    p, weight = _weights(score, seen, m, vs, tl.broadcast_to(_inverse(w)[None, :], score.shape))
    high, low = (weight >> 10).to(tl.float16), (weight & 1023).to(tl.float16)
    if 2 * high.shape[1] == 8:
        hh, lh = _apart(tl.dot(v_high, _beside(high, low)))
        hl, ll = _apart(tl.dot(v_low, _beside(high, low)))
    else:  # more than eight columns would be one of the products whose sums no one promises to be exact
        hh, lh = tl.dot(v_high, high), tl.dot(v_high, low)
        hl, ll = tl.dot(v_low, high), tl.dot(v_low, low)
    return tl.sum(p, axis=0), 128 * (1024 * _whole(hh) + _whole(lh)) + (1024 * _whole(hl) + _whole(ll))


@triton.jit
def _weighted_one(score, seen, m, vs, w, v):
    """The same of one key: score, scale and the others [HB], its value i16 [C2]."""
    p, weight = _weights(score, seen, m, vs, _inverse(w))
    return p, v.to(tl.int64)[:, None] * weight.to(tl.int64)[None, :]


@triton.jit
def _whole(x):
    """f32 that hold integers, as i64."""
    return x.to(tl.int32).to(tl.int64)


@triton.jit
def _quotient(num, den, bad, w):
    """Outputs from the sums over all keys, NaN for heads that are `bad`; what a head has once is broadcast."""
    below = tl.where(bad | (den == 0), 1.0, den.to(tl.float32))
    return nan_where(bad, tl.div_rn(num.to(tl.float32), tl.broadcast_to(below, num.shape)) * w)


@triton.jit
def _store(
    y, out_ptr, operand_ptr, g, first,
    H: tl.constexpr, PER: tl.constexpr, C: tl.constexpr, S: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Store the outputs [C2, HB] of kv head `g`, from its query `first` on, unless S is 0 as an operand too."""
    HB: tl.constexpr = y.shape[1]
    c, j = tl.arange(0, y.shape[0])[:, None], tl.arange(0, HB)[None, :]
    at_ptr = out_ptr + (g * PER + first) * C
    tl.store(at_ptr + j * C + c, y, (first + j < PER) & (c < C))
    if S > 0:
        # Through memory: then a warp has whole blocks, and quantises them without the others.
        tl.debug_barrier()
        M: tl.constexpr = max(WARPS, HB * C // 256)
        m = tl.arange(0, M)
        live = (m < HB * C // 256) & (first * C + m * 256 < PER * C)
        x = tl.load(at_ptr + m[:, None] * 256 + tl.arange(0, 256)[None, :], live[:, None], 0.0)
        block = tl.where(live, (g * PER + first) * C // 256 + m, H * C // 256)
        store_operand(x, tl.zeros([M], tl.int32), block, operand_ptr, H * C // 256, S, True)


@triton.jit
def _largest(
    tops_ptr, head, own, position, H: tl.constexpr, PER: tl.constexpr, PARTS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Of each head [M], where `own`, the largest score by `_marked` and the largest scale of its values, from what the
    scores' programs found. A head is a row of 32 of them at a time: it lies in one warp, which waits for no other."""
    found = 1 + tl.minimum(_tiles_of(position, BK), PARTS)
    tops = tl.full([head.shape[0], 32], float("-inf"), tl.float32)
    wide = tl.zeros([head.shape[0], 32], tl.float32)
    for start in tl.static_range(0, 1 + PARTS, 32):
        i = start + tl.arange(0, 32)[None, :]
        live = (i < found) & own[:, None]
        tops = tl.maximum(tops, tl.load(tops_ptr + head[:, None] * (1 + PARTS) + i, live, float("-inf")))
        wide = tl.maximum(wide, tl.load(tops_ptr + (H + head // PER)[:, None] * (1 + PARTS) + i, live, 0.0))
    return tl.max(tops, axis=1), tl.max(wide, axis=1)


@triton.jit
def _num_at(sums_ptr, part, head, c, H: tl.constexpr, C: tl.constexpr):
    """Where a part's sum of weighted values lies: its outputs side by side."""
    return sums_ptr + (part * H + head) * C + c


@triton.jit
def _den_at(sums_ptr, part, head, H: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr):
    """Where a part's sum of probabilities lies: those of a head side by side."""
    return sums_ptr + PARTS * H * C + head * PARTS + part


@triton.jit(do_not_specialize=["P"])
def _decode_values_kernel(
    position_ptr, v_ptr, vs_ptr, scores_ptr, tops_ptr, sums_ptr,
    later_ptr, later2_ptr, later3_ptr, later4_ptr, later5_ptr, P,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, C2: tl.constexpr, HB: tl.constexpr,
    BK: tl.constexpr, PARTS: tl.constexpr, LATER: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = H // G
    SPLIT: tl.constexpr = (PER + HB - 1) // HB
    group, part = tl.program_id(0), tl.program_id(1)
    g = group // SPLIT
    first = group % SPLIT * HB
    c, j = tl.arange(0, C2), tl.arange(0, HB)
    head = g * PER + first + j
    own = first + j < PER
    position = tl.load(position_ptr)
    count = position // BK + 1
    active = tl.minimum(count, PARTS)
    s = part * BK + tl.arange(0, BK)
    v_high, v_low, vs = _load_values(v_ptr, vs_ptr, s, s < position, g, G, C, C2)
    later = (later_ptr, later2_ptr, later3_ptr, later4_ptr, later5_ptr)
    _fetch_later(later, LATER, part * tl.num_programs(0) + group, G * SPLIT * PARTS, 32 * WARPS)
    finish_wait()
    release_next()
    if part < active:
        # Scores before the largest are known, so that one does not wait for the other.
        inside = (s < position)[:, None] & own[None, :]
        score = tl.load(scores_ptr + head[None, :].to(tl.int64) * P + s[:, None], inside, 0.0)
        last = (count - 1) % PARTS == part
        slot = position.to(tl.int64) * G + g
        new_v = tl.load(v_ptr + slot * C + c, last & (c < C), 0)
        new_vs = tl.load(vs_ptr + slot + 0 * j, last & own, 0.0)
        new_score = tl.load(scores_ptr + head.to(tl.int64) * P + position, last & own, 0.0)
        issue(sums_ptr)
        top, w = _largest(tops_ptr, head, own, position, H, PER, PARTS, BK)
        bad = top == float("inf")
        m = tl.where(bad, 0.0, top)
        valid = (own & (bad == 0))[None, :]
        seen = (s < position)[:, None] & valid
        part_den, num = _weighted(score, seen, m[None, :], vs, w, v_high, v_low)
        den = part_den.to(tl.int64)
        for tile in range(part + PARTS, count, PARTS):
            s = tile * BK + tl.arange(0, BK)
            v_high, v_low, vs = _load_values(v_ptr, vs_ptr, s, s < position, g, G, C, C2)
            seen = (s < position)[:, None] & valid
            score = tl.load(scores_ptr + head[None, :].to(tl.int64) * P + s[:, None], seen, 0.0)
            part_den, part_num = _weighted(score, seen, m[None, :], vs, w, v_high, v_low)
            den += part_den.to(tl.int64)
            num += part_num
        if last:
            new_den, new_num = _weighted_one(new_score, own & (bad == 0), m, new_vs, w, new_v)
            den += new_den.to(tl.int64)
            num += new_num
        tl.store(_num_at(sums_ptr, part, head[None, :], c[:, None], H, C), num, own[None, :] & (c < C)[:, None])
        tl.store(_den_at(sums_ptr, part, head, H, C, PARTS), den, own)


@triton.jit
def _decode_combine_kernel(
    position_ptr, tops_ptr, sums_ptr, out_ptr, operand_ptr,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, C2: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    S: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    # Few programs, done soon: the next kernel may fetch what it multiplies with, the only thing it has before its wait.
    release_next()
    # A row is 32 outputs of a head. It lies in one warp, and an output in one thread, which adds its parts up alone.
    row = tl.program_id(0) * 8 + tl.arange(0, 8)
    head = row // (C2 // 32)
    own = head < H
    position = tl.load(position_ptr)
    active = tl.minimum(position // BK + 1, PARTS)
    # The scores' launch wrote them, and has ended: the values' has waited for it.
    top, w = _largest(tops_ptr, head, own, position, H, H // G, PARTS, BK)
    bad = top == float("inf")
    c = (row % (C2 // 32) * 32)[:, None] + tl.arange(0, 32)[None, :]
    live = own[:, None] & (c < C)
    finish_wait()
    den = tl.zeros([8, 32], tl.int64)  # of 32 parts at a time
    for start in tl.static_range(0, PARTS, 32):
        i = start + tl.arange(0, 32)[None, :]
        den += tl.load(_den_at(sums_ptr, i, head[:, None], H, C, PARTS), (i < active) & own[:, None], 0)
    num = tl.zeros([8, 32], tl.int64)
    for start in range(0, active, AHEAD):
        parts = ()  # type: tuple[tl.tensor, ...]
        for part in tl.static_range(AHEAD):
            at = _num_at(sums_ptr, start + part, head[:, None], c, H, C)
            parts = parts + (tl.load(at, live & (start + part < active), 0),)  # noqa: RUF005 - Triton has no *
        issue(sums_ptr)
        for part in tl.static_range(AHEAD):
            num += parts[part]
    y = _quotient(num, tl.sum(den, axis=1)[:, None], bad[:, None], w[:, None])
    tl.store(out_ptr + head[:, None] * C + c, y, live)
    if S > 0:
        block = tl.program_id(0) + tl.zeros([1], tl.int32)
        store_operand(tl.reshape(y, [1, 256]), tl.zeros([1], tl.int32), block, operand_ptr, H * C // 256, S, True)
