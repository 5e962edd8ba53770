"""SwiGLU.      gate, up [R, F] f32 -> [R, F] f32"""

from exactmoe.parity.reference.numerics import F32, ONE, exp, quiet, require
from exactmoe.parity.reference.quantize import Activations, quantize


@quiet
def swiglu(gate: F32, up: F32) -> F32:
    """silu(gate) * up, with silu(g) = g * (1 / (1 + exp(-g)))."""
    require(gate.shape == up.shape, f"up must have shape {list(gate.shape)}, got {list(up.shape)}")
    silu = gate * (ONE / (ONE + exp(-gate)))
    return silu * up


def swiglu_quantize(gate: F32, up: F32, profile: str) -> Activations:
    """SwiGLU, quantised."""
    return quantize(swiglu(gate, up), profile)
