"""SwiGLU.      gate, up [R, F] f32 -> [R, F] f32"""

from exactmoe.parity.reference.numerics import F32, ONE, exp, quiet, require
from exactmoe.parity.reference.quantize import Activations, quantize


@quiet
def swiglu(gate: F32, up: F32) -> F32:
    """(gate * (1 / (1 + exp(-gate)))) * up."""
    require(gate.shape == up.shape, f"up must have shape {list(gate.shape)}, got {list(up.shape)}")
    return (gate * (ONE / (ONE + exp(-gate)))) * up


def swiglu_quantize(gate: F32, up: F32, profile: str) -> Activations:
    """The activations of SwiGLU."""
    return quantize(swiglu(gate, up), profile)
