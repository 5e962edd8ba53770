"""The KV cache: integers, with one scale for every token and kv head.      k [T, G, C], v [T, G*C] f32 -> the cache

Keys have 15 bits and any scale; values have a scale that is a power of two, so that attention can move it between a
value and its probability."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from exactmoe.parity.reference.numerics import (
    F32,
    I16,
    NAN,
    TINY,
    ZERO,
    exponent,
    largest,
    nonfinite,
    pow2,
    quiet,
    require,
    rne,
)
from exactmoe.parity.reference.quantize import Group, quantize_15
from exactmoe.parity.reference.rope import RopeTable, rope_table
from exactmoe.parity.reference.weights import Dims


class KVLayer(NamedTuple):
    """Keys and values of one layer, for P positions."""

    k: I16  # [P, G, C] -16256..16256
    k_scale: F32  # [P, G]
    v: I16  # [P, G, C] -8192..8192
    v_scale: F32  # [P, G] powers of two, or 0


@dataclass
class KVCache:
    """Keys and values of all layers; positions 0..length-1 are filled."""

    k: I16  # [L, P, G, C]
    k_scale: F32  # [L, P, G]
    v: I16  # [L, P, G, C]
    v_scale: F32  # [L, P, G]
    rope: RopeTable
    length: int = 0

    @staticmethod
    def allocate(dims: Dims, capacity: int) -> "KVCache":
        """An empty cache for `capacity` positions. Raises ValueError for more than the model's context."""
        context = dims.context_length
        require(0 < capacity <= context, f"cache capacity must be 1 to {context}, got {capacity}")
        scales = (dims.n_layers, capacity, dims.n_kv_heads)
        values = (*scales, dims.head_dim)
        return KVCache(
            k=np.zeros(values, np.int16),
            k_scale=np.zeros(scales, np.float32),
            v=np.zeros(values, np.int16),
            v_scale=np.zeros(scales, np.float32),
            rope=rope_table(capacity, dims.head_dim, dims.rope_base),
        )

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return int(self.k.shape[1])

    def layer(self, i: int) -> KVLayer:
        """Views of layer `i`."""
        return KVLayer(self.k[i], self.k_scale[i], self.v[i], self.v_scale[i])


def append(k: F32, v: F32, kv: KVLayer, start: int) -> None:
    """Write keys (after rope) and values of positions start, start+1, ... into `kv`."""
    T, capacity = len(k), len(kv.k)
    require(
        0 <= start and start + T <= capacity,
        f"positions {start} to {start + T - 1} are not among the cache's {capacity}",
    )
    at = slice(start, start + T)
    kv.k[at], kv.k_scale[at] = quantize_15(k)
    kv.v[at], kv.v_scale[at] = quantize_pow2(v.reshape(k.shape))


@quiet
def quantize_pow2(x: F32) -> Group:
    """Integers -8192..8192 for groups x [..., C], their scale the power of two 2^(e(amax) - 12)."""
    bad = nonfinite(x)
    x = np.where(bad[..., None], ZERO, x)
    amax = largest(x)
    live = amax >= TINY
    e = np.where(live, exponent(amax), 0)
    v = rne(x * pow2(12 - e)[..., None])
    scale = np.where(bad, NAN, np.where(live, pow2(e - 12), ZERO))
    return Group(np.where(live[..., None], v, 0), scale)
