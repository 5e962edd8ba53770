"""Quantise f32 weights to Q4_K and Q6_K blocks, as llama.cpp does without an importance matrix, in numpy.

    quantise_q4_k(x [..., K] f32) -> [..., K/256*144] u8        quantise_q6_k(x [..., K] f32) -> [..., K/256*210] u8

Sources: llama.cpp, ggml/src/ggml-quants.c: `quantize_row_q4_K_ref` with `make_qkx2_quants`, and
`quantize_row_q6_K_ref` with `make_qx_quants`. Rounding the extremes of a sub-block to the ends of the code range is not
the best choice of scale, so both formats try about twenty scales, fit each by weighted least squares and keep the best.
Then the scales are themselves rounded (6 bits or 8) and the codes are taken again for the rounded scales.

The steps and their order are llama.cpp's, with sums in float64 where llama.cpp adds f32 one by one: where two scales
are all but equal the choice may differ, so not every block is byte-equal to llama.cpp's. gguf-py can read both formats
but write neither."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exactmoe.kernels.errors import InvalidInput, require
from exactmoe.kernels.formats import BLOCK, Q4_K, Q6_K, QuantFormat

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

_CHUNK = 2048  # blocks worked on at a time: about 2 MiB of weights, some 20 MiB of intermediates
_TINY = np.float32(
    1e-15
)  # ggml's GROUP_MAX_EPS; no float16 scale reaches down to a smaller sub-block, it becomes zeros
_HUGE = 1e30  # far above what a float16 scale reaches, and safe from overflow in the search


def quantise_q4_k(x: F32) -> U8:
    """Q4_K bytes of `x` [..., K] f32, K a multiple of 256: [..., K/256*144] u8. Raises `InvalidInput`."""
    return _by_block(x, Q4_K, _q4_k_blocks)


def quantise_q6_k(x: F32) -> U8:
    """Q6_K bytes of `x` [..., K] f32, K a multiple of 256: [..., K/256*210] u8. Raises `InvalidInput`."""
    return _by_block(x, Q6_K, _q6_k_blocks)


def quantise(x: F32, type_name: str) -> U8:
    """`x` in the format called `type_name`, "Q4_K" or "Q6_K"."""
    if type_name not in _QUANTISER:
        raise InvalidInput(f"type {type_name!r} cannot be written; supported: {', '.join(_QUANTISER)}")
    return _QUANTISER[type_name](x)


def pack_q4_k(d: NDArray[np.float16], dmin: NDArray[np.float16], scale: U8, minimum: U8, code: U8) -> U8:
    """Blocks [n, 144] from d, dmin [n] f16, scale, minimum [n, 8] u8 below 64, code [n, 256] u8 below 16."""
    # scales, 12 B. Bytes 0..3: scale 0..3 and, on top, the high bits of scale 4..7. Bytes 4..7: the same of minimum.
    # Bytes 8..11: the low nibbles of scale 4..7 and of minimum 4..7.
    low, high = slice(0, 4), slice(4, 8)
    packed = np.concatenate(
        (
            scale[:, low] | (scale[:, high] >> 4 << 6),
            minimum[:, low] | (minimum[:, high] >> 4 << 6),
            (scale[:, high] & 15) | ((minimum[:, high] & 15) << 4),
        ),
        axis=1,
    )
    # qs, 4 chunks of 32 B: byte l of chunk c = code 64c + l (low nibble) and code 64c + 32 + l (high nibble)
    pair = code.reshape(-1, 4, 2, 32)
    qs = (pair[:, :, 0] | (pair[:, :, 1] << 4)).reshape(-1, 128)
    return np.concatenate((_bytes(d), _bytes(dmin), packed, qs), axis=1)


def pack_q6_k(d: NDArray[np.float16], scale: NDArray[np.int8], code: U8) -> U8:
    """Blocks [n, 210] from d [n] f16, scale [n, 16] i8, code [n, 256] u8 below 64 (the weight's integer plus 32)."""
    # Each half of 128 codes is four quarters of 32. Byte l of ql holds the low nibbles of quarters 0 and 2, byte 32 + l
    # those of quarters 1 and 3; byte l of qh holds the high two bits of all four, quarter 0 lowest.
    quarter = code.reshape(-1, 2, 4, 32)
    nibble, top = quarter & 15, quarter >> 4
    ql = nibble[:, :, 0:2] | (nibble[:, :, 2:4] << 4)  # [n, 2, 2, 32]
    qh = top[:, :, 0] | (top[:, :, 1] << 2) | (top[:, :, 2] << 4) | (top[:, :, 3] << 6)  # [n, 2, 32]
    return np.concatenate((ql.reshape(-1, 128), qh.reshape(-1, 64), scale.view(np.uint8), _bytes(d)), axis=1)


_QUANTISER: dict[str, Callable[[F32], U8]] = {"Q4_K": quantise_q4_k, "Q6_K": quantise_q6_k}


def _by_block(x: F32, form: QuantFormat, blocks: Callable[[F32], U8]) -> U8:
    require(x.dtype == np.float32, f"{form.name}: weights must be float32, got {x.dtype}")
    require(x.ndim >= 1, f"{form.name}: weights need at least one dimension, got a scalar")
    K = x.shape[-1]
    require(
        K > 0 and K % BLOCK == 0, f"{form.name}: the last dimension must be a positive multiple of {BLOCK}, got {K}"
    )
    flat = x.reshape(-1, BLOCK)
    out = np.empty((len(flat), form.block_bytes), np.uint8)
    for start in range(0, len(flat), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        sane = bool((np.abs(chunk) < _HUGE).all())  # false for NaN too
        require(sane, f"{form.name}: weights hold NaN, Inf or a magnitude of {_HUGE:g} or more")
        out[start : start + _CHUNK] = blocks(chunk)
    return out.reshape(*x.shape[:-1], K // BLOCK * form.block_bytes)


def _q4_k_blocks(x: F32) -> U8:
    """Quantise x [n, 256] to blocks [n, 144]."""
    sub = x.reshape(-1, 8, 32)
    scale, minimum = _search_scale_and_min(sub)  # [n, 8] each
    d, step_scale = _six_bits(scale, "Q4_K")
    dmin, step_min = _six_bits(minimum, "Q4_K")
    width = (d.astype(np.float32)[:, None] * step_scale)[..., None]  # [n, 8, 1]
    offset = (dmin.astype(np.float32)[:, None] * step_min)[..., None]
    code = np.zeros_like(sub)
    np.divide(sub + offset, width, out=code, where=width != 0)
    code = np.clip(np.rint(code), 0, 15)
    return pack_q4_k(d, dmin, step_scale, step_min, code.astype(np.uint8).reshape(-1, BLOCK))


def _six_bits(value: F32, name: str) -> tuple[NDArray[np.float16], U8]:
    """Round value [n, 8] >= 0 to unit [n] f16 times steps [n, 8] u8 below 64."""
    top = value.max(1, keepdims=True)
    unit = _half(top[:, 0] / np.float32(63), name)
    inverse = np.zeros_like(top)
    # llama.cpp divides by the unrounded unit, not by its float16.
    np.divide(np.float32(63), top, out=inverse, where=top > _TINY)
    return unit, np.minimum(np.rint(value * inverse), 63).astype(np.uint8)


def _search_scale_and_min(x: F32) -> tuple[F32, F32]:
    """Find scale, minimum [...] >= 0 with x [..., 32] near scale * code - minimum, codes 0..15.

    This is make_qkx2_quants with nmax 15, rmin -1, rdelta 0.1, nstep 20; errors are weighted with |x| + rms(x)."""
    weight = np.abs(x) + np.sqrt(_sum(np.square(x, dtype=np.float64)) / x.shape[-1])[..., None]  # f64
    sum_w, sum_x = _sum(weight), _sum(weight * x)
    low = np.minimum(x.min(-1), 0)
    high = x.max(-1)
    flat = high - low < _TINY  # nothing to scale: equal numbers, none positive
    span = np.where(flat, np.float32(1), high - low)
    scale, least = span / np.float32(15), low.astype(np.float32)
    best = _sum(weight * np.square(scale[..., None] * _code(x, least, 15 / span) + least[..., None] - x))
    for trial in range(21):
        # Codes are counted from the best minimum so far, not from the block's least number: so does llama.cpp.
        inverse = np.float32(-1 + 0.1 * trial + 15) / np.where(flat, np.float32(1), _positive(high - least))
        code = _code(x, least, inverse)
        sum_l, sum_l2, sum_xl = _sum(weight * code), _sum(weight * code * code), _sum(weight * code * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        usable = determinant > 0
        divisor = np.where(usable, determinant, 1)
        trial_scale = (sum_w * sum_xl - sum_x * sum_l) / divisor
        trial_least = (sum_l2 * sum_x - sum_l * sum_xl) / divisor
        above = trial_least > 0
        trial_scale = np.where(above, sum_xl / np.where(sum_l2 > 0, sum_l2, 1), trial_scale).astype(np.float32)
        trial_least = np.where(above, 0, trial_least).astype(np.float32)
        error = _sum(weight * np.square(trial_scale[..., None] * code + trial_least[..., None] - x))
        better = usable & (error < best)
        best = np.where(better, error, best)
        scale = np.where(better, trial_scale, scale)
        least = np.where(better, trial_least, least)
    return np.where(flat, np.float32(0), scale), -least


def _q6_k_blocks(x: F32) -> U8:
    """Quantise x [n, 256] to blocks [n, 210]."""
    sub = x.reshape(-1, 16, 16)
    scale = _search_scale(sub)  # [n, 16], of either sign
    largest = np.take_along_axis(scale, np.abs(scale).argmax(1)[:, None], 1)  # [n, 1], the first of equal magnitude
    zero = np.abs(largest) < _TINY
    inverse = np.float32(-128) / np.where(zero, np.float32(1), largest)
    d = _half(np.where(zero, np.float32(0), 1 / inverse)[:, 0], "Q6_K")
    step = np.where(zero, 0, np.minimum(np.rint(inverse * scale), 127)).astype(np.int8)
    width = (d.astype(np.float32)[:, None] * step)[..., None]  # [n, 16, 1]
    code = np.zeros_like(sub)
    np.divide(sub, width, out=code, where=width != 0)
    code = np.clip(np.rint(code), -32, 31) + 32
    return pack_q6_k(d, step, code.astype(np.uint8).reshape(-1, BLOCK))


def _search_scale(x: F32) -> F32:
    """Find scale [...], of either sign, with x [..., 16] near scale * code, codes -32..31.

    This is make_qx_quants with nmax 32, rmse_type 1: errors are weighted with x squared, and the largest magnitude is
    put at -32, the longer end of the range."""
    extreme = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)
    zero = np.abs(extreme) < _TINY
    extreme = np.where(zero, np.float32(1), extreme)
    weight = np.square(x, dtype=np.float64)
    scale = np.zeros(x.shape[:-1], np.float64)
    best = np.full(x.shape[:-1], -1.0)
    for shift in (0, *range(-9, 0), *range(1, 10)):
        code = np.clip(np.rint(np.float32(-(32 + 0.1 * shift)) / extreme * x), -32, 31)
        sum_xl, sum_l2 = _sum(weight * x * code), _sum(weight * code * code)
        fit = sum_xl / np.where(sum_l2 > 0, sum_l2, 1)
        # scale * sum_xl is what the fit takes off the squared error, so larger is better
        better = (sum_l2 > 0) & (fit * sum_xl > best)
        scale = np.where(better, fit, scale)
        best = np.where(better, fit * sum_xl, best)
    return np.where(zero[..., 0], 0, scale).astype(np.float32)


def _code(x: F32, least: F32, inverse: NDArray[Any]) -> F32:
    return np.clip(np.rint(inverse[..., None].astype(np.float32) * (x - least[..., None])), 0, 15)


def _positive(x: F32) -> F32:
    return np.where(x > 0, x, np.float32(1))


def _sum(x: NDArray[Any]) -> NDArray[np.float64]:
    total: NDArray[np.float64] = np.sum(x, axis=-1, dtype=np.float64)
    return total


def _half(x: F32, name: str) -> NDArray[np.float16]:
    limit = float(np.finfo(np.float16).max)
    worst = float(np.abs(x).max(initial=0))
    require(worst <= limit, f"{name}: a block needs the scale {worst:g}, above float16's largest, {limit:g}")
    return x.astype(np.float16)


def _bytes(x: NDArray[np.float16]) -> U8:
    return x.astype("<f2").view(np.uint8).reshape(len(x), 2)
