"""`exactmoe inspect`: the figures, the verdict, and the exit status."""

import argparse
import importlib
import json
import shutil
from pathlib import Path

import pytest

from exactmoe.model import inspect as inspect_module
from exactmoe.model.gguf.reader import GGUFError
from exactmoe.model.inspect import inspect_model
from exactmoe.model.synth import synthesise


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inspect") / "tiny.gguf"
    synthesise(path, "tiny")
    return path


@pytest.fixture
def spoiled(tiny, tmp_path) -> Path:
    """The tiny model with another architecture: the header reads well, the loader refuses."""
    path = tmp_path / "other.gguf"
    content = tiny.read_bytes()
    assert content.count(b"qwen3moe") > 1
    path.write_bytes(content.replace(b"qwen3moe", b"qwen9moe", 2))  # the value, and the first key
    return path


@pytest.fixture
def damaged(tiny, tmp_path) -> Path:
    """The tiny model with the last block's scale of the last tensor made NaN."""
    path = shutil.copy(tiny, tmp_path / "damaged.gguf")
    with open(path, "r+b") as file:
        file.seek(-2, 2)
        file.write(b"\xff\xff")
    return Path(path)


def run_command(*arguments: str) -> int:
    command = importlib.import_module("exactmoe.cli.commands.inspect")
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.run(parser.parse_args(arguments))


def row_bytes(weights: int, bytes_per_block: int) -> int:
    return weights // 256 * bytes_per_block


def test_bytes_per_token_count_active_experts_one_embedding_row_and_all_else(tiny):
    q4, q6 = 144, 210
    layer = row_bytes(1024 * 512, q4) + row_bytes(256 * 512, q4) + row_bytes(512 * 1024, q4)  # q, k, output
    layer += 4 * (512 + 512 + 128 + 128 + 12 * 512)  # norms and router, f32
    layer += 4 * 2 * row_bytes(256 * 512, q4)  # gate and up of 4 experts
    small = row_bytes(256 * 512, q4) + 4 * row_bytes(512 * 256, q4)  # v, and down of 4 experts
    large = row_bytes(256 * 512, q6) + 4 * row_bytes(512 * 256, q6)
    ends = row_bytes(512, q4) + 4 * 512 + row_bytes(2048 * 512, q6)
    assert inspect_model(tiny).bytes_per_token == 4 * layer + 2 * small + 2 * large + ends


def test_parameters_are_counted_whole_and_active(tiny):
    found = inspect_model(tiny)
    expert = 3 * 256 * 512
    rest = 4 * (2 * 1024 * 512 + 2 * 256 * 512 + 2 * 512 + 2 * 128 + 12 * 512) + 2 * 2048 * 512 + 512
    assert found.parameters == rest + 4 * 12 * expert
    assert found.active_parameters == rest + 4 * 4 * expert


def test_groups_cover_every_tensor_byte_and_split_by_type(tiny):
    found = inspect_model(tiny)
    types = {(group.name, group.type_name): group.tensors for group in found.groups}
    assert types["attn_v", "Q4_K"] == types["attn_v", "Q6_K"] == 2 and types["ffn_norm", "F32"] == 4
    assert sum(group.tensors for group in found.groups) == 51
    assert sum(group.parameters for group in found.groups) == found.parameters
    assert 0 < found.file_bytes - sum(group.nbytes for group in found.groups) < 100_000


def test_a_good_file_can_run_and_exits_0(tiny, capsys):
    assert run_command(str(tiny)) == 0
    out = capsys.readouterr().out
    for words in ("qwen3moe", "8 query, 2 key/value, of 128", "12 of width 256, 4 per token", "ffn_down_exps", "yes ("):
        assert words in out


def test_json_says_the_same_in_one_object(tiny, capsys):
    assert run_command(str(tiny), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    found = inspect_model(tiny)
    assert report["runs"] is True and report["verdict"].startswith("yes") and report["architecture"] == "qwen3moe"
    assert report["config"]["hidden"] == 512 and report["config"]["eps"] == float(found.config.eps)
    assert report["bytes_per_token"] == found.bytes_per_token and len(report["tensors"]) == len(found.groups)


def test_another_architecture_is_reported_refused_and_exits_2(spoiled, capsys):
    assert run_command(str(spoiled)) == 2
    out = capsys.readouterr().out
    assert "architecture    qwen9moe" in out
    assert f"no: {spoiled}: architecture is 'qwen9moe'; supported: qwen3moe" in out


def test_a_nan_scale_is_reported_refused_and_exits_2(damaged, capsys):
    assert run_command(str(damaged), "--json") == 2
    report = json.loads(capsys.readouterr().out)
    assert report["runs"] is False and report["config"]["hidden"] == 512 and report["bytes_per_token"] is None
    assert "tensor 'output.weight': block 4095: the Q6_K scale at byte 208 is nan" in report["verdict"]


def test_a_file_without_a_header_is_refused(tmp_path):
    path = tmp_path / "text.gguf"
    path.write_text("not a model")
    with pytest.raises(GGUFError, match="magic is b'not '"):
        run_command(str(path))


def test_without_anything_to_run_on_the_verdict_is_no_and_the_exit_3(tiny, capsys, monkeypatch):
    monkeypatch.setattr(inspect_module, "_device", lambda: None)
    assert run_command(str(tiny)) == 3
    assert "no: torch and triton are not installed" in capsys.readouterr().out
