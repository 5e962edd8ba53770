"""The streaming GGUF writer: our reader and gguf-py read what it writes; what it refuses; what it leaves behind."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from exactmoe.kernels.errors import InvalidInput, MissingEnvironment
from exactmoe.model.gguf import writer
from exactmoe.model.gguf.reader import open_gguf
from exactmoe.model.gguf.writer import TensorData, tensor_bytes, write_gguf

METADATA = {
    "general.architecture": "qwen3moe",
    "an.int": 151936,
    "a.bool": True,
    "an.eps": np.float32(1e-6),
    "a.double": np.float64(1e-6),
    "a.small": np.int8(-5),
    "a.big": np.uint64(2**63),
    "some.words": ["é", "", "Ġthe"],
    "no.words": [],
    "some.types": np.array([1, 3, -6], np.int32),
    "some.floats": np.array([0.5, 1e-6], np.float32),
}
NORM = np.linspace(-1, 1, 7, dtype=np.float32)
ROUTER = np.arange(6, dtype=np.float32).reshape(2, 3)
BLOCKS = np.random.default_rng(1).integers(0, 256, (2, 3, 2 * 144), dtype=np.uint8)
TENSORS = (
    TensorData("norm", (7,), "F32", NORM),
    TensorData("router", (2, 3), "F32", ROUTER),
    TensorData("blocks", (2, 3, 512), "Q4_K", BLOCKS),
    TensorData("pieces", (1, 256), "Q6_K", (bytes(100), b"\xff" * 110)),
)


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, METADATA, TENSORS)
    file = open_gguf(path)
    assert list(file.metadata) == list(METADATA) and list(file.tensors) == [t.name for t in TENSORS]
    for key, value in METADATA.items():
        assert np.array_equal(file.metadata[key], value), key
    assert type(file.metadata["an.eps"]) is np.float32
    assert file.tensor("norm").tobytes() == NORM.tobytes()
    assert np.array_equal(file.tensor("router"), ROUTER)
    assert np.array_equal(file.tensor("blocks"), BLOCKS)
    assert file.tensor("pieces").tobytes() == bytes(100) + b"\xff" * 110


def test_gguf_py_reads_the_same_values_types_and_bytes(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, METADATA, TENSORS)
    theirs, ours = gguf.GGUFReader(path), open_gguf(path)
    for key, value in METADATA.items():
        assert np.array_equal(theirs.fields[key].contents(), value), key
    expected = {"an.int": "UINT32", "an.eps": "FLOAT32", "a.double": "FLOAT64", "a.small": "INT8", "a.big": "UINT64"}
    assert {key: theirs.fields[key].types[0].name for key in expected} == expected
    assert [t.name for t in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert tuple(reversed(tensor.shape.tolist())) == info.shape
        assert (tensor.tensor_type.name, tensor.data_offset, tensor.n_bytes) == (
            info.type_name,
            info.offset,
            info.nbytes,
        )
        assert tensor.data.tobytes() == ours.tensor(tensor.name).tobytes()


def test_offsets_are_multiples_of_32(tmp_path):
    write_gguf(tmp_path / "a.gguf", METADATA, TENSORS)
    offsets = [info.offset for info in open_gguf(tmp_path / "a.gguf").tensors.values()]
    assert len(offsets) == 4 and all(offset % 32 == 0 for offset in offsets)


def one(**change: object) -> TensorData:
    return TensorData("t", (2, 256), "Q4_K", np.zeros((2, 144), np.uint8))._replace(**change)


@pytest.mark.parametrize(
    ("metadata", "tensor", "words"),
    [
        ({"k": 1.5}, one(), "k: float 1.5 cannot be stored"),
        ({"k": -1}, one(), "k: -1 does not fit UINT32"),
        ({"k": 2**32}, one(), "k: 4294967296 does not fit UINT32"),
        ({"k": [1, 2]}, one(), "k: a list must hold only str"),
        ({"k": None}, one(), "k: NoneType None cannot be stored"),
        ({"k": np.zeros((1, 1), np.float32)}, one(), "k: ndarray .* cannot be stored"),
        ({"k": np.float16(1)}, one(), "k: float16 .* cannot be stored"),
        ({"general.alignment": 64}, one(), "general.alignment is always"),
        ({}, one(type_name="Q9"), "t: type 'Q9' is not known"),
        ({}, one(shape=()), "t: 0 dims"),
        ({}, one(shape=(1,) * 5), "t: 5 dims"),
        ({}, one(shape=(2, 0)), r"t: shape \(2, 0\) is empty"),
        ({}, one(shape=(2, 128)), "t: rows of 128 are not whole Q4_K blocks"),
        ({}, one(shape=(3, 256)), r"t: data is uint8 \(2, 144\), Q4_K of \(3, 256\) is uint8 \(3, 144\)"),
        ({}, one(data=np.zeros((2, 144), np.int8)), "t: data is int8"),
        ({}, one(shape=(2, 144), type_name="F32"), "t: data is uint8 .*, F32 of .* is float32"),
        ({}, one(data=(bytes(287),)), "t: 287 bytes of data, its shape needs 288"),
        ({}, one(data=(bytes(144),) * 3), "t: more data than the 288 bytes"),
        ({}, one(name=""), "tensor name '' has a bad length"),
        ({}, one(name="t" * 64), "tensor name 't+' has a bad length"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_leaves_nothing(metadata, tensor, words, tmp_path):
    with pytest.raises(InvalidInput, match=words):
        write_gguf(tmp_path / "a.gguf", metadata, [tensor])
    assert list(tmp_path.iterdir()) == []


def test_a_name_given_twice_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="tensor t is given twice"):
        write_gguf(tmp_path / "a.gguf", {}, [one(), one()])


def test_an_existing_file_is_kept_unless_told_otherwise(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_text("mine")
    with pytest.raises(InvalidInput, match="already exists"):
        write_gguf(path, {}, [one()])
    assert path.read_text() == "mine"
    write_gguf(path, {}, [one()], overwrite=True)
    assert list(open_gguf(path).tensors) == ["t"]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_text("mine")

    def interrupted():
        yield bytes(144)
        assert len(list(tmp_path.iterdir())) == 2  # the partial file stands beside the old one
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(path, {}, [one(data=interrupted())], overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"] and path.read_text() == "mine"


def test_a_place_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="there is no folder"):
        write_gguf(tmp_path / "none" / "a.gguf", {}, [one()])
    with pytest.raises(InvalidInput, match="is a folder"):
        write_gguf(tmp_path, {}, [one()], overwrite=True)


def test_a_full_disk_is_a_matter_of_the_machine(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", full)
    with pytest.raises(MissingEnvironment, match=r"a\.gguf: cannot be written: No space left on device"):
        write_gguf(tmp_path / "a.gguf", {}, [one()])
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_byte_of_tensor_data(tmp_path: Path):
    seen: list[int] = []
    write_gguf(tmp_path / "a.gguf", {}, TENSORS, progress=seen.append)
    assert sum(seen) == sum(tensor_bytes(t.name, t.shape, t.type_name) for t in TENSORS) == 28 + 24 + 1728 + 210
