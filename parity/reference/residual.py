"""The residual add.      a, b [T, D] f32 -> [T, D] f32"""

from exactmoe.parity.reference.numerics import F32, quiet, require


@quiet
def add(a: F32, b: F32) -> F32:
    """a + b."""
    require(a.shape == b.shape, f"b must have shape {list(a.shape)}, got {list(b.shape)}")
    return a + b
