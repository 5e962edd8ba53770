"""Quantised weights and one activation row as integer dots read them: four bytes to an i32, products by dp4a.

Weights: Q4_K as the file holds it, whose blocks are nine 16-byte words. Q6_K blocks of 210 bytes cannot be read in wide
words, so they are taken apart at load, losslessly, into planes: low bits, high bits, scales, d. The upper of two high
bits is flipped: then code and high bits, two places up, are the signed byte 4 * (q - 32).

Activations: an `operand`, i32 [S * 68 * NB + NB] for NB blocks and S slices. A slice holds
    64 words a block    the codes, in order
     4 words a block    the sums of 32 codes, as i16
and after the slices come the NB scales, f32.

A block's integers are exact in i32: |S| <= 63 * 15 * 127 * 256 < 2^25 for Q4_K, and 4 * |S| <= 4 * 128 * 32 * 127 * 256
< 2^29 for Q6_K."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels.errors import require
from exactmoe.kernels.formats import BLOCK, QuantFormat, executable_format
from exactmoe.kernels.launch import interpreting
from exactmoe.kernels.numerics import (
    bits_of,
    codes_8,
    codes_15,
    factors_8,
    factors_15,
    from_bits,
    magnitude,
    sign_key,
)
from exactmoe.kernels.tensors import QuantMatrix

_INTERPRETED = tl.constexpr(interpreting())
Q4_K = tl.constexpr(12)
_NIBBLES = tl.constexpr(0x0F0F0F0F)
_HIGH_PAIRS = tl.constexpr(0x30303030)
_CODES_UP = tl.constexpr(0x3C3C3C3C)
_TOP_PAIRS = tl.constexpr(-0x3F3F3F40)  # 0xC0C0C0C0
_FLIPPED = -0x55555556  # 0xAAAAAAAA


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
    storage: Tensor  # all planes, one behind the other

    @property
    def planes(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """What a kernel is given."""
        return self[:4]

    @property
    def plane_bytes(self) -> tuple[int, int, int, int]:
        """Bytes of each plane that an expert has."""
        words, high, scales, d = (0 if p is None else p.nbytes // self.experts for p in self.planes)
        return words, high, scales, d


def pack(weight: QuantMatrix) -> PackedMatrix:
    """`weight` in planes; Q4_K shares the memory of `weight`."""
    executable_format(weight.format.name, "weight")
    n, k, blocks = weight.n, weight.k, weight.k // BLOCK
    rows = weight.data.numel() // (blocks * weight.format.block_bytes)
    experts = rows // n if n else 1
    if weight.format.name == "Q4_K":
        require(weight.data.data_ptr() % 16 == 0, "Q4_K weights must start at a multiple of 16 bytes")
        words = weight.data.view(rows, -1).view(torch.int32)
        return PackedMatrix(words, None, None, None, weight.format, n, k, experts, words)
    block = weight.data.view(rows, blocks, weight.format.block_bytes)
    storage = torch.empty(block.numel(), dtype=torch.uint8, device=block.device)
    low, high, places, d = storage.split([rows * blocks * size for size in (128, 64, 16, 2)])
    # Scale of the sub-block that starts at weight 128*n + 32*k + 16*v goes to (n, v, k): a lane takes four at once.
    scales = block[..., 192:208].reshape(rows, blocks, 2, 4, 2).transpose(3, 4)
    return PackedMatrix(
        _plane(low, block[..., :128], torch.int32),
        _plane(high, block[..., 128:192], torch.int32).bitwise_xor_(_FLIPPED),
        _plane(places, scales, torch.int32),
        _plane(d, block[..., 208:], torch.float16),
        weight.format, n, k, experts, storage,
    )  # fmt: skip


def _plane(place: Tensor, part: Tensor, dtype: torch.dtype) -> Tensor:
    """`part` copied to `place`, as rows of `dtype`."""
    place.view(part.shape).copy_(part)
    return place.view(part.shape[0], -1).view(dtype)


def operand_words(width: int, slices: int) -> int:
    """i32 words of the operand of a row of `width` activations."""
    return width // BLOCK * (68 * slices + 1)


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
def dp2a(a, b, c, half: tl.constexpr):
    """c plus the dot of the two signed i16 in `a` with the two signed bytes in half `half` of `b`."""
    if _INTERPRETED:
        bytes_ = b >> (16 * half)
        return c + ((a << 16) >> 16) * ((bytes_ << 24) >> 24) + (a >> 16) * ((bytes_ << 16) >> 24)
    elif half == 0:
        return tl.inline_asm_elementwise(
            "dp2a.lo.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "dp2a.hi.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def operand_index(NB2: tl.constexpr):
    """Index of the elements of NB2 blocks as a tile [2, NB2, 128], halves of blocks first.

    A warp holds whole rows of 128 and both halves of a block, so that nothing in a block crosses warps."""
    half = tl.arange(0, 2)[:, None, None] * 128
    return half + tl.arange(0, NB2)[None, :, None] * 256 + tl.arange(0, 128)[None, None, :]


@triton.jit
def store_operand(x, start, block, at_ptr, NB: tl.constexpr, S: tl.constexpr, SUMS: tl.constexpr):
    """Quantise f32 [2, M, 128] as blocks `block` [M] of the operands that begin `start` [M] words after `at_ptr`.

    A block from NB on is not stored, sums only for a format that takes them (`SUMS`)."""
    mag = magnitude(x)
    top = tl.max(tl.max(mag, axis=2), axis=0)  # [M]
    top3 = top[None, :, None]
    if S == 1:
        index = (tl.arange(0, 2) * 128)[:, None, None] + tl.arange(0, 128)[None, None, :]
        key = tl.min(tl.min(sign_key(x, mag, top3, index), axis=2), axis=0)
        s, scale = factors_8(top, key)
        _store_slice(codes_8(x, top3, s[None, :, None]), start, block, at_ptr, NB, SUMS)
    else:
        s, scale = factors_15(top)
        v = codes_15(x, top3, s[None, :, None])
        hi = (v + 64) >> 7
        _store_slice(hi, start, block, at_ptr, NB, SUMS)
        _store_slice(v - 128 * hi, start, block, at_ptr + 68 * NB, NB, SUMS)
    scale_ptr = (at_ptr + 68 * S * NB).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(scale_ptr + start + block, scale, block < NB)


@triton.jit
def _store_slice(q, start, block, at_ptr, NB: tl.constexpr, SUMS: tl.constexpr):
    M: tl.constexpr = q.shape[1]
    live = (block < NB)[None, :, None]
    half = tl.arange(0, 2)[:, None, None]
    at = block[None, :, None]
    start = start[None, :, None]
    byte_ptr = at_ptr.to(tl.pointer_type(tl.int8), bitcast=True)
    tl.store(byte_ptr + start * 4 + at * 256 + half * 128 + tl.arange(0, 128)[None, None, :], q.to(tl.int8), live)
    if SUMS:
        sums = tl.sum(tl.reshape(q, [2, M, 4, 32]), axis=3)
        sum_ptr = (at_ptr + 64 * NB).to(tl.pointer_type(tl.int16), bitcast=True)
        tl.store(sum_ptr + start * 2 + at * 8 + half * 4 + tl.arange(0, 4)[None, None, :], sums.to(tl.int16), live)


@triton.jit
def load_block(planes, row, live, b: tl.constexpr, NB: tl.constexpr, FORMAT: tl.constexpr, EVEN: tl.constexpr):
    """Block `b` of weight rows `row` [N], i64, as a tuple for `block_product`; nothing is awaited yet.

    Lanes come first in a tile: Triton deals its threads out in that order, so that a block lies in one warp. What all
    lanes of a row need, each loads for itself, in the same 16 bytes a row."""
    v = tl.arange(0, 4)[None, None, :]
    live3 = live[None, :, None]
    if FORMAT == Q4_K:
        ptr = (planes[0] + row * (NB * 36) + b * 36)[None, :, None] + v
        return (_load(ptr + 4 + (4 * tl.arange(0, 8))[:, None, None], live3, EVEN),)
    else:
        N: tl.constexpr = row.shape[0]
        lane = tl.arange(0, 4)
        at = (lane // 2 * 16 + lane % 2 * 4)[:, None, None] + v
        low_ptr = (planes[0] + row * (NB * 32) + b * 32)[None, :, None] + at
        at = (lane * 4)[:, None, None] + v
        high_ptr = (planes[1] + row * (NB * 16) + b * 16)[None, :, None] + at
        low, low2, high = _load(low_ptr, live3, EVEN), _load(low_ptr + 8, live3, EVEN), _load(high_ptr, live3, EVEN)
        scales_ptr = (planes[2] + row * (NB * 4) + b * 4)[None, :, None] + v
        scales = _load(tl.broadcast_to(scales_ptr, [4, N, 4]), live3, EVEN)
        return low, low2, high, scales, _load(planes[3] + row * NB + b, live, EVEN)


@triton.jit
def _load(ptr, live, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(ptr)
    else:
        return tl.load(ptr, live, 0)


@triton.jit
def _load_head(planes, row, live, b: tl.constexpr, NB: tl.constexpr, EVEN: tl.constexpr):
    """The first four words of Q4_K blocks, [8, N, 4]. `load_block` has fetched their lines; in flight they would
    take as many registers as the codes."""
    N: tl.constexpr = row.shape[0]
    ptr = (planes[0] + row * (NB * 36) + b * 36)[None, :, None] + tl.arange(0, 4)[None, None, :]
    return _load(tl.broadcast_to(ptr, [8, N, 4]), live[None, :, None], EVEN)


@triton.jit
def block_product(
    w, planes, row, live, x_ptr,
    b: tl.constexpr, NB: tl.constexpr, FORMAT: tl.constexpr, S: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """P of block `b`: xd * (d*S - dmin*T) for Q4_K, xd * (d*S) for Q6_K, of `load_block`'s tuple `w` and an operand.

    It is [lanes, N], the same in every lane. `x_ptr` is [1] or [N]: one operand for all rows, or one for each."""
    xd = tl.load((x_ptr + 68 * S * NB + b).to(tl.pointer_type(tl.float32), bitcast=True))[None, :]
    if FORMAT == Q4_K:
        scales, mins, d, dmin = _unpack_q4_k(_load_head(planes, row, live, b, NB, EVEN))
        s, t = _sums_q4_k(w[0], scales, mins, x_ptr, b, NB)
        if S == 2:
            s_lo, t_lo = _sums_q4_k(w[0], scales, mins, x_ptr + 68 * NB, b, NB)
            s = 128.0 * s + s_lo
            t = 128.0 * t + t_lo
        return xd * (d * s[None, :] - dmin * t)
    else:
        scales = tl.sum(tl.where(tl.arange(0, 4)[:, None, None] == tl.arange(0, 4)[None, None, :], w[3], 0), axis=2)
        s = _sum_q6_k(w, scales, x_ptr, b, NB)
        if S == 2:
            s = 128.0 * s + _sum_q6_k(w, scales, x_ptr + 68 * NB, b, NB)
        return tl.broadcast_to(xd * (w[4].to(tl.float32) * s)[None, :], scales.shape)


@triton.jit
def of_lanes(y):
    """[N] of f32 [lanes, N] that are the same in every lane."""
    return from_bits(tl.max(bits_of(y), axis=0))


@triton.jit
def _half(word):
    """The f16 in the low half of i32 `word`, as f32."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _word(head, i: tl.constexpr):
    """Word `i` of every four."""
    return tl.sum(tl.where(tl.arange(0, 4)[None, None, :] == i, head, 0), axis=2)


@triton.jit
def _unpack_q4_k(head):
    """Of blocks' first four words: scales and mins of the 8 sub-blocks, each as two i32 of 4 bytes; d and dmin."""
    h0, h1, h2, h3 = _word(head, 0), _word(head, 1), _word(head, 2), _word(head, 3)
    scales = (h1 & 0x3F3F3F3F, (h3 & _NIBBLES) | ((h1 >> 2) & _HIGH_PAIRS))
    mins = (h2 & 0x3F3F3F3F, ((h3 >> 4) & _NIBBLES) | ((h2 >> 2) & _HIGH_PAIRS))
    return scales, mins, _half(h0), _half(h0 >> 16)


@triton.jit
def _sums_q4_k(words, scales, mins, x_ptr, b: tl.constexpr, NB: tl.constexpr):
    """f32 of the exact sums over one block and slice: of sc*q*x, [N], and of mn*x, [8, N], the same in every lane."""
    u = tl.arange(0, 8)  # lane u holds bytes 16u..16u+15: sub-blocks u//2*2 in the low nibbles, the next in the high
    at = x_ptr[None, :, None] + b * 64 + (u // 2 * 16 + u % 2 * 4)[:, None, None] + tl.arange(0, 4)[None, None, :]
    low = tl.sum(dp4a(words & _NIBBLES, tl.load(at), 0), axis=2)
    high = tl.sum(dp4a((words >> 4) & _NIBBLES, tl.load(at + 8), 0), axis=2)
    pair = tl.where((u < 4)[:, None], scales[0], scales[1]) >> (u // 2 % 2 * 16)[:, None]
    s = tl.sum((pair & 255) * low + ((pair >> 8) & 255) * high, axis=0)
    sums = (x_ptr + 64 * NB + b * 4).to(tl.pointer_type(tl.int64), bitcast=True)
    first, last = tl.load(sums)[None, :], tl.load(sums + 1)[None, :]
    t = dp2a((first >> 32).to(tl.int32), mins[0], dp2a(first.to(tl.int32), mins[0], 0, 0), 1)
    t = dp2a((last >> 32).to(tl.int32), mins[1], dp2a(last.to(tl.int32), mins[1], t, 0), 1)
    return s.to(tl.float32), t.to(tl.float32)


@triton.jit
def _sum_q6_k(w, scales, x_ptr, b: tl.constexpr, NB: tl.constexpr):
    """f32 of the exact sum of sc*(q-32)*x over one block and slice, [N]; `scales` [4, N] are each lane's four."""
    low, low2, high = w[0], w[1], w[2]
    lane = tl.arange(0, 4)  # half lane//2 of the block; 16 weights in each of its four rows of 32
    at = x_ptr[None, :, None] + b * 64 + (lane // 2 * 32 + lane % 2 * 4)[:, None, None] + tl.arange(0, 4)[None, None, :]
    s = _scaled(low << 2, high << 6, at, scales, 0)
    s += _scaled(low2 << 2, high << 4, at, scales, 1)
    s += _scaled(low >> 2, high << 2, at, scales, 2)
    s += _scaled(low2 >> 2, high, at, scales, 3)
    return (tl.sum(s, axis=0) >> 2).to(tl.float32)


@triton.jit
def _scaled(low, high, at, scales, k: tl.constexpr):
    """4 * sc * sum((q-32)*x) of each lane's sub-block in row `k`, [4, N]."""
    dot = tl.sum(dp4a((low & _CODES_UP) | (high & _TOP_PAIRS), tl.load(at + 8 * k), 0), axis=2)
    return ((scales << (24 - 8 * k)) >> 24) * dot
