"""Dims from metadata, and the judgement of a whole file: every way to be wrong is refused by name."""

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exactmoe.kernels.errors import InvalidInput
from exactmoe.kernels.formats import EXECUTABLE
from exactmoe.model import config as config_module
from exactmoe.model.config import Config, check_model, expected_tensors
from exactmoe.model.gguf.reader import GGUFFile, open_gguf
from exactmoe.model.gguf.types import TYPES_BY_NAME
from exactmoe.model.gguf.writer import TensorData, tensor_bytes, write_gguf
from exactmoe.model.type_mix import q4_k_m

SMALL = Config(
    hidden=256,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=64,
    n_experts=5,
    n_active=2,
    expert_width=512,
    vocab=7,
    context_length=128,
    eps=np.float32(1e-6),
    rope_base=1e6,
)
METADATA: dict[str, Any] = {
    "general.architecture": "qwen3moe",
    "qwen3moe.block_count": 3,
    "qwen3moe.context_length": 128,
    "qwen3moe.embedding_length": 256,
    "qwen3moe.feed_forward_length": 999,
    "qwen3moe.attention.head_count": 4,
    "qwen3moe.attention.head_count_kv": 2,
    "qwen3moe.attention.key_length": 64,
    "qwen3moe.attention.value_length": 64,
    "qwen3moe.attention.layer_norm_rms_epsilon": np.float32(1e-6),
    "qwen3moe.rope.freq_base": np.float32(1e6),
    "qwen3moe.expert_count": 5,
    "qwen3moe.expert_used_count": 2,
    "qwen3moe.expert_feed_forward_length": 512,
    "tokenizer.ggml.tokens": list("abcdefg"),
}


def array_for(shape: tuple[int, ...], type_name: str) -> np.ndarray:
    if type_name == "F32":
        return np.ones(shape, np.float32)
    kind = TYPES_BY_NAME[type_name]
    return np.zeros((*shape[:-1], shape[-1] // kind.block * kind.block_bytes), np.uint8)


def tensors_of(config: Config) -> dict[str, TensorData]:
    out = {}
    for want in expected_tensors(config):
        type_name = q4_k_m(want.name, config.n_layers)
        out[want.name] = TensorData(want.name, want.shape, type_name, array_for(want.shape, type_name))
    return out


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., GGUFFile]:
    """Write the small model with changes: metadata values (None removes a key), and a function over the tensors."""

    def _model(
        metadata: dict[str, Any] | None = None, change: Callable[[dict[str, TensorData]], None] | None = None
    ) -> GGUFFile:
        keys = METADATA | (metadata or {})
        tensors = tensors_of(SMALL)
        if change is not None:
            change(tensors)
        path = tmp_path / "small.gguf"
        kept = {key: value for key, value in keys.items() if value is not None}
        write_gguf(path, kept, tensors.values(), overwrite=True)
        return open_gguf(path)

    return _model


def test_dims_come_from_the_metadata(model):
    assert Config.from_gguf(model()) == SMALL


def test_eps_is_the_float32_stored_and_rope_base_its_exact_value(model):
    eps, base = np.float32(3.0000001e-6), np.float32(999999.94)
    config = Config.from_gguf(
        model({"qwen3moe.attention.layer_norm_rms_epsilon": eps, "qwen3moe.rope.freq_base": base})
    )
    assert type(config.eps) is np.float32 and config.eps.tobytes() == eps.tobytes()
    assert type(config.rope_base) is float and config.rope_base == float(base)


def test_every_dim_follows_its_own_key(model):
    """Change each key alone: exactly the field that it feeds moves, so no dims are mixed up and none is a constant."""
    feeds = {
        "block_count": ("n_layers", 2),
        "context_length": ("context_length", 64),
        "embedding_length": ("hidden", 768),
        "attention.head_count": ("n_heads", 8),
        "attention.head_count_kv": ("n_kv_heads", 1),
        "expert_count": ("n_experts", 6),
        "expert_used_count": ("n_active", 3),
        "expert_feed_forward_length": ("expert_width", 256),
        "attention.layer_norm_rms_epsilon": ("eps", np.float32(1e-5)),
        "rope.freq_base": ("rope_base", np.float32(1e4)),
    }
    for key, (field, value) in feeds.items():
        config = Config.from_gguf(model({f"qwen3moe.{key}": value}))
        moved = {f.name for f in fields(Config) if getattr(config, f.name) != getattr(SMALL, f.name)}
        assert moved == {field} and getattr(config, field) == value


REQUIRED = [key for key in METADATA if key.startswith("qwen3moe.") and "feed_forward_length" not in key]
REQUIRED += ["qwen3moe.expert_feed_forward_length", "general.architecture"]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_refused_and_never_defaulted(key, model):
    with pytest.raises(InvalidInput, match=f"small.gguf: key {re.escape(key)} is missing"):
        Config.from_gguf(model({key: None}))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("general.architecture", "llama", "architecture is 'llama'; supported: qwen3moe"),
        ("general.architecture", "qwen3", "architecture is 'qwen3'; supported: qwen3moe"),
        ("general.architecture", 3, "architecture is 3; supported"),
        ("qwen3moe.block_count", 0, "block_count is 0, not a positive integer"),
        ("qwen3moe.block_count", np.int32(-1), "block_count is -1, not a positive integer"),
        ("qwen3moe.block_count", True, "block_count is True, not a positive integer"),
        ("qwen3moe.block_count", "3", "block_count is '3', not a positive integer"),
        (
            "qwen3moe.attention.head_count",
            np.array([4, 4, 4], np.uint32),
            "head_count is array.*, not a positive integer",
        ),
        ("qwen3moe.embedding_length", np.float32(256), "embedding_length is .*256.*, not a positive integer"),
        ("qwen3moe.attention.value_length", 128, "value_length is 128, but attention.key_length is 64"),
        ("qwen3moe.rope.dimension_count", 32, "rope.dimension_count is 32, but attention.key_length is 64"),
        ("qwen3moe.vocab_size", 8, "vocab_size is 8, but token_embd.weight's rows is 7"),
        ("qwen3moe.expert_used_count", 6, "expert_used_count is 6, but there are 5 experts"),
        ("qwen3moe.attention.head_count_kv", 3, "4 heads cannot share 3 KV heads"),
        ("qwen3moe.embedding_length", 384, "embedding_length is 384, not a multiple of 256"),
        ("qwen3moe.expert_feed_forward_length", 128, "expert_feed_forward_length is 128, not a multiple of 256"),
        ("qwen3moe.attention.head_count", 6, r"head_count \* attention.key_length is 384, not a multiple of 256"),
        ("qwen3moe.rope.freq_base", np.float64(1e6), "rope.freq_base is 1000000.0, not a FLOAT32"),
        ("qwen3moe.rope.freq_base", 1000000, "rope.freq_base is 1000000, not a FLOAT32"),
        ("qwen3moe.rope.freq_base", np.float32("inf"), "rope.freq_base is inf, not a positive finite number"),
        ("qwen3moe.rope.freq_base", np.float32(0), "rope.freq_base is 0.0, not a positive finite number"),
        ("qwen3moe.attention.layer_norm_rms_epsilon", np.float32("nan"), "epsilon is nan, not a positive finite"),
        ("qwen3moe.attention.layer_norm_rms_epsilon", np.float32(-1), "epsilon is -1.0, not a positive finite"),
        ("qwen3moe.rope.scaling.type", "yarn", "rope.scaling.type is 'yarn', which is not implemented"),
        ("qwen3moe.rope.scaling.factor", np.float32(4), "rope.scaling.factor is .*4.0.*, which is not implemented"),
        ("qwen3moe.attention.sliding_window", 4096, "attention.sliding_window is 4096, which is not implemented"),
        ("qwen3moe.expert_shared_count", 1, "expert_shared_count is 1, which is not implemented"),
        ("qwen3moe.expert_shared_feed_forward_length", 512, "expert_shared_feed_forward_length is 512, which is not"),
        ("qwen3moe.leading_dense_block_count", 1, "leading_dense_block_count is 1, which is not implemented"),
        ("qwen3moe.expert_weights_norm", False, "expert_weights_norm is False, which is not implemented"),
        ("qwen3moe.expert_gating_func", 2, "expert_gating_func is 2, which is not implemented"),
        ("qwen3moe.final_logit_softcapping", np.float32(30), "final_logit_softcapping is .*30.*, which is not"),
        ("qwen3moe.something_new", 1, "key qwen3moe.something_new is not known"),
        ("split.count", np.uint16(3), "split.count is 3: one part of a split model"),
        (
            "tokenizer.ggml.tokens",
            list("abcdef"),
            "tokenizer.ggml.tokens has 6 entries, 'token_embd.weight' has 7 rows",
        ),
        ("tokenizer.ggml.tokens", np.arange(7, dtype=np.int32), "tokenizer.ggml.tokens is not an array of strings"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(key, value, words, model):
    with pytest.raises(InvalidInput, match=f"small.gguf: .*{words}"):
        Config.from_gguf(model({key: value}))


def test_an_odd_head_width_is_refused(model):
    keys = {
        "qwen3moe.attention.key_length": 1,
        "qwen3moe.attention.value_length": 1,
        "qwen3moe.attention.head_count": 256,
    }
    with pytest.raises(InvalidInput, match="head width 1 is odd"):
        Config.from_gguf(model(keys))


def test_switched_off_keys_and_a_missing_tokenizer_are_accepted(model):
    off = {
        "qwen3moe.rope.scaling.type": "none",
        "qwen3moe.rope.scaling.factor": np.float32(1),
        "qwen3moe.expert_shared_feed_forward_length": 0,
        "qwen3moe.expert_gating_func": 1,
        "qwen3moe.attention.sliding_window": 0,
        "qwen3moe.rope.dimension_count": 64,
        "qwen3moe.vocab_size": 7,
        "tokenizer.ggml.tokens": None,
    }
    assert Config.from_gguf(model(off)) == SMALL


def test_without_an_embedding_there_is_no_vocabulary(model):
    with pytest.raises(InvalidInput, match=r"tensor 'token_embd\.weight' is missing"):
        Config.from_gguf(model(change=lambda tensors: tensors.pop("token_embd.weight")))


def test_a_whole_model_passes_and_is_compared_tensor_by_tensor(model):
    file = model()
    check_model(file, Config.from_gguf(file))
    assert {want.name for want in expected_tensors(SMALL)} == set(file.tensors) and len(file.tensors) == 3 * 12 + 3


@pytest.mark.parametrize("name", [want.name for want in expected_tensors(SMALL)])
def test_every_missing_tensor_is_refused_by_name(name, model):
    file = model(change=lambda tensors: tensors.pop(name))
    with pytest.raises(InvalidInput, match=f"tensor '{re.escape(name)}' is missing"):
        check_model(file, SMALL)


@pytest.mark.parametrize("name", [want.name for want in expected_tensors(SMALL)])
def test_every_wrong_shape_is_refused_by_name(name, model):
    def grow(tensors: dict[str, TensorData]) -> None:
        old = tensors[name]
        shape = (old.shape[0] + 1, *old.shape[1:])
        tensors[name] = TensorData(name, shape, old.type_name, array_for(shape, old.type_name))

    with pytest.raises(InvalidInput, match=rf"tensor '{re.escape(name)}' has shape \(.*\), the metadata says \("):
        check_model(model(change=grow), SMALL)


def test_a_square_matrix_turned_around_is_refused(model):
    def turn(tensors: dict[str, TensorData]) -> None:
        name = "blk.0.ffn_down_exps.weight"
        tensors[name] = TensorData(name, (5, 512, 256), "Q4_K", array_for((5, 512, 256), "Q4_K"))

    with pytest.raises(InvalidInput, match=r"ffn_down_exps.weight' has shape \(5, 512, 256\), .* \(5, 256, 512\)"):
        check_model(model(change=turn), SMALL)


@pytest.mark.parametrize(
    "name", ["rope_freqs.weight", "blk.3.attn_norm.weight", "blk.0.attn_q.bias", "blk.00.attn_q.weight"]
)
def test_an_unexpected_tensor_is_refused_by_name(name, model):
    def add(tensors: dict[str, TensorData]) -> None:
        tensors[name] = TensorData(name, (32,), "F32", np.ones(32, np.float32))

    with pytest.raises(InvalidInput, match=f"tensor '{re.escape(name)}' is not part of a 3-layer qwen3moe model"):
        check_model(model(change=add), SMALL)


@pytest.mark.parametrize("want", list(expected_tensors(SMALL)), ids=lambda want: want.name)
def test_a_type_that_cannot_be_executed_is_refused_by_name_and_type(want, model):
    other = "Q5_K" if want.quantised else "F16"
    supported = ", ".join(EXECUTABLE)
    words = f"has type {other}|type {other} cannot be executed; supported: {supported}"

    def retype(tensors: dict[str, TensorData]) -> None:
        tensors[want.name] = TensorData(want.name, want.shape, other, array_for(want.shape, other))

    with pytest.raises(InvalidInput, match=f"tensor '{re.escape(want.name)}'.*({words})"):
        check_model(model(change=retype), SMALL)


def test_a_quantised_router_is_refused(model):
    def retype(tensors: dict[str, TensorData]) -> None:
        name = "blk.1.ffn_gate_inp.weight"
        tensors[name] = TensorData(name, (5, 256), "Q4_K", array_for((5, 256), "Q4_K"))

    with pytest.raises(InvalidInput, match=r"'blk\.1\.ffn_gate_inp\.weight' has type Q4_K, it must be F32"):
        check_model(model(change=retype), SMALL)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["blk.2.ffn_norm.weight", "blk.0.ffn_gate_inp.weight", "output_norm.weight"])
def test_nan_and_inf_in_norms_and_routers_are_refused_with_their_place(name, value, model):
    def spoil(tensors: dict[str, TensorData]) -> None:
        tensors[name].data.reshape(-1)[-2] = value

    file = model(change=spoil)
    where = "(4, 254)" if "gate_inp" in name else "(254,)"
    with pytest.raises(InvalidInput, match=re.escape(f"tensor '{name}': element {where} is {value}")):
        check_model(file, SMALL)
    check_model(file, SMALL, deep=False)


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7C01, 0xFFFF])
@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("token_embd.weight", 0),
        ("blk.0.ffn_gate_exps.weight", 2),
        ("blk.2.ffn_down_exps.weight", 208),
        ("output.weight", 208),
    ],
)
def test_nan_and_inf_in_a_block_scale_are_refused_with_the_block(name, at, bits, model, monkeypatch):
    monkeypatch.setattr(config_module, "_CHUNK_BLOCKS", 3)  # so that the block lies in a later chunk

    def spoil(tensors: dict[str, TensorData]) -> None:
        blocks = tensors[name].data.reshape(-1, EXECUTABLE[tensors[name].type_name].block_bytes)
        blocks[5, at : at + 2] = np.array([bits], "<u2").view(np.uint8)

    file = model(change=spoil)
    words = rf"tensor '{re.escape(name)}': block 5: the Q[46]_K scale at byte {at} is -?(inf|nan)"
    with pytest.raises(InvalidInput, match=words):
        check_model(file, SMALL)
    check_model(file, SMALL, deep=False)


def test_the_largest_finite_scales_pass(model):
    def edge(tensors: dict[str, TensorData]) -> None:
        for tensor in tensors.values():
            if tensor.type_name != "F32":
                tensor.data[:] = 0x7B  # f16 0x7b7b is finite, and every quant byte is legal

    file = model(change=edge)
    check_model(file, SMALL)


def test_the_scale_places_cover_every_executable_format():
    assert set(config_module._SCALE_BYTES) == set(EXECUTABLE)
    assert tensor_bytes("t", (256,), "Q6_K") == config_module._SCALE_BYTES["Q6_K"][-1] + 2
