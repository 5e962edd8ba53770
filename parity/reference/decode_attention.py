"""One token's attention, from its projections to the heads' outputs.      qkv [(H+2G)*C] f32 -> [H*C] f32"""

from typing import NamedTuple

from exactmoe.parity.reference.attention import attend
from exactmoe.parity.reference.kv_cache import KVLayer, append
from exactmoe.parity.reference.matvec import Norm
from exactmoe.parity.reference.numerics import F32, I32
from exactmoe.parity.reference.packed import operand
from exactmoe.parity.reference.quantize import quantize
from exactmoe.parity.reference.rope import RopeTable, qk_norm_rope


class Attended(NamedTuple):
    """What the output projection takes."""

    heads: F32  # [H*C]
    operand: I32 | None  # theirs, as reference.packed describes it


def decode_attention(
    qkv: F32, q_norm: Norm, k_norm: Norm, rope: RopeTable, kv: KVLayer, position: I32, profile: str
) -> Attended:
    """Outputs [H*C] of the token at `position` [1], whose key and value are appended to `kv`.

    `qkv` holds the projections of H query heads, then G keys, then G values. The outputs come quantised too where C is
    a power of two from 32 on and the queries of a kv head are whole blocks of 256."""
    G, C = kv.k.shape[1:]
    at = int(position[0])
    q, k, v = qkv[None, : -2 * G * C], qkv[None, -2 * G * C : -G * C], qkv[None, -G * C :]
    k = qk_norm_rope(k, k_norm.weight, k_norm.eps, rope, at)
    append(k, v, kv, at)
    q = qk_norm_rope(q, q_norm.weight, q_norm.eps, rope, at)
    out: F32 = attend(q, kv, at)[0]
    whole = C >= 32 and C.bit_count() == 1 and out.size // G % 256 == 0
    return Attended(out, operand(quantize(out[None], profile)) if whole else None)
