"""The stages of a forward pass, by name and in the order they happen. Names are an interface: none is ever renamed."""

from typing import NamedTuple

WHOLE_MODEL = -1
"""Layer number of a stage that belongs to no layer."""

Key = tuple[str, int]
"""One stage of one layer: its name, and the layer or WHOLE_MODEL."""


class Stage(NamedTuple):
    """One named intermediate."""

    name: str
    per_layer: bool


STAGES: tuple[Stage, ...] = (
    Stage("embedding", False),  # [T, D]
    Stage("attn_norm", True),  # [T, D]
    Stage("q", True),  # [T, H*C], before the head norm
    Stage("k", True),  # [T, G*C], before the head norm
    Stage("v", True),  # [T, G*C]
    Stage("q_post_rope", True),  # [T, H, C]
    Stage("k_post_rope", True),  # [T, G, C]
    Stage("attn_scores", True),  # [T, H, S], -inf where a query may not look
    Stage("attn_softmax", True),  # [T, H, S], 0 where a query may not look
    Stage("attention", True),  # [T, H*C]
    Stage("attn_out", True),  # [T, D]
    Stage("post_attn_residual", True),  # [T, D]
    Stage("ffn_norm", True),  # [T, D]
    Stage("moe_router_logits", True),  # [T, E]
    Stage("moe_router", True),  # [T, A], renormalised weights in rank order
    Stage("moe_router_indices", True),  # [T, A] i32, expert ids in rank order
    Stage("moe_expert_gate", True),  # [T, A, F]
    Stage("moe_expert_up", True),  # [T, A, F]
    Stage("moe_expert_swigl", True),  # [T, A, F]
    Stage("moe_expert_out", True),  # [T, A, D]
    Stage("moe_ffn_out", True),  # [T, D]
    Stage("post_ffn_residual", True),  # [T, D]
    Stage("final_norm", False),  # [T, D]
    Stage("lm_head", False),  # [T, V]
)


def keys(n_layers: int) -> list[Key]:
    """Every (stage, layer) of a model of `n_layers`, in the order they happen; layer is WHOLE_MODEL outside layers."""
    before = [s for s in STAGES if not s.per_layer and s.name == "embedding"]
    after = [s for s in STAGES if not s.per_layer and s.name != "embedding"]
    inside = [(s.name, i) for i in range(n_layers) for s in STAGES if s.per_layer]
    return [(s.name, WHOLE_MODEL) for s in before] + inside + [(s.name, WHOLE_MODEL) for s in after]
