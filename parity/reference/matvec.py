"""One token through quantised matrices that lie one below the other.      x [K] f32 -> y [sum N] f32"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from exactmoe.parity.reference.matmul import matmul
from exactmoe.parity.reference.norm import rms_norm_quantize
from exactmoe.parity.reference.numerics import F32, I32
from exactmoe.parity.reference.packed import activations
from exactmoe.parity.reference.quantize import quantize
from exactmoe.parity.reference.residual import add
from exactmoe.parity.reference.weights import QuantMatrix


class Norm(NamedTuple):
    """An RMSNorm before a matrix."""

    weight: F32  # [K]
    eps: np.float32


def matvec(
    weights: Sequence[QuantMatrix], x: F32 | I32, profile: str, norm: Norm | None = None, residual: F32 | None = None
) -> F32:
    """y [sum N] of the row x [K], normed first where asked, plus `residual` [sum N]. x may be the row's operand."""
    row = x[None].view(np.float32)
    if x.dtype == np.int32:
        a = activations(x.view(np.int32), weights[0].k)
    elif norm is not None:
        a = rms_norm_quantize(row, norm.weight, norm.eps, profile).activations
    else:
        a = quantize(row, profile)
    y: F32 = np.concatenate([matmul(w, a)[0] for w in weights])
    if residual is not None:
        y = add(residual, y)
    return y
