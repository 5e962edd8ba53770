"""One quantised activation row as one block of i32, the form in which fused kernels hand it on.

For NB blocks and each slice: 64 words a block of codes, then 4 words a block of the sums of 32 codes, as i16. After the
slices come the NB scales, f32. Where Q8_K's scale is positive, it and the codes are negated: products stay the same,
and whoever quantises need not find the sign of the largest element."""

import numpy as np

from exactmoe.parity.reference.numerics import I32
from exactmoe.parity.reference.quantize import Activations

_BLOCK = 256


def operand(x: Activations) -> I32:
    """The i32 words of the only row of `x`."""
    parts = []
    scale = x.scale[0]
    sign = np.where((scale > 0) & (len(x.q) == 1), -1, 1)
    for row in x.q[:, 0]:
        codes = (row.reshape(len(sign), -1) * sign[:, None]).astype(np.int8)
        sums = codes.reshape(-1, 32).sum(axis=1, dtype=np.int16)
        parts += [_words(codes), _words(sums)]
    return np.concatenate([*parts, _words(scale * sign.astype(np.float32))])


def activations(words: I32, width: int) -> Activations:
    """The row of `width` elements that `operand` put into `words`."""
    blocks = width // _BLOCK
    slices = words.size // (68 * blocks)
    q = [words[68 * blocks * s :][: 64 * blocks].view(np.int8) for s in range(slices)]
    scale = words[68 * blocks * slices :][:blocks].view(np.float32)
    return Activations(np.stack(q)[:, None], scale[None])


def _words(part: np.ndarray) -> I32:
    return np.ascontiguousarray(part).reshape(-1).view(np.int32)
