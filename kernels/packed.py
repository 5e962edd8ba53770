"""Quantised weights and one activation row as integer dots read them: four bytes to an i32, products by dp4a.

Weights lie in planes, or blocks of 144 and 210 bytes could not be read in wide words and whole lines. Q4_K: codes and
heads, as every kernel takes them. Q6_K, taken apart once more at load, losslessly: low bits as in the file, and in the
order of the eight lanes that take 16 bytes of them each, high bits, scales, d. Of a lane's high bits the first word
goes with its low nibbles and the second with its high ones: two bits of byte 4j+i in byte i, 2j places up. The upper of
the two is flipped: then code and high bits, two places up, are the signed byte 4 * (q - 32).

Activations: an `operand`, i32 [S * 68 * NB + NB] for NB blocks and S slices. A slice holds
    64 words a block    the codes, in order
     4 words a block    the sums of 32 codes, as i16
and after the slices come the NB scales, f32. Where Q8_K's scale is positive, it and the codes are negated: see
numerics.quantize_8.

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
from exactmoe.kernels.numerics import quantize_8, quantize_15
from exactmoe.kernels.tensors import QuantMatrix

_INTERPRETED = tl.constexpr(interpreting())
Q4_K = tl.constexpr(12)
_NIBBLES = tl.constexpr(0x0F0F0F0F)
_HIGH_PAIRS = tl.constexpr(0x30303030)
_CODES_UP = tl.constexpr(0x3C3C3C3C)
_TOP_PAIRS = tl.constexpr(-0x3F3F3F40)  # 0xC0C0C0C0


class PackedMatrix(NamedTuple):
    """Rows of quantised weights, of one matrix or of E experts' (R = E * n rows), in the planes of their format."""

    words: Tensor  # Q4_K: codes, Q6_K: low bits, i32 [R, NB*32]
    high: Tensor  # Q4_K: heads, i32 [R, NB*4]; Q6_K: high bits, i64 [R, NB*8]
    scales: Tensor | None  # Q6_K: scales, i16 [R, NB*8]
    d: Tensor | None  # Q6_K: d, f16 [R, NB]
    format: QuantFormat
    n: int  # output features
    k: int  # input features
    experts: int

    @property
    def planes(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What a kernel is given."""
        return self[:4]

    @property
    def tensors(self) -> list[Tensor]:
        """The planes that there are."""
        return [plane for plane in self.planes if plane is not None]

    @property
    def plane_bytes(self) -> tuple[int, int, int, int]:
        """Bytes of each plane that an expert has."""
        words, high, scales, d = (0 if p is None else p.nbytes // self.experts for p in self.planes)
        return words, high, scales, d


def pack(weight: QuantMatrix) -> PackedMatrix:
    """`weight` in planes; Q4_K shares the memory of `weight`."""
    executable_format(weight.format.name, "weight")
    n, k, blocks = weight.n, weight.k, weight.k // BLOCK
    rows = weight.data.numel() // weight.data.shape[-1]
    experts = rows // n if n else 1
    if weight.heads is not None:
        words, heads = (part.view(rows, -1).view(torch.int32) for part in (weight.data, weight.heads))
        return PackedMatrix(words, heads, None, None, weight.format, n, k, experts)
    block = weight.data.view(rows, blocks, weight.format.block_bytes)
    storage = torch.empty(block.numel(), dtype=torch.uint8, device=block.device)
    low, high, scales, d = storage.split([rows * blocks * size for size in (128, 64, 16, 2)])
    _pack_high(block[..., 128:192].unflatten(2, (2, 2, 4, 4)), high.view(rows, blocks, 2, 2, 2, 2, 4))
    return PackedMatrix(
        _plane(low, block[..., :128], torch.int32),
        high.view(rows, -1).view(torch.int64),
        _plane(scales, block[..., 192:208].unflatten(2, (2, 2, 2, 2)).permute(0, 1, 2, 4, 5, 3), torch.int16),
        _plane(d, block[..., 208:], torch.float16),
        weight.format, n, k, experts,
    )  # fmt: skip


def _pack_high(bits: Tensor, high: Tensor) -> None:
    """High bits u8 [R, NB, half, 16 bytes, j, i] of the file, as lanes take them: [R, NB, half, row, 16, nibble, i].

    The file has the rows of 32 weights of a half, and then those 64 further on, side by side in a byte."""
    for row in range(2):
        for nibble in range(2):
            pairs = bits.bitwise_right_shift(2 * row + 4 * nibble).bitwise_and_(3).bitwise_xor_(2)
            first, second, third, fourth = pairs.unbind(4)
            high[:, :, :, row, :, nibble] = first | second << 2 | third << 4 | fourth << 6


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
def dp4a(a, b, c, SIGNED: tl.constexpr = True):
    """c plus the dot of the four bytes in each i32 of `a`, signed or not, with the four signed ones in `b`."""
    if _INTERPRETED:
        total = c
        for up in tl.static_range(0, 32, 8):
            byte = (a << up) >> 24
            total += (byte if SIGNED else byte & 255) * ((b << up) >> 24)
        return total
    elif SIGNED:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
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
def store_operand(x, start, block, at_ptr, NB: tl.constexpr, S: tl.constexpr, SUMS: tl.constexpr):
    """Quantise f32 [M, 256] as blocks `block` [M] of the operands that begin `start` [M] words after `at_ptr`.

    A block from NB on is not stored, sums only for a format that takes them (`SUMS`)."""
    if S == 1:
        q, scale = quantize_8(x, SIGN=False)
        _store_slice(q, start, block, at_ptr, NB, SUMS)
    else:
        v, scale = quantize_15(x)
        hi = (v + 64) >> 7
        _store_slice(hi, start, block, at_ptr, NB, SUMS)
        _store_slice(v - 128 * hi, start, block, at_ptr + 68 * NB, NB, SUMS)
    scale_ptr = (at_ptr + 68 * S * NB).to(tl.pointer_type(tl.float32), bitcast=True)
    store_of_rows(scale_ptr + start + block, scale, block < NB)


@triton.jit
def store_of_rows(ptr, value, live):
    """Store `value` [M], made of rows, at `ptr` [M]: as a row itself, or it would go to another layout first."""
    i = tl.arange(0, 32)[None, :]
    at = ptr[:, None] + i
    tl.store(at, tl.broadcast_to(value[:, None], at.shape), live[:, None] & (i == 0))


@triton.jit
def _store_slice(q, start, block, at_ptr, NB: tl.constexpr, SUMS: tl.constexpr):
    live = (block < NB)[:, None]
    at, start = block[:, None], start[:, None]
    byte_ptr = at_ptr.to(tl.pointer_type(tl.int8), bitcast=True)
    tl.store(byte_ptr + start * 4 + at * 256 + tl.arange(0, 256)[None, :], q.to(tl.int8), live)
    if SUMS:
        sums = tl.sum(tl.reshape(q, [q.shape[0], 8, 32]), axis=2)
        sum_ptr = (at_ptr + 64 * NB).to(tl.pointer_type(tl.int16), bitcast=True)
        # Four times over, as a row of 32: then they need not go to another layout.
        i = tl.arange(0, 32)[None, :]
        again = tl.reshape(tl.broadcast_to(sums[:, :, None], [q.shape[0], 8, 4]), [q.shape[0], 32])
        tl.store(sum_ptr + start * 2 + at * 8 + i // 4, again.to(tl.int16), live & (i % 4 == 0))


@triton.jit
def load_block(planes, start, live, b: tl.constexpr, FORMAT: tl.constexpr, EVEN: tl.constexpr):
    """Blocks `start` [N] + b of the weights, i64, without `load_end`, as a tuple; nothing is awaited.

    A block is 32 words in the order of memory, so that its eight lanes of four lie in one warp."""
    i = tl.arange(0, 32)[None, :]
    u = tl.arange(0, 8)[None, :]
    live = live[:, None]
    if FORMAT == Q4_K:
        return (_stream((planes[0] + start * 32 + b * 32)[:, None] + i, live, EVEN),)
    else:
        at = (start + b)[:, None]
        return (
            _stream(planes[0] + at * 32 + i, live, EVEN),
            _stream(planes[1] + at * 8 + u, live, EVEN),
            _stream(planes[2] + at * 8 + u, live, EVEN),
        )


@triton.jit
def _stream(ptr, live, EVEN: tl.constexpr):
    """What is read once: the caches had better keep what is read again, or was asked for ahead."""
    if EVEN:
        return tl.load(ptr, eviction_policy="evict_first")
    else:
        return tl.load(ptr, live, 0, eviction_policy="evict_first")


@triton.jit
def _load(ptr, live, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(ptr)
    else:
        return tl.load(ptr, live, 0)


@triton.jit
def _words(x):
    """The four words of each lane's, of [M, 32], as [M, 8]."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 8, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def load_end(planes, start, n, b: tl.constexpr, N, STEP, TILES, NB, FORMAT: tl.constexpr, EVEN: tl.constexpr):
    """What a block has once: the head of Q4_K, d of Q6_K.

    Lane t has it of tile t, whose rows `n` [M], and those of its blocks `start` [M], lie STEP rows of NB blocks behind
    those of the tile before; lanes without a tile have that of the last."""
    if FORMAT == Q4_K:
        i = tl.arange(0, 32)[None, :]
        row = tl.minimum(i // 4, TILES - 1) * STEP
        words_ptr = planes[1] + (start[:, None] + row * NB + b) * 4 + i % 4
        return _load(words_ptr, n[:, None] + row < N, EVEN)
    else:
        row = tl.minimum(tl.arange(0, 8)[None, :], TILES - 1) * STEP
        return _load(planes[3] + (start[:, None] + row * NB + b), n[:, None] + row < N, EVEN)


@triton.jit
def operand_at(ptr, skip, NB: tl.constexpr, S: tl.constexpr):
    """Where an operand of NB blocks, at `ptr` [1] or [N], has codes, sums and scales from block `skip` on."""
    return ptr + skip * 64, ptr + 64 * NB + skip * 4, ptr + 68 * S * NB + skip


@triton.jit
def load_operand(x, b: tl.constexpr, NB: tl.constexpr, FORMAT: tl.constexpr, S: tl.constexpr):
    """Block `b` of `operand_at`'s operands as a tuple for `block_product`; nothing is awaited yet."""
    scale = tl.load((x[2] + b).to(tl.pointer_type(tl.float32), bitcast=True))
    loaded = _load_slice(x[0] + b * 64, x[1] + b * 4, FORMAT)
    if S == 2:
        loaded = loaded + _load_slice(x[0] + (68 * NB + b * 64), x[1] + (68 * NB + b * 4), FORMAT)
    return loaded + (scale,)  # noqa: RUF005 - Triton has no *


@triton.jit
def _load_slice(x_ptr, sums_ptr, FORMAT: tl.constexpr):
    """Codes of a block and slice as the lanes take them, in two halves; for Q4_K its sums too."""
    i = tl.arange(0, 32)[None, :]
    if FORMAT == Q4_K:  # lane u holds bytes 16u..16u+15: sub-blocks u//2*2 in the low nibbles, the next above
        at = x_ptr[:, None] + i // 8 * 16 + i % 8
        sums = sums_ptr.to(tl.pointer_type(tl.int64), bitcast=True)
        return tl.load(at), tl.load(at + 8), tl.load(sums), tl.load(sums + 1)
    else:
        at = x_ptr[:, None] + i // 16 * 32 + i % 16
        return tl.load(at), tl.load(at + 16)


@triton.jit
def scales_of(end, FORMAT: tl.constexpr):
    """The eight scales of each lane's own tile, a byte each, as two words [M, 8], from Q4_K's `load_end`."""
    if FORMAT == Q4_K:
        _, first, _, third = _words(end)
        return first & 0x3F3F3F3F, (third & _NIBBLES) | ((first >> 2) & _HIGH_PAIRS)
    else:
        return ()


@triton.jit
def block_sums(w, scales, t: tl.constexpr, x, FORMAT: tl.constexpr, S: tl.constexpr):
    """The exact sums over the blocks of tile t, i32 [N] for each slice, from `load_block`, the `scales_of` all tiles,
    and `load_operand`: of sc*q*x for Q4_K, 4 times that of sc*(q-32)*x for Q6_K."""
    sums = ()  # type: tuple[tl.tensor, ...]
    u = tl.arange(0, 8)[None, :]
    if FORMAT == Q4_K:
        holder = tl.zeros([w[0].shape[0], 8], tl.int32) + t
        own = tl.where(u < 4, tl.gather(scales[0], holder, 1), tl.gather(scales[1], holder, 1)) >> (u // 2 % 2 * 16)
        sums = sums + (_sum_q4_k(w[0], own, x[0], x[1]),)  # noqa: RUF005 - Triton has no *
        if S == 2:
            sums = sums + (_sum_q4_k(w[0], own, x[4], x[5]),)  # noqa: RUF005
    else:
        sums = sums + (_sum_q6_k(w, x[0], x[1]),)  # noqa: RUF005 - Triton has no *
        if S == 2:
            sums = sums + (_sum_q6_k(w, x[2], x[3]),)  # noqa: RUF005
    return sums


@triton.jit
def block_product(sums, end, x, FORMAT: tl.constexpr, S: tl.constexpr):
    """P of blocks, [N, 8]: xd * (d*S - dmin*T) for Q4_K, xd * (d*S) for Q6_K; each lane has the `block_sums` and the
    `load_end` of its own tile."""
    if FORMAT == Q4_K:
        first, _, third, fourth = _words(end)
        mins = (third & 0x3F3F3F3F, ((fourth >> 4) & _NIBBLES) | ((third >> 2) & _HIGH_PAIRS))
        s = sums[0].to(tl.float32)
        t = _sum_of_mins(mins, x[2], x[3]).to(tl.float32)
        if S == 2:
            s = 128.0 * s + sums[1].to(tl.float32)
            t = 128.0 * t + _sum_of_mins(mins, x[6], x[7]).to(tl.float32)
        return x[4 * S][:, None] * (_half(first) * s - _half(first >> 16) * t)
    else:
        s = (sums[0] >> 2).to(tl.float32)
        if S == 2:
            s = 128.0 * s + (sums[1] >> 2).to(tl.float32)
        return x[2 * S][:, None] * (end.to(tl.float32) * s)


@triton.jit
def _half(word):
    """The f16 in the low half of i32 `word`, as f32."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _dot(a, b, SIGNED: tl.constexpr):
    """The sum over each lane's four words, [M, 8] of [M, 32], of what `dp4a` gives."""
    a0, a1, a2, a3 = _words(a)
    b0, b1, b2, b3 = _words(b)
    return dp4a(a3, b3, dp4a(a2, b2, dp4a(a1, b1, dp4a(a0, b0, 0, SIGNED), SIGNED), SIGNED), SIGNED)


@triton.jit
def _sum_q4_k(words, scales, x_low, x_high):
    """The exact sum of sc*q*x over one block and slice, [N]; of each lane's `scales` the low byte is of the sub-block
    in the low nibbles, the next of that in the high ones."""
    low = _dot(words & _NIBBLES, x_low, True)
    high = _dot(words & ~_NIBBLES, x_high, False) >> 4  # the nibbles where they stand: 16 times their sum
    return tl.sum((scales & 255) * low + ((scales >> 8) & 255) * high, axis=1)


@triton.jit
def _sum_of_mins(mins, first, last):
    """The exact sum of mn*x over one block and slice, [N, 8]: of two words of `mins` with the sums of x, i64 [N]."""
    first, last = first[:, None], last[:, None]
    t = dp2a((first >> 32).to(tl.int32), mins[0], dp2a(first.to(tl.int32), mins[0], 0, 0), 1)
    return dp2a((last >> 32).to(tl.int32), mins[1], dp2a(last.to(tl.int32), mins[1], t, 0), 1)


@triton.jit
def _sum_q6_k(w, x_first, x_second):
    """Four times the exact sum of sc*(q-32)*x over one block and slice, [N]."""
    scales = w[2].to(tl.int32)
    first = ((scales << 24) >> 24) * _dot_q6_k(w[0] << 2, w[1].to(tl.int32), x_first)
    return tl.sum(first + (scales >> 8) * _dot_q6_k(w[0] >> 2, (w[1] >> 32).to(tl.int32), x_second), axis=1)


@triton.jit
def _dot_q6_k(codes, high, x):
    """4 * sum((q-32)*x) of each lane's sub-block, [N, 8], from codes two places up, and their high bits."""
    c0, c1, c2, c3 = _words(codes & _CODES_UP)
    x0, x1, x2, x3 = _words(x)
    s = dp4a(c0 | ((high << 6) & _TOP_PAIRS), x0, 0)
    s = dp4a(c1 | ((high << 4) & _TOP_PAIRS), x1, s)
    s = dp4a(c2 | ((high << 2) & _TOP_PAIRS), x2, s)
    return dp4a(c3 | (high & _TOP_PAIRS), x3, s)
