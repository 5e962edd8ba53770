"""The MoE layer: its two forms, and what it refuses."""

import numpy as np
import pytest

from exactmoe.parity.exact import dequantize
from exactmoe.parity.reference.moe import moe_ffn, moe_ffn_with_router
from exactmoe.parity.reference.quantize import PROFILES
from exactmoe.parity.reference.router import Routing, prepare_router, route, router_logits
from exactmoe.parity.reference.weights import QuantMatrix

FORMS = [moe_ffn, moe_ffn_with_router]


@pytest.fixture
def x(weights, rng):
    return rng.standard_normal((9, weights.dims.hidden)).astype(np.float32)


@pytest.mark.parametrize("profile", PROFILES)
def test_both_forms_give_the_same_output_and_one_the_routing_too(weights, x, profile, same):
    for layer in weights.layers:
        found = moe_ffn_with_router(x, layer, weights.dims, profile)
        same(moe_ffn(x, layer, weights.dims, profile), found.y)
        routing = route(router_logits(x, prepare_router(layer.router)), weights.dims.n_active)
        same(found.weight, routing.weight)
        same(found.expert, routing.expert)


@pytest.mark.parametrize(("profile", "bound"), [("q8_k", 0.03), ("q16_k", 3e-4)])
def test_the_layer_is_near_float64_with_the_same_experts(weights, x, profile, bound):
    layer = weights.layers[1]
    y, weight, expert = moe_ffn_with_router(x, layer, weights.dims, profile)
    exact = np.zeros(y.shape)
    for t, ids in enumerate(expert):
        for w, e in zip(weight[t], ids, strict=True):
            gate, up, down = (dequantize(m.data[e], m.type_name) for m in (layer.gate, layer.up, layer.down))
            g = gate @ x[t]
            exact[t] += w * (down @ (g / (1 + np.exp(-g)) * (up @ x[t])))
    error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
    assert 1e-7 < error < bound


@pytest.mark.parametrize("profile", PROFILES)
def test_one_token_alone_equals_itself_in_a_batch(weights, x, profile, same):
    whole = moe_ffn_with_router(x, weights.layers[0], weights.dims, profile)
    for t in (0, 4, 8):
        alone = moe_ffn_with_router(x[t : t + 1], weights.layers[0], weights.dims, profile)
        for left, right in zip(alone, whole, strict=True):
            same(left, right[t : t + 1])


def test_a_routing_that_is_given_replaces_the_routers(weights, x, same):
    layer = weights.layers[0]
    own = moe_ffn_with_router(x, layer, weights.dims, "q8_k")
    same(moe_ffn(x, layer, weights.dims, "q8_k", Routing(own.weight, own.expert)), own.y)
    other = Routing(own.weight, ((own.expert + 1) % weights.dims.n_experts).astype(np.int32))
    assert (moe_ffn(x, layer, weights.dims, "q8_k", other) != own.y).any()


def test_a_bad_row_is_nan_and_no_other(weights, x, same):
    good = moe_ffn(x, weights.layers[0], weights.dims, "q8_k")
    x[2, 5] = np.nan
    found = moe_ffn(x, weights.layers[0], weights.dims, "q8_k")
    assert np.isnan(found[2]).all()
    same(np.delete(found, 2, axis=0), np.delete(good, 2, axis=0))


def shorter(matrix):
    return QuantMatrix(matrix.data[..., :-1], matrix.type_name)


def fewer(matrix):
    return QuantMatrix(matrix.data[:-1], matrix.type_name)


WRONG = [
    ("wrong hidden width", lambda a: a | {"x": a["x"][:, :-1]}),
    ("wrong hidden width", lambda a: a | {"x": a["x"][0]}),
    ("x holds no token", lambda a: a | {"x": a["x"][:0]}),
    ("x must be f32, got float64", lambda a: a | {"x": a["x"].astype(np.float64)}),
    ("activation profile must be one of q8_k, q16_k, got 'q4_k'", lambda a: a | {"profile": "q4_k"}),
    (
        "router weight must be f32, got float16",
        lambda a: a | {"layer": a["layer"]._replace(router=a["layer"].router.astype(np.float16))},
    ),
    (
        r"router weight must have shape \[6, 512\], got \[5, 512\]",
        lambda a: a | {"layer": a["layer"]._replace(router=a["layer"].router[:-1])},
    ),
    ("top_k must be 1 to the 6 experts, got 7", lambda a: a | {"dims": a["dims"]._replace(n_active=7)}),
    ("top_k must be 1 to the 6 experts, got 0", lambda a: a | {"dims": a["dims"]._replace(n_active=0)}),
    *(
        (
            said,
            lambda a, part=part, cut=cut: a | {"layer": a["layer"]._replace(**{part: cut(getattr(a["layer"], part))})},
        )
        for part in ("gate", "up", "down")
        for said, cut in (("is no whole number of Q4_K blocks", shorter), (f"{part} experts of 6 x", fewer))
    ),
    *(
        (
            "expert ids must be 0 to 5, got",
            lambda a, bad=bad: a | {"routing": Routing(np.ones((9, 2), np.float32), np.full((9, 2), bad, np.int32))},
        )
        for bad in (-1, 6)
    ),
    (
        r"routing must have shape \[9, 2\]",
        lambda a: a | {"routing": Routing(np.ones((9, 3), np.float32), np.zeros((9, 3), np.int32))},
    ),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize(("said", "change"), WRONG, ids=[f"{i}" for i in range(len(WRONG))])
def test_what_the_layer_cannot_take_is_refused_in_words_before_any_arithmetic(
    weights, x, form, said, change, monkeypatch
):
    right = {"x": x, "layer": weights.layers[0], "dims": weights.dims, "profile": "q8_k", "routing": None}
    form(**right)
    for name in ("prepare_router", "router_logits", "route", "dispatch", "quantize"):
        monkeypatch.setattr(f"exactmoe.parity.reference.moe.{name}", lambda *_: pytest.fail("too late"))
    with pytest.raises(ValueError, match=said):
        form(**change(right))
