"""Weights of the decode step: the model's own planes of Q4_K, others of Q6_K."""

from typing import NamedTuple

from exactmoe.kernels.matvec import Norm
from exactmoe.kernels.packed import PackedMatrix
from exactmoe.kernels.router import RouterWeight


class PackedLayer(NamedTuple):
    """One transformer layer, as the kernels of a decode step take it."""

    attn_norm: Norm
    qkv: tuple[PackedMatrix, ...]  # q, k and v one below the other: one matrix, or two where v has its own format
    q_norm: Norm
    k_norm: Norm
    attn_output: PackedMatrix
    ffn_norm: Norm
    router: RouterWeight
    gate: PackedMatrix
    up: PackedMatrix
    down: PackedMatrix


class PackedWeights(NamedTuple):
    """All a decode step reads but the embedding."""

    layers: tuple[PackedLayer, ...]
    output_norm: Norm
    output: PackedMatrix
