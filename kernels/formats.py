"""Which GGUF block formats the kernels can execute: the one list that loader, dispatcher and docs read.

Byte layouts are ggml's (ggml-common.h, `block_q4_K` and `block_q6_K`), 256 weights a block:

    Q4_K, 144 B: d f16 | dmin f16 | scales 12 B (8 x 6-bit scale, 8 x 6-bit min) | qs 128 B (256 x 4 bit)
    Q6_K, 210 B: ql 128 B (low 4 bits) | qh 64 B (high 2 bits) | scales 16 x int8 | d f16
"""

from typing import NamedTuple

from exactmoe.kernels.errors import InvalidInput

BLOCK = 256  # weights in a super-block of every K-quant, and in an activation block


class QuantFormat(NamedTuple):
    """One block format."""

    name: str
    ggml_id: int  # ggml_type in the file
    block_bytes: int  # bytes that hold BLOCK weights
    head_bytes: int = 0  # the first of them, which kernels.tensors keeps apart

    @property
    def data_bytes(self) -> int:
        """The others."""
        return self.block_bytes - self.head_bytes


Q4_K = QuantFormat("Q4_K", 12, 144, 16)
Q6_K = QuantFormat("Q6_K", 14, 210)

EXECUTABLE: dict[str, QuantFormat] = {f.name: f for f in (Q4_K, Q6_K)}
"""Formats a quantised matmul or an embedding row can be read from. Norms and the router are F32."""


def executable_format(name: str, tensor: str) -> QuantFormat:
    """The format called `name`; raises `InvalidInput` that names `tensor`, `name` and the supported list."""
    if name not in EXECUTABLE:
        raise InvalidInput(f"{tensor}: type {name} cannot be executed; supported: {', '.join(EXECUTABLE)}")
    return EXECUTABLE[name]
