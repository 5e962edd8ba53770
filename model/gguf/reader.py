"""Strict GGUF reader: the whole header is validated, tensors stay in the file and are mapped, nothing is expanded.

Layout, little-endian (ggml repository, docs/gguf.md):

    magic "GGUF" | version u32 | n_tensors u64 | n_keys u64
    n_keys x    { key string | value type u32 | value }           string = length u64 | UTF-8 bytes
    n_tensors x { name string | n_dims u32 | dims u64, fastest first | type u32 | offset u64 from the data section }
    padding to general.alignment (32 if absent) | data section

Every refusal is a `GGUFError` that names the file, and the byte offset or the tensor. A count is compared with the
bytes left before anything is read, so no file can make the reader loop or allocate beyond its own size."""

import hashlib
import mmap
import os
import stat
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from exactmoe.kernels.errors import InvalidInput
from exactmoe.model.gguf import types

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_MIN_KEY_BYTES = 8 + 1 + 4 + 1  # length, one character, value type, the smallest value
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # length, one character, n_dims, one dim, type, offset


class GGUFError(InvalidInput):
    """A GGUF file is refused; the message names the file, the offset or tensor, and what was found."""


class TensorInfo(NamedTuple):
    """Where a tensor lies. `shape` counts weights, slowest dimension first (numpy order)."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int  # bytes from the start of the file
    nbytes: int


class GGUFFile:
    """An open, validated GGUF file. Made by `open_gguf`; its arrays keep the mapping alive."""

    def __init__(
        self, path: str, data: mmap.mmap, metadata: dict[str, object], tensors: dict[str, TensorInfo], alignment: int
    ) -> None:
        self.path = path
        self.metadata: Mapping[str, object] = MappingProxyType(metadata)
        self.tensors = tensors
        self.alignment = alignment
        self.nbytes = len(data)
        self._data = data

    def tensor(self, name: str) -> np.ndarray:
        """A read-only view of the file: an F32 tensor as f32 [*shape], any other as u8 [*shape[:-1], bytes per row].

        Raises `GGUFError` for a name that is not in the file."""
        if name not in self.tensors:
            raise GGUFError(f"{self.path}: tensor {name!r} is not in the file")
        info = self.tensors[name]
        if info.type_name == "F32":
            count = info.nbytes // 4
            return np.frombuffer(self._data, np.dtype("<f4"), count, info.offset).reshape(info.shape)
        kind = types.TYPES_BY_NAME[info.type_name]
        row_bytes = info.shape[-1] // kind.block * kind.block_bytes
        flat = np.frombuffer(self._data, np.uint8, info.nbytes, info.offset)
        return flat.reshape(*info.shape[:-1], row_bytes)

    def sha256(self) -> str:
        """Hex digest of the whole file; reads all of it."""
        return hashlib.sha256(self._data).hexdigest()


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Map the file at `path` and validate its whole header; raises `GGUFError` for anything not understood.

    Metadata values are int, bool, str, `np.float32` or float (as stored: FLOAT32 or FLOAT64); arrays are lists of str
    or read-only numpy arrays of the stored dtype. Tensor data is not read."""
    name = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(name).st_mode):
            raise GGUFError(f"{name}: not a regular file")
        with open(name, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise GGUFError(f"{name}: the file is empty")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise GGUFError(f"{name}: cannot be opened: {error.strerror}") from error
    return _Parser(name, data).parse()


class _Parser:
    """A cursor over the mapped header."""

    def __init__(self, path: str, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.at = 0

    def refuse(self, offset: int, what: str) -> NoReturn:
        raise GGUFError(f"{self.path}: at byte {offset}: {what}")

    def take(self, count: int, what: str) -> int:
        """Step over `count` bytes and return where they start."""
        start = self.at
        if count > self.size - start:
            self.refuse(start, f"{what} needs {count} bytes, the file has {self.size - start} left")
        self.at = start + count
        return start

    def u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self.data, self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self.data, self.take(8, what))[0]
        return value

    def count(self, what: str, least_bytes: int) -> int:
        """A u64 count of things of at least `least_bytes` each, refused if the file cannot hold them."""
        start = self.at
        count = self.u64(what)
        left = self.size - self.at
        if count > left // least_bytes:
            self.refuse(start, f"{what} is {count}, more than the {left} bytes left can hold")
        return count

    def string(self, what: str) -> str:
        length = self.count(f"length of {what}", 1)
        start = self.take(length, what)
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            self.refuse(start + error.start, f"{what} is not UTF-8 ({error.reason})")

    def name(self, what: str, most_bytes: int) -> str:
        start = self.at
        name = self.string(what)
        if not name:
            self.refuse(start, f"{what} is empty")
        if self.at - start - 8 > most_bytes:
            self.refuse(start, f"{what} has {self.at - start - 8} bytes, at most {most_bytes} are allowed")
        return name

    def parse(self) -> GGUFFile:
        magic = self.data[self.take(4, "magic") : 4]
        if magic != types.MAGIC:
            self.refuse(0, f"magic is {magic!r}, not {types.MAGIC!r}")
        version = self.u32("version")
        if version not in types.VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            why = " (a big-endian file)" if swapped in types.VERSIONS else ""
            supported = ", ".join(map(str, types.VERSIONS))
            self.refuse(4, f"version is {version}{why}; supported: {supported}")
        n_tensors = self.count("tensor count", _MIN_TENSOR_BYTES)
        n_keys = self.count("key count", _MIN_KEY_BYTES)
        metadata: dict[str, object] = {}
        alignment = types.DEFAULT_ALIGNMENT
        for index in range(n_keys):
            start = self.at
            key = self.name(f"key {index}", types.MAX_KEY_BYTES)
            if key in metadata:
                self.refuse(start, f"key {key!r} appears twice")
            value_type = self.u32(f"type of {key!r}")
            value_start = self.at
            metadata[key] = self.value(value_type, repr(key))
            if key == "general.alignment":
                alignment = self.alignment(value_type, metadata[key], value_start)
        tensors = self.tensor_infos(n_tensors, alignment)
        return GGUFFile(self.path, self.data, metadata, tensors, alignment)

    def alignment(self, value_type: int, value: object, start: int) -> int:
        if value_type != types.UINT32 or not isinstance(value, int):
            self.refuse(start, f"general.alignment is {types.VALUE_NAMES[value_type]}, not UINT32")
        if value < types.MIN_ALIGNMENT or value & (value - 1):
            self.refuse(start, f"general.alignment is {value}, not a power of two of at least {types.MIN_ALIGNMENT}")
        return value

    def value(self, value_type: int, key: str) -> object:
        if value_type == types.STRING:
            return self.string(f"value of {key}")
        if value_type == types.ARRAY:
            return self.array(key)
        if value_type not in types.SCALARS:
            self.refuse(self.at - 4, f"value type of {key} is {value_type}, which GGUF does not define")
        array = self.numbers(value_type, 1, f"value of {key}")
        return array[0] if value_type == types.FLOAT32 else array[0].item()

    def array(self, key: str) -> object:
        start = self.at
        item_type = self.u32(f"item type of {key}")
        if item_type == types.ARRAY:
            self.refuse(start, f"{key} is an array of arrays, which is not supported")
        if item_type == types.STRING:
            return self.strings(key)
        if item_type not in types.SCALARS:
            self.refuse(start, f"item type of {key} is {item_type}, which GGUF does not define")
        count = self.count(f"item count of {key}", types.SCALARS[item_type].itemsize)
        return self.numbers(item_type, count, f"items of {key}")

    def numbers(self, value_type: int, count: int, what: str) -> npt.NDArray[np.generic]:
        dtype = types.SCALARS[value_type]
        start = self.take(count * dtype.itemsize, what)
        raw = np.frombuffer(self.data, np.uint8, count * dtype.itemsize, start)
        if value_type == types.BOOL and (raw > 1).any():
            bad = int(np.argmax(raw > 1))
            self.refuse(start + bad, f"{what}: a BOOL is {raw[bad]}, not 0 or 1")
        return np.frombuffer(raw.tobytes(), dtype)  # a copy: values lie at any byte, this one is aligned and read-only

    def strings(self, key: str) -> list[str]:
        """A vocabulary has 150,000 strings, so this loop is the reader's speed: local names, no calls but decode."""
        count = self.count(f"item count of {key}", 8)
        data, at, size, unpack = self.data, self.at, self.size, _U64.unpack_from
        out: list[str] = []
        for index in range(count):
            if size - at < 8:
                self.refuse(at, f"item {index} of {key} is cut off")
            length = unpack(data, at)[0]
            if length > size - at - 8:
                self.refuse(at, f"item {index} of {key} has {length} bytes, the file has {size - at - 8} left")
            start, at = at + 8, at + 8 + length
            try:
                out.append(data[start:at].decode("utf-8"))
            except UnicodeDecodeError as error:
                self.refuse(start + error.start, f"item {index} of {key} is not UTF-8 ({error.reason})")
        self.at = at
        return out

    def tensor_infos(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        infos: dict[str, TensorInfo] = {}  # offsets are relative to the data section until the header's end is known
        for index in range(count):
            info = self.tensor_info(index, alignment)
            if info.name in infos:
                self.refuse_tensor(info.name, "appears twice")
            infos[info.name] = info
        data_start = -(-self.at // alignment) * alignment
        placed = {name: info._replace(offset=data_start + info.offset) for name, info in infos.items()}
        end, last = data_start, ""
        for info in sorted(placed.values(), key=lambda info: info.offset):
            if info.offset + info.nbytes > self.size:
                self.refuse_tensor(
                    info.name, f"bytes {info.offset} to {info.offset + info.nbytes} lie outside the file of {self.size}"
                )
            if info.offset < end:
                self.refuse_tensor(
                    info.name, f"starts at byte {info.offset}, inside tensor {last!r}, which ends at {end}"
                )
            end, last = info.offset + info.nbytes, info.name
        return placed

    def tensor_info(self, index: int, alignment: int) -> TensorInfo:
        name = self.name(f"name of tensor {index}", types.MAX_NAME_BYTES)
        n_dims = self.u32(f"number of dims of {name!r}")
        if not 1 <= n_dims <= types.MAX_DIMS:
            self.refuse_tensor(name, f"has {n_dims} dims, not 1 to {types.MAX_DIMS}")
        dims = [self.u64(f"dims of {name!r}") for _ in range(n_dims)]
        shape = tuple(reversed(dims))
        if 0 in dims:
            self.refuse_tensor(name, f"is empty: shape {shape}")
        ggml_id = self.u32(f"type of {name!r}")
        if ggml_id not in types.TENSOR_TYPES:
            self.refuse_tensor(name, f"has type id {ggml_id}, which is not known")
        kind = types.TENSOR_TYPES[ggml_id]
        if shape[-1] % kind.block:
            self.refuse_tensor(
                name, f"has rows of {shape[-1]} weights, not a multiple of {kind.name}'s block {kind.block}"
            )
        nbytes = shape[-1] // kind.block * kind.block_bytes
        for dim in shape[:-1]:
            nbytes *= dim  # Python integers: a product that would wrap in 64 bits is simply too large for the file
        if nbytes > self.size:
            self.refuse_tensor(name, f"shape {shape} of {kind.name} needs {nbytes} bytes, the file has {self.size}")
        offset = self.u64(f"offset of {name!r}")
        if offset % alignment:
            self.refuse_tensor(name, f"offset {offset} is not a multiple of the alignment {alignment}")
        return TensorInfo(name, shape, kind.name, offset, nbytes)

    def refuse_tensor(self, name: str, what: str) -> NoReturn:
        raise GGUFError(f"{self.path}: tensor {name!r}: {what}")
