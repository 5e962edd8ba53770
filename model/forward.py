"""The production forward pass of Qwen3-MoE: chunks of T rows after `length`; a chunk of one is a decode step.

T tokens, D model width, H query heads, G kv heads, C head width, E experts, A active, F expert width, V vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor

from exactmoe.kernels.attention import attend
from exactmoe.kernels.embedding import embed
from exactmoe.kernels.errors import require
from exactmoe.kernels.kv_cache import append
from exactmoe.kernels.matmul import matmul
from exactmoe.kernels.norm import rms_norm, rms_norm_quantize
from exactmoe.kernels.quantize import quantize
from exactmoe.kernels.residual import add
from exactmoe.kernels.rope import qk_norm_rope
from exactmoe.model.cache import KVCache
from exactmoe.model.decode import Decoder
from exactmoe.model.moe import moe_ffn
from exactmoe.model.weights import Layer, Model


def prefill(
    model: Model, cache: KVCache, tokens: Sequence[int], chunk: int = 512, all_positions: bool = False
) -> Tensor:
    """Run a prompt in chunks of at most `chunk` tokens; logits [V] of its last token, or [T, V] of all."""
    require(chunk > 0, f"chunk must be positive, got {chunk}")
    check_tokens(model, cache, tokens)
    parts = [forward(model, cache, tokens[i : i + chunk], all_positions) for i in range(0, len(tokens), chunk)]
    return torch.cat(parts) if all_positions else parts[-1]


def forward(model: Model, cache: KVCache, tokens: Sequence[int] | Tensor, all_positions: bool = False) -> Tensor:
    """Run T tokens after those in `cache`, which grows by T; logits f32 [V] of the last, or [T, V] of all.

    A tensor of tokens on the device is taken as it is, so that a sampled token need not visit the host. One token alone
    is a decode step."""
    ids = check_tokens(model, cache, tokens)
    if ids.shape[0] == 1:
        decoder = decoder_of(model, cache)
        decoder.step(ids)
        return decoder.logits[None].clone() if all_positions else decoder.logits.clone()
    x = embed(model.embedding, ids)  # [T, D]
    for i, layer in enumerate(model.layers):
        x = add(x, _attention(model, layer, cache, i, x))
        x = add(x, moe_ffn(rms_norm(x, layer.ffn_norm, model.eps), layer.moe, model.config.n_active, model.profile))
    cache.length += ids.shape[0]
    last = x if all_positions else x[-1:]
    logits = matmul(model.output, rms_norm_quantize(last, model.output_norm, model.eps, model.profile).activations)
    return logits if all_positions else logits[0]


def decoder_of(model: Model, cache: KVCache) -> Decoder:
    """The decode steps of the sequence in `cache`, made at the first."""
    if cache.decoder is None:
        cache.decoder = Decoder(model, cache)
    return cache.decoder


def _attention(model: Model, layer: Layer, cache: KVCache, i: int, x: Tensor) -> Tensor:
    """Attention of layer `i` on the residual stream x [T, D], keys and values appended: [T, D], not yet added to x."""
    start, kv = cache.length, cache.layer(i)
    n = rms_norm_quantize(x, layer.attn_norm, model.eps, model.profile).activations
    q = qk_norm_rope(matmul(layer.q, n), layer.q_norm, model.eps, cache.rope, start)  # [T, H, C]
    k = qk_norm_rope(matmul(layer.k, n), layer.k_norm, model.eps, cache.rope, start)  # [T, G, C]
    append(k, matmul(layer.v, n), kv, start)
    return matmul(layer.attn_output, quantize(attend(q, kv, start), model.profile))


def check_tokens(model: Model, cache: KVCache, tokens: Sequence[int] | Tensor) -> Tensor:
    """Tokens as i32 [T] on the model's device; refuses none, ids outside the vocabulary, more than the cache holds."""
    V = model.config.vocab
    require(len(tokens) > 0, "no token to run")
    room = cache.capacity - cache.length
    require(
        len(tokens) <= room, f"{len(tokens)} tokens do not fit the cache: {room} of {cache.capacity} positions left"
    )
    if isinstance(tokens, Tensor):
        require(
            tokens.dtype == torch.int32 and tokens.ndim == 1,
            f"tokens must be i32 [T], got {tokens.dtype} {list(tokens.shape)}",
        )
        return tokens.to(model.device)
    bad = next((t for t in tokens if not 0 <= t < V), None)
    require(bad is None, f"token id {bad} is outside the vocabulary of {V}")
    return torch.tensor(tokens, dtype=torch.int32, device=model.device)
