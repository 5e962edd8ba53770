"""Q6_K blocks: load and decode.

256 weights, 210 B: ql 128 B (low 4 bits) | qh 64 B (high 2 bits) | scales 16 x i8 | d f16

Byte b of ql, seen as (half n, row h, column l) = (b//64, b//32%2, b%32), holds weight 128n + 32h + l in its low nibble
and the one 64 further in its high nibble; byte 32n + l of qh holds the high bits of the four weights of column l.
Layout: ggml-common.h, block_q6_K; dequantize_row_q6_K."""

import triton
import triton.language as tl


@triton.jit
def low_k_q6_k():
    """[128] index of the weights in the low nibbles; the high nibbles' are `HIGH_Q6_K` further."""
    b = tl.arange(0, 128)
    return 128 * (b // 64) + b % 64


HIGH_Q6_K = tl.constexpr(64)


@triton.jit
def load_codes_q6_k(block_ptr, live):
    """Codes -32..31 of blocks at `block_ptr` [N], as (low, high), each i32 [N, 8, 16] in byte order."""
    byte = tl.arange(0, 8)[:, None] * 16 + tl.arange(0, 16)[None, :]
    row = byte // 32 % 2
    live3 = live[:, None, None]
    ql = tl.load(block_ptr[:, None, None] + byte[None, :, :], live3, 0).to(tl.int32)
    qh = tl.load(block_ptr[:, None, None] + (128 + 32 * (byte // 64) + byte % 32)[None, :, :], live3, 0).to(tl.int32)
    qh = qh >> (2 * row)[None, :, :]
    low = (ql & 15) | ((qh & 3) << 4)
    high = (ql >> 4) | (((qh >> 4) & 3) << 4)
    return low - 32, high - 32


@triton.jit
def load_scales_q6_k(block_ptr, j, live):
    """int8 scale of sub-blocks `j` [J] of blocks at `block_ptr` [N], i32 [N, J]."""
    scale = tl.load(block_ptr[:, None] + 192 + j[None, :], live[:, None], 0)
    return scale.to(tl.int8, bitcast=True).to(tl.int32)
