"""The dims of a Qwen3-MoE model, read from GGUF metadata and never from constants; and the check of the whole file.

`Config.from_gguf` reads and judges the metadata, `check_model` the tensors: names, shapes, types, and the values from
which one bad number would spread. Both refuse with `InvalidInput` before anything is allocated for the model."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from exactmoe.kernels.errors import InvalidInput, require
from exactmoe.kernels.formats import BLOCK, EXECUTABLE, executable_format
from exactmoe.model.gguf.reader import GGUFFile

ARCHITECTURE = "qwen3moe"

# Keys that ask for arithmetic this project does not have, with the values that ask for nothing. llama.cpp reads these
# for one architecture or another; a file may carry them switched off.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),  # 1 is softmax, 0 unset
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "moe_every_n_layers": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.finetuned": (False,),
    "rope.scaling.type": ("none",),
    "use_parallel_residual": (False,),
}
# Keys that carry a dim used below, or a number that no arithmetic here depends on (the width of dense layers, the
# context before a scaling that is refused above).
_READ = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_feed_forward_length",
    "expert_used_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.original_context_length",
    "vocab_size",
}
_F16_INF = np.uint16(0x7C00)  # exponent bits of an f16: all set means Inf or NaN
_SCALE_BYTES = {"Q4_K": (0, 2), "Q6_K": (208,)}  # where the f16 scales of a block lie: d and dmin, d
_CHUNK_BLOCKS = 1 << 17  # blocks judged at a time, so that the check holds a megabyte whatever the tensor


@dataclass(frozen=True)
class Config:
    """Dims of a Qwen3-MoE model; the letters are those of the shape comments everywhere else."""

    hidden: int  # D
    n_layers: int  # L
    n_heads: int  # H
    n_kv_heads: int  # G
    head_dim: int  # C
    n_experts: int  # E
    n_active: int  # A, experts per token
    expert_width: int  # F
    vocab: int  # V
    context_length: int  # positions the model was trained for
    eps: np.float32  # of every RMSNorm, exactly as stored
    rope_base: float  # exactly the f32 stored

    @staticmethod
    def from_gguf(file: GGUFFile) -> "Config":
        """The dims in the metadata of `file`.

        Raises `InvalidInput` for a key that is missing, of the wrong type, out of range, contradicted by another, or
        that asks for arithmetic which is not implemented."""
        keys = _Keys(file.path, file.metadata)
        keys.refuse_other_architectures()
        keys.refuse_other_arithmetic()
        parts = file.metadata.get("split.count", 1)
        require(
            parts in (0, 1), f"{file.path}: split.count is {parts!r}: one part of a split model; merge the parts first"
        )
        head_dim = keys.positive("attention.key_length")
        keys.equal("attention.value_length", head_dim, "attention.key_length")
        config = Config(
            hidden=keys.positive("embedding_length"),
            n_layers=keys.positive("block_count"),
            n_heads=keys.positive("attention.head_count"),
            n_kv_heads=keys.positive("attention.head_count_kv"),
            head_dim=head_dim,
            n_experts=keys.positive("expert_count"),
            n_active=keys.positive("expert_used_count"),
            expert_width=keys.positive("expert_feed_forward_length"),
            vocab=_vocabulary(file),
            context_length=keys.positive("context_length"),
            eps=keys.real("attention.layer_norm_rms_epsilon"),
            rope_base=float(keys.real("rope.freq_base")),
        )
        if keys.has("rope.dimension_count"):
            keys.equal("rope.dimension_count", head_dim, "attention.key_length")
        if keys.has("vocab_size"):
            keys.equal("vocab_size", config.vocab, "token_embd.weight's rows")
        config._require_consistent(file.path)
        return config

    def _require_consistent(self, path: str) -> None:
        require(
            self.n_active <= self.n_experts,
            f"{path}: {ARCHITECTURE}.expert_used_count is {self.n_active}, but there are {self.n_experts} experts",
        )
        require(
            self.n_heads % self.n_kv_heads == 0,
            f"{path}: {self.n_heads} heads cannot share {self.n_kv_heads} KV heads evenly",
        )
        require(self.head_dim % 2 == 0, f"{path}: head width {self.head_dim} is odd, RoPE turns pairs")
        for what, width in (
            ("embedding_length", self.hidden),
            ("expert_feed_forward_length", self.expert_width),
            ("attention.head_count * attention.key_length", self.n_heads * self.head_dim),
        ):
            require(width % BLOCK == 0, f"{path}: {ARCHITECTURE}.{what} is {width}, not a multiple of {BLOCK}")


class ExpectedTensor(NamedTuple):
    """A tensor that a Qwen3-MoE file must hold."""

    name: str
    shape: tuple[int, ...]  # numpy order
    quantised: bool  # True: one of EXECUTABLE; False: F32


def expected_tensors(config: Config) -> Iterator[ExpectedTensor]:
    """Every tensor of the model and its shape, in the order published files have: shapes are [rows, row length]."""
    D, E, F, V = config.hidden, config.n_experts, config.expert_width, config.vocab
    C, Q, KV = config.head_dim, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    yield ExpectedTensor("token_embd.weight", (V, D), True)
    for layer in range(config.n_layers):
        for part, shape, quantised in (
            ("attn_norm", (D,), False),
            ("attn_q", (Q, D), True),
            ("attn_k", (KV, D), True),
            ("attn_v", (KV, D), True),
            ("attn_output", (D, Q), True),
            ("attn_q_norm", (C,), False),
            ("attn_k_norm", (C,), False),
            ("ffn_norm", (D,), False),
            ("ffn_gate_inp", (E, D), False),
            ("ffn_gate_exps", (E, F, D), True),
            ("ffn_up_exps", (E, F, D), True),
            ("ffn_down_exps", (E, D, F), True),
        ):
            yield ExpectedTensor(f"blk.{layer}.{part}.weight", shape, quantised)
    yield ExpectedTensor("output_norm.weight", (D,), False)
    yield ExpectedTensor("output.weight", (V, D), True)


def check_model(file: GGUFFile, config: Config, *, deep: bool = True) -> None:
    """Raise `InvalidInput` unless `file` holds exactly the tensors of `config`, each executable.

    Names, shapes and types are always judged. `deep` reads the norms, the routers and the f16 scales of every block,
    and refuses NaN and Inf there, naming the tensor and the element or block."""
    known = set()
    for want in expected_tensors(config):
        known.add(want.name)
        _require_tensor(file, want)
    for name in file.tensors:
        require(
            name in known, f"{file.path}: tensor {name!r} is not part of a {config.n_layers}-layer {ARCHITECTURE} model"
        )
    if deep:
        for want in expected_tensors(config):
            check_finite(file, want.name)


def check_finite(file: GGUFFile, name: str) -> None:
    """Raise `InvalidInput` if the F32 tensor `name`, or an f16 scale of a block of the quantised one, is NaN or Inf."""
    info, data = file.tensors[name], file.tensor(name)
    if info.type_name == "F32":
        bad = ~np.isfinite(data)
        if bad.any():
            first = tuple(int(i) for i in np.argwhere(bad)[0])
            raise InvalidInput(f"{file.path}: tensor {name!r}: element {first} is {data[first]}")
        return
    blocks = data.reshape(-1, EXECUTABLE[info.type_name].block_bytes)
    for start in range(0, len(blocks), _CHUNK_BLOCKS):
        chunk = blocks[start : start + _CHUNK_BLOCKS]
        for at in _SCALE_BYTES[info.type_name]:
            scale: npt.NDArray[np.uint16] = chunk[:, at : at + 2].view("<u2")[:, 0]
            bad = (scale & _F16_INF) == _F16_INF
            if bad.any():
                block = int(np.argmax(bad))
                value = scale[block : block + 1].view(np.float16)[0]
                where = f"{file.path}: tensor {name!r}: block {start + block}"
                raise InvalidInput(f"{where}: the {info.type_name} scale at byte {at} is {value}")


def _require_tensor(file: GGUFFile, want: ExpectedTensor) -> None:
    if want.name not in file.tensors:
        why = " (tied embeddings are not supported)" if want.name == "output.weight" else ""
        raise InvalidInput(f"{file.path}: tensor {want.name!r} is missing{why}")
    info = file.tensors[want.name]
    require(
        info.shape == want.shape,
        f"{file.path}: tensor {want.name!r} has shape {info.shape}, the metadata says {want.shape}",
    )
    if want.quantised:
        executable_format(info.type_name, f"{file.path}: tensor {want.name!r}")
    else:
        require(info.type_name == "F32", f"{file.path}: tensor {want.name!r} has type {info.type_name}, it must be F32")


def _vocabulary(file: GGUFFile) -> int:
    """V: the rows of the embedding, which the tokenizer must agree with if the file has one."""
    name = "token_embd.weight"
    require(name in file.tensors, f"{file.path}: tensor {name!r} is missing")
    shape = file.tensors[name].shape
    require(len(shape) == 2, f"{file.path}: tensor {name!r} has shape {shape}, not [vocabulary, width]")
    if "tokenizer.ggml.tokens" in file.metadata:
        tokens = file.metadata["tokenizer.ggml.tokens"]
        require(isinstance(tokens, list), f"{file.path}: tokenizer.ggml.tokens is not an array of strings")
        count = len(tokens) if isinstance(tokens, list) else 0
        require(
            count == shape[0],
            f"{file.path}: tokenizer.ggml.tokens has {count} entries, {name!r} has {shape[0]} rows",
        )
    return shape[0]


class _Keys:
    """Metadata under the architecture's prefix; every refusal names the file, the key and the value."""

    def __init__(self, path: str, metadata: Mapping[str, object]) -> None:
        self.path = path
        self.metadata = metadata

    def has(self, key: str) -> bool:
        return f"{ARCHITECTURE}.{key}" in self.metadata

    def get(self, key: str) -> object:
        full = f"{ARCHITECTURE}.{key}"
        require(full in self.metadata, f"{self.path}: key {full} is missing")
        return self.metadata[full]

    def refuse_other_architectures(self) -> None:
        require("general.architecture" in self.metadata, f"{self.path}: key general.architecture is missing")
        found = self.metadata["general.architecture"]
        require(
            isinstance(found, str) and found == ARCHITECTURE,
            f"{self.path}: architecture is {found!r}; supported: {ARCHITECTURE}",
        )

    def refuse_other_arithmetic(self) -> None:
        """An unknown key under the prefix is refused too: it may ask for anything."""
        for full, value in self.metadata.items():
            if not full.startswith(f"{ARCHITECTURE}."):
                continue
            key = full.removeprefix(f"{ARCHITECTURE}.")
            if key in _NEUTRAL:
                neutral = isinstance(value, int | float | str | np.float32) and value in _NEUTRAL[key]
                require(neutral, f"{self.path}: {full} is {value!r}, which is not implemented")
            else:
                require(key in _READ, f"{self.path}: key {full} is not known, so what it asks for is not implemented")

    def positive(self, key: str) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InvalidInput(f"{self.path}: {ARCHITECTURE}.{key} is {value!r}, not a positive integer")
        return value

    def equal(self, key: str, other: int, what: str) -> None:
        value = self.positive(key)
        require(value == other, f"{self.path}: {ARCHITECTURE}.{key} is {value}, but {what} is {other}")

    def real(self, key: str) -> np.float32:
        value = self.get(key)
        if not isinstance(value, np.float32):
            raise InvalidInput(f"{self.path}: {ARCHITECTURE}.{key} is {value!r}, not a FLOAT32")
        if not math.isfinite(value) or value <= 0:
            raise InvalidInput(f"{self.path}: {ARCHITECTURE}.{key} is {value}, not a positive finite number")
        return value
