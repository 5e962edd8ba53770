"""Router: logits, then softmax, top-k, renormalise.      x [T, D] f32 -> weight [T, A] f32, expert [T, A] i32
Promised order: logits are exact sums of fixed-point products, scaled; then max, exp, exact sum over all E, one
division; equal scores go to the smaller expert; the A weights are folded left to right and divide once."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels import tiles
from exactmoe.kernels.errors import require
from exactmoe.kernels.launch import FAITHFUL
from exactmoe.kernels.numerics import (
    INF_BITS,
    P_ONE,
    bits_of,
    exp,
    exponent,
    from_bits,
    magnitude,
    nan_where,
    pow2,
    round_even,
)
from exactmoe.kernels.tensors import require_f32

_MAX_WIDTH = 16384
_MAX_EXPERTS = 1024


class RouterWeight(NamedTuple):
    """F32 router rows in fixed point, one power-of-two scale an expert."""

    q: Tensor  # [E, D] i32
    scale: Tensor  # [E] f32


class Routing(NamedTuple):
    """Where each token goes."""

    weight: Tensor  # [T, A] f32, best first; a row sums to one
    expert: Tensor  # [T, A] i32


def router_bits(width: int) -> tuple[int, int]:
    """Bits (x, w) of the fixed-point operands, such that width * 2^x * 2^w <= 2^52."""
    lg = math.ceil(math.log2(width))
    w = min(20, (52 - lg) // 2)
    return min(21, 52 - lg - w), w


def prepare_router(weight: Tensor) -> RouterWeight:
    """Put F32 router rows [E, D] into fixed point, once, at load; bit-equal to the reference's prepare_router."""
    require_f32(weight, "router weight", None, None)
    E, D = weight.shape
    require(0 < D <= _MAX_WIDTH, f"router width must be 1 to {_MAX_WIDTH}, got {D}")
    out = RouterWeight(
        torch.empty(E, D, dtype=torch.int32, device=weight.device),
        torch.empty(E, dtype=torch.float32, device=weight.device),
    )
    if E:
        _prepare_kernel[(E,)](
            weight, *out, D=D, W=triton.next_power_of_2(D), BITS=router_bits(D)[1], num_warps=4, **FAITHFUL
        )
    return out


def router_logits(x: Tensor, weight: RouterWeight) -> Tensor:
    """Logits [T, E] of normed rows x [T, D]; bit-equal to parity.reference.router.router_logits."""
    E, D = weight.q.shape
    require_f32(x, "x", None, D)
    require(weight.q.dtype == torch.int32, f"prepared router must be i32, got {weight.q.dtype}")
    require_f32(weight.scale, "router scale", E)
    T = x.shape[0]
    logits = torch.empty(T, E, dtype=torch.float32, device=x.device)
    if T:
        BT, BE = tiles.router(T, E)
        _logits_kernel[(triton.cdiv(T, BT), triton.cdiv(E, BE))](
            x, *weight, logits, T, E=E, D=D, BITS=router_bits(D)[0], BT=BT, BE=BE, BK=64, num_warps=4, **FAITHFUL
        )
    return logits


def route(logits: Tensor, top_k: int) -> Routing:
    """Pick `top_k` experts a token from logits [T, E]; bit-equal to parity.reference.router.route.

    A row with a NaN or an infinity gets experts 0..A-1 with NaN weights."""
    require_f32(logits, "logits", None, None)
    T, E = logits.shape
    require(E <= _MAX_EXPERTS, f"at most {_MAX_EXPERTS} experts, got {E}")
    require(1 <= top_k <= E, f"top_k must be 1 to the {E} experts, got {top_k}")
    out = Routing(logits.new_empty(T, top_k), logits.new_empty(T, top_k, dtype=torch.int32))
    if T:
        E2 = triton.next_power_of_2(E)
        BT = tiles.route(T, E2)
        _route_kernel[(triton.cdiv(T, BT),)](logits, *out, T, E=E, E2=E2, A=top_k, BT=BT, num_warps=4, **FAITHFUL)
    return out


@triton.jit
def _prepare_kernel(w_ptr, q_ptr, scale_ptr, D: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr):
    e = tl.program_id(0)
    j = tl.arange(0, W)
    w = tl.load(w_ptr + e.to(tl.int64) * D + j, j < D, 0.0)[None, :]
    ex = tl.maximum(exponent(tl.max(magnitude(w), axis=1)), -100)
    tl.store(q_ptr + e.to(tl.int64) * D + j[None, :], round_even(w * pow2(BITS - 1 - ex)[:, None]), (j < D)[None, :])
    tl.store(scale_ptr + e + tl.arange(0, 1), pow2(ex + 1 - BITS))


@triton.jit(do_not_specialize=["T"])
def _logits_kernel(
    x_ptr, w_ptr, scale_ptr, logits_ptr, T,
    E: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    row = t.to(tl.int64)[:, None] * D
    top = tl.zeros([BT], tl.int32)
    for at in range(0, D, BK):
        k = at + tl.arange(0, BK)
        x = tl.load(x_ptr + row + k[None, :], (t < T)[:, None] & (k < D)[None, :], 0.0)
        top = tl.maximum(top, tl.max(magnitude(x), axis=1))
    bad = top >= INF_BITS
    ex = tl.where(bad, 0, tl.maximum(exponent(top), -100))
    up = pow2(BITS - 1 - ex)[:, None]
    # f64 holds every partial sum exactly: D * 2^bx * 2^bw <= 2^52.
    acc = tl.zeros([BT, BE], tl.float64)
    for at in range(0, D, BK):
        k = at + tl.arange(0, BK)
        live_x = ((t < T) & (bad == 0))[:, None] & (k < D)[None, :]
        x = round_even(tl.load(x_ptr + row + k[None, :], live_x, 0.0) * up)
        w = tl.load(w_ptr + e.to(tl.int64)[None, :] * D + k[:, None], (k < D)[:, None] & (e < E)[None, :], 0)
        acc = tl.dot(x.to(tl.float64), w.to(tl.float64), acc, out_dtype=tl.float64)
    scale_w = tl.load(scale_ptr + e, e < E, 0.0)[None, :]
    logit = nan_where(bad[:, None], (acc.to(tl.float32) * pow2(ex + 1 - BITS)[:, None]) * scale_w)
    tl.store(logits_ptr + t.to(tl.int64)[:, None] * E + e[None, :], logit, (t < T)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["T"])
def _route_kernel(
    logits_ptr, weight_ptr, expert_ptr, T, E: tl.constexpr, E2: tl.constexpr, A: tl.constexpr, BT: tl.constexpr
):
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.arange(0, E2)
    real = (t < T)[:, None] & (e < E)[None, :]
    logit = tl.load(logits_ptr + t.to(tl.int64)[:, None] * E + e[None, :], real, 0.0)
    key, bad = scores(logit, real, t < T, E, E2)
    chosen = ()  # type: tuple[tl.tensor, ...]
    total = tl.zeros([BT], tl.float32)
    for k in tl.static_range(A):
        prob, expert, key = take_best(key)
        chosen = chosen + (prob,)  # noqa: RUF005 - Triton has no *
        total = total + prob
        tl.store(expert_ptr + t.to(tl.int64) * A + k, expert, t < T)
    for k in tl.static_range(A):
        tl.store(weight_ptr + t.to(tl.int64) * A + k, weight_of(chosen[k], bad, total, A), t < T)


@triton.jit
def scores(logit, real, live, E: tl.constexpr, E2: tl.constexpr):
    """Bits of every expert's probability from rows of logits [BT, E2], -1 beyond the experts; and whether a row holds
    NaN or infinity [BT].

    `real` says which elements are logits, `live` which rows are tokens. Probabilities are not negative, so their bits
    order them."""
    inside = (tl.arange(0, E2) < E)[None, :]
    bad = tl.max(magnitude(logit), axis=1) >= INF_BITS  # [BT]
    logit = tl.where(bad[:, None], 0.0, logit)
    m = tl.max(tl.where(inside, logit, float("-inf")), axis=1)
    p = tl.where(real, exp(logit - m[:, None]), 0.0)
    den = tl.sum(round_even(p * P_ONE), axis=1).to(tl.float32) * (1.0 / P_ONE)  # at most 2^10 terms of 2^20
    den = tl.where(live, den, 1.0)[:, None]
    return tl.where(inside, bits_of(tl.div_rn(p, tl.broadcast_to(den, p.shape))), -1), bad


@triton.jit
def take_best(key):
    """Probability and expert [BT] of the largest of `scores` [BT, E2], of equal ones the smaller; and the others'."""
    E2: tl.constexpr = key.shape[1]
    e = tl.arange(0, E2)[None, :]
    top = tl.max(key, axis=1)
    expert = tl.min(tl.where(key == top[:, None], e, E2), axis=1)
    return from_bits(top), expert, tl.where(e == expert[:, None], -1, key)


@triton.jit
def expert_of_rank(key, k):
    """The expert [BT] that `take_best` gives after `k` others, from `scores` [BT, E2].

    Equal ones are taken at once: then a round waits only for its maximum."""
    E2: tl.constexpr = key.shape[1]
    left = key
    seen = tl.zeros([key.shape[0]], tl.int32)
    before = seen
    value = seen
    for _ in range(k + 1):
        top = tl.max(left, axis=1)
        same = left == top[:, None]
        count = tl.sum(same.to(tl.int32), axis=1)
        here = (seen <= k) & (k < seen + count)
        value, before = tl.where(here, top, value), tl.where(here, seen, before)
        seen += count
        left = tl.where(same, -1, left)
    same = key == value[:, None]
    place = (before - k)[:, None] + tl.cumsum(same.to(tl.int32), axis=1)  # of equal ones the smaller comes first
    return tl.max(tl.where(same & (place == 1), tl.arange(0, E2)[None, :], 0), axis=1)


@triton.jit
def weight_of(prob, bad, total, A: tl.constexpr):
    """Renormalised weight of a chosen expert from its probability; the arguments have one shape."""
    none = total <= 0.0
    uniform = tl.div_rn(tl.full(total.shape, 1.0, tl.float32), tl.full(total.shape, A, tl.float32))
    w = tl.div_rn(prob, tl.where(none, 1.0, total))
    return nan_where(bad, tl.where(none, uniform, w))
