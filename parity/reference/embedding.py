"""Token embedding rows.      table [V, D], tokens [T] -> [T, D] f32

Q4_K: (d*sc)*q - dmin*mn.  Q6_K: (d*sc)*q.  Every operation rounded."""

import numpy as np

from exactmoe.parity.reference.numerics import F32, I32, quiet, require
from exactmoe.parity.reference.q4_k import decode_q4_k
from exactmoe.parity.reference.q6_k import decode_q6_k
from exactmoe.parity.reference.weights import BLOCK, BLOCK_BYTES, QuantMatrix


@quiet
def embed(table: QuantMatrix, tokens: I32) -> F32:
    """The rows of `tokens`. Raises ValueError for an id outside 0..V-1."""
    outside = tokens[(tokens < 0) | (tokens >= table.n)]
    require(outside.size == 0, f"token id {outside[:1]} is outside the vocabulary of {table.n}")
    T, D = len(tokens), table.k
    blocks = table.data[tokens].reshape(T, D // BLOCK, BLOCK_BYTES[table.type_name])
    if table.type_name == "Q4_K":
        b = decode_q4_k(blocks)
        scale = b.d[..., None] * b.scale.astype(np.float32)  # [T, blocks, 8]
        offset = b.dmin[..., None] * b.minimum.astype(np.float32)
        rows = scale[..., None] * b.code.astype(np.float32) - offset[..., None]
    else:
        c = decode_q6_k(blocks)
        scale = c.d[..., None] * c.scale.astype(np.float32)  # [T, blocks, 16]
        rows = scale[..., None] * c.code.astype(np.float32)
    return rows.reshape(T, D)
