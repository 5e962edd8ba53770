"""Q6_K blocks of 256 weights: w = d*scale*code, with a scale for every 16 weights.

    210 B: ql 128 B | qh 64 B | scales 16 x i8 | d f16

Two halves of 128 weights, each 64 B of ql and 32 B of qh; a half is four runs of 32, and weight i of run r has
    low 4 bits   in ql[i + 32*(r % 2)]: low nibble for runs 0 and 1, high nibble for runs 2 and 3
    high 2 bits  in qh[i]: bits 2r and 2r+1
A stored number n stands for the code n - 32.

Layout: block_q6_K in ggml-common.h, dequantize_row_q6_K in ggml-quants.c."""

from typing import NamedTuple

import numpy as np

from exactmoe.parity.reference.numerics import F32, I16, U8

BYTES = 210


class BlockQ6K(NamedTuple):
    """Blocks as numbers."""

    d: F32  # [...]
    scale: I16  # [..., 16] -128..127
    code: I16  # [..., 16, 16] -32..31


def decode_q6_k(block: U8) -> BlockQ6K:
    """Decode blocks [..., 210]."""
    lead = block.shape[:-1]
    ql = block[..., 0:128].reshape(*lead, 2, 2, 32)  # half, run % 2, weight
    qh = block[..., 128:192].reshape(*lead, 2, 32)  # half, weight
    low = np.concatenate([ql & 15, ql >> 4], axis=-2)  # half, run, weight
    high = np.stack([(qh >> 2 * run) & 3 for run in range(4)], axis=-2)
    code = (low | (high << 4)).astype(np.int16) - np.int16(32)
    scale = np.ascontiguousarray(block[..., 192:208]).view(np.int8).astype(np.int16)
    d = np.ascontiguousarray(block[..., 208:210]).view(np.float16).astype(np.float32)[..., 0]
    return BlockQ6K(d, scale, code.reshape(*lead, 16, 16))
