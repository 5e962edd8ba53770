"""One token's way into the experts: norm, router logits, and the normed row quantised.      x [D] f32"""

from typing import NamedTuple

from exactmoe.parity.reference.matvec import Norm
from exactmoe.parity.reference.norm import rms_norm
from exactmoe.parity.reference.numerics import F32, I32
from exactmoe.parity.reference.packed import operand
from exactmoe.parity.reference.quantize import quantize
from exactmoe.parity.reference.router import RouterWeight, router_logits


class NextLayer(NamedTuple):
    """What a guess is made with."""

    norm: Norm
    router: RouterWeight


class Routed(NamedTuple):
    """What the experts take."""

    logits: F32  # [E]
    operand: I32  # the normed row, as reference.packed describes it
    guess: F32 | None = None  # [E], logits of the next layer's router for the same row


def decode_router(x: F32, norm: Norm, weight: RouterWeight, profile: str, after: NextLayer | None = None) -> Routed:
    """Router logits [E] of the normed row x [D], and the row quantised; with the layer `after` this one, a guess."""
    normed = rms_norm(x[None], norm.weight, norm.eps)
    routed = Routed(router_logits(normed, weight)[0], operand(quantize(normed, profile)))
    if after is None:
        return routed
    then = rms_norm(x[None], after.norm.weight, after.norm.eps)
    return routed._replace(guess=router_logits(then, after.router)[0])
