"""The KV cache of one sequence: integers with a scale a (token, kv head) for every layer, and the rope table."""

from dataclasses import dataclass

import torch
from torch import Tensor

from exactmoe.kernels.errors import require
from exactmoe.kernels.kv_cache import KVLayer
from exactmoe.kernels.rope import RopeTable, rope_table
from exactmoe.model.decode import Decoder
from exactmoe.model.weights import Model


@dataclass
class KVCache:
    """Keys and values of positions 0..length-1; what lies beyond `length` means nothing."""

    k: Tensor  # [L, P, G, C] i16
    k_scale: Tensor  # [L, P, G] f32
    v: Tensor  # [L, P, G, C] i16
    v_scale: Tensor  # [L, P, G] f32
    rope: RopeTable
    length: int = 0
    decoder: Decoder | None = None  # of this sequence's single tokens

    @staticmethod
    def allocate(model: Model, capacity: int) -> "KVCache":
        """An empty cache for `capacity` positions; refuses more than the model's context."""
        c = model.config
        require(0 < capacity <= c.context_length, f"cache capacity must be 1 to {c.context_length}, got {capacity}")
        shape = (c.n_layers, capacity, c.n_kv_heads)
        return KVCache(
            torch.empty(*shape, c.head_dim, dtype=torch.int16, device=model.device),
            torch.empty(*shape, dtype=torch.float32, device=model.device),
            torch.empty(*shape, c.head_dim, dtype=torch.int16, device=model.device),
            torch.empty(*shape, dtype=torch.float32, device=model.device),
            rope_table(capacity, c.head_dim, c.rope_base, model.device),
        )

    @property
    def capacity(self) -> int:
        """Positions the cache can hold."""
        return self.k.shape[1]

    def layer(self, i: int) -> KVLayer:
        """Views of layer `i`."""
        return KVLayer(self.k[i], self.k_scale[i], self.v[i], self.v_scale[i])
