"""Streaming GGUF version 3 writer: the header first, then each tensor as its bytes arrive.

Layout as in `reader`. The file appears at its path whole or not at all: it is written beside it under another name,
flushed to disk, and renamed."""

import contextlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import BinaryIO, NamedTuple

import numpy as np

from exactmoe.kernels.errors import MissingEnvironment, require
from exactmoe.model.gguf import types

_SCALAR_IDS = {dtype: value_type for value_type, dtype in types.SCALARS.items()}


class TensorData(NamedTuple):
    """A tensor to be written. `data` is one array (f32 [*shape] for F32, else u8 [*shape[:-1], bytes per row]) or its
    bytes in pieces, which are asked for only when this tensor's turn comes."""

    name: str
    shape: tuple[int, ...]  # weights, slowest dimension first
    type_name: str
    data: np.ndarray | Iterable[bytes | memoryview | np.ndarray]


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, object],
    tensors: Iterable[TensorData],
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a GGUF file, in the order given; interrupted, it leaves nothing behind.

    A metadata value is a str, a bool, an int (stored as UINT32), a numpy scalar or 1-D array (stored as its dtype), or
    a list of str; `general.alignment` stays at 32. `progress` is called with the number of bytes after each write.
    Raises `InvalidInput` for a value that cannot be stored, a tensor whose data does not fill its shape, or an existing
    file unless `overwrite`; `MissingEnvironment` when the file system refuses (no room, no permission)."""
    name = os.fspath(path)
    folder = os.path.dirname(name) or "."
    require(os.path.isdir(folder), f"{name}: there is no folder {folder}")
    require(not os.path.isdir(name), f"{name}: is a folder")
    require(overwrite or not os.path.lexists(name), f"{name}: already exists")
    require("general.alignment" not in metadata, "general.alignment is always the default")
    todo = list(tensors)
    header = _header(metadata, todo)
    with _whole_or_nothing(name) as file:
        file.write(header)
        for tensor in todo:
            _write_tensor(file, tensor, progress)


def tensor_bytes(name: str, shape: tuple[int, ...], type_name: str) -> int:
    """Bytes of a tensor of `shape` stored as `type_name`; `name` is for the message of the `InvalidInput`."""
    require(type_name in types.TYPES_BY_NAME, f"{name}: type {type_name!r} is not known")
    require(1 <= len(shape) <= types.MAX_DIMS, f"{name}: {len(shape)} dims, not 1 to {types.MAX_DIMS}")
    require(min(shape) > 0, f"{name}: shape {shape} is empty")
    kind = types.TYPES_BY_NAME[type_name]
    require(
        shape[-1] % kind.block == 0, f"{name}: rows of {shape[-1]} are not whole {type_name} blocks of {kind.block}"
    )
    size = shape[-1] // kind.block * kind.block_bytes
    for dim in shape[:-1]:
        size *= dim
    return size


def _padding(size: int) -> int:
    return -size % types.DEFAULT_ALIGNMENT


def _header(metadata: Mapping[str, object], tensors: list[TensorData]) -> bytes:
    out = bytearray(types.MAGIC + struct.pack("<IQQ", types.VERSIONS[-1], len(tensors), len(metadata)))
    for key, value in metadata.items():
        out += _string(key) + _value(key, value)
    offset, seen = 0, set()
    for tensor in tensors:
        require(tensor.name not in seen, f"tensor {tensor.name} is given twice")
        require(0 < len(tensor.name.encode()) < types.MAX_NAME_BYTES, f"tensor name {tensor.name!r} has a bad length")
        seen.add(tensor.name)
        size = tensor_bytes(tensor.name, tensor.shape, tensor.type_name)
        dims = tuple(reversed(tensor.shape))
        ggml_id = types.TYPES_BY_NAME[tensor.type_name].ggml_id
        out += _string(tensor.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, ggml_id, offset)
        offset += size + _padding(size)
    return bytes(out) + bytes(_padding(len(out)))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: object) -> bytes:
    """The value type as u32, then the value."""
    if isinstance(value, str):
        return struct.pack("<I", types.STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", types.BOOL, value)
    if isinstance(value, int):
        require(0 <= value < 2**32, f"{key}: {value} does not fit UINT32; give a numpy scalar of the type wanted")
        return struct.pack("<II", types.UINT32, value)
    if isinstance(value, list):
        require(all(isinstance(item, str) for item in value), f"{key}: a list must hold only str; give a numpy array")
        return struct.pack("<IIQ", types.ARRAY, types.STRING, len(value)) + b"".join(map(_string, value))
    # A Python float is also a float64 to numpy; which of the two it should be in the file, only the caller knows.
    known = isinstance(value, np.ndarray | np.generic) and value.ndim <= 1 and value.dtype in _SCALAR_IDS
    require(known, f"{key}: {type(value).__name__} {value!r} cannot be stored; give a str, int or numpy value")
    array = np.asarray(value)
    value_type = _SCALAR_IDS[array.dtype]
    if array.ndim:
        return struct.pack("<IIQ", types.ARRAY, value_type, array.size) + array.tobytes()
    return struct.pack("<I", value_type) + array.tobytes()


def _write_tensor(file: BinaryIO, tensor: TensorData, progress: Callable[[int], None] | None) -> None:
    size = tensor_bytes(tensor.name, tensor.shape, tensor.type_name)
    written = 0
    for piece in _pieces(tensor):
        view = (piece.data if isinstance(piece, np.ndarray) else memoryview(piece)).cast("B")
        written += len(view)
        require(written <= size, f"{tensor.name}: more data than the {size} bytes of its shape")
        file.write(view)
        if progress is not None:
            progress(len(view))
    require(written == size, f"{tensor.name}: {written} bytes of data, its shape needs {size}")
    file.write(bytes(_padding(size)))


def _pieces(tensor: TensorData) -> Iterable[bytes | memoryview | np.ndarray]:
    if not isinstance(tensor.data, np.ndarray):
        return tensor.data
    kind = types.TYPES_BY_NAME[tensor.type_name]
    dtype = np.float32 if tensor.type_name == "F32" else np.uint8
    shape = tensor.shape
    if tensor.type_name != "F32":
        shape = (*shape[:-1], shape[-1] // kind.block * kind.block_bytes)
    found = f"{tensor.data.dtype} {tensor.data.shape}"
    require(
        tensor.data.dtype == dtype and tensor.data.shape == shape,
        f"{tensor.name}: data is {found}, {tensor.type_name} of {tensor.shape} is {np.dtype(dtype)} {shape}",
    )
    return (np.ascontiguousarray(tensor.data),)


@contextlib.contextmanager
def _whole_or_nothing(path: str) -> Iterator[BinaryIO]:
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        if isinstance(error, OSError):
            raise MissingEnvironment(f"{path}: cannot be written: {error.strerror}") from error
        raise
