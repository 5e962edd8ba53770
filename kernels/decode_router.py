"""One token's way into the experts: norm, router logits, and the normed row quantised.      x [D] f32
Promised order: as norm, router_logits and quantize, one after another; every program norms the row for itself.

The same row also goes through the norm and router of the next layer: what they say of it is a guess, as kernels.guess
takes it."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels import tiles
from exactmoe.kernels.dependent import DEPENDENT, finish_wait, release_next
from exactmoe.kernels.errors import require
from exactmoe.kernels.formats import BLOCK
from exactmoe.kernels.launch import FAITHFUL
from exactmoe.kernels.matvec import Norm, block_index, load_norm, load_row, normed
from exactmoe.kernels.numerics import INF_BITS, exponent, magnitude, nan_where, pow2, round_even
from exactmoe.kernels.packed import operand_words, store_operand
from exactmoe.kernels.router import RouterWeight, router_bits
from exactmoe.kernels.tensors import require_f32, slices


class NextLayer(NamedTuple):
    """What a guess is made with."""

    norm: Norm
    router: RouterWeight


class Routed(NamedTuple):
    """What the experts' kernels take."""

    logits: Tensor  # [E] f32
    operand: Tensor  # i32, the normed row as kernels.packed describes it
    guess: Tensor | None = None  # [E] f32, logits of the next layer's router for the same row


def decode_router(x: Tensor, norm: Norm, weight: RouterWeight, profile: str, after: NextLayer | None = None) -> Routed:
    """Router logits [E] of the normed row x [D], and the row's operand; with the layer `after` this one, a guess too.

    Logits are bit-equal to parity.reference.decode_router.decode_router."""
    E, D = weight.q.shape
    require_f32(x, "x", D)
    require_f32(norm.weight, "norm weight", D)
    require(D % BLOCK == 0, f"activation width must be a multiple of {BLOCK}, got {D}")
    NB = D // BLOCK
    out = Routed(
        torch.empty(E, dtype=torch.float32, device=x.device),
        torch.empty(operand_words(D, slices(profile)), dtype=torch.int32, device=x.device),
        torch.empty(E, dtype=torch.float32, device=x.device) if after else None,
    )
    norm2, weight2 = after or (None, (None, None))
    if after:
        require_f32(after.norm.weight, "norm weight of the next layer", D)
        require(after.norm.eps == norm.eps, f"two norms with eps {norm.eps} and {after.norm.eps}")
        require(after.router.q.shape == (E, D), f"the next router is {list(after.router.q.shape)}, not {[E, D]}")
    BE, warps = tiles.decode_router(E)
    _decode_router_kernel[(triton.cdiv(E, BE) * (2 if after else 1) + 1,)](
        x, norm.weight, norm.eps, *weight, *out[:2], norm2.weight if norm2 else None, *weight2, out.guess,
        E=E, NB=NB, NB2=triton.next_power_of_2(NB), BITS=router_bits(D)[0], S=slices(profile), BE=BE,
        GUESS=after is not None, num_warps=warps, **DEPENDENT, **FAITHFUL,
    )  # fmt: skip
    return out


@triton.jit
def _decode_router_kernel(
    x_ptr, norm_ptr, eps, w_ptr, scale_ptr, logits_ptr, operand_ptr, norm2_ptr, w2_ptr, scale2_ptr, guess_ptr,
    E: tl.constexpr, NB: tl.constexpr, NB2: tl.constexpr, BITS: tl.constexpr, S: tl.constexpr, BE: tl.constexpr,
    GUESS: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = NB * 256
    PARTS: tl.constexpr = (E + BE - 1) // BE
    part = tl.program_id(0)
    if part == PARTS:
        norm = load_norm(norm_ptr, NB, NB2)
        finish_wait()
        release_next()
        x = normed(load_row(x_ptr, NB, NB2), norm, eps, D)
        store_operand(x, tl.zeros([NB2], tl.int32), tl.arange(0, NB2), operand_ptr, NB, S, True)
    else:
        if GUESS:  # noqa: SIM102 - Triton decides the outer test when it compiles
            if part > PARTS:
                part -= PARTS + 1
                norm_ptr, w_ptr, scale_ptr, logits_ptr = norm2_ptr, w2_ptr, scale2_ptr, guess_ptr
        first = part * BE
        j = block_index(NB2)
        live = j < D
        fetched = ()  # type: tuple[tl.tensor, ...]
        scales = ()  # type: tuple[tl.tensor, ...]
        for i in tl.static_range(BE):
            e = tl.minimum(first + i, E - 1)
            fetched = fetched + (tl.load(w_ptr + e.to(tl.int64) * D + j, live, 0),)  # noqa: RUF005 - Triton has no *
            scales = scales + (tl.load(scale_ptr + e + tl.zeros([1], tl.int32)),)  # noqa: RUF005
        norm = load_norm(norm_ptr, NB, NB2)
        finish_wait()
        release_next()
        x = normed(load_row(x_ptr, NB, NB2), norm, eps, D)
        top = tl.max(magnitude(x))
        bad = top >= INF_BITS
        ex = tl.where(bad, 0, tl.maximum(exponent(top), -100)) + tl.zeros([1, 1], tl.int32)
        fixed = round_even(tl.where(bad, 0.0, x) * pow2(BITS - 1 - ex)).to(tl.int64)
        for i in tl.static_range(BE):
            e = first + i + tl.zeros([1], tl.int32)
            total = tl.sum(fixed * fetched[i].to(tl.int64)).to(tl.float32)
            down = pow2(tl.where(bad, 0, tl.maximum(exponent(top), -100)) + tl.zeros([1], tl.int32) + 1 - BITS)
            logit = (total * down) * scales[i]
            tl.store(logits_ptr + e, nan_where(bad, logit), e < E)
