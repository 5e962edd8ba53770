"""A GGUF file as the reference sees it."""

from dataclasses import asdict

import numpy as np
import pytest

from exactmoe.kernels.errors import InvalidInput
from exactmoe.model.config import Config
from exactmoe.model.gguf.reader import open_gguf
from exactmoe.model.synth import LIKES, Like, synthesise
from exactmoe.parity.load import reference_weights

SMALL = Config(
    hidden=256,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    head_dim=128,
    n_experts=4,
    n_active=2,
    expert_width=512,
    vocab=512,
    context_length=64,
    eps=np.float32(1e-6),
    rope_base=1e6,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LIKES, "small", Like("small", "4x1M", 512, SMALL))
        synthesise(path, "small", seed=3)
    return open_gguf(path)


def test_every_tensor_of_the_file_is_handed_over_as_it_lies_in_the_map(file):
    weights = reference_weights(file)
    held = [
        weights.embedding,
        weights.output_norm,
        weights.output,
        *(part for layer in weights.layers for part in layer),
    ]
    arrays = [getattr(part, "data", part) if isinstance(part, tuple) else part for part in held]
    assert len(arrays) == len(file.tensors) == 3 + 12 * SMALL.n_layers
    addresses = {file.tensor(name).ctypes.data: info.type_name for name, info in file.tensors.items()}
    assert {array.ctypes.data for array in arrays} == set(addresses)
    for part in held:
        if isinstance(part, tuple):
            assert addresses[part.data.ctypes.data] == part.type_name


def test_dims_are_those_of_the_config(file):
    weights = reference_weights(file)
    assert weights.dims._asdict() == asdict(SMALL)
    D, E, F, C = SMALL.hidden, SMALL.n_experts, SMALL.expert_width, SMALL.head_dim
    for layer in weights.layers:
        assert (layer.q.n, layer.q.k) == (2 * C, D) and (layer.k.n, layer.v.n) == (C, C)
        assert (layer.gate.data.shape[:2], layer.gate.k) == ((E, F), D)
        assert (layer.up.data.shape[:2], layer.up.k) == ((E, F), D)
        assert (layer.down.data.shape[:2], layer.down.k) == ((E, D), F)
        assert layer.router.shape == (E, D)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
        field = {"attn_output": "attn_output"}.get(name, name.split("_")[1])
        expected = file.tensor(f"blk.1.{name}.weight")
        assert getattr(weights.layers[1], field).data.ctypes.data == expected.ctypes.data
    for name, field in (("attn_norm", "attn_norm"), ("attn_q_norm", "q_norm"), ("attn_k_norm", "k_norm")):
        assert getattr(weights.layers[1], field).ctypes.data == file.tensor(f"blk.1.{name}.weight").ctypes.data


def test_a_file_that_is_no_such_model_is_refused(file):
    lost = type(file)(file.path, file._data, dict(file.metadata), dict(file.tensors), file.alignment)
    del lost.tensors["blk.1.ffn_norm.weight"]
    with pytest.raises(InvalidInput, match=r"blk\.1\.ffn_norm\.weight"):
        reference_weights(lost)
