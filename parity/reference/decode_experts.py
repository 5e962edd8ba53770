"""One token through its experts.      logits [E] f32, the row x [D] quantised -> h [A, F] -> y [D] f32"""

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


def experts_up(routed: Routed, gate: QuantMatrix, up: QuantMatrix, top_k: int) -> F32:
    """silu(gate) * up of the `top_k` experts that the logits choose, best first: h [A, F]."""
    chosen = route(routed.logits[None], top_k).expert
    rows = dispatch(chosen, routed.logits.size)
    a = activations(routed.operand, gate.k)
    g = grouped_matmul(gate, a, rows, top_k)
    u = grouped_matmul(up, a, rows, top_k)
    return swiglu(g, u)


def experts_down(routed: Routed, h: F32, down: QuantMatrix, x: F32, profile: str) -> F32:
    """x [D] plus the experts' outputs of h [A, F], each weighted as the logits choose, best first."""
    chosen = route(routed.logits[None], h.shape[0])
    rows = dispatch(chosen.expert, routed.logits.size)
    out = grouped_matmul(down, quantize(h, profile), rows, 1)
    return add(x, combine(out, chosen.weight)[0])
