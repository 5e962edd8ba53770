"""Greedy choice.      logits [T, V] f32 -> token [T] i32"""

import numpy as np

from exactmoe.parity.reference.numerics import F32, I32, I64, INF, require


def argmax(logits: F32) -> I32:
    """The smallest id among those with the largest logit; NaN is below everything, so a row of NaN gives 0."""
    require(logits.ndim == 2 and logits.shape[1] > 0, f"logits must have shape [T, V], V > 0, got {list(logits.shape)}")
    largest = np.max(np.where(np.isnan(logits), -INF, logits), axis=1, keepdims=True)
    first: I64 = np.argmax(logits == largest, axis=1)  # of nothing but NaN: 0
    return first.astype(np.int32)
