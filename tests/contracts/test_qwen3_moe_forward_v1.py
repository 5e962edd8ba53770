"""The forward contracts on whole models: every stage finite and in shape, weights that sum to one, the same twice."""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from exactmoe.kernels.launch import resolve_device
from exactmoe.model.cache import KVCache
from exactmoe.model.config import Config
from exactmoe.model.gguf.reader import open_gguf
from exactmoe.model.stages import Key, keys
from exactmoe.model.traced import forward_traced
from exactmoe.model.weights import load_model
from exactmoe.parity.bits import Array, digest
from exactmoe.parity.load import reference_weights
from exactmoe.parity.reference.kv_cache import KVCache as ReferenceCache
from exactmoe.parity.reference.traced import forward_traced as reference_traced

SHIPPED = Path(__file__).resolve().parents[2] / "model" / "tiny" / "qwen3-moe-tiny.gguf"
TOKENS = [3, 141, 59]


def shape(name: str, c: Config, tokens: int) -> tuple[int, ...]:
    """The shape of a stage after `tokens` from an empty cache, as the contract's table has it."""
    hidden, heads, routed = (c.hidden,), c.n_heads, (c.n_active,)
    tails: dict[str, tuple[int, ...]] = {
        "q": (heads * c.head_dim,), "k": (c.n_kv_heads * c.head_dim,), "v": (c.n_kv_heads * c.head_dim,),
        "q_post_rope": (heads, c.head_dim), "k_post_rope": (c.n_kv_heads, c.head_dim),
        "attn_scores": (heads, tokens), "attn_softmax": (heads, tokens), "attention": (heads * c.head_dim,),
        "moe_router_logits": (c.n_experts,), "moe_router": routed, "moe_router_indices": routed,
        "moe_expert_gate": (*routed, c.expert_width), "moe_expert_up": (*routed, c.expert_width),
        "moe_expert_swigl": (*routed, c.expert_width), "moe_expert_out": (*routed, c.hidden), "lm_head": (c.vocab,),
    }  # fmt: skip
    return (tokens, *tails.get(name, hidden))


def judge(stages: Mapping[Key, Array], config: Config, tokens: int) -> None:
    """Hold a traced pass to what both contracts say of its stages."""
    assert list(stages) == keys(config.n_layers)
    future = np.triu(np.ones((tokens, tokens), bool), 1)
    for (name, layer), values in stages.items():
        assert values.shape == shape(name, config, tokens), (name, layer)
        assert values.dtype == (np.int32 if name == "moe_router_indices" else np.float32), (name, layer)
        seen = values.transpose(0, 2, 1)[~future] if name == "attn_scores" else values
        assert seen.size > 0 and np.isfinite(seen).all(), (name, layer)
    for layer in range(config.n_layers):
        weight, expert = stages["moe_router", layer], stages["moe_router_indices", layer]
        off = [abs(sum(Fraction(float(w)) for w in row) - 1) for row in weight]
        assert len(off) == tokens and max(off) <= Fraction(1, 10**6), (layer, max(off))
        assert (np.diff(weight, axis=1) <= 0).all() and (weight > 0).all(), layer
        assert all(len(set(row)) == config.n_active for row in expert.tolist()), layer
        assert expert.min() >= 0 and expert.max() < config.n_experts, layer


@pytest.mark.parametrize("profile", ["q8_k", "q16_k"])
def test_every_stage_of_the_reference_is_finite_and_in_shape_and_weights_sum_to_one(profile: str) -> None:
    file = open_gguf(SHIPPED)
    weights = reference_weights(file)
    tokens = [(37 * i + 11) % weights.dims.vocab for i in range(32)]
    traced = reference_traced(weights, ReferenceCache.allocate(weights.dims, len(tokens)), tokens, profile)
    judge(traced.stages, Config.from_gguf(file), len(tokens))


def test_every_stage_of_the_kernels_is_finite_and_in_shape_and_weights_sum_to_one(model_file: Path) -> None:
    model = load_model(model_file, resolve_device("auto"))
    runs = []
    for _ in range(2):
        stages = forward_traced(model, KVCache.allocate(model, len(TOKENS)), TOKENS).stages
        runs.append({key: value.cpu().numpy() for key, value in stages.items()})
    judge(runs[0], model.config, len(TOKENS))
    first, again = (digest([(f"{name} {layer}", v) for (name, layer), v in run.items()]) for run in runs)
    assert first == again
