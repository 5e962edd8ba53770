"""Synthetic models: valid, the right size and mix, the same for the same seed, and nothing left behind."""

import argparse
import importlib
import subprocess
import sys
import time
from collections import Counter, namedtuple
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel

from exactmoe.kernels.errors import InvalidInput, MissingEnvironment
from exactmoe.model import synth
from exactmoe.model.config import Config, check_model, expected_tensors
from exactmoe.model.gguf.reader import GGUFFile, open_gguf
from exactmoe.model.gguf.writer import tensor_bytes, write_gguf
from exactmoe.model.synth import LIKES, synthesise
from exactmoe.model.type_mix import q4_k_m, use_more_bits

CODER = "qwen3-coder-30b-a3b"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> GGUFFile:
    path = tmp_path_factory.mktemp("synth") / "tiny.gguf"
    synthesise(path, "tiny", seed=3)
    return open_gguf(path)


def test_more_bits_go_to_both_ends_and_every_third_layer_between():
    picked = [layer for layer in range(48) if use_more_bits(layer, 48)]
    assert picked == [*range(6), *range(8, 42, 3), *range(42, 48)]
    assert [layer for layer in range(94) if use_more_bits(layer, 94)] == [*range(11), *range(13, 82, 3), *range(82, 94)]
    assert [layer for layer in range(4) if use_more_bits(layer, 4)] == [2, 3]
    assert use_more_bits(0, 1)


@pytest.mark.parametrize(("layer", "n_layers"), [(4, 4), (-1, 4), (0, 0)])
def test_a_layer_outside_the_model_has_no_bits(layer, n_layers):
    with pytest.raises(InvalidInput, match=f"layer {layer} is not one of {n_layers} layers"):
        use_more_bits(layer, n_layers)


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q.bias", "blk.x.attn_q.weight", "rope_freqs.weight", "blk.01.attn_q.weight"]
)
def test_an_unknown_tensor_has_no_type(name):
    with pytest.raises(InvalidInput, match=f"{name}: not a tensor of a Qwen3-MoE model"):
        q4_k_m(name, 4)


def test_the_coder_model_has_the_published_number_of_tensors_of_each_type_and_18_55_gb():
    config = LIKES[CODER].config
    types = {want: q4_k_m(want.name, config.n_layers) for want in expected_tensors(config)}
    assert Counter(types.values()) == {"F32": 241, "Q4_K": 289, "Q6_K": 49}
    total = sum(tensor_bytes(want.name, want.shape, type_name) for want, type_name in types.items())
    assert total == 18_550_716_416
    assert sum(int(np.prod(want.shape)) for want in types) == 30_532_122_624


def test_a_synthetic_model_is_accepted_with_the_dims_asked_for(tiny):
    config = Config.from_gguf(tiny)
    assert config == LIKES["tiny"].config
    check_model(tiny, config)
    found = {info.name: info.type_name for info in tiny.tensors.values()}
    assert found == {want.name: q4_k_m(want.name, 4) for want in expected_tensors(config)}


def test_gguf_py_reads_a_synthetic_model_alike(tiny):
    theirs = gguf.GGUFReader(tiny.path)
    assert [t.name for t in theirs.tensors] == list(tiny.tensors) and len(theirs.tensors) == 51
    for tensor in theirs.tensors:
        info = tiny.tensors[tensor.name]
        assert (tensor.tensor_type.name, tuple(reversed(tensor.shape.tolist()))) == (info.type_name, info.shape)
        assert tensor.data.tobytes() == tiny.tensor(tensor.name).tobytes()
    for key, value in tiny.metadata.items():
        assert np.array_equal(theirs.fields[key].contents(), value), key


def test_metadata_keys_are_those_of_published_files(tiny):
    names = gguf.Keys
    attention, experts = names.Attention, names.LLM
    architecture = [
        experts.BLOCK_COUNT,
        experts.CONTEXT_LENGTH,
        experts.EMBEDDING_LENGTH,
        experts.FEED_FORWARD_LENGTH,
        experts.EXPERT_COUNT,
        experts.EXPERT_USED_COUNT,
        experts.EXPERT_FEED_FORWARD_LENGTH,
        attention.HEAD_COUNT,
        attention.HEAD_COUNT_KV,
        attention.KEY_LENGTH,
        attention.VALUE_LENGTH,
        attention.LAYERNORM_RMS_EPS,
        names.Rope.FREQ_BASE,
    ]
    tokenizer = names.Tokenizer
    general = names.General
    expected = {key.format(arch="qwen3moe") for key in architecture} | {
        general.ARCHITECTURE,
        general.TYPE,
        general.NAME,
        general.BASENAME,
        general.SIZE_LABEL,
        general.QUANTIZATION_VERSION,
        general.FILE_TYPE,
        tokenizer.MODEL,
        tokenizer.PRE,
        tokenizer.LIST,
        tokenizer.TOKEN_TYPE,
        tokenizer.MERGES,
        tokenizer.EOS_ID,
        tokenizer.PAD_ID,
        tokenizer.BOS_ID,
        tokenizer.ADD_BOS,
        tokenizer.CHAT_TEMPLATE,
    }
    assert set(tiny.metadata) == expected
    assert tiny.metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_M


def test_weights_have_a_deviation_near_one_over_the_root_of_the_row_length(tiny):
    seen = set()
    for info in tiny.tensors.values():
        if info.type_name != "F32":
            weights = dequantize(tiny.tensor(info.name), gguf.GGMLQuantizationType[info.type_name])
            assert weights.shape == info.shape
            assert 0.95 < weights.std() * np.sqrt(info.shape[-1]) < 1.15, info.name
            assert abs(weights.mean()) < 0.05 * weights.std(), info.name
            seen.add((info.type_name, info.shape[-1]))
    assert seen == {("Q4_K", 512), ("Q4_K", 1024), ("Q4_K", 256), ("Q6_K", 512), ("Q6_K", 256)}


def test_norms_lie_near_one_and_router_logits_spread(tiny):
    for info in tiny.tensors.values():
        if "norm" in info.name:
            assert abs(tiny.tensor(info.name) - 1).max() < 0.6
    logits = np.random.default_rng(0).standard_normal((100, 512)) @ tiny.tensor("blk.0.ffn_gate_inp.weight").T
    assert 1 < logits.std() < 2 and len(set(logits.argmax(1))) == 12


def test_no_two_experts_are_alike(tiny):
    experts = tiny.tensor("blk.1.ffn_up_exps.weight")
    assert len({expert.tobytes() for expert in experts}) == 12


def test_the_same_seed_gives_the_same_file_and_another_seed_another(tmp_path):
    files = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        synthesise(tmp_path / name, "tiny", n_layers=1, seed=seed)
        files.append(open_gguf(tmp_path / name))
    assert files[0].sha256() == files[1].sha256()
    assert files[0].sha256() != files[2].sha256()
    pools = [synth._Pools(seed).get("Q6_K", 512)[:2100] for seed in (3, 3, 4)]
    assert pools[0] == pools[1] != pools[2]


def test_layers_can_be_chosen(tmp_path):
    synthesise(tmp_path / "a", "tiny", n_layers=9)
    file = open_gguf(tmp_path / "a")
    config = Config.from_gguf(file)
    assert config.n_layers == 9
    check_model(file, config)
    assert file.tensors["blk.0.attn_v.weight"].type_name == "Q6_K" and q4_k_m("blk.0.attn_v.weight", 4) == "Q4_K"


def test_progress_ends_at_the_bytes_returned(tmp_path):
    seen: list[tuple[int, int]] = []
    total = synthesise(tmp_path / "a", "tiny", 1, progress=lambda done, whole: seen.append((done, whole)))
    assert seen[-1] == (total, total) and sorted(seen) == seen and len(seen) >= 15


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("huge", None, 0), "no model is called 'huge'; there are: tiny, qwen3-coder-30b-a3b"),
        (("tiny", 0, 0), "the number of layers is 0"),
        (("tiny", -3, 0), "the number of layers is -3"),
        (("tiny", 1, -1), "the seed is -1"),
    ],
)
def test_nonsense_is_refused_before_anything_is_written(arguments, words, tmp_path):
    with pytest.raises(InvalidInput, match=words):
        synthesise(tmp_path / "a", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_file_too_large_for_the_disk_is_refused_before_it_is_begun(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(synth.shutil, "disk_usage", lambda _: usage(10**9, 0, 10**9))
    with pytest.raises(MissingEnvironment, match="needs 18550716416 bytes, the disk has 1000000000 free"):
        synthesise(tmp_path / "a", CODER)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_synthesis_leaves_nothing(tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesise(tmp_path / "a", "tiny", 1, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_in_the_file_gives_back_any_text(tiny):
    tokens, merges = tiny.metadata["tokenizer.ggml.tokens"], tiny.metadata["tokenizer.ggml.merges"]
    assert isinstance(tokens, list) and isinstance(merges, list) and len(set(tokens)) == len(tokens) == 2048
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+|\S+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevel()
    text = "def f(x):\n    return '!!naïve — 漢字' # \x00\x7f"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text and max(ids) < 2048
    assert any(token >= 256 for token in tokenizer.encode("!!").ids)


def test_a_vocabulary_of_151936_opens_well_under_a_second(tmp_path):
    tokens, merges = synth._vocabulary(151936)
    assert len(set(tokens)) == len(tokens) == 151936 and len(set(merges)) == len(merges) == 151936 - 256 - 3
    known = set(tokens)
    assert all({a, b, a + b} <= known for a, b in (merge.split(" ") for merge in merges))
    write_gguf(tmp_path / "v", {"tokens": tokens, "merges": merges, "types": np.ones(151936, np.int32)}, [])
    started = time.perf_counter()
    file = open_gguf(tmp_path / "v")
    assert time.perf_counter() - started < 1
    assert file.metadata["tokens"] == tokens and file.metadata["merges"] == merges


def run_command(*arguments: str) -> int:
    command = importlib.import_module("exactmoe.cli.commands.synth")
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.run(parser.parse_args(arguments))


def test_the_command_writes_the_file_and_keeps_an_existing_one_unless_forced(tmp_path, capsys):
    out = str(tmp_path / "a.gguf")
    assert run_command(out, "--like", "tiny", "--layers", "1", "--seed", "5") == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}: {sum(i.nbytes for i in open_gguf(out).tensors.values()):,} bytes of tensors\n"
    assert printed.err == ""
    with pytest.raises(InvalidInput, match="already exists"):
        run_command(out, "--like", "tiny", "--layers", "1")
    digest = open_gguf(out).sha256()
    assert run_command(out, "--like", "tiny", "--layers", "1", "--force") == 0
    assert open_gguf(out).sha256() != digest


def test_a_terminal_sees_a_progress_bar_on_stderr(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run_command(str(tmp_path / "a.gguf"), "--like", "tiny", "--layers", "1") == 0
    assert "bytes of tensors" in capsys.readouterr().out


def test_synthesis_and_reading_need_no_gguf_package(tmp_path):
    script = f"""
import sys
sys.modules["gguf"] = None
from exactmoe.model.config import Config, check_model
from exactmoe.model.gguf.reader import open_gguf
from exactmoe.model.synth import synthesise
synthesise({str(tmp_path / "a.gguf")!r}, "tiny", 1)
file = open_gguf({str(tmp_path / "a.gguf")!r})
check_model(file, Config.from_gguf(file))
"""
    root = Path(__file__).parents[2] / "src"
    done = subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
