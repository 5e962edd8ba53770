"""Q4_K blocks of 256 weights: w = d*scale*code - dmin*minimum, with a scale and a minimum for every 32 weights.

    144 B: d f16 | dmin f16 | scales 12 B | qs 128 B

    scales  bytes 0-3: scales 0-3 (low 6 bits), high 2 bits of scales 4-7 (top 2 bits)
            bytes 4-7: the same of the minimums
            bytes 8-11: low 4 bits of scales 4-7 (low nibble) and of minimums 4-7 (high nibble)
    qs      4 x 32 B; byte i of part p is code i of sub-block 2p (low nibble) and of sub-block 2p+1 (high nibble)

Layout: block_q4_K in ggml-common.h, dequantize_row_q4_K and get_scale_min_k4 in ggml-quants.c."""

from typing import NamedTuple

import numpy as np

from exactmoe.parity.reference.numerics import F32, I16, U8

BYTES = 144


class BlockQ4K(NamedTuple):
    """Blocks as numbers."""

    d: F32  # [...]
    dmin: F32  # [...]
    scale: I16  # [..., 8] 0..63
    minimum: I16  # [..., 8] 0..63
    code: I16  # [..., 8, 32] 0..15


def decode_q4_k(block: U8) -> BlockQ4K:
    """Decode blocks [..., 144]."""
    factors = np.ascontiguousarray(block[..., 0:4]).view(np.float16).astype(np.float32)
    first, second, third = block[..., 4:8], block[..., 8:12], block[..., 12:16]
    scale = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=-1)
    minimum = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=-1)
    qs = block[..., 16:].reshape(*block.shape[:-1], 4, 32)
    code = np.stack([qs & 15, qs >> 4], axis=-2).reshape(*block.shape[:-1], 8, 32)
    return BlockQ4K(
        factors[..., 0],
        factors[..., 1],
        scale.astype(np.int16),
        minimum.astype(np.int16),
        code.astype(np.int16),
    )
