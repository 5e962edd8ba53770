"""Q4_K blocks.      256 weights, 144 B: d f16 | dmin f16 | scales 12 B (8 x 6+6 bit) | qs 128 B (256 x 4 bit)

Layout: ggml-common.h, block_q4_K; dequantize_row_q4_K and get_scale_min_k4 in ggml-quants.c."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from exactmoe.parity.reference.numerics import F32, I32

BYTES = 144


class BlockQ4K(NamedTuple):
    """Decoded blocks: w = d*scale*code - dmin*minimum."""

    d: F32  # [...]
    dmin: F32  # [...]
    scale: I32  # [..., 8] 0..63, one a sub-block of 32
    minimum: I32  # [..., 8] 0..63
    code: I32  # [..., 256] 0..15


def decode_q4_k(block: npt.NDArray[np.uint8]) -> BlockQ4K:
    """Blocks u8 [..., 144] as their integers."""
    halves = np.ascontiguousarray(block[..., :4]).view(np.float16).astype(np.float32)
    a, b, c = (block[..., i : i + 4].astype(np.int32) for i in (4, 8, 12))
    scale = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=-1)
    minimum = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=-1)
    qs = block[..., 16:].reshape(*block.shape[:-1], 4, 1, 32)
    code = np.concatenate([qs & 15, qs >> 4], axis=-2)  # low nibbles, then high ones, 32 by 32
    return BlockQ4K(halves[..., 0], halves[..., 1], scale, minimum, code.reshape(*block.shape[:-1], 256).astype(np.int32))
