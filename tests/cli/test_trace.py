"""`exactmoe trace`: what it saves, prints and refuses."""

import json
from pathlib import Path

import pytest

from exactmoe.cli.main import main
from exactmoe.model.stages import keys
from exactmoe.parity.trace.folder import open_trace

TOKENS = "3,141,59,26,5"


def run(model_file: Path, folder: Path, *arguments: str) -> int:
    return main(["trace", str(model_file), "--tokens", TOKENS, "--backend", "reference", "-o", str(folder), *arguments])


def test_everything_is_saved_by_default_and_the_cost_is_told(model_file: Path, tmp_path: Path, capsys) -> None:
    assert run(model_file, tmp_path / "t", "--json", "-") == 0
    told = json.loads(capsys.readouterr().out)
    trace = open_trace(tmp_path / "t")
    assert trace.keys() == keys(2)
    assert trace.verify() == told["tensors"] == 45
    assert told["bytes"] == sum(record.nbytes for record in trace.manifest.tensors) > 0
    assert told["production_seconds"] > 0 and told["traced_seconds"] > 0


def test_a_selection_is_saved_and_nothing_else(model_file: Path, tmp_path: Path) -> None:
    arguments = ["--stages", "MoE_Router, layer_output", "--layers", "1", "--positions", "last"]
    assert run(model_file, tmp_path / "t", *arguments) == 0
    trace = open_trace(tmp_path / "t")
    assert trace.keys() == [("moe_router", 1), ("post_ffn_residual", 1)]
    assert trace.read("post_ffn_residual", 1).shape == (1, 256)
    assert sorted(p.relative_to(tmp_path / "t").as_posix() for p in (tmp_path / "t").rglob("*.*")) == [
        "layer-1/moe_router.safetensors", "layer-1/post_ffn_residual.safetensors", "manifest.json",
    ]  # fmt: skip


def test_a_trace_round_trips_through_aprt_bit_for_bit(model_file: Path, tmp_path: Path) -> None:
    assert run(model_file, tmp_path / "a", "--format", "aprt") == 0
    assert run(model_file, tmp_path / "b") == 0
    left, right = open_trace(tmp_path / "a"), open_trace(tmp_path / "b")
    assert left.keys() == right.keys() == keys(2)
    for key in keys(2):
        values = right.read(*key)
        assert left.read(*key).tobytes() == (values.astype("f4") if values.dtype.kind == "i" else values).tobytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--stages", "moe_rooter"], "unknown stage 'moe_rooter'"), (["--layers", "2"], "reaches layer 2, the last is 1"),
     (["--positions", "9"], "reaches position 9"), (["--experts", "4"], "reaches expert 4"),
     (["--stages", ""], "empty name"),
     (["--device", "interpret"], "is for --backend triton"), (["--digest", "--positions", "1"], "whole stages")],
)  # fmt: skip
def test_what_cannot_be_saved_is_refused_before_anything_is_written(
    model_file: Path, tmp_path: Path, capsys, arguments: list[str], said: str
) -> None:
    assert run(model_file, tmp_path / "t", *arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_a_folder_in_use_is_refused_and_a_trace_replaced_when_asked(model_file: Path, tmp_path: Path, capsys) -> None:
    assert run(model_file, tmp_path / "t", "--stages", "q") == 0
    assert run(model_file, tmp_path / "t", "--stages", "k") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(model_file, tmp_path / "t", "--stages", "k", "--overwrite") == 0
    assert open_trace(tmp_path / "t").keys() == [("k", 0), ("k", 1)]
