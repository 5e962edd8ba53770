"""Where a decode step begins.      token [1] i32, position [1] i32"""

import numpy as np

from exactmoe.parity.reference.numerics import I32, require


def place(token: I32, at: int, given: I32 | None = None) -> tuple[I32, I32]:
    """Token and position of a step that begins at position `at`: the `given` token, else the one that stands there."""
    require(0 <= at < 1 << 31, f"position must lie in i32, got {at}")
    return (token if given is None else given).astype(np.int32), np.array([at], np.int32)
