"""One quantised activation row as one block of i32, the form in which fused kernels hand it on.

For NB blocks and each slice: 64 words a block of codes; 4 words a block of sums of 32 codes, as bytes h0..7 and l0..7
of 128*h + l; 16 words a block of -32 times the sums of 16 codes, halves of a block first, then the parity of a sum's
place. After the slices come the NB scales, f32."""

import numpy as np

from exactmoe.parity.reference.numerics import I32
from exactmoe.parity.reference.quantize import Activations

_BLOCK = 256


def operand(x: Activations) -> I32:
    """The i32 words of the only row of `x`."""
    parts = []
    for codes in x.q[:, 0]:
        q = codes.reshape(-1, _BLOCK)
        blocks = q.shape[0]
        sums = q.reshape(blocks, 16, 16).sum(axis=2, dtype=np.int32)
        wide = sums.reshape(blocks, 8, 2).sum(axis=2, dtype=np.int32)
        high = (wide + 64) >> 7
        pairs = np.concatenate([high, wide - 128 * high], axis=1).astype(np.int8)
        minus = (-32 * sums).reshape(blocks, 2, 4, 2).transpose(0, 1, 3, 2)  # half, parity, row of 32
        parts += [_words(q), _words(pairs), _words(minus)]
    return np.concatenate([*parts, _words(x.scale[0])])


def activations(words: I32, width: int) -> Activations:
    """The row of `width` elements that `operand` put into `words`."""
    blocks = width // _BLOCK
    slices = words.size // (84 * blocks)
    q = [words[84 * blocks * s :][: 64 * blocks].view(np.int8) for s in range(slices)]
    scale = words[84 * blocks * slices :][:blocks].view(np.float32)
    return Activations(np.stack(q)[:, None], scale[None])


def _words(part: np.ndarray) -> I32:
    return np.ascontiguousarray(part).reshape(-1).view(np.int32)
