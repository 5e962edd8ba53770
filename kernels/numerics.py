"""The arithmetic all kernels share, one copy of each move, as numerics-v1 states it.

Every float operation here is one binary32 operation; sums are sums of integers. Triton's own exp, sqrt, `/` and float
sums are approximate or ordered by the layout, and are not used."""

import struct

import triton
import triton.language as tl

INF_BITS = tl.constexpr(0x7F800000)  # bits of +inf; larger magnitudes are NaN
NAN_BITS = tl.constexpr(0x7FC00000)  # the one NaN
TINY_BITS = tl.constexpr((127 - 100) << 23)  # 2^-100: groups below it quantise to zero
P_ONE = tl.constexpr(1048576.0)  # 2^20: probabilities in fixed point


def _f32(bits: int) -> tl.constexpr:
    """The binary32 with these bits, as the contract writes its constants."""
    return tl.constexpr(struct.unpack("<f", struct.pack("<I", bits))[0])


_ROUND_BITS = tl.constexpr(0x4B400000)
_ROUND = _f32(
    0x4B400000
)  # 1.5 * 2^23: added to |a| <= 2^22 it leaves the nearest integer, ties to even, in the low bits
_LOG2E = _f32(0x3FB8AA3B)
_LN2_HI = _f32(0x3F318000)
_LN2_LO = _f32(0xB95E8083)
_EXP_Q4 = _f32(0x3AB50FB0)
_EXP_Q3 = _f32(0x3C091E66)
_EXP_Q2 = _f32(0x3D2AAC82)
_EXP_Q1 = _f32(0x3E2AAA47)
_EXP_Q0 = _f32(0x3EFFFFFE)


@triton.jit
def bits_of(x):
    """The 32 bits of f32 `x` as i32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def from_bits(b):
    """The f32 whose bits are i32 `b`."""
    return b.to(tl.float32, bitcast=True)


@triton.jit
def magnitude(x):
    """|x| as ordered integer bits: larger magnitude, larger integer; inf and NaN on top."""
    return bits_of(x) & 0x7FFFFFFF


@triton.jit
def exponent(mag):
    """floor(log2 |x|) of a normal x from `magnitude(x)`."""
    return (mag >> 23) - 127


@triton.jit
def pow2(n):
    """2^n as f32, n an i32 tensor in -126..127."""
    return from_bits((n + 127) << 23)


@triton.jit
def nan_where(bad, x):
    """`x` with the one NaN where `bad`."""
    return from_bits(tl.where(bad, NAN_BITS, bits_of(x)))


@triton.jit
def round_even(x):
    """Nearest integer to |x| <= 2^22, ties to even, as i32."""
    return bits_of(x + _ROUND) - _ROUND_BITS


@triton.jit
def exp(x):
    """exp within 1 ulp, clamped to [-87, 88]; NaN stays NaN."""
    nan = x != x
    c = tl.minimum(tl.maximum(tl.where(nan, 0.0, x), -87.0), 88.0)
    n = (c * _LOG2E + _ROUND) - _ROUND
    rh = c - n * _LN2_HI
    rl = n * _LN2_LO
    r = rh - rl
    q = (((_EXP_Q4 * r + _EXP_Q3) * r + _EXP_Q2) * r + _EXP_Q1) * r + _EXP_Q0
    y = 1.0 + (rh + ((r * r) * q - rl))
    return nan_where(nan, from_bits(bits_of(y) + (n.to(tl.int32) << 23)))


@triton.jit
def reciprocal(x):
    """1 / x, correctly rounded."""
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def swiglu_of(gate, up):
    """silu(gate) * up."""
    return (gate * reciprocal(1.0 + exp(0.0 - gate))) * up


@triton.jit
def inverse_rms(x, WIDTH: tl.constexpr, eps):
    """1 / sqrt(mean(x^2) + eps) of each row of f32 [M, W], zero beyond WIDTH; the mean is a sum of integers."""
    top = tl.max(magnitude(x), axis=1)  # [M]
    i = fixed_point_23(x, top[:, None])
    return inverse_rms_of(tl.sum(i * i, axis=1), top, WIDTH, eps)


@triton.jit
def _exponent_23(top):
    return tl.where(top < INF_BITS, tl.maximum(exponent(top), -100), 0)


@triton.jit
def fixed_point_23(x, top):
    """`x` as i64 below 2^24, scaled by the largest magnitude `top` of its row; zero in a row with inf or NaN."""
    fixed = tl.where(top < INF_BITS, x, 0.0) * pow2(23 - _exponent_23(top))
    return fixed.to(tl.int32).to(tl.int64)


@triton.jit
def inverse_rms_of(squares, top, WIDTH: tl.constexpr, eps):
    """1 / sqrt(mean + eps) from the exact sum of the squares of `fixed_point_23`."""
    total = squares.to(tl.float32)
    down = pow2(_exponent_23(top) - 23)
    if WIDTH & (WIDTH - 1) == 0:  # exact, and a division takes its time
        mean = total * (1.0 / WIDTH)
    else:
        mean = tl.div_rn(total, tl.full(total.shape, WIDTH, tl.float32))
    mean = (mean * down) * down
    return nan_where(top >= INF_BITS, reciprocal(tl.sqrt_rn(mean + eps)))


@triton.jit
def quantize_8(x, SIGN: tl.constexpr = True):
    """Each row of f32 [M, W] as i32 in -127..127 and one f32 scale, by ggml's Q8_K rule.

    Without SIGN all codes and the scale are negated where the scale is positive. Their products are the same, and the
    sign of the largest magnitude need not be found. A product with zero may be -0 for 0, which no sum shows that begins
    with 0."""
    W: tl.constexpr = x.shape[1]
    mag = magnitude(x)
    top = tl.max(mag, axis=1)  # [M]
    key = 0
    if SIGN:
        key = tl.min(sign_key(x, mag, top[:, None], tl.arange(0, W)[None, :]), axis=1)
    s, scale = factors_8(top, key)
    return codes_8(x, top[:, None], s[:, None]), scale


@triton.jit
def sign_key(x, mag, top, index):
    """A key whose minimum over a row tells the sign of its largest magnitude, of the first where several are equal.

    The smallest index wins, its sign rides in the low bit."""
    return tl.where(mag == top, index * 2 + (x < 0).to(tl.int32), 1 << 30)


@triton.jit
def _live(top):
    """Whether a group with largest magnitude `top` is quantised; below it is zero, above it is NaN."""
    return (top >= TINY_BITS) & (top < INF_BITS)


@triton.jit
def factors_8(top, key):
    """What a row is multiplied by, and its scale."""
    live = _live(top)
    amax = from_bits(tl.where(live, top, 0x3F800000))
    s = tl.div_rn(tl.full(amax.shape, -127.0, tl.float32), tl.where((key & 1) == 1, 0.0 - amax, amax))
    return s, nan_where(top >= INF_BITS, tl.where(live, reciprocal(s), 0.0))


@triton.jit
def codes_8(x, top, s):
    """i32 codes -127..127."""
    return tl.minimum(round_even(tl.where(_live(top), x, 0.0) * s), 127)


@triton.jit
def quantize_15(x):
    """Each row of f32 [M, W] as i32 in -16256..16256 and one f32 scale amax/16256."""
    top = tl.max(magnitude(x), axis=1)  # [M]
    s, scale = factors_15(top)
    return codes_15(x, top[:, None], s[:, None]), scale


@triton.jit
def factors_15(top):
    """What a row is multiplied by, and its scale."""
    live = _live(top)
    amax = from_bits(tl.where(live, top, 0x3F800000))
    full = tl.full(amax.shape, 16256.0, tl.float32)
    return tl.div_rn(full, amax), nan_where(top >= INF_BITS, tl.where(live, tl.div_rn(amax, full), 0.0))


@triton.jit
def codes_15(x, top, s):
    """i32 codes -16256..16256."""
    v = round_even(tl.where(_live(top), x, 0.0) * s)
    return tl.minimum(tl.maximum(v, -16256), 16256)


@triton.jit
def quantize_pow2(x):
    """Each row of f32 [M, W] as i32 in -8192..8192 and one power-of-two f32 scale."""
    top = tl.max(magnitude(x), axis=1)  # [M]
    s, scale = factors_pow2(top)
    return codes_15(x, top[:, None], s[:, None]), scale  # below 2^13 + 1, so the limit of 15 bits changes none


@triton.jit
def factors_pow2(top):
    """What a row is multiplied by, and its scale."""
    live = _live(top)
    e = tl.where(live, exponent(top), 0)
    return pow2(12 - e), nan_where(top >= INF_BITS, tl.where(live, pow2(e - 12), 0.0))


@triton.jit
def ordered(x):
    """f32 as i32 in the order of the values: -0 equals +0, NaN is below everything."""
    b = bits_of(tl.where(x == 0, 0.0, x))
    return tl.where(x != x, -2147483648, b ^ ((b >> 31) & 0x7FFFFFFF))
