"""The traced forward pass: the arithmetic of model.forward with every intermediate named (model.stages).

Slower by the stages it writes; bit-equal in logits and cache."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from exactmoe.kernels.attention import attend, attention_scores, attention_softmax
from exactmoe.kernels.combine import combine
from exactmoe.kernels.dispatch import dispatch
from exactmoe.kernels.embedding import embed
from exactmoe.kernels.kv_cache import append
from exactmoe.kernels.matmul import grouped_matmul, matmul
from exactmoe.kernels.norm import rms_norm
from exactmoe.kernels.quantize import quantize
from exactmoe.kernels.residual import add
from exactmoe.kernels.rope import qk_norm_rope
from exactmoe.kernels.router import route, router_logits
from exactmoe.kernels.swiglu import swiglu
from exactmoe.model.cache import KVCache
from exactmoe.model.forward import check_tokens
from exactmoe.model.moe import require_moe
from exactmoe.model.stages import WHOLE_MODEL
from exactmoe.model.weights import Layer, Model


class Plan(Protocol):
    """Which stages to keep."""

    def wants(self, stage: str, layer: int) -> bool:
        """Whether to keep `stage` of `layer`."""
        ...


class Traced(NamedTuple):
    """Logits of all positions, and the stages that were kept by (name, layer)."""

    logits: Tensor  # [T, V] f32
    stages: dict[tuple[str, int], Tensor]


def forward_traced(model: Model, cache: KVCache, tokens: Sequence[int] | Tensor, plan: Plan | None = None) -> Traced:
    """Run T tokens after those in `cache`, which grows by T, and keep every stage, or those that `plan` wants.

    Shapes are in model.stages. What is kept changes no arithmetic."""
    ids = check_tokens(model, cache, tokens)
    stages: dict[tuple[str, int], Tensor] = {}
    x = stages["embedding", WHOLE_MODEL] = embed(model.embedding, ids)
    for i, layer in enumerate(model.layers):
        named = _attention(model, layer, cache, i, x)
        named |= _moe(model, layer, named["post_attn_residual"])
        x = named["post_ffn_residual"]
        stages |= {(name, i): value for name, value in named.items() if plan is None or plan.wants(name, i)}
    cache.length += ids.shape[0]
    normed = stages["final_norm", WHOLE_MODEL] = rms_norm(x, model.output_norm, model.eps)
    logits = stages["lm_head", WHOLE_MODEL] = matmul(model.output, quantize(normed, model.profile))
    if plan is not None:  # stages of the whole model are at hand anyway
        stages = {key: value for key, value in stages.items() if plan.wants(*key)}
    return Traced(logits, stages)


def _attention(model: Model, layer: Layer, cache: KVCache, i: int, x: Tensor) -> dict[str, Tensor]:
    start, kv = cache.length, cache.layer(i)
    attn_norm = rms_norm(x, layer.attn_norm, model.eps)
    n = quantize(attn_norm, model.profile)
    q, k, v = matmul(layer.q, n), matmul(layer.k, n), matmul(layer.v, n)
    q_post_rope = qk_norm_rope(q, layer.q_norm, model.eps, cache.rope, start)
    k_post_rope = qk_norm_rope(k, layer.k_norm, model.eps, cache.rope, start)
    append(k_post_rope, v, kv, start)
    attention = attend(q_post_rope, kv, start)
    attn_out = matmul(layer.attn_output, quantize(attention, model.profile))
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


def _moe(model: Model, layer: Layer, x: Tensor) -> dict[str, Tensor]:
    T, A = x.shape[0], model.config.n_active
    ffn_norm = rms_norm(x, layer.ffn_norm, model.eps)
    require_moe(ffn_norm, layer.moe, A, model.profile, None)
    logits = router_logits(ffn_norm, layer.moe.router)
    routing = route(logits, A)
    rows = dispatch(routing.expert, model.config.n_experts)
    u = quantize(ffn_norm, model.profile)
    gate = grouped_matmul(layer.moe.gate, u, rows, A)
    up = grouped_matmul(layer.moe.up, u, rows, A)
    h = swiglu(gate, up)
    out = grouped_matmul(layer.moe.down, quantize(h, model.profile), rows, 1)
    y = combine(out, routing.weight)
    return {
        "ffn_norm": ffn_norm,
        "moe_router_logits": logits,
        "moe_router": routing.weight,
        "moe_router_indices": routing.expert,
        "moe_expert_gate": gate.view(T, A, -1),
        "moe_expert_up": up.view(T, A, -1),
        "moe_expert_swigl": h.view(T, A, -1),
        "moe_expert_out": out.view(T, A, -1),
        "moe_ffn_out": y,
        "post_ffn_residual": add(x, y),
    }
