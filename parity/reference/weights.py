"""A model's weights: quantised bytes as the file holds them, norms and routers in f32.

T tokens, D model width, H query heads, G kv heads, C head width, E experts, A active, F expert width, V vocabulary."""

from typing import NamedTuple

import numpy as np

from exactmoe.parity.reference import q4_k, q6_k
from exactmoe.parity.reference.numerics import F32, U8, require

BLOCK = 256  # weights in a block of either format
BLOCK_BYTES = {"Q4_K": q4_k.BYTES, "Q6_K": q6_k.BYTES}


class Dims(NamedTuple):
    """Dims of a model."""

    hidden: int  # D
    n_layers: int  # L
    n_heads: int  # H
    n_kv_heads: int  # G
    head_dim: int  # C
    n_experts: int  # E
    n_active: int  # A
    expert_width: int  # F
    vocab: int  # V
    context_length: int
    eps: np.float32
    rope_base: float


class QuantMatrix(NamedTuple):
    """A matrix of quantised rows, or one for every expert."""

    data: U8  # [..., N, row_bytes]
    type_name: str

    @property
    def n(self) -> int:
        """Rows, which are output features."""
        return int(self.data.shape[-2])

    @property
    def k(self) -> int:
        """Weights in a row, which are input features. Raises ValueError for bytes that are not whole blocks."""
        known = ", ".join(BLOCK_BYTES)
        require(self.type_name in BLOCK_BYTES, f"type {self.type_name} has no reference; supported: {known}")
        size, row = BLOCK_BYTES[self.type_name], int(self.data.shape[-1])
        require(
            row > 0 and row % size == 0, f"a row of {row} bytes is no whole number of {self.type_name} blocks ({size})"
        )
        return row // size * BLOCK


class LayerWeights(NamedTuple):
    """One transformer layer."""

    attn_norm: F32  # [D]
    q: QuantMatrix  # [H*C, D]
    k: QuantMatrix  # [G*C, D]
    v: QuantMatrix  # [G*C, D]
    q_norm: F32  # [C]
    k_norm: F32  # [C]
    attn_output: QuantMatrix  # [D, H*C]
    ffn_norm: F32  # [D]
    router: F32  # [E, D]
    gate: QuantMatrix  # [E, F, D]
    up: QuantMatrix  # [E, F, D]
    down: QuantMatrix  # [E, D, F]


class Weights(NamedTuple):
    """A whole model."""

    dims: Dims
    embedding: QuantMatrix  # [V, D]
    layers: tuple[LayerWeights, ...]
    output_norm: F32  # [D]
    output: QuantMatrix  # [V, D]
