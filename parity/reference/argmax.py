"""Greedy choice.      logits [T, V] f32 -> token [T] i32"""

import numpy as np

from exactmoe.parity.reference.numerics import F32, I32


def argmax(logits: F32) -> I32:
    """The smallest id among the largest logits; NaN is below everything."""
    nan = np.isnan(logits)
    below = np.where(nan, np.float32(-np.inf), logits)
    # A row of -inf and NaN must choose the -inf: rank NaN one step further down.
    best = np.max(below, axis=1, keepdims=True)
    candidate = (below == best) & ~nan
    return np.where(nan.all(axis=1), 0, np.argmax(candidate, axis=1)).astype(np.int32)
