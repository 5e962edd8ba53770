"""The forward pass of Qwen3-MoE in numpy, top to bottom. Prefill chunks and decode steps are the same code.

T tokens, D model width, H query heads, G kv heads, C head width, E experts, A active, F expert width, V vocabulary."""

from collections.abc import Sequence

import numpy as np

from exactmoe.parity.reference.attention import attend
from exactmoe.parity.reference.embedding import embed
from exactmoe.parity.reference.kv_cache import KVCache, append
from exactmoe.parity.reference.matmul import matmul
from exactmoe.parity.reference.moe import moe_ffn
from exactmoe.parity.reference.norm import rms_norm
from exactmoe.parity.reference.numerics import F32, I32, require
from exactmoe.parity.reference.quantize import quantize
from exactmoe.parity.reference.residual import add
from exactmoe.parity.reference.rope import qk_norm_rope
from exactmoe.parity.reference.weights import LayerWeights, Weights


def forward(weights: Weights, cache: KVCache, tokens: Sequence[int], profile: str, all_positions: bool = False) -> F32:
    """Run T tokens after those in `cache`, which grows by T; logits f32 [V] of the last, or [T, V] of all.

    Raises ValueError for no token, an id outside the vocabulary, and more tokens than the cache has room for."""
    ids = check_tokens(weights, cache, tokens)
    eps = weights.dims.eps
    x = embed(weights.embedding, ids)  # [T, D]
    for i, layer in enumerate(weights.layers):
        x = add(x, _attention(weights, layer, cache, i, x, profile))
        x = add(x, moe_ffn(rms_norm(x, layer.ffn_norm, eps), layer, weights.dims, profile))
    cache.length += len(ids)
    last = x if all_positions else x[-1:]
    logits = matmul(weights.output, quantize(rms_norm(last, weights.output_norm, eps), profile))
    return logits if all_positions else logits[0]


def _attention(weights: Weights, layer: LayerWeights, cache: KVCache, i: int, x: F32, profile: str) -> F32:
    """Attention of layer `i` on the residual stream x [T, D], keys and values appended: [T, D], not yet added to x."""
    eps, start, kv = weights.dims.eps, cache.length, cache.layer(i)
    n = quantize(rms_norm(x, layer.attn_norm, eps), profile)
    q = qk_norm_rope(matmul(layer.q, n), layer.q_norm, eps, cache.rope, start)  # [T, H, C]
    k = qk_norm_rope(matmul(layer.k, n), layer.k_norm, eps, cache.rope, start)  # [T, G, C]
    append(k, matmul(layer.v, n), kv, start)
    return matmul(layer.attn_output, quantize(attend(q, kv, start), profile))


def check_tokens(weights: Weights, cache: KVCache, tokens: Sequence[int]) -> I32:
    """The tokens as i32 [T], if they can be run."""
    require(len(tokens) > 0, "no token to run")
    room, of = cache.capacity - cache.length, cache.capacity
    require(len(tokens) <= room, f"{len(tokens)} tokens do not fit the cache: {room} of {of} positions left")
    bad = next((t for t in tokens if not 0 <= t < weights.dims.vocab), None)
    require(bad is None, f"token id {bad} is outside the vocabulary of {weights.dims.vocab}")
    return np.array(tokens, np.int32)
