"""Quantise the trained tiny model and write the GGUF file that ships.

    python -m exactmoe.model.tiny.build WEIGHTS_DIR OUT.gguf

WEIGHTS_DIR is what `exactmoe.model.tiny.train` wrote: weights-N.safetensors, tokenizer.json, train.json. The file has
the keys and tensor names of published Qwen3-MoE files and llama.cpp's Q4_K_M type mix. The same folder gives the same
bytes."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exactmoe.kernels.errors import InvalidInput, MissingEnvironment, require
from exactmoe.model import kquants
from exactmoe.model.gguf.writer import TensorData, write_gguf
from exactmoe.model.tiny.network import Dims
from exactmoe.model.type_mix import q4_k_m

NAME = "Qwen3 MoE Tiny Python"
_END_OF_TEXT = "<|endoftext|>"
_FILE_TYPE_Q4_K_M = 15  # llama_ftype LLAMA_FTYPE_MOSTLY_Q4_K_M
_NORMAL, _CONTROL = 1, 3  # llama_token_type
_LAYER_ORDER = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "attn_q_norm",
    "attn_k_norm",
    "ffn_norm",
    "ffn_gate_inp",
    "ffn_gate_exps",
    "ffn_up_exps",
    "ffn_down_exps",
)


def build(weights: Path, out: Path) -> None:
    """Write `out` from the folder `weights`; raises `InvalidInput` for a folder that does not hold a whole model."""
    state = load_state(weights)
    dims = Dims(**read_json(weights / "train.json")["dims"])
    metadata = model_metadata(dims) | tokenizer_metadata(read_json(weights / "tokenizer.json"), dims.vocab)
    names = tensor_names(dims.n_layers)
    require(set(state) == set(names), f"{weights}: tensors differ from the model's: {sorted(set(state) ^ set(names))}")
    write_gguf(out, metadata, [quantised(name, state[name], dims.n_layers) for name in names], overwrite=True)


def tensor_names(n_layers: int) -> list[str]:
    """Every tensor of the file, in file order."""
    layers = [f"blk.{i}.{part}.weight" for i in range(n_layers) for part in _LAYER_ORDER]
    return ["token_embd.weight", *layers, "output_norm.weight", "output.weight"]


def quantised(name: str, value: npt.NDArray[np.float32], n_layers: int) -> TensorData:
    """The tensor in the type that the Q4_K_M mix gives it."""
    type_name = q4_k_m(name, n_layers)
    data = value if type_name == "F32" else kquants.quantise(value, type_name)
    return TensorData(name, value.shape, type_name, data)


def load_state(weights: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The trained tensors by GGUF name, bf16 widened to f32."""
    try:
        import torch
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingEnvironment(f"reading the trained weights needs torch and safetensors: {error}") from error
    shards = sorted(weights.glob("weights-*.safetensors"))
    require(bool(shards), f"{weights}: no weights-*.safetensors here")
    state: dict[str, npt.NDArray[np.float32]] = {}
    for shard in shards:
        for name, value in load_file(str(shard)).items():
            require(name not in state, f"{shard}: {name} is in an earlier shard too")
            state[name] = value.to(torch.float32).numpy()
    return state


def model_metadata(dims: Dims) -> dict[str, object]:
    """Keys of the architecture, as llama.cpp's converter writes them for Qwen3MoeForCausalLM."""
    return {
        "general.architecture": "qwen3moe",
        "general.type": "model",
        "general.name": NAME,
        "general.license": "apache-2.0",
        "general.file_type": _FILE_TYPE_Q4_K_M,
        "general.quantization_version": 2,
        "qwen3moe.block_count": dims.n_layers,
        "qwen3moe.context_length": dims.context_length,
        "qwen3moe.embedding_length": dims.hidden,
        # the width of a dense layer; no layer is dense, so any number serves
        "qwen3moe.feed_forward_length": dims.expert_width * dims.n_active,
        "qwen3moe.attention.head_count": dims.n_heads,
        "qwen3moe.attention.head_count_kv": dims.n_kv_heads,
        "qwen3moe.attention.key_length": dims.head_dim,
        "qwen3moe.attention.value_length": dims.head_dim,
        "qwen3moe.attention.layer_norm_rms_epsilon": np.float32(dims.eps),
        "qwen3moe.rope.freq_base": np.float32(dims.rope_base),
        "qwen3moe.expert_count": dims.n_experts,
        "qwen3moe.expert_used_count": dims.n_active,
        "qwen3moe.expert_feed_forward_length": dims.expert_width,
    }


def tokenizer_metadata(trained: Mapping[str, Any], vocab_size: int) -> dict[str, object]:
    """Keys of the tokenizer from the content of a tokenizer.json, byte-level BPE with `<|endoftext|>`."""
    ids = dict(trained["model"]["vocab"])
    special = {entry["content"]: entry["id"] for entry in trained["added_tokens"] if entry["special"]}
    ids |= special
    tokens = sorted(ids, key=ids.__getitem__)
    whole = [ids[token] for token in tokens] == list(range(vocab_size))
    require(whole, f"tokenizer.json: {len(tokens)} tokens, their ids are not 0 to {vocab_size - 1}")
    require(_END_OF_TEXT in special, f"tokenizer.json: no special token {_END_OF_TEXT}")
    end = ids[_END_OF_TEXT]
    kinds = [_CONTROL if token in special else _NORMAL for token in tokens]
    # older versions of the library write a merge as "a b", newer ones as ["a", "b"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in trained["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": end,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.padding_token_id": end,
        "tokenizer.ggml.add_bos_token": False,
    }


def read_json(path: Path) -> Any:
    """Content of a JSON file; raises `InvalidInput` where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: {error}") from error


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m exactmoe.model.tiny.build", description="Write the tiny GGUF.")
    parser.add_argument("weights", type=Path, metavar="WEIGHTS_DIR", help="what exactmoe.model.tiny.train wrote")
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    args = parser.parse_args(argv)
    build(args.weights, args.out)
    print(f"{args.out}: {args.out.stat().st_size} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except InvalidInput as error:
        print(f"build: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except MissingEnvironment as error:
        print(f"build: error: {error}", file=sys.stderr)
        raise SystemExit(3) from error
