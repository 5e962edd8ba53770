"""The strict GGUF reader: good files against gguf-py, and every refusal with the words that name what is wrong."""

import hashlib
import re
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exactmoe.kernels.errors import InvalidInput
from exactmoe.kernels.formats import BLOCK, EXECUTABLE
from exactmoe.model.gguf import types
from exactmoe.model.gguf.reader import GGUFError, open_gguf

U8, U32, F32, BOOL, STR, ARR, U64 = 0, 4, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, value_type: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", value_type) + value


def tensor(name: str | bytes, dims: tuple[int, ...], ggml_id: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, ggml_id, offset)


def container(
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = (
        len(tensors) if n_tensors is None else n_tensors,
        len(keys) if n_keys is None else n_keys,
    )
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


GOOD = container(
    (
        key("a.u8", U8, b"\x07"),
        key("a.i16", 3, struct.pack("<h", -300)),
        key("a.u32", U32, struct.pack("<I", 4000000000)),
        key("a.f32", F32, struct.pack("<f", 1e-6)),
        key("a.f64", 12, struct.pack("<d", 1e-6)),
        key("a.bool", BOOL, b"\x01"),
        key("a.str", STR, text("naïve")),
        key("a.u64", U64, struct.pack("<Q", 2**63)),
        key("a.words", ARR, struct.pack("<IQ", STR, 3) + text("x") + text("") + text("ü")),
        key("a.numbers", ARR, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
    ),
    (tensor("one", (3, 2), 0, 0), tensor("two", (256, 2), 12, 32)),
    struct.pack("<6f", *range(6)) + bytes(8) + bytes(range(144)) * 2,
)
HEADER_BYTES = len(GOOD) - 32 - 288


@pytest.fixture
def write(tmp_path: Path):
    def _write(content: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return _write


def test_a_good_file_gives_its_values_with_the_stored_types(write):
    file = open_gguf(write(GOOD))
    numbers = file.metadata["a.numbers"]
    assert isinstance(numbers, np.ndarray) and numbers.dtype == np.int32 and numbers.tolist() == [1, -2, 3]
    assert {k: v for k, v in file.metadata.items() if k != "a.numbers"} == {
        "a.u8": 7,
        "a.i16": -300,
        "a.u32": 4000000000,
        "a.f32": np.float32(1e-6),
        "a.f64": 1e-6,
        "a.bool": True,
        "a.str": "naïve",
        "a.u64": 2**63,
        "a.words": ["x", "", "ü"],
    }
    kinds = {k: type(v) for k, v in file.metadata.items()}
    assert kinds["a.f32"] is np.float32 and kinds["a.f64"] is float
    assert kinds["a.bool"] is bool and kinds["a.u8"] is int


def test_tensors_are_read_only_views_in_numpy_order(write):
    file = open_gguf(write(GOOD))
    one, two = file.tensor("one"), file.tensor("two")
    assert one.dtype == np.float32 and one.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert two.dtype == np.uint8 and two.shape == (2, 144) and two[1].tolist() == list(range(144))
    assert file.tensors["two"].shape == (2, 256) and file.tensors["two"].nbytes == 288
    for array in (one, two):
        assert not array.flags.writeable and not array.flags.owndata
    assert GOOD[file.tensors["two"].offset :][:288] == two.tobytes()


def test_version_2_has_the_same_layout(write):
    assert open_gguf(write(container((key("k", U8, b"\x01"),), version=2))).metadata["k"] == 1


def test_the_digest_is_that_of_the_whole_file(write):
    assert open_gguf(write(GOOD)).sha256() == hashlib.sha256(GOOD).hexdigest()


def test_a_tensor_that_is_not_there_is_refused_by_name(write):
    with pytest.raises(GGUFError, match="tensor 'three' is not in the file"):
        open_gguf(write(GOOD)).tensor("three")


def test_block_sizes_agree_with_gguf_py_and_with_the_kernels():
    assert types.TENSOR_TYPES
    for kind in types.TENSOR_TYPES.values():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]] == (kind.block, kind.block_bytes)
        assert gguf.GGMLQuantizationType[kind.name] == kind.ggml_id
    for quant in EXECUTABLE.values():
        assert types.TENSOR_TYPES[quant.ggml_id] == (quant.ggml_id, quant.name, BLOCK, quant.block_bytes)


MANY = 2**40
ROOM = bytes(4096)
REFUSALS: dict[str, tuple[bytes, str]] = {
    "an empty file": (b"", "the file is empty"),
    "three bytes": (b"GGU", "at byte 0: magic needs 4 bytes, the file has 3"),
    "another magic": (container(magic=b"GGML"), "at byte 0: magic is b'GGML'"),
    "version 1": (container(version=1), "at byte 4: version is 1; supported: 2, 3"),
    "version 4": (container(version=4), "at byte 4: version is 4;"),
    "a big-endian file": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), r"version is 50331648 \(a big-endian file\)"),
    "a cut version": (b"GGUF\x03", "at byte 4: version needs 4 bytes, the file has 1"),
    "a cut tensor count": (b"GGUF" + struct.pack("<I", 3) + b"\0\0", "at byte 8: tensor count needs 8 bytes"),
    "a cut key count": (b"GGUF" + struct.pack("<IQ", 3, 0), "at byte 16: key count needs 8 bytes"),
    "a huge tensor count": (container(n_tensors=MANY), f"at byte 8: tensor count is {MANY}"),
    "a huge key count": (container(n_keys=2**64 - 1), f"at byte 16: key count is {2**64 - 1}"),
    "one key too many": (container((key("k", STR, text("x" * 20)),), n_keys=2, alignment=1), "length of key 1 needs 8"),
    "a key longer than the file": (container((struct.pack("<Q", MANY) + ROOM,)), f"length of key 0 is {MANY}"),
    "a key without a name": (container((key("", U8, b"\1"), ROOM), n_keys=1), "at byte 24: key 0 is empty"),
    "a key of 65,536 bytes": (container((key("k" * 65536, U8, b"\1"),)), "key 0 has 65536 bytes, at most 65535"),
    "a key that is not UTF-8": (container((key(b"ab\xff", U8, b"\1"),)), "at byte 34: key 0 is not UTF-8"),
    "a key twice": (container((key("k", U8, b"\1"), key("k", U8, b"\1"))), "at byte 38: key 'k' appears twice"),
    "a cut value type": (container((text("ab"), bytes(4)), n_keys=1, alignment=1), "value of 'ab' needs 1 bytes"),
    "value type 13": (container((key("k", 13, ROOM),)), "at byte 33: value type of 'k' is 13"),
    "value type 2**32-1": (container((key("k", 2**32 - 1, ROOM),)), "value type of 'k' is 4294967295"),
    "a BOOL of 2": (container((key("k", BOOL, b"\2"),)), "at byte 37: value of 'k': a BOOL is 2"),
    "a cut FLOAT64": (container((key("k", 12, b"\0\0\0"),), alignment=1), "value of 'k' needs 8 bytes, .* 3 left"),
    "a string longer than the file": (
        container((key("k", STR, struct.pack("<Q", MANY)),)),
        "value of 'k' is 1099511627776",
    ),
    "a string that is not UTF-8": (
        container((key("k", STR, text(b"x\xc3\x28")),)),
        "at byte 46: value of 'k' is not UTF-8",
    ),
    "an array of type 13": (
        container((key("k", ARR, struct.pack("<IQ", 13, 1)),)),
        "at byte 37: item type of 'k' is 13",
    ),
    "an array of arrays": (
        container((key("k", ARR, struct.pack("<IQ", ARR, 1)),)),
        "at byte 37: 'k' is an array of arrays",
    ),
    "an array longer than the file": (
        container((key("k", ARR, struct.pack("<IQ", U32, 2**62)),)),
        f"at byte 41: item count of 'k' is {2**62}",
    ),
    "an array whose byte count wraps": (
        container((key("k", ARR, struct.pack("<IQ", U64, 2**61)),)),
        f"item count of 'k' is {2**61}",
    ),
    "more strings than fit": (
        container((key("k", ARR, struct.pack("<IQ", STR, 2**60)), ROOM), n_keys=1),
        f"item count of 'k' is {2**60}",
    ),
    "an item longer than the file": (
        container((key("k", ARR, struct.pack("<IQ", STR, 2) + text("a") + struct.pack("<Q", MANY)),)),
        f"item 1 of 'k' has {MANY} bytes",
    ),
    "items that are cut off": (
        container((key("k", ARR, struct.pack("<IQ", STR, 2) + text("abcdefgh")),), alignment=1),
        "at byte 65: item 1 of 'k' is cut off",
    ),
    "an item that is not UTF-8": (
        container((key("k", ARR, struct.pack("<IQ", STR, 2) + text("a") + text(b"\x80")),)),
        "at byte 66: item 1 of 'k' is not UTF-8",
    ),
    "a BOOL of 3 in an array": (
        container((key("k", ARR, struct.pack("<IQ", BOOL, 3) + b"\1\0\3"),)),
        "at byte 51: items of 'k': a BOOL is 3",
    ),
    "an alignment of 0": (container((key("general.alignment", U32, bytes(4)),)), "general.alignment is 0,"),
    "an alignment of 4": (container((key("general.alignment", U32, b"\4\0\0\0"),)), "general.alignment is 4,"),
    "an alignment of 48": (container((key("general.alignment", U32, b"\x30\0\0\0"),)), "general.alignment is 48,"),
    "an alignment in UINT64": (
        container((key("general.alignment", U64, struct.pack("<Q", 32)),)),
        "at byte 53: general.alignment is UINT64, not UINT32",
    ),
    "a tensor without a name": (container((), (tensor("", (4,)),), ROOM), "at byte 24: name of tensor 0 is empty"),
    "a tensor name of 65 bytes": (container((), (tensor("t" * 65, (4,)),), ROOM), "name of tensor 0 has 65 bytes"),
    "a tensor name not UTF-8": (container((), (tensor(b"\xfe", (4,)),), ROOM), "name of tensor 0 is not UTF-8"),
    "a tensor twice": (container((), (tensor("t", (4,)), tensor("t", (4,), 0, 32)), ROOM), "tensor 't': appears twice"),
    "a tensor of no dims": (container((), (tensor("t", ()), ROOM), n_tensors=1), "tensor 't': has 0 dims"),
    "a tensor of 5 dims": (container((), (tensor("t", (1,) * 5),), ROOM), "tensor 't': has 5 dims"),
    "a tensor of 2**32-1 dims": (
        container((), (text("t") + b"\xff" * 4,), ROOM),
        "tensor 't': has 4294967295 dims",
    ),
    "an empty tensor": (container((), (tensor("t", (4, 0)),), ROOM), r"tensor 't': is empty: shape \(0, 4\)"),
    "a removed tensor type": (container((), (tensor("t", (256,), 4),), ROOM), "tensor 't': has type id 4,"),
    "tensor type 1000": (container((), (tensor("t", (256,), 1000),), ROOM), "tensor 't': has type id 1000,"),
    "a row of half a block": (
        container((), (tensor("t", (128, 2), 12),), ROOM),
        "tensor 't': has rows of 128 weights, not a multiple of Q4_K's block 256",
    ),
    "more bytes than the file": (
        container((), (tensor("t", (1025,)),), ROOM),
        r"tensor 't': bytes 64 to 4164 lie outside the file of 4160",
    ),
    "a shape far beyond the file": (container((), (tensor("t", (2**40,)),), ROOM), f"needs {2**42} bytes"),
    "a shape whose product wraps to 0": (
        container((), (tensor("t", (2**32, 2**32)),), ROOM),
        f"tensor 't': shape .* needs {2**66} bytes",
    ),
    "a shape whose product wraps to 4": (
        container((), (tensor("t", (2**63, 2, 1, 4)),), ROOM),
        f"tensor 't': shape .* needs {2**68} bytes",
    ),
    "an offset beyond the file": (container((), (tensor("t", (4,), 0, 8192),), ROOM), "bytes 8256 to 8272 lie outside"),
    "an offset that wraps": (
        container((), (tensor("t", (4,), 0, 2**64 - 32),), ROOM),
        "tensor 't': bytes 18446744073709551648 to",
    ),
    "a misaligned offset": (container((), (tensor("t", (4,), 0, 8),), ROOM), "offset 8 is not a multiple of .* 32"),
    "misaligned for the file's own alignment": (
        container((key("general.alignment", U32, b"\x40\0\0\0"),), (tensor("t", (4,), 0, 32),), ROOM, alignment=64),
        "offset 32 is not a multiple of the alignment 64",
    ),
    "tensors that overlap": (
        container((), (tensor("t", (16,)), tensor("u", (4,), 0, 32)), ROOM),
        "tensor 'u': starts at byte 128, inside tensor 't', which ends at 160",
    ),
    "tensors at one place": (
        container((), (tensor("t", (4,)), tensor("u", (4,))), ROOM),
        "tensor 'u': starts at byte 96, inside tensor 't'",
    ),
    "a tensor inside another listed later": (
        container((), (tensor("t", (4,), 0, 64), tensor("u", (64,), 0, 0)), ROOM),
        "tensor 't': starts at byte 160, inside tensor 'u'",
    ),
    "a cut tensor list": (
        container((), (tensor("t", (4,)),), n_tensors=2, alignment=1),
        "tensor count is 2, more than",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_bad_file_is_refused_by_what_is_wrong_with_it(case, write):
    content, words = REFUSALS[case]
    path = write(content)
    with pytest.raises(GGUFError) as refusal:
        open_gguf(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert re.search(words, str(refusal.value)), str(refusal.value)


def test_the_refusals_are_many_and_no_two_say_the_same(write):
    said = set()
    for content, _ in REFUSALS.values():
        with pytest.raises(GGUFError) as refusal:
            open_gguf(write(content))
        said.add(str(refusal.value))
    assert len(said) == len(REFUSALS) >= 40


def test_a_refusal_is_invalid_input():
    assert issubclass(GGUFError, InvalidInput)


@pytest.mark.parametrize("name", ["missing.gguf", "."])
def test_what_is_not_a_file_is_refused(name, tmp_path):
    with pytest.raises(GGUFError, match=re.escape(str(tmp_path / name))):
        open_gguf(tmp_path / name)


def test_45_bytes_that_promise_2_to_the_60_strings_are_refused_at_once(write):
    content = container((key("abc", ARR, struct.pack("<IQ", STR, 2**60)),), alignment=1)[:45].ljust(45, b"\0")
    path = write(content)
    started = time.perf_counter()
    with pytest.raises(GGUFError):
        open_gguf(path)
    assert len(content) == 45 and time.perf_counter() - started < 0.1


def test_every_truncation_is_refused(write):
    """Byte 0 to the end of the data: nothing but `GGUFError`, and never a file that opens."""
    for length in range(len(GOOD)):
        with pytest.raises(GGUFError):
            open_gguf(write(GOOD[:length]))
    open_gguf(write(GOOD))


def test_every_one_byte_change_of_the_header_opens_or_is_refused(write):
    opened = 0
    for at in range(HEADER_BYTES):
        for value in (1, 0xFF):
            path = write(GOOD[:at] + bytes([value]) + GOOD[at + 1 :])
            try:
                file = open_gguf(path)
            except GGUFError:
                continue
            opened += 1
            for name in file.tensors:
                assert file.tensor(name).nbytes == file.tensors[name].nbytes
    assert 0 < opened < 2 * HEADER_BYTES


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(0, 64),
)
def test_random_damage_opens_or_is_refused(flips, cut, write):
    content = bytearray(GOOD)
    for at, value in flips:
        content[at] = value
    try:
        file = open_gguf(write(bytes(content[: len(content) - cut])))
    except GGUFError:
        return
    for name in file.tensors:
        assert file.tensor(name).nbytes == file.tensors[name].nbytes


def test_a_file_by_gguf_py_reads_the_same(tmp_path):
    path = tmp_path / "theirs.gguf"
    rng = np.random.default_rng(0)
    norm = rng.standard_normal(64).astype(np.float32)
    blocks = rng.integers(0, 256, (3, 5, 2 * 210), dtype=np.uint8)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_uint32("a.u32", 17)
    writer.add_float32("a.f32", 1e-6)
    writer.add_bool("a.bool", False)
    writer.add_array("a.words", ["é", "", "c"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_tensor("norm", norm)
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(path)
    assert file.metadata["general.architecture"] == "qwen3moe" and file.metadata["a.words"] == ["é", "", "c"]
    assert file.metadata["a.u32"] == 17 and file.metadata["a.f32"] == np.float32(1e-6)
    assert file.metadata["a.bool"] is False
    assert file.tensor("norm").tobytes() == norm.tobytes()
    assert file.tensors["blocks"].shape == (3, 5, 512) and file.tensors["blocks"].type_name == "Q6_K"
    assert np.array_equal(file.tensor("blocks"), blocks)
