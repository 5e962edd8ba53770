"""Token embedding rows.      table [V, D], tokens [T] -> [T, D] f32"""

import numpy as np

from exactmoe.parity.reference.numerics import F32, I32, quiet, require
from exactmoe.parity.reference.q4_k import decode_q4_k
from exactmoe.parity.reference.q6_k import decode_q6_k
from exactmoe.parity.reference.weights import BLOCK_BYTES, QuantMatrix


@quiet
def embed(table: QuantMatrix, tokens: I32) -> F32:
    """(d*sc)*q - dmin*mn for Q4_K, (d*sc)*(q-32) for Q6_K, each operation rounded."""
    tokens = np.asarray(tokens, np.int32)
    bad = tokens[(tokens < 0) | (tokens >= table.n)]
    require(bad.size == 0, f"token id {bad[:1]} is outside the vocabulary of {table.n}")
    T, K = len(tokens), table.k
    block = table.data[tokens].reshape(T, K // 256, BLOCK_BYTES[table.type_name])
    if table.type_name == "Q4_K":
        b = decode_q4_k(block)
        scale = np.repeat(b.d[..., None] * b.scale.astype(np.float32), 32, axis=-1)
        offset = np.repeat(b.dmin[..., None] * b.minimum.astype(np.float32), 32, axis=-1)
        return (scale * b.code.astype(np.float32) - offset).reshape(T, K)
    c = decode_q6_k(block)
    scale = np.repeat(c.d[..., None] * c.scale.astype(np.float32), 16, axis=-1)
    return (scale * c.code.astype(np.float32)).reshape(T, K)
