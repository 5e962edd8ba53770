"""The numbers of the GGUF container: value types, tensor types, and how many bytes each takes.

Source: the GGUF specification (ggml repository, docs/gguf.md) and ggml's `ggml_type` table. Types that
ggml has removed (ids 4, 5, 31 to 33, 36 to 38) and those that never stand in a file (Q8_1, Q8_K) are unknown here."""

from typing import NamedTuple

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # both have the layout read here; version 1 has 32-bit counts
DEFAULT_ALIGNMENT = 32
MIN_ALIGNMENT = 8
MAX_DIMS = 4
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 64

STRING, ARRAY, BOOL, UINT32, FLOAT32 = 8, 9, 7, 4, 6

VALUE_NAMES = {
    0: "UINT8",
    1: "INT8",
    2: "UINT16",
    3: "INT16",
    4: "UINT32",
    5: "INT32",
    6: "FLOAT32",
    7: "BOOL",
    8: "STRING",
    9: "ARRAY",
    10: "UINT64",
    11: "INT64",
    12: "FLOAT64",
}

SCALARS: dict[int, np.dtype[np.generic]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


class TensorType(NamedTuple):
    """A way to store weights: `block_bytes` bytes hold `block` weights."""

    ggml_id: int
    name: str
    block: int
    block_bytes: int


_TABLE = (
    TensorType(0, "F32", 1, 4),
    TensorType(1, "F16", 1, 2),
    TensorType(2, "Q4_0", 32, 18),
    TensorType(3, "Q4_1", 32, 20),
    TensorType(6, "Q5_0", 32, 22),
    TensorType(7, "Q5_1", 32, 24),
    TensorType(8, "Q8_0", 32, 34),
    TensorType(10, "Q2_K", 256, 84),
    TensorType(11, "Q3_K", 256, 110),
    TensorType(12, "Q4_K", 256, 144),
    TensorType(13, "Q5_K", 256, 176),
    TensorType(14, "Q6_K", 256, 210),
    TensorType(16, "IQ2_XXS", 256, 66),
    TensorType(17, "IQ2_XS", 256, 74),
    TensorType(18, "IQ3_XXS", 256, 98),
    TensorType(19, "IQ1_S", 256, 50),
    TensorType(20, "IQ4_NL", 32, 18),
    TensorType(21, "IQ3_S", 256, 110),
    TensorType(22, "IQ2_S", 256, 82),
    TensorType(23, "IQ4_XS", 256, 136),
    TensorType(24, "I8", 1, 1),
    TensorType(25, "I16", 1, 2),
    TensorType(26, "I32", 1, 4),
    TensorType(27, "I64", 1, 8),
    TensorType(28, "F64", 1, 8),
    TensorType(29, "IQ1_M", 256, 56),
    TensorType(30, "BF16", 1, 2),
    TensorType(34, "TQ1_0", 256, 54),
    TensorType(35, "TQ2_0", 256, 66),
    TensorType(39, "MXFP4", 32, 17),
)
TENSOR_TYPES: dict[int, TensorType] = {t.ggml_id: t for t in _TABLE}
TYPES_BY_NAME: dict[str, TensorType] = {t.name: t for t in _TABLE}
