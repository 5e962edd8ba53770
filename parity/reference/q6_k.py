"""Q6_K blocks.      256 weights, 210 B: ql 128 B (low 4 bits) | qh 64 B (high 2 bits) | scales 16 x i8 | d f16

Layout: ggml-common.h, block_q6_K; dequantize_row_q6_K in ggml-quants.c."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from exactmoe.parity.reference.numerics import F32, I32

BYTES = 210


class BlockQ6K(NamedTuple):
    """Decoded blocks: w = d*scale*code."""

    d: F32  # [...]
    scale: I32  # [..., 16] -128..127, one a sub-block of 16
    code: I32  # [..., 256] -32..31


def decode_q6_k(block: npt.NDArray[np.uint8]) -> BlockQ6K:
    """Blocks u8 [..., 210] as their integers."""
    lead = block.shape[:-1]
    ql = block[..., :128].reshape(*lead, 2, 2, 32)  # half of 128, row, column
    qh = block[..., 128:192].reshape(*lead, 2, 1, 32)
    low = np.concatenate([ql & 15, ql >> 4], axis=-2)  # [..., 2, 4, 32]: quarters 0 1 in low nibbles, 2 3 in high ones
    high = np.concatenate([(qh >> shift) & 3 for shift in (0, 2, 4, 6)], axis=-2)
    code = (low | (high << 4)).reshape(*lead, 256).astype(np.int32) - 32
    scale = np.ascontiguousarray(block[..., 192:208]).view(np.int8).astype(np.int32)
    d = np.ascontiguousarray(block[..., 208:]).view(np.float16).astype(np.float32)[..., 0]
    return BlockQ6K(d, scale, code)
