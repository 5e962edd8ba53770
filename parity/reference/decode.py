"""The MoE layer of one token, from its residual stream to the next.      x [D] f32 -> y [D] f32"""

from typing import NamedTuple

from exactmoe.parity.reference.decode_experts import experts_down, experts_up
from exactmoe.parity.reference.decode_router import decode_router
from exactmoe.parity.reference.matvec import Norm
from exactmoe.parity.reference.numerics import F32
from exactmoe.parity.reference.router import RouterWeight
from exactmoe.parity.reference.weights import QuantMatrix


class Stepped(NamedTuple):
    """A layer's outcome."""

    x: F32  # [D]
    guess: F32 | None  # [E], a guess of the next layer's router logits


def moe_step(
    x: F32, norm: Norm, router: RouterWeight, gate: QuantMatrix, up: QuantMatrix, down: QuantMatrix,
    top_k: int, profile: str,
) -> Stepped:  # fmt: skip
    """x [D] plus the MoE layer of its norm."""
    routed = decode_router(x, norm, router, profile)
    return Stepped(experts_down(experts_up(routed, gate, up, top_k), down, x, profile), routed.guess)
