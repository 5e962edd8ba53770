"""Q4_K blocks: load and decode.

256 weights, 144 B: d f16 | dmin f16 | scales 12 B (8 x 6+6 bit) | qs 128 B (256 x 4 bit)

The first 16 B, a block's head, and its qs, the codes, lie in two planes (kernels.tensors). Byte b of qs holds weight
64*(b//32) + b%32 in its low nibble and the one 32 further in its high nibble, so a block is decoded as two halves of
128 weights; `low_k` says which. Layout of a block: ggml-common.h, block_q4_K; get_scale_min_k4."""

import triton
import triton.language as tl


@triton.jit
def load_f16(ptr, live):
    """Little-endian f16 at byte pointers `ptr`, as f32 (exact)."""
    lo = tl.load(ptr, live, 0).to(tl.int32)
    hi = tl.load(ptr + 1, live, 0).to(tl.int32)
    return (lo | (hi << 8)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def low_k_q4_k():
    """[128] index of the weights in the low nibbles; the high nibbles' are `HIGH_Q4_K` further."""
    b = tl.arange(0, 128)
    return 64 * (b // 32) + b % 32


HIGH_Q4_K = tl.constexpr(32)


@triton.jit
def load_codes_q4_k(code_ptr, live):
    """Codes 0..15 of blocks whose codes are at `code_ptr` [N], as (low, high), each i32 [N, 4, 32] in byte order."""
    byte = tl.arange(0, 4)[:, None] * 32 + tl.arange(0, 32)[None, :]
    qs = tl.load(code_ptr[:, None, None] + byte[None, :, :], live[:, None, None], 0).to(tl.int32)
    return qs & 15, qs >> 4


@triton.jit
def load_scales_q4_k(head_ptr, live):
    """6-bit scale and min of the 8 sub-blocks of blocks whose heads are at `head_ptr` [N], each i32 [N, 8]."""
    j = tl.arange(0, 8)
    at = head_ptr[:, None] + 4 + (j % 4)[None, :]
    a = tl.load(at, live[:, None], 0).to(tl.int32)
    b = tl.load(at + 4, live[:, None], 0).to(tl.int32)
    c = tl.load(at + 8, live[:, None], 0).to(tl.int32)
    first = (j < 4)[None, :]
    scale = tl.where(first, a & 63, (c & 15) | ((a >> 6) << 4))
    minimum = tl.where(first, b & 63, (c >> 4) | ((b >> 6) << 4))
    return scale, minimum


@triton.jit
def split_halves_q4_k(x):
    """Per-sub-block values [N, 8] as those of the low and of the high nibbles, each [N, 4, 1]."""
    low, high = tl.split(tl.reshape(x, [x.shape[0], 4, 2]))
    return low[:, :, None], high[:, :, None]
