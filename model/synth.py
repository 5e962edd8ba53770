"""Files of random but valid weights, with the dims, names, metadata and Q4_K_M type mix of a published Qwen3-MoE GGUF.

For tests, and for timings at sizes that are not shipped. Weights have a standard deviation near 1/sqrt(row length),
norms lie near one, and router logits spread, so a forward pass stays finite and routes to every expert. The text they
produce is noise. Blocks come from a pool per type and row length, so that writing is as fast as the disk."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from exactmoe.kernels.errors import MissingEnvironment, require
from exactmoe.kernels.formats import EXECUTABLE
from exactmoe.model.config import ARCHITECTURE, Config, ExpectedTensor, expected_tensors
from exactmoe.model.gguf.writer import TensorData, tensor_bytes, write_gguf
from exactmoe.model.type_mix import q4_k_m

_POOL_BLOCKS = 131071  # prime, so that a pool never repeats in step with the rows or the experts of a tensor
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_NORMAL, _CONTROL = 1, 3  # llama.cpp's token types
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
)


@dataclass(frozen=True)
class Like:
    """A model whose dims a synthetic file can take."""

    name: str
    size_label: str
    dense_width: int  # feed_forward_length: published files have it, no layer uses it
    config: Config


LIKES: dict[str, Like] = {
    "tiny": Like(
        "tiny",
        "12x2M",
        1024,
        Config(
            hidden=512,
            n_layers=4,
            n_heads=8,
            n_kv_heads=2,
            head_dim=128,
            n_experts=12,
            n_active=4,
            expert_width=256,
            vocab=2048,
            context_length=4096,
            eps=np.float32(1e-6),
            rope_base=1e6,
        ),
    ),
    "qwen3-coder-30b-a3b": Like(
        "Qwen3-Coder-30B-A3B",
        "30B-A3B",
        5472,
        Config(
            hidden=2048,
            n_layers=48,
            n_heads=32,
            n_kv_heads=4,
            head_dim=128,
            n_experts=128,
            n_active=8,
            expert_width=768,
            vocab=151936,
            context_length=262144,
            eps=np.float32(1e-6),
            rope_base=1e7,
        ),
    ),
}


def synthesise(
    path: str | os.PathLike[str],
    like: str,
    n_layers: int | None = None,
    seed: int = 0,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write a random model with the dims of `like` (a key of `LIKES`) to `path` and return the bytes of its tensors.

    `n_layers` replaces the number of layers; the same arguments give the same bytes. `progress` is called with the
    bytes done and the bytes in all. Raises `InvalidInput` for an unknown name, no layers, a negative seed, or a file
    that exists unless `overwrite`; `MissingEnvironment` where the disk has no room."""
    require(like in LIKES, f"no model is called {like!r}; there are: {', '.join(LIKES)}")
    require(n_layers is None or n_layers > 0, f"the number of layers is {n_layers}, not at least 1")
    require(seed >= 0, f"the seed is {seed}, not at least 0")
    config = LIKES[like].config
    if n_layers is not None:
        config = replace(config, n_layers=n_layers)
    wanted = [(want, q4_k_m(want.name, config.n_layers)) for want in expected_tensors(config)]
    total = sum(tensor_bytes(want.name, want.shape, type_name) for want, type_name in wanted)
    _require_room(os.fspath(path), total)
    pools = _Pools(seed)
    tensors = [
        TensorData(
            want.name, want.shape, type_name, _data(want, type_name, pools, np.random.default_rng([seed, index]))
        )
        for index, (want, type_name) in enumerate(wanted)
    ]
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    write_gguf(path, _metadata(LIKES[like], config), tensors, overwrite=overwrite, progress=count)
    return total


def _require_room(path: str, total: int) -> None:
    folder = os.path.dirname(path) or "."
    require(os.path.isdir(folder), f"{path}: there is no folder {folder}")
    free = shutil.disk_usage(folder).free
    if free < total:
        raise MissingEnvironment(f"{path}: needs {total} bytes, the disk has {free} free")


def _metadata(like: Like, config: Config) -> dict[str, object]:
    tokens, merges = _vocabulary(config.vocab)
    end_of_text, _, end_of_turn = range(config.vocab - len(_SPECIAL), config.vocab)
    token_type = np.full(config.vocab, _NORMAL, np.int32)
    token_type[-len(_SPECIAL) :] = _CONTROL
    return {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": f"{like.name} (random weights)",
        "general.basename": like.name,
        "general.size_label": like.size_label,
        f"{ARCHITECTURE}.block_count": config.n_layers,
        f"{ARCHITECTURE}.context_length": config.context_length,
        f"{ARCHITECTURE}.embedding_length": config.hidden,
        f"{ARCHITECTURE}.feed_forward_length": like.dense_width,
        f"{ARCHITECTURE}.attention.head_count": config.n_heads,
        f"{ARCHITECTURE}.attention.head_count_kv": config.n_kv_heads,
        f"{ARCHITECTURE}.rope.freq_base": np.float32(config.rope_base),
        f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon": config.eps,
        f"{ARCHITECTURE}.expert_used_count": config.n_active,
        f"{ARCHITECTURE}.attention.key_length": config.head_dim,
        f"{ARCHITECTURE}.attention.value_length": config.head_dim,
        f"{ARCHITECTURE}.expert_count": config.n_experts,
        f"{ARCHITECTURE}.expert_feed_forward_length": config.expert_width,
        "general.quantization_version": 2,
        "general.file_type": 15,  # llama.cpp's number for "mostly Q4_K_M"
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": token_type,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": end_of_turn,
        "tokenizer.ggml.padding_token_id": end_of_text,
        "tokenizer.ggml.bos_token_id": end_of_text,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": _CHAT_TEMPLATE,
    }


def _vocabulary(size: int) -> tuple[list[str], list[str]]:
    """`size` distinct tokens of a byte-level BPE that encodes any text, and the merges that build them.

    256 bytes, then every pair of bytes, then pairs followed by a byte, as far as there is room before the specials."""
    alphabet = _byte_alphabet()
    room = size - len(alphabet) - len(_SPECIAL)
    pairs = [(a, b) for a in alphabet for b in alphabet][:room]
    triples = ((a + b, c) for a, b in pairs for c in alphabet)
    merges = pairs + [triple for _, triple in zip(range(room - len(pairs)), triples, strict=False)]
    return alphabet + [a + b for a, b in merges] + list(_SPECIAL), [f"{a} {b}" for a, b in merges]


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in its order: printable Latin-1, then U+0100 on for the rest."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]


def _data(
    want: ExpectedTensor, type_name: str, pools: "_Pools", rng: np.random.Generator
) -> Iterator[memoryview | npt.NDArray[np.float32]]:
    """The bytes of one tensor, made when they are asked for."""
    if want.name.endswith("ffn_gate_inp.weight"):
        yield rng.standard_normal(want.shape, np.float32) * np.float32(1.5 / np.sqrt(want.shape[-1]))
    elif not want.quantised:
        yield 1 + rng.standard_normal(want.shape, np.float32) * np.float32(0.1)
    else:
        pool = pools.get(type_name, want.shape[-1])
        block_bytes = EXECUTABLE[type_name].block_bytes
        left = tensor_bytes(want.name, want.shape, type_name)
        start = int(rng.integers(_POOL_BLOCKS)) * block_bytes
        while left:
            piece = pool[start : start + left]
            yield piece
            left -= len(piece)
            start = 0


class _Pools:
    """Random valid blocks: every bit of quants and block scales is random, d (and dmin) set the standard deviation."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.pools: dict[tuple[str, int], memoryview] = {}

    def get(self, type_name: str, row_length: int) -> memoryview:
        key = type_name, row_length
        if key not in self.pools:
            self.pools[key] = memoryview(self._make(type_name, row_length)).cast("B")
        return self.pools[key]

    def _make(self, type_name: str, row_length: int) -> bytes:
        quant = EXECUTABLE[type_name]
        rng = np.random.default_rng([self.seed, quant.ggml_id, row_length])
        blocks = np.frombuffer(rng.bytes(_POOL_BLOCKS * quant.block_bytes), np.uint8).copy()
        blocks = blocks.reshape(_POOL_BLOCKS, quant.block_bytes)
        spread = rng.uniform(0.5, 1.5, (_POOL_BLOCKS, 1)) / np.sqrt(row_length)
        if type_name == "Q4_K":
            # d*sc*q - dmin*m with q in 0..15 and sc, m in 0..63: dmin = 7.5 d centres it, its deviation is then 258 d.
            d = (spread / 258).astype("<f2")
            blocks[:, 0:2] = d.view(np.uint8)
            blocks[:, 2:4] = (d * np.float16(7.5)).view(np.uint8)
        elif type_name == "Q6_K":
            # d*sc*(q-32) with q in 0..63 and sc int8: its deviation is 1366 d.
            blocks[:, 208:210] = (spread / 1366).astype("<f2").view(np.uint8)
        else:
            raise AssertionError(f"no random blocks of {type_name}")
        return blocks.tobytes()
