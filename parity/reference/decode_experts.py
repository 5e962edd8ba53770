"""One token through its experts.      logits [E] f32, the row x [D] quantised -> h [A, F] -> y [D] f32"""

from typing import NamedTuple

from exactmoe.parity.reference.combine import combine
from exactmoe.parity.reference.decode_router import Routed
from exactmoe.parity.reference.dispatch import dispatch
from exactmoe.parity.reference.matmul import grouped_matmul
from exactmoe.parity.reference.numerics import F32
from exactmoe.parity.reference.packed import activations
from exactmoe.parity.reference.quantize import quantize
from exactmoe.parity.reference.residual import add
from exactmoe.parity.reference.router import route
from exactmoe.parity.reference.swiglu import swiglu
from exactmoe.parity.reference.weights import QuantMatrix


class Activated(NamedTuple):
    """What `experts_down` takes."""

    h: F32  # [A, F], the chosen experts' rows, best first
    logits: F32  # [E], which chose them


def experts_up(routed: Routed, gate: QuantMatrix, up: QuantMatrix, top_k: int) -> Activated:
    """silu(gate) * up of the `top_k` experts that the logits choose, best first."""
    chosen = route(routed.logits[None], top_k)
    rows = dispatch(chosen.expert, routed.logits.size)
    a = activations(routed.operand, gate.k)
    g = grouped_matmul(gate, a, rows, top_k)
    u = grouped_matmul(up, a, rows, top_k)
    return Activated(swiglu(g, u), routed.logits)


def experts_down(activated: Activated, down: QuantMatrix, x: F32, profile: str) -> F32:
    """x [D] plus the experts' outputs, each weighted, best first."""
    chosen = route(activated.logits[None], activated.h.shape[0])
    rows = dispatch(chosen.expert, down.data.shape[0])
    out = grouped_matmul(down, quantize(activated.h, profile), rows, 1)
    return add(x, combine(out, chosen.weight)[0])
