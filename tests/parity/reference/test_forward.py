"""The forward pass in any chunks, and its traced form."""

import numpy as np
import pytest

from exactmoe.model import stages
from exactmoe.parity.reference.attention import attend, attention_scores, attention_softmax
from exactmoe.parity.reference.combine import combine
from exactmoe.parity.reference.embedding import embed
from exactmoe.parity.reference.forward import forward
from exactmoe.parity.reference.kv_cache import KVCache
from exactmoe.parity.reference.matmul import matmul
from exactmoe.parity.reference.norm import rms_norm
from exactmoe.parity.reference.quantize import PROFILES, quantize, quantize_15
from exactmoe.parity.reference.rope import qk_norm_rope
from exactmoe.parity.reference.router import prepare_router, route, router_logits
from exactmoe.parity.reference.swiglu import swiglu
from exactmoe.parity.reference.traced import forward_traced
from exactmoe.parity.reference.weights import QuantMatrix

ARRAYS = ("k", "k_scale", "v", "v_scale")
TOKENS = [5, 95, 0, 17, 17, 42, 61, 2, 88, 30, 7, 7, 51]


@pytest.fixture(params=PROFILES)
def profile(request):
    return request.param


def run(weights, profile, chunks, all_positions=True):
    """Logits and the filled cache after TOKENS in chunks of these sizes."""
    cache = KVCache.allocate(weights.dims, len(TOKENS) + 2)
    logits, at = [], 0
    for size in chunks:
        logits.append(forward(weights, cache, TOKENS[at : at + size], profile, all_positions))
        at += size
    assert at == cache.length == len(TOKENS)
    return logits, cache


@pytest.mark.parametrize("chunks", [[1] * 13, [7, 6], [4, 4, 4, 1], [12, 1]], ids=str)
def test_any_chunks_give_the_same_logits_and_the_same_cache(weights, profile, chunks, same):
    whole, cache = run(weights, profile, [13])
    parts, cut_cache = run(weights, profile, chunks)
    same(np.concatenate(parts), whole[0])
    for name in ARRAYS:
        same(getattr(cut_cache, name), getattr(cache, name))


def test_the_last_position_is_that_of_all(weights, profile, same):
    whole, _ = run(weights, profile, [13])
    last, _ = run(weights, profile, [13], all_positions=False)
    assert last[0].shape == (weights.dims.vocab,)
    same(last[0], whole[0][-1])


def test_the_same_run_again_gives_the_same_bits(weights, profile, same):
    same(run(weights, profile, [13])[0][0], run(weights, profile, [13])[0][0])


def test_the_profiles_differ_but_not_by_much(weights):
    q8, q16 = (run(weights, profile, [13])[0][0].astype(np.float64) for profile in PROFILES)
    error = np.linalg.norm(q8 - q16) / np.linalg.norm(q16)
    assert 1e-5 < error < 0.2


@pytest.mark.parametrize("chunks", [[13], [7, 6]], ids=str)
def test_the_traced_pass_has_the_bits_of_the_production_pass(weights, profile, chunks, same):
    logits, cache = run(weights, profile, chunks)
    traced_cache, at = KVCache.allocate(weights.dims, cache.capacity), 0
    for size, expected in zip(chunks, logits, strict=True):
        traced = forward_traced(weights, traced_cache, TOKENS[at : at + size], profile)
        same(traced.logits, expected)
        at += size
    assert traced_cache.length == cache.length
    for name in ARRAYS:
        same(getattr(traced_cache, name), getattr(cache, name))


def test_every_stage_is_named_once_and_has_its_shape(weights, profile):
    d, start, T = weights.dims, 4, 9
    cache = KVCache.allocate(d, 20)
    forward(weights, cache, TOKENS[:start], profile)
    found = forward_traced(weights, cache, TOKENS[start:], profile).stages
    assert list(found) == stages.keys(d.n_layers)
    H, G, C, A, F, D = d.n_heads, d.n_kv_heads, d.head_dim, d.n_active, d.expert_width, d.hidden
    shapes = {
        "embedding": (D,), "attn_norm": (D,), "q": (H * C,), "k": (G * C,), "v": (G * C,), "q_post_rope": (H, C),
        "k_post_rope": (G, C), "attn_scores": (H, start + T), "attn_softmax": (H, start + T), "attention": (H * C,),
        "attn_out": (D,), "post_attn_residual": (D,), "ffn_norm": (D,), "moe_router_logits": (d.n_experts,),
        "moe_router": (A,), "moe_router_indices": (A,), "moe_expert_gate": (A, F), "moe_expert_up": (A, F),
        "moe_expert_swigl": (A, F), "moe_expert_out": (A, D), "moe_ffn_out": (D,), "post_ffn_residual": (D,),
        "final_norm": (D,), "lm_head": (d.vocab,),
    }  # fmt: skip
    for (name, layer), value in found.items():
        assert value.shape == (T, *shapes[name]), (name, layer)
        assert value.dtype == (np.int32 if name == "moe_router_indices" else np.float32), (name, layer)


def test_every_stage_follows_from_those_before_it(weights, profile, same):
    d, eps = weights.dims, weights.dims.eps
    cache = KVCache.allocate(d, 13)
    found = forward_traced(weights, cache, TOKENS, profile).stages
    same(found["embedding", -1], embed(weights.embedding, np.array(TOKENS, np.int32)))
    x = found["embedding", -1]
    for i, layer in enumerate(weights.layers):
        at = {name: value for (name, j), value in found.items() if j == i}
        same(at["attn_norm"], rms_norm(x, layer.attn_norm, eps))
        n = quantize(at["attn_norm"], profile)
        for name in ("q", "k", "v"):
            same(at[name], matmul(getattr(layer, name), n))
        same(at["q_post_rope"], qk_norm_rope(at["q"], layer.q_norm, eps, cache.rope, 0))
        same(at["k_post_rope"], qk_norm_rope(at["k"], layer.k_norm, eps, cache.rope, 0))
        q, kv = at["q_post_rope"], cache.layer(i)
        same(kv.k, quantize_15(at["k_post_rope"]).v.astype(np.int16))
        same(at["attn_scores"], attention_scores(q, kv, 0))
        same(at["attn_softmax"], attention_softmax(q, kv, 0))
        same(at["attention"], attend(q, kv, 0))
        same(at["attn_out"], matmul(layer.attn_output, quantize(at["attention"], profile)))
        same(at["post_attn_residual"], x + at["attn_out"])
        same(at["ffn_norm"], rms_norm(at["post_attn_residual"], layer.ffn_norm, eps))
        same(at["moe_router_logits"], router_logits(at["ffn_norm"], prepare_router(layer.router)))
        weight, expert = route(at["moe_router_logits"], d.n_active)
        same(at["moe_router"], weight)
        same(at["moe_router_indices"], expert)
        for t, k in np.ndindex(*expert.shape):
            gate, up, down = (
                QuantMatrix(m.data[expert[t, k]], m.type_name) for m in (layer.gate, layer.up, layer.down)
            )
            u, h = quantize(at["ffn_norm"][t : t + 1], profile), at["moe_expert_swigl"][t : t + 1, k]
            same(at["moe_expert_gate"][t : t + 1, k], matmul(gate, u))
            same(at["moe_expert_up"][t : t + 1, k], matmul(up, u))
            same(h, swiglu(at["moe_expert_gate"][t : t + 1, k], at["moe_expert_up"][t : t + 1, k]))
            same(at["moe_expert_out"][t : t + 1, k], matmul(down, quantize(h, profile)))
        same(at["moe_ffn_out"], combine(at["moe_expert_out"].reshape(-1, d.hidden), weight))
        x = at["post_attn_residual"] + at["moe_ffn_out"]
        same(at["post_ffn_residual"], x)
    same(found["final_norm", -1], rms_norm(x, weights.output_norm, eps))
    same(found["lm_head", -1], matmul(weights.output, quantize(found["final_norm", -1], profile)))


@pytest.mark.parametrize("run_pass", [forward, forward_traced], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([], "no token to run"),
        ([0, 96], "token id 96 is outside the vocabulary of 96"),
        ([-1], "token id -1 is outside the vocabulary of 96"),
        ([1] * 5, "5 tokens do not fit the cache: 4 of 6 positions left"),
    ],
)
def test_tokens_that_cannot_be_run_are_refused_and_leave_the_cache_alone(weights, run_pass, tokens, said, same):
    cache = KVCache.allocate(weights.dims, 6)
    forward(weights, cache, [1, 2], "q8_k")
    before = cache.k.copy()
    with pytest.raises(ValueError, match=said):
        run_pass(weights, cache, tokens, "q8_k")
    assert cache.length == 2
    same(cache.k, before)
