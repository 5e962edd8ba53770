"""A trace on disk: bits preserved, alterations seen, and no killed run that passes as complete."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from exactmoe.kernels.errors import InvalidInput
from exactmoe.parity.trace.folder import Saved, open_trace, write_trace
from exactmoe.parity.trace.manifest import NAME, Manifest, read_manifest

STRANGE = np.array([0x80000000, 0x7FC12345, 0xFFC00001, 0x7F800001, 1, 0, 0x7F800000, 0x40490FDB], np.uint32)


def manifest(**changes: object) -> Manifest:
    fields: dict[str, object] = {
        "complete": True,
        "model": "m.gguf",
        "model_sha256": "ab",
        "numerics": "numerics-v1 1.0.0",
        "activations": "q8_k",
        "backend": "reference",
        "device": "numpy",
        "versions": {"numpy": "2"},
        "tokens": (5, 6),
        "n_layers": 2,
        "positions": (0, 1),
        "plan": {},
    }
    return Manifest(**{**fields, **changes})  # type: ignore[arg-type]


def items() -> list[Saved]:
    f = STRANGE.view(np.float32)
    ids = np.array([[1, 0], [3, 2]], np.int32)
    return [
        Saved(("embedding", -1), f.reshape(2, 4)),
        Saved(("moe_router", 1), f[:4].reshape(2, 2).copy(), None, np.array([3, 2**32], np.int64)),
        Saved(("moe_router_indices", 1), ids),
        Saved(("moe_expert_out", 1), f[:4].reshape(1, 4).copy(), np.array([[1, 0, 3]], np.int32)),
    ]


@pytest.mark.parametrize("file_format", ["safetensors", "aprt"])
def test_bits_shapes_and_order_come_back(tmp_path: Path, file_format: str) -> None:
    saved = items()[: 4 if file_format == "safetensors" else 3]
    trace = write_trace(tmp_path / "t", manifest(), saved, file_format)
    assert trace.keys() == [item.key for item in saved]
    for item in saved:
        found = trace.read(*item.key)
        values = item.values
        if file_format == "aprt":
            values = values.astype(np.float32).ravel()
        assert (found.dtype, found.shape) == (values.dtype, values.shape)
        assert found.tobytes() == values.tobytes()
    assert trace.verify() == len(saved)
    assert (tmp_path / "t" / "layer-1" / f"moe_router.{file_format}").is_file()
    assert (tmp_path / "t" / f"embedding.{file_format}").is_file()


def test_rows_and_margins_stand_beside_their_stage(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", manifest(), items())
    np.testing.assert_array_equal(trace.rows("moe_expert_out", 1), [[1, 0, 3]])
    assert trace.rows("moe_router", 1) is None
    np.testing.assert_array_equal(trace.margin_ulp(1), [3, 2**32])
    assert trace.margin_ulp(0) is None


def test_a_folder_of_aprt_files_alone_is_a_trace_of_another_engine(tmp_path: Path) -> None:
    write_trace(tmp_path / "t", manifest(), items()[:3], "aprt")
    (tmp_path / "t" / NAME).unlink()
    trace = open_trace(tmp_path / "t")
    assert trace.manifest.backend == "aprt"
    assert trace.keys() == [item.key for item in items()[:3]]
    np.testing.assert_array_equal(trace.read("embedding", -1).view(np.uint32), STRANGE)


def test_a_stage_that_is_not_held_is_refused_by_name(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", manifest(), items())
    with pytest.raises(InvalidInput, match="holds no q of layer 0"):
        trace.read("q", 0)


def test_nothing_to_write_is_refused_and_leaves_no_complete_trace(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no tensor to write"):
        write_trace(tmp_path / "t", manifest(), [])
    with pytest.raises(InvalidInput, match="incomplete"):
        open_trace(tmp_path / "t")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: _flip(d / "embedding.safetensors"), "not those of the manifest"),
        (lambda d: (d / "embedding.safetensors").write_bytes(b"x" * 9), "no safetensors file"),
        (lambda d: (d / "embedding.safetensors").unlink(), "is missing"),
        (
            lambda d: shutil.copy(d / "layer-1" / "moe_router.safetensors", d / "embedding.safetensors"),
            "no tensor embed",
        ),
        (lambda d: (d / NAME).write_text("{"), "is not JSON"),
        (lambda d: (d / NAME).write_text("[]"), "no JSON object"),
        (lambda d: (d / NAME).write_text((d / NAME).read_text().replace('"shape"', '"shapes"')), "lacks shape"),
        (lambda d: (d / NAME).write_text((d / NAME).read_text().replace('"format": 1', '"format": 2')), "format 2"),
        (lambda d: (d / NAME).write_text((d / NAME).read_text().replace("embedding.s", "../embedding.s")), "outside"),
        (
            lambda d: (d / NAME).write_text((d / NAME).read_text().replace("float32", "float16", 1)),
            "manifest says float16",
        ),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_what_was_altered_is_refused(tmp_path: Path, change, said: str) -> None:
    write_trace(tmp_path / "t", manifest(), items())
    change(tmp_path / "t")
    with pytest.raises(InvalidInput, match=said):
        open_trace(tmp_path / "t").verify()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(InvalidInput, match="not empty, and no trace"):
            write_trace(tmp_path / "t", manifest(), items(), overwrite=overwrite)
    assert (tmp_path / "t" / "thesis.txt").read_text() == "precious"


def test_a_trace_is_replaced_only_when_asked(tmp_path: Path) -> None:
    write_trace(tmp_path / "t", manifest(), items())
    with pytest.raises(InvalidInput, match="--overwrite"):
        write_trace(tmp_path / "t", manifest(), items()[:1])
    trace = write_trace(tmp_path / "t", manifest(), items()[:1], overwrite=True)
    assert trace.keys() == [("embedding", -1)]
    assert not (tmp_path / "t" / "layer-1").exists()


def test_an_error_on_the_way_leaves_an_incomplete_trace(tmp_path: Path) -> None:
    def broken():
        yield items()[0]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_trace(tmp_path / "t", manifest(), broken())
    assert not read_manifest(tmp_path / "t").complete
    with pytest.raises(InvalidInput, match="incomplete"):
        open_trace(tmp_path / "t")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child only writes files
def test_a_run_killed_at_any_moment_never_passes_as_complete(tmp_path: Path) -> None:
    """Twenty writers killed at random moments: each folder is refused, or complete to the last bit."""
    chance = random.Random(20)
    stages = [Saved(("q" if i % 2 else "k", i // 2), np.full((64, 256), i, np.float32)) for i in range(40)]

    def write(folder: Path) -> None:
        write_trace(folder, manifest(n_layers=20), iter(stages))

    began = time.perf_counter()
    write(tmp_path / "whole")
    length = time.perf_counter() - began
    refused = 0
    for n in range(20):
        folder = tmp_path / str(n)
        child = os.fork()
        if child == 0:
            try:
                write(folder)
            finally:
                os._exit(0)
        time.sleep(length * (n + chance.random()) / 20)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            trace = open_trace(folder)
        except InvalidInput:
            refused += 1
        else:
            assert trace.verify() == len(stages)
        for path in folder.rglob("*.safetensors"):  # every name stands for a whole file
            assert path.stat().st_size > 64 * 256 * 4
    assert refused >= 5  # else nothing was killed on the way
