"""Quantised weights and one activation row as integer dots read them: four bytes to an i32, products by dp4a.

Weights: Q4_K as the file holds it, whose blocks are nine 16-byte words. Q6_K blocks of 210 bytes cannot be read in wide
words, so they are taken apart at load, losslessly, into planes: low bits, high bits, scales, d.

Activations: an `operand`, i32 [S * 84 * NB + NB] for NB blocks and S slices. A slice holds
    64 words a block    the codes, in order
     4 words a block    for Q4_K: sums of 32 codes as 128*h + l, the bytes h0..7, l0..7
    16 words a block    for Q6_K: -32 times the sums of 16 codes, in the order of the planes' scales
and after the slices come the NB scales, f32.

A sub-block's integers are exact in i32: |S| <= 128 * 63 * 127 * 256 < 2^28 for either format."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels.errors import require
from exactmoe.kernels.formats import BLOCK, QuantFormat, executable_format
from exactmoe.kernels.launch import interpreting
from exactmoe.kernels.numerics import codes_8, codes_15, factors_8, factors_15, magnitude, sign_key
from exactmoe.kernels.tensors import QuantMatrix

_INTERPRETED = tl.constexpr(interpreting())
_Q4_K = tl.constexpr(12)
_NIBBLES = tl.constexpr(0x0F0F0F0F)
_HIGH_PAIRS = tl.constexpr(0x30303030)


class PackedMatrix(NamedTuple):
    """Rows of quantised weights, of one matrix or of E experts' (R = E * n rows), in the planes of their format."""

    words: Tensor  # Q4_K: the file's blocks, i32 [R, NB*36]; Q6_K: low bits, i32 [R, NB*32]
    high: Tensor | None  # Q6_K: high bits, i32 [R, NB*16]
    scales: Tensor | None  # Q6_K: scales, i32 [R, NB*4]
    d: Tensor | None  # Q6_K: d, f16 [R, NB]
    format: QuantFormat
    n: int  # output features
    k: int  # input features
    experts: int

    @property
    def planes(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """What a kernel is given."""
        return self[:4]


def pack(weight: QuantMatrix) -> PackedMatrix:
    """`weight` in planes; Q4_K shares the memory of `weight`."""
    executable_format(weight.format.name, "weight")
    n, k, blocks = weight.n, weight.k, weight.k // BLOCK
    rows = weight.data.numel() // (blocks * weight.format.block_bytes)
    experts = rows // n if n else 1
    if weight.format.name == "Q4_K":
        require(weight.data.data_ptr() % 16 == 0, "Q4_K weights must start at a multiple of 16 bytes")
        words = weight.data.view(rows, -1).view(torch.int32)
        return PackedMatrix(words, None, None, None, weight.format, n, k, experts)
    block = weight.data.view(rows, blocks, weight.format.block_bytes)
    # Scale of the sub-block that starts at weight 128*n + 32*k + 16*v goes to (n, v, k): a lane takes four at once.
    scales = block[..., 192:208].reshape(rows, blocks, 2, 4, 2).transpose(3, 4)
    return PackedMatrix(
        _plane(block[..., :128], rows, torch.int32),
        _plane(block[..., 128:192], rows, torch.int32),
        _plane(scales, rows, torch.int32),
        _plane(block[..., 208:], rows, torch.float16),
        weight.format, n, k, experts,
    )  # fmt: skip


def _plane(part: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    return part.reshape(rows, -1).contiguous().view(dtype)


def operand_words(width: int, slices: int) -> int:
    """i32 words of the operand of a row of `width` activations."""
    return width // BLOCK * (84 * slices + 1)


def operand_stride(width: int, slices: int) -> int:
    """Words from one operand to the next where several lie one behind the other: whole lines of 128 bytes."""
    return -(-operand_words(width, slices) // 32) * 32


def operand_slices(operand: Tensor, width: int) -> int:
    """Slices of the operand of a row of `width` activations; refuses a tensor that is none."""
    fits = [s for s in (1, 2) if operand.numel() == operand_words(width, s)]
    require(operand.dtype == torch.int32 and bool(fits), f"{operand.numel()} words are no operand of {width} elements")
    return fits[0]


@triton.jit
def dp4a(a, b, c):
    """c plus the dot of the four signed bytes in each i32 of `a` and `b`."""
    if _INTERPRETED:
        total = c
        for up in tl.static_range(0, 32, 8):
            total += ((a << up) >> 24) * ((b << up) >> 24)
        return total
    else:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def operand_index(NB2: tl.constexpr):
    """Index of the elements of NB2 blocks as a tile [2, NB2, 128], halves of blocks first.

    A warp holds whole rows of 128 and both halves of a block, so that nothing in a block crosses warps."""
    half = tl.arange(0, 2)[:, None, None] * 128
    return half + tl.arange(0, NB2)[None, :, None] * 256 + tl.arange(0, 128)[None, None, :]


@triton.jit
def store_operand(x, start, block, at_ptr, NB: tl.constexpr, S: tl.constexpr):
    """Quantise f32 [2, M, 128] as blocks `block` [M] of the operands that begin `start` [M] words after `at_ptr`.

    A block from NB on is not stored."""
    mag = magnitude(x)
    top = tl.max(tl.max(mag, axis=2), axis=0)  # [M]
    top3 = top[None, :, None]
    if S == 1:
        index = (tl.arange(0, 2) * 128)[:, None, None] + tl.arange(0, 128)[None, None, :]
        key = tl.min(tl.min(sign_key(x, mag, top3, index), axis=2), axis=0)
        s, scale = factors_8(top, key)
        _store_slice(codes_8(x, top3, s[None, :, None]), start, block, at_ptr, NB)
    else:
        s, scale = factors_15(top)
        v = codes_15(x, top3, s[None, :, None])
        hi = (v + 64) >> 7
        _store_slice(hi, start, block, at_ptr, NB)
        _store_slice(v - 128 * hi, start, block, at_ptr + 84 * NB, NB)
    scale_ptr = (at_ptr + 84 * S * NB).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(scale_ptr + start + block, scale, block < NB)


@triton.jit
def _store_slice(q, start, block, at_ptr, NB: tl.constexpr):
    M: tl.constexpr = q.shape[1]
    live = (block < NB)[None, :, None]
    half = tl.arange(0, 2)[:, None, None]
    at = block[None, :, None]
    start = start[None, :, None]
    byte_ptr = at_ptr.to(tl.pointer_type(tl.int8), bitcast=True)
    tl.store(byte_ptr + start * 4 + at * 256 + half * 128 + tl.arange(0, 128)[None, None, :], q.to(tl.int8), live)
    sum16 = tl.sum(tl.reshape(q, [2, M, 8, 16]), axis=3)
    j = tl.arange(0, 8)
    lane = (j % 2 * 4 + j // 2)[None, None, :]
    tl.store(at_ptr + start + 68 * NB + at * 16 + half * 8 + lane, -32 * sum16, live)
    sum32 = tl.sum(tl.reshape(sum16, [2, M, 4, 2]), axis=3)
    high = (sum32 + 64) >> 7
    sums = byte_ptr + start * 4 + 256 * NB + at * 16 + half * 4 + tl.arange(0, 4)[None, None, :]
    tl.store(sums, high.to(tl.int8), live)
    tl.store(sums + 8, (sum32 - 128 * high).to(tl.int8), live)


@triton.jit
def load_block(planes, row, live, b: tl.constexpr, NB: tl.constexpr, FORMAT: tl.constexpr, EVEN: tl.constexpr):
    """Block `b` of weight rows `row` [N], i64, as a tuple for `block_product`; nothing is awaited yet."""
    v = tl.arange(0, 4)[None, None, :]
    if FORMAT == _Q4_K:
        ptr = planes[0] + row * (NB * 36) + b * 36
        head_ptr = ptr.to(tl.pointer_type(tl.int64), bitcast=True)
        words = _load(ptr[:, None, None] + 4 + (4 * tl.arange(0, 8))[None, :, None] + v, live[:, None, None], EVEN)
        return words, _load(head_ptr, live, EVEN), _load(head_ptr + 1, live, EVEN)
    else:
        lane = tl.arange(0, 4)
        at = (lane // 2 * 16 + lane % 2 * 4)[None, :, None] + v
        low_ptr = (planes[0] + row * (NB * 32) + b * 32)[:, None, None] + at
        at = (lane * 4)[None, :, None] + v
        high_ptr = (planes[1] + row * (NB * 16) + b * 16)[:, None, None] + at
        live3 = live[:, None, None]
        low, low2, high = _load(low_ptr, live3, EVEN), _load(low_ptr + 8, live3, EVEN), _load(high_ptr, live3, EVEN)
        scales_ptr = (planes[2] + row * (NB * 4) + b * 4).to(tl.pointer_type(tl.int64), bitcast=True)
        scales = _load(scales_ptr, live, EVEN), _load(scales_ptr + 1, live, EVEN)
        return low, low2, high, scales, _load(planes[3] + row * NB + b, live, EVEN)


@triton.jit
def _load(ptr, live, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(ptr)
    else:
        return tl.load(ptr, live, 0)


@triton.jit
def block_product(w, x_ptr, b: tl.constexpr, NB: tl.constexpr, FORMAT: tl.constexpr, S: tl.constexpr):
    """P [N] of block `b`: xd * (d*S - dmin*T) for Q4_K, xd * (d*S) for Q6_K, of `load_block`'s tuple and an operand.

    `x_ptr` is [1] or [N]: one operand for all rows, or one for each."""
    xd = tl.load((x_ptr + 84 * S * NB + b).to(tl.pointer_type(tl.float32), bitcast=True))
    if FORMAT == _Q4_K:
        scales, mins, d, dmin = _unpack_q4_k(w[1], w[2])
        s, t = _sums_q4_k(w[0], scales, mins, x_ptr, b, NB)
        if S == 2:
            s_lo, t_lo = _sums_q4_k(w[0], scales, mins, x_ptr + 84 * NB, b, NB)
            s = 128.0 * s + s_lo
            t = 128.0 * t + t_lo
        return xd * (d * s - dmin * t)
    else:
        s = _sum_q6_k(w, x_ptr, b, NB)
        if S == 2:
            s = 128.0 * s + _sum_q6_k(w, x_ptr + 84 * NB, b, NB)
        return xd * (w[4].to(tl.float32) * s)


@triton.jit
def _half(word):
    """The f16 in the low half of i32 `word`, as f32."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _unpack_q4_k(head, tail):
    """Scales and mins of the 8 sub-blocks, each as two i32 of 4 bytes; d and dmin. The 16 bytes come as two i64."""
    h0 = head.to(tl.int32)
    h1 = (head >> 32).to(tl.int32)
    h2 = tail.to(tl.int32)
    h3 = (tail >> 32).to(tl.int32)
    scales = (h1 & 0x3F3F3F3F, (h3 & _NIBBLES) | ((h1 >> 2) & _HIGH_PAIRS))
    mins = (h2 & 0x3F3F3F3F, ((h3 >> 4) & _NIBBLES) | ((h2 >> 2) & _HIGH_PAIRS))
    return scales, mins, _half(h0), _half(h0 >> 16)


@triton.jit
def _sums_q4_k(words, scales, mins, x_ptr, b: tl.constexpr, NB: tl.constexpr):
    """f32 of the exact sums of sc*q*x and of mn*x over one block and slice, each [N]."""
    u = tl.arange(0, 8)  # lane u holds bytes 16u..16u+15: sub-blocks u//2*2 in the low nibbles, the next in the high
    at = x_ptr[:, None, None] + b * 64 + (u // 2 * 16 + u % 2 * 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
    low = tl.sum(dp4a(words & _NIBBLES, tl.load(at), 0), axis=2)
    high = tl.sum(dp4a((words >> 4) & _NIBBLES, tl.load(at + 8), 0), axis=2)
    pair = tl.where((u < 4)[None, :], scales[0][:, None], scales[1][:, None]) >> (u // 2 % 2 * 16)[None, :]
    s = tl.sum((pair & 255) * low + ((pair >> 8) & 255) * high, axis=1)
    sums = (x_ptr + 64 * NB + b * 4).to(tl.pointer_type(tl.int64), bitcast=True)
    high_sums, low_sums = tl.load(sums), tl.load(sums + 1)
    t = dp4a(mins[0], high_sums.to(tl.int32), dp4a(mins[1], (high_sums >> 32).to(tl.int32), 0))
    t = dp4a(mins[0], low_sums.to(tl.int32), dp4a(mins[1], (low_sums >> 32).to(tl.int32), 128 * t))
    return s.to(tl.float32), t.to(tl.float32)


@triton.jit
def _sum_q6_k(w, x_ptr, b: tl.constexpr, NB: tl.constexpr):
    """f32 of the exact sum of sc*(q-32)*x over one block and slice, [N]."""
    low, low2, high = w[0], w[1], w[2]
    lane = tl.arange(0, 4)  # half lane//2 of the block; 16 weights in each of its four rows of 32
    at = x_ptr[:, None, None] + b * 64 + (lane // 2 * 32 + lane % 2 * 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
    minus = x_ptr[:, None] + 68 * NB + b * 16 + (lane * 4)[None, :]
    scales = tl.where((lane < 2)[None, :], w[3][0][:, None], w[3][1][:, None]) >> (lane % 2 * 32)[None, :]
    scales = scales.to(tl.int32)
    s = _scaled(low & _NIBBLES, high << 4, at, minus, scales, 0)
    s += _scaled(low2 & _NIBBLES, high << 2, at, minus, scales, 1)
    s += _scaled((low >> 4) & _NIBBLES, high, at, minus, scales, 2)
    s += _scaled((low2 >> 4) & _NIBBLES, high >> 2, at, minus, scales, 3)
    return tl.sum(s, axis=1).to(tl.float32)


@triton.jit
def _scaled(low, high, at, minus, scales, k: tl.constexpr):
    """sc * sum((q-32)*x) of each lane's sub-block in row `k`, [N, 4]."""
    dot = tl.sum(dp4a(low | (high & _HIGH_PAIRS), tl.load(at + 8 * k), 0), axis=2)
    return ((scales << (24 - 8 * k)) >> 24) * (dot + tl.load(minus + k))
