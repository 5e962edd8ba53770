"""One token's way into the experts: norm, router logits, and the normed row quantised.      x [D] f32"""

from typing import NamedTuple

from exactmoe.parity.reference.matvec import Norm
from exactmoe.parity.reference.norm import rms_norm
from exactmoe.parity.reference.numerics import F32, I32
from exactmoe.parity.reference.packed import operand
from exactmoe.parity.reference.quantize import quantize
from exactmoe.parity.reference.router import RouterWeight, router_logits


class Routed(NamedTuple):
    """What the experts take."""

    logits: F32  # [E]
    operand: I32  # the normed row, as reference.packed describes it


def decode_router(x: F32, norm: Norm, weight: RouterWeight, profile: str) -> Routed:
    """Router logits [E] of the normed row x [D], and the row quantised."""
    normed = rms_norm(x[None], norm.weight, norm.eps)
    logits = router_logits(normed, weight)[0]
    return Routed(logits, operand(quantize(normed, profile)))
