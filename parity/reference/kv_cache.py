"""The KV cache: integers with one scale a (token, kv head).      k [T, G, C], v [T, G*C] f32 -> the cache"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from exactmoe.parity.reference.numerics import F32, NAN, ZERO, exponent, nonfinite, pow2, quiet, require, rne
from exactmoe.parity.reference.quantize import TINY, Group, quantize_15
from exactmoe.parity.reference.rope import RopeTable, rope_table
from exactmoe.parity.reference.weights import Dims

I16 = npt.NDArray[np.int16]


class KVLayer(NamedTuple):
    """One layer's keys and values."""

    k: I16  # [P, G, C]
    k_scale: F32  # [P, G]
    v: I16  # [P, G, C]
    v_scale: F32  # [P, G], powers of two


@dataclass
class KVCache:
    """Keys and values of positions 0..length-1 of every layer."""

    k: I16  # [L, P, G, C]
    k_scale: F32  # [L, P, G]
    v: I16  # [L, P, G, C]
    v_scale: F32  # [L, P, G]
    rope: RopeTable
    length: int = 0

    @staticmethod
    def allocate(dims: Dims, capacity: int) -> "KVCache":
        """An empty cache for `capacity` positions."""
        require(0 < capacity <= dims.context_length, f"cache capacity must be 1 to {dims.context_length}, got {capacity}")
        shape = (dims.n_layers, capacity, dims.n_kv_heads)
        return KVCache(
            np.zeros((*shape, dims.head_dim), np.int16), np.zeros(shape, np.float32),
            np.zeros((*shape, dims.head_dim), np.int16), np.zeros(shape, np.float32),
            rope_table(capacity, dims.head_dim, dims.rope_base),
        )  # fmt: skip

    @property
    def capacity(self) -> int:
        """Positions the cache can hold."""
        return int(self.k.shape[1])

    def layer(self, i: int) -> KVLayer:
        """Views of layer `i`."""
        return KVLayer(self.k[i], self.k_scale[i], self.v[i], self.v_scale[i])


def append(k: F32, v: F32, kv: KVLayer, start: int) -> None:
    """Write the keys and values of tokens start..start+T-1."""
    T = k.shape[0]
    require(
        0 <= start and start + T <= len(kv.k), f"positions {start}..{start + T - 1} lie outside the cache of {len(kv.k)}"
    )
    at = slice(start, start + T)
    kv.k[at], kv.k_scale[at] = quantize_15(k)
    kv.v[at], kv.v_scale[at] = quantize_pow2(v.reshape(k.shape))


@quiet
def quantize_pow2(x: F32) -> Group:
    """14-bit integers in -8192..8192 of rows x [..., C], scale the power of two 2^(e(amax) - 12)."""
    bad = nonfinite(x)
    amax = np.max(np.abs(np.where(bad[..., None], ZERO, x)), axis=-1)
    live = ~bad & (amax >= TINY)
    e = np.where(live, exponent(amax), 0)
    v = rne(np.where(live[..., None], x, ZERO) * pow2(12 - e)[..., None])
    return Group(v, np.where(bad, NAN, np.where(live, pow2(e - 12), ZERO)))
