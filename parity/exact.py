"""Qwen3-MoE in plain float64: what the arithmetic of `reference` is judged against.

The model as its definition reads, on weights expanded from the file's blocks without rounding; the whole prompt at
once, no cache, no activation quantised. It shares no code with the reference, its decoders included."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from exactmoe.kernels.errors import require
from exactmoe.model.config import Config, check_model
from exactmoe.model.gguf.reader import GGUFFile

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


class ExactPass(NamedTuple):
    """What a prompt of T tokens gives, every position. L layers."""

    logits: F64  # [T, V]
    router: F64  # [L, T, E] probability of each expert
    experts: I64  # [L, T, A] the most probable ones, best first


def exact_forward(file: GGUFFile, tokens: Sequence[int]) -> ExactPass:
    """Run `tokens` through the model in `file`. Raises `InvalidInput` for a file or tokens it cannot take."""
    config = Config.from_gguf(file)
    check_model(file, config)
    ids = np.array(tokens, np.int64)
    require(ids.size > 0, "no token to run")
    require(len(ids) <= config.context_length, f"{len(ids)} tokens exceed the context of {config.context_length}")
    outside = ids[(ids < 0) | (ids >= config.vocab)]
    require(outside.size == 0, f"token id {outside[:1]} is outside the vocabulary of {config.vocab}")
    eps = float(config.eps)

    def weight(name: str) -> F64:
        return dequantize(file.tensor(f"{name}.weight"), file.tensors[f"{name}.weight"].type_name)

    x = dequantize(file.tensor("token_embd.weight")[ids], file.tensors["token_embd.weight"].type_name)  # [T, D]
    router, experts = [], []
    for layer in range(config.n_layers):
        block = f"blk.{layer}."
        n = _rms_norm(x, weight(block + "attn_norm"), eps)
        q, k, v = (
            (n @ weight(block + name).T).reshape(len(ids), -1, config.head_dim)
            for name in ("attn_q", "attn_k", "attn_v")
        )
        q = _rope(_rms_norm(q, weight(block + "attn_q_norm"), eps), config.rope_base)
        k = _rope(_rms_norm(k, weight(block + "attn_k_norm"), eps), config.rope_base)
        x = x + _attention(q, k, v) @ weight(block + "attn_output").T
        n = _rms_norm(x, weight(block + "ffn_norm"), eps)
        probability = _softmax(n @ weight(block + "ffn_gate_inp").T)
        chosen = np.argsort(-probability, axis=-1, kind="stable")[:, : config.n_active]
        x = x + _experts(file, block, n, probability, chosen)
        router.append(probability)
        experts.append(chosen)
    logits = _rms_norm(x, weight("output_norm"), eps) @ weight("output").T
    return ExactPass(logits, np.stack(router), np.stack(experts))


def dequantize(data: np.ndarray, type_name: str) -> F64:
    """Weights as float64, exact: Q4_K or Q6_K rows u8 [..., row bytes] to [..., K], F32 as it is.

    Layouts: dequantize_row_q4_K and dequantize_row_q6_K in ggml-quants.c."""
    if type_name == "F32":
        return data.astype(np.float64)
    size = {"Q4_K": 144, "Q6_K": 210}[type_name]
    blocks = np.ascontiguousarray(data).reshape(-1, size)
    out = np.empty((len(blocks), 256))
    fill = _fill_q4_k if type_name == "Q4_K" else _fill_q6_k
    fill(blocks, out)
    return out.reshape(*data.shape[:-1], -1)


def _fill_q4_k(blocks: npt.NDArray[np.uint8], out: F64) -> None:
    """A block: d f16, dmin f16, 12 bytes of 6-bit scales and minimums, 128 bytes of 4-bit codes."""
    d, dmin = _f16(blocks[:, 0:2]), _f16(blocks[:, 2:4])
    packed = blocks[:, 4:16]
    for j in range(8):
        if j < 4:
            scale, minimum = packed[:, j] & 63, packed[:, j + 4] & 63
        else:
            scale = (packed[:, j + 4] & 15) | (packed[:, j - 4] >> 6 << 4)
            minimum = (packed[:, j + 4] >> 4) | (packed[:, j] >> 6 << 4)
        codes = blocks[:, 16 + 32 * (j // 2) :][:, :32] >> 4 * (j % 2) & 15
        out[:, 32 * j : 32 * (j + 1)] = (d * scale)[:, None] * codes - (dmin * minimum)[:, None]


def _fill_q6_k(blocks: npt.NDArray[np.uint8], out: F64) -> None:
    """A block: 128 bytes of low 4 bits, 64 bytes of high 2 bits, 16 scales i8, d f16."""
    d = _f16(blocks[:, 208:210])
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    for run in range(8):  # 32 weights each
        half, part = divmod(run, 4)
        low = blocks[:, 64 * half + 32 * (part % 2) :][:, :32] >> 4 * (part // 2) & 15
        high = blocks[:, 128 + 32 * half :][:, :32] >> 2 * part & 3
        codes = (low.astype(np.float64) + 16 * high.astype(np.float64)) - 32
        scale = np.repeat(d[:, None] * scales[:, 2 * run : 2 * run + 2], 16, axis=1)
        out[:, 32 * run : 32 * (run + 1)] = scale * codes


def _f16(two_bytes: npt.NDArray[np.uint8]) -> F64:
    return np.ascontiguousarray(two_bytes).view("<f2")[:, 0].astype(np.float64)


def _rms_norm(x: F64, weight: F64, eps: float) -> F64:
    normed: F64 = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    return normed


def _rope(x: F64, base: float) -> F64:
    """Turn x [T, heads, C] at positions 0..T-1: component i and i + C/2 are a complex number."""
    T, _, C = x.shape
    angle = np.arange(T)[:, None, None] * base ** (-np.arange(0, C, 2) / C)
    turned = (x[..., : C // 2] + 1j * x[..., C // 2 :]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _softmax(x: F64) -> F64:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    probability: F64 = e / e.sum(axis=-1, keepdims=True)
    return probability


def _attention(q: F64, k: F64, v: F64) -> F64:
    """Causal attention [T, H*C] of q [T, H, C] over k, v [T, G, C], H/G query heads to a kv head."""
    T, H, C = q.shape
    share = H // k.shape[1]
    future = np.triu(np.ones((T, T), bool), 1)
    out = np.empty((T, H, C))
    for h in range(H):
        score = q[:, h] @ k[:, h // share].T / np.sqrt(C)
        out[:, h] = _softmax(np.where(future, -np.inf, score)) @ v[:, h // share]
    return out.reshape(T, H * C)


def _experts(file: GGUFFile, block: str, n: F64, probability: F64, chosen: I64) -> F64:
    """The MoE layer's output [T, D] for normed rows n."""
    weight = np.take_along_axis(probability, chosen, axis=-1)
    weight = weight / weight.sum(axis=-1, keepdims=True)
    y = np.zeros_like(n)
    for e in np.unique(chosen):
        token, rank = np.nonzero(chosen == e)
        gate, up, down = (
            dequantize(file.tensor(name)[e], file.tensors[name].type_name)
            for name in (f"{block}ffn_{part}_exps.weight" for part in ("gate", "up", "down"))
        )
        g = n[token] @ gate.T
        h = g / (1 + np.exp(-g)) * (n[token] @ up.T)
        y[token] += weight[token, rank][:, None] * (h @ down.T)
    return y
