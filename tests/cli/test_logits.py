import os

import numpy as np
import pytest

from exactmoe.parity.bits import compare

V = 512  # vocabulary of the model under test


@pytest.fixture
def out(tmp_path):
    return tmp_path / "logits.npy"


def logits(exactmoe, model_file, out, *arguments, tokens="3,1,4"):
    outcome = exactmoe("logits", model_file, "--tokens", tokens, *arguments, "-o", out)
    assert outcome.status == 0, outcome.err
    return np.load(out)


@pytest.mark.parametrize("profile", ["q8_k", "q16_k"])
def test_both_backends_write_the_same_bits_of_every_position(exactmoe, model_file, out, profile):
    arrays = [
        logits(exactmoe, model_file, out, "--backend", backend, "--all-positions", "--activations", profile)
        for backend in ("reference", "triton")
    ]
    assert arrays[0].shape == (3, V)
    assert arrays[0].dtype == np.float32
    assert len(np.unique(arrays[0])) > V
    found = compare("logits", *arrays)
    assert found.equal, str(found)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_without_all_positions_the_last_position_alone_is_written(exactmoe, model_file, out, backend):
    every = logits(exactmoe, model_file, out, "--backend", backend, "--all-positions")
    last = logits(exactmoe, model_file, out, "--backend", backend)
    assert last.shape == (V,)
    assert compare("logits", every[-1], last).equal


def test_the_profile_changes_the_bits(exactmoe, model_file, out):
    q8 = logits(exactmoe, model_file, out, "--backend", "triton")
    q16 = logits(exactmoe, model_file, out, "--backend", "triton", "--activations", "q16_k")
    assert compare("logits", q8, q16).differing > V // 2


def test_the_file_is_named_as_asked_and_nothing_is_left_beside_it(exactmoe, model_file, tmp_path):
    out = tmp_path / "no suffix"
    outcome = exactmoe("logits", model_file, "--tokens", "1", "--backend", "triton", "-o", out)
    assert outcome.status == 0
    assert f"{out}: float32 [{V}]" in outcome.out
    assert os.listdir(tmp_path) == ["no suffix"]


def test_a_file_that_cannot_be_finished_leaves_the_old_one_as_it_was(exactmoe, model_file, out, monkeypatch):
    out.write_bytes(b"old")

    def full_disk(file, array, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    outcome = exactmoe("logits", model_file, "--tokens", "1", "--backend", "triton", "-o", out)
    assert outcome.status == 2
    assert f"{out}: cannot be written: No space left on device" in outcome.err
    assert out.read_bytes() == b"old"
    assert os.listdir(out.parent) == ["logits.npy"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--tokens", "1,x", "--backend", "triton"], "'x' is not a token id"),
        (["--tokens", "", "--backend", "triton"], "'' is not a token id"),
        (["--tokens=-1", "--backend", "triton"], "'-1' is not a token id"),
        (["--tokens", "1,,2", "--backend", "triton"], "'' is not a token id"),
        (["--tokens", "512", "--backend", "triton"], "token id 512 is outside the vocabulary of 512"),
        (["--tokens", ",".join(["7"] * 65), "--backend", "reference"], "exceeds the context of 64 positions"),
        (["--tokens", "1"], "--backend"),
        (["--backend", "triton"], "--tokens"),
        (["--tokens", "1", "--backend", "cpu"], "invalid choice"),
        (["--tokens", "1", "--backend", "triton", "--activations", "q4"], "invalid choice"),
        (["--tokens", "1", "--backend", "reference", "--device", "interpret"], "is for --backend triton"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(exactmoe, model_file, out, arguments, text):
    outcome = exactmoe("logits", model_file, *arguments, "-o", out)
    assert outcome.status == 2
    assert text in outcome.err
    assert not out.exists()


def test_an_output_folder_that_is_not_there_is_refused_before_anything_runs(
    exactmoe, model_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("exactmoe.cli.options.open_model", lambda _: pytest.fail("the model was opened"))
    out = tmp_path / "nowhere" / "x.npy"
    outcome = exactmoe("logits", model_file, "--tokens", "1", "--backend", "triton", "-o", out)
    assert outcome.status == 2
    assert f"{out}: there is no folder" in outcome.err


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all"])
def test_a_file_that_is_no_model_is_refused_by_name(exactmoe, out, tmp_path, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    outcome = exactmoe("logits", path, "--tokens", "1", "--backend", "reference", "-o", out)
    assert outcome.status == 2
    assert str(path) in outcome.err
    assert not out.exists()


def test_a_gpu_that_is_demanded_and_absent_gives_3(exactmoe, model_file, out, no_cuda):
    arguments = ["--tokens", "1", "--backend", "triton", "--device", "cuda", "-o", out]
    assert exactmoe("logits", model_file, *arguments).status == 3
    assert not out.exists()
