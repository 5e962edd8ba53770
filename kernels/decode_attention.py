"""One token's attention, from its projections to the heads' outputs.      qkv [(H+2G)*C] f32 -> [H*C] f32
Promised order: as qk_norm_rope, append and attend, one after another.

A program takes one head. It quantises its query and, as all heads of a group do alike, the new key and value, which it
appends. Dots run on i32: a query in two slices 128h + l (|k|*127*C < 2^31), a weight in two, 2048h + l (2047*8192*128 <
2^31), joined in i64."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels import tiles
from exactmoe.kernels.attention import fixed_point
from exactmoe.kernels.dependent import DEPENDENT, finish_wait, release_next
from exactmoe.kernels.errors import require
from exactmoe.kernels.kv_cache import KVLayer, require_kv
from exactmoe.kernels.launch import FAITHFUL
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
from exactmoe.kernels.rope import RopeTable, normed_rotated
from exactmoe.kernels.tensors import require_f32

_MAX_KEYS = 262144  # as kernels.attention
_MAX_WIDTH = 1024  # a head's |k * query slice| sum stays below 2^31


def decode_attention(qkv: Tensor, q_norm: Norm, k_norm: Norm, rope: RopeTable, kv: KVLayer, position: Tensor) -> Tensor:
    """Output [H*C] of the token at `position` [1] i32, on the device, whose key and value are appended to `kv`.

    `qkv` holds the projections of H query heads, then G keys, then G values. The caller has checked that the position
    lies in the cache. Bit-equal to parity.reference.decode_attention.decode_attention."""
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
    out = torch.empty(heads * C, dtype=torch.float32, device=qkv.device)
    scores = torch.empty(heads, P, dtype=torch.float32, device=qkv.device)
    keys, warps = tiles.decode_attention(P)
    _decode_attention_kernel[(heads,)](
        qkv, q_norm.weight, k_norm.weight, q_norm.eps, *rope, position, *kv, scores, out, P,
        H=heads, G=G, C=C, C2=triton.next_power_of_2(C), BK=keys, num_warps=warps, **DEPENDENT, **FAITHFUL,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["P"])
def _decode_attention_kernel(
    qkv_ptr, q_norm_ptr, k_norm_ptr, eps, cos_ptr, sin_ptr, position_ptr, k_ptr, ks_ptr, v_ptr, vs_ptr,
    scores_ptr, out_ptr, P,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, C2: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    g = h // (H // G)
    c = tl.arange(0, C2)
    one = tl.zeros([1], tl.int32)
    row = c[None, :] < C
    finish_wait()
    release_next()
    position = tl.load(position_ptr)
    turn = one + position
    live = one == 0
    q = normed_rotated(qkv_ptr + h * C + one, live, q_norm_ptr, cos_ptr, sin_ptr, turn, eps, C, C2)
    q, q_scale = quantize_15(q)
    factor = q_scale * reciprocal(tl.sqrt_rn(tl.full([1], C, tl.float32)))
    q_high = (q + 64) >> 7
    q_low = q - 128 * q_high

    new = normed_rotated(qkv_ptr + (H + g) * C + one, live, k_norm_ptr, cos_ptr, sin_ptr, turn, eps, C, C2)
    new_slot = (one + position).to(tl.int64) * G + g
    new_at = new_slot[:, None] * C + c[None, :]
    new_k, new_scale = quantize_15(new)
    tl.store(k_ptr + new_at, new_k.to(tl.int16), row)
    tl.store(ks_ptr + new_slot, new_scale)
    new_v, new_scale = quantize_pow2(tl.load(qkv_ptr + (H + G + g) * C + c[None, :], row, 0.0))
    tl.store(v_ptr + new_at, new_v.to(tl.int16), row)
    tl.store(vs_ptr + new_slot, new_scale)
    tl.debug_barrier()

    score_ptr = scores_ptr + h.to(tl.int64) * P
    top = tl.full([BK], float("-inf"), tl.float32)
    wide = tl.zeros([BK], tl.float32)
    bad = tl.zeros([BK], tl.int32)
    for at in range(0, position + 1, BK):
        s = at + tl.arange(0, BK)
        seen = s <= position
        slot = s.to(tl.int64) * G + g
        k = tl.load(k_ptr + slot[:, None] * C + c[None, :], seen[:, None] & row, 0).to(tl.int32)
        dot = tl.sum(k * q_high, axis=1).to(tl.int64) * 128 + tl.sum(k * q_low, axis=1).to(tl.int64)
        score = (dot.to(tl.float32) * factor) * tl.load(ks_ptr + slot, seen, 0.0)
        vs = tl.load(vs_ptr + slot, seen, 0.0)
        strange = (magnitude(score) >= INF_BITS) | (magnitude(vs) >= INF_BITS)
        bad = tl.maximum(bad, (seen & strange).to(tl.int32))
        fine = seen & (strange == 0)
        top = tl.maximum(top, tl.where(fine, score, float("-inf")))
        wide = tl.maximum(wide, tl.where(fine, vs, 0.0))
        tl.store(score_ptr + s, score, seen)
    nan = tl.max(bad) > 0
    m = tl.where(nan, 0.0, tl.max(top)) + tl.zeros([1], tl.float32)
    w = tl.max(wide)
    share = tl.full([BK], 1.0, tl.float32) * tl.where(w > 0.0, w, 1.0)
    tl.debug_barrier()

    den = tl.zeros([BK], tl.int64)
    num = tl.zeros([C2], tl.int64)
    for at in range(0, position + 1, BK):
        s = at + tl.arange(0, BK)
        seen = (s <= position) & (nan == 0)
        slot = s.to(tl.int64) * G + g
        p = tl.reshape(fixed_point(tl.load(score_ptr + s, seen, 0.0)[None, :], seen[None, :], m), [BK])
        den += round_even(p * P_ONE).to(tl.int64)
        weight = round_even((p * tl.div_rn(tl.load(vs_ptr + slot, seen, 0.0), share)) * P_ONE)
        v = tl.load(v_ptr + slot[:, None] * C + c[None, :], seen[:, None] & row, 0).to(tl.int32)
        high = tl.sum((weight >> 11)[:, None] * v, axis=0).to(tl.int64)
        num += 2048 * high + tl.sum((weight & 2047)[:, None] * v, axis=0).to(tl.int64)
    below = tl.where(nan, 1.0, tl.sum(den).to(tl.float32)) + tl.zeros([C2], tl.float32)
    y = nan_where(nan, tl.div_rn(num.to(tl.float32), below) * w)
    tl.store(out_ptr + h * C + c, y, c < C)
