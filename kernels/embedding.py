"""Token embedding rows, read from quantised blocks.      table [V, D], tokens [T] i32 -> [T, D] f32
Promised order: (d*sc)*q - dmin*mn for Q4_K, (d*sc)*(q-32) for Q6_K, one rounding each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels import tiles
from exactmoe.kernels.errors import require
from exactmoe.kernels.formats import BLOCK, executable_format
from exactmoe.kernels.launch import FAITHFUL
from exactmoe.kernels.q4_k import HIGH_Q4_K, load_codes_q4_k, load_f16, load_scales_q4_k, low_k_q4_k, split_halves_q4_k
from exactmoe.kernels.q6_k import HIGH_Q6_K, load_codes_q6_k, load_scales_q6_k, low_k_q6_k
from exactmoe.kernels.tensors import QuantMatrix, require_shape

_Q4_K = tl.constexpr(12)


def embed(table: QuantMatrix, tokens: Tensor) -> Tensor:
    """Rows of `table` for tokens [T], which the caller has checked to be 0..V-1; bit-equal to the reference's embed."""
    executable_format(table.format.name, "embedding")
    require_shape(table.data, "embedding", table.n, None)
    require(tokens.dtype == torch.int32, f"tokens must be i32, got {tokens.dtype}")
    require_shape(tokens, "tokens", None)
    T = tokens.shape[0]
    out = torch.empty(T, table.k, dtype=torch.float32, device=tokens.device)
    if T:
        blocks = table.k // BLOCK
        M = tiles.rows_of_blocks(T * blocks)
        _embed_kernel[(triton.cdiv(T * blocks, M),)](
            table.data, table.heads, tokens, out, T * blocks, NB=blocks, M=M,
            BYTES=table.format.data_bytes, FORMAT=table.format.ggml_id, num_warps=4, **FAITHFUL,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["blocks"])
def _embed_kernel(
    w_ptr, head_ptr, token_ptr, out_ptr, blocks,
    NB: tl.constexpr, M: tl.constexpr, BYTES: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) * M + tl.arange(0, M)
    live = b < blocks
    token = tl.load(token_ptr + b // NB, live, 0).to(tl.int64)
    # Row and block are scaled apart: of (token*NB + b%NB) * 210 the compiler takes too large an alignment for granted.
    block_ptr = w_ptr + token * (NB * BYTES) + (b % NB) * BYTES
    out = out_ptr + b.to(tl.int64)[:, None, None] * 256
    if FORMAT == _Q4_K:
        low, high = load_codes_q4_k(block_ptr, live)
        k = tl.reshape(low_k_q4_k(), [1, 4, 32])
        head_ptr = head_ptr + token * (NB * 16) + (b % NB) * 16
        sc, mn = load_scales_q4_k(head_ptr, live)
        scale_low, scale_high = split_halves_q4_k(load_f16(head_ptr, live)[:, None] * sc.to(tl.float32))
        min_low, min_high = split_halves_q4_k(load_f16(head_ptr + 2, live)[:, None] * mn.to(tl.float32))
        tl.store(out + k, scale_low * low.to(tl.float32) - min_low, live[:, None, None])
        tl.store(out + k + HIGH_Q4_K, scale_high * high.to(tl.float32) - min_high, live[:, None, None])
    else:
        low, high = load_codes_q6_k(block_ptr, live)
        k = tl.reshape(low_k_q6_k(), [1, 8, 16])
        d = load_f16(block_ptr + 208, live)[:, None]
        g = tl.arange(0, 8)
        j = 8 * (g // 4) + g % 4
        y = (d * load_scales_q6_k(block_ptr, j, live).to(tl.float32))[:, :, None] * low.to(tl.float32)
        tl.store(out + k, y, live[:, None, None])
        y = (d * load_scales_q6_k(block_ptr, j + 4, live).to(tl.float32))[:, :, None] * high.to(tl.float32)
        tl.store(out + k + HIGH_Q6_K, y, live[:, None, None])
