"""The model's weights as numpy arrays: quantised bytes as the file holds them, norms and routers in f32."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from exactmoe.parity.reference import q4_k, q6_k
from exactmoe.parity.reference.numerics import F32, require

BLOCK_BYTES = {"Q4_K": q4_k.BYTES, "Q6_K": q6_k.BYTES}


class Dims(NamedTuple):
    """Dims of a Qwen3-MoE model."""

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
    """Quantised rows, one matrix or one an expert."""

    data: npt.NDArray[np.uint8]  # [..., N, row_bytes]
    type_name: str

    @property
    def n(self) -> int:
        """Output features."""
        return int(self.data.shape[-2])

    @property
    def k(self) -> int:
        """Input features."""
        require(self.type_name in BLOCK_BYTES, f"type {self.type_name} has no reference; there is {', '.join(BLOCK_BYTES)}")
        size = BLOCK_BYTES[self.type_name]
        row = self.data.shape[-1]
        require(row > 0 and row % size == 0, f"a row of {row} bytes is not a whole number of {self.type_name} blocks of {size} bytes")
        return int(row // size * 256)


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
