"""One token's attention, from its projections to the heads' outputs.      qkv [(H+2G)*C] f32 -> [H*C] f32"""

from exactmoe.parity.reference.attention import attend
from exactmoe.parity.reference.kv_cache import KVLayer, append
from exactmoe.parity.reference.matvec import Norm
from exactmoe.parity.reference.numerics import F32, I32
from exactmoe.parity.reference.rope import RopeTable, qk_norm_rope


def decode_attention(qkv: F32, q_norm: Norm, k_norm: Norm, rope: RopeTable, kv: KVLayer, position: I32) -> F32:
    """Output [H*C] of the token at `position` [1], whose key and value are appended to `kv`.

    `qkv` holds the projections of H query heads, then G keys, then G values."""
    G, C = kv.k.shape[1:]
    at = int(position[0])
    q, k, v = qkv[None, : -2 * G * C], qkv[None, -2 * G * C : -G * C], qkv[None, -G * C :]
    k = qk_norm_rope(k, k_norm.weight, k_norm.eps, rope, at)
    append(k, v, kv, at)
    q = qk_norm_rope(q, q_norm.weight, q_norm.eps, rope, at)
    out: F32 = attend(q, kv, at)[0]
    return out
