"""The traced forward pass: the arithmetic of `forward`, with every intermediate named."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from exactmoe.parity.reference.attention import attend, attention_scores, attention_softmax
from exactmoe.parity.reference.combine import combine
from exactmoe.parity.reference.dispatch import dispatch
from exactmoe.parity.reference.embedding import embed
from exactmoe.parity.reference.forward import check_tokens
from exactmoe.parity.reference.kv_cache import KVCache, append
from exactmoe.parity.reference.matmul import grouped_matmul, matmul
from exactmoe.parity.reference.moe import require_moe
from exactmoe.parity.reference.norm import rms_norm
from exactmoe.parity.reference.numerics import F32, Array
from exactmoe.parity.reference.quantize import quantize
from exactmoe.parity.reference.residual import add
from exactmoe.parity.reference.rope import qk_norm_rope
from exactmoe.parity.reference.router import prepare_router, route, router_logits
from exactmoe.parity.reference.swiglu import swiglu
from exactmoe.parity.reference.weights import LayerWeights, Weights

WHOLE_MODEL = -1  # the layer of a stage that belongs to none


class Plan(Protocol):
    """Which stages to keep."""

    def wants(self, stage: str, layer: int) -> bool:
        """Whether to keep `stage` of `layer`."""
        ...


class Traced(NamedTuple):
    """Logits of all positions, and the stages that were kept by (name, layer)."""

    logits: F32  # [T, V]
    stages: dict[tuple[str, int], Array]


def forward_traced(
    weights: Weights, cache: KVCache, tokens: Sequence[int], profile: str, plan: Plan | None = None
) -> Traced:
    """Run T tokens after those in `cache`, which grows by T, and keep every stage, or those that `plan` wants.

    Raises ValueError as `forward`."""
    ids = check_tokens(weights, cache, tokens)
    stages: dict[tuple[str, int], Array] = {}
    x = stages["embedding", WHOLE_MODEL] = embed(weights.embedding, ids)
    for i, layer in enumerate(weights.layers):
        named = _attention(weights, layer, cache, i, x, profile)
        named |= _moe(weights, layer, named["post_attn_residual"], profile)
        x = named["post_ffn_residual"]
        stages |= {(name, i): value for name, value in named.items() if plan is None or plan.wants(name, i)}
    cache.length += len(ids)
    normed = stages["final_norm", WHOLE_MODEL] = rms_norm(x, weights.output_norm, weights.dims.eps)
    logits = stages["lm_head", WHOLE_MODEL] = matmul(weights.output, quantize(normed, profile))
    if plan is not None:  # stages of the whole model are at hand anyway
        stages = {key: value for key, value in stages.items() if plan.wants(*key)}
    return Traced(logits, stages)


def _attention(weights: Weights, layer: LayerWeights, cache: KVCache, i: int, x: F32, profile: str) -> dict[str, Array]:
    eps, start, kv = weights.dims.eps, cache.length, cache.layer(i)
    attn_norm = rms_norm(x, layer.attn_norm, eps)
    n = quantize(attn_norm, profile)
    q, k, v = matmul(layer.q, n), matmul(layer.k, n), matmul(layer.v, n)
    q_post_rope = qk_norm_rope(q, layer.q_norm, eps, cache.rope, start)
    k_post_rope = qk_norm_rope(k, layer.k_norm, eps, cache.rope, start)
    append(k_post_rope, v, kv, start)
    attention = attend(q_post_rope, kv, start)
    attn_out = matmul(layer.attn_output, quantize(attention, profile))
    return {
        "attn_norm": attn_norm,
        "q": q,
        "k": k,
        "v": v,
        "q_post_rope": q_post_rope,
        "k_post_rope": k_post_rope,
        "attn_scores": attention_scores(q_post_rope, kv, start),
        "attn_softmax": attention_softmax(q_post_rope, kv, start),
        "attention": attention,
        "attn_out": attn_out,
        "post_attn_residual": add(x, attn_out),
    }


def _moe(weights: Weights, layer: LayerWeights, x: F32, profile: str) -> dict[str, Array]:
    T, A = len(x), weights.dims.n_active
    ffn_norm = rms_norm(x, layer.ffn_norm, weights.dims.eps)
    require_moe(ffn_norm, layer, weights.dims, profile)
    logits = router_logits(ffn_norm, prepare_router(layer.router))
    routing = route(logits, A)
    rows = dispatch(routing.expert, weights.dims.n_experts)
    u = quantize(ffn_norm, profile)
    gate = grouped_matmul(layer.gate, u, rows, A)
    up = grouped_matmul(layer.up, u, rows, A)
    h = swiglu(gate, up)
    out = grouped_matmul(layer.down, quantize(h, profile), rows, 1)
    y = combine(out, routing.weight)
    return {
        "ffn_norm": ffn_norm,
        "moe_router_logits": logits,
        "moe_router": routing.weight,
        "moe_router_indices": routing.expert,
        "moe_expert_gate": gate.reshape(T, A, -1),
        "moe_expert_up": up.reshape(T, A, -1),
        "moe_expert_swigl": h.reshape(T, A, -1),
        "moe_expert_out": out.reshape(T, A, -1),
        "moe_ffn_out": y,
        "post_ffn_residual": add(x, y),
    }
