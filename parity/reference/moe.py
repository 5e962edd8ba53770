"""The MoE layer: router, dispatch, experts, combine.      x [T, D] f32, normed -> y [T, D] f32

Two forms of one body: `moe_ffn` gives the output, `moe_ffn_with_router` the routing beside it."""

from typing import NamedTuple

import numpy as np

from exactmoe.parity.reference.combine import combine
from exactmoe.parity.reference.dispatch import dispatch, require_experts
from exactmoe.parity.reference.matmul import grouped_matmul
from exactmoe.parity.reference.numerics import F32, I32, require
from exactmoe.parity.reference.quantize import quantize, require_profile
from exactmoe.parity.reference.router import Routing, prepare_router, route, router_logits
from exactmoe.parity.reference.swiglu import swiglu_quantize
from exactmoe.parity.reference.weights import Dims, LayerWeights


class MoeOutput(NamedTuple):
    """The layer's output with the routing that led to it."""

    y: F32  # [T, D]
    weight: F32  # [T, A], best first
    expert: I32  # [T, A]


def moe_ffn(x: F32, layer: LayerWeights, dims: Dims, profile: str, routing: Routing | None = None) -> F32:
    """Output y [T, D] of the layer for normed rows x; `routing` replaces the router's choice. Raises ValueError."""
    return moe_ffn_with_router(x, layer, dims, profile, routing).y


def moe_ffn_with_router(
    x: F32, layer: LayerWeights, dims: Dims, profile: str, routing: Routing | None = None
) -> MoeOutput:
    """As `moe_ffn`, with the routing weights [T, A] and expert ids [T, A] beside the output."""
    require_moe(x, layer, dims, profile, routing)
    routing = routing or route(router_logits(x, prepare_router(layer.router)), dims.n_active)
    rows = dispatch(routing.expert, dims.n_experts)
    u = quantize(x, profile)
    gate = grouped_matmul(layer.gate, u, rows, dims.n_active)  # [R, F]
    up = grouped_matmul(layer.up, u, rows, dims.n_active)  # [R, F]
    out = grouped_matmul(layer.down, swiglu_quantize(gate, up, profile), rows, 1)  # [R, D]
    return MoeOutput(combine(out, routing.weight), *routing)


def require_moe(x: F32, layer: LayerWeights, dims: Dims, profile: str, routing: Routing | None = None) -> None:
    """Refuse arguments the MoE layer cannot take; every form of it asks here first."""
    D, E, F, A = dims.hidden, dims.n_experts, dims.expert_width, dims.n_active
    require(x.ndim == 2 and x.shape[1] == D, f"x must have shape [T, {D}], got {list(x.shape)}: wrong hidden width")
    require(x.shape[0] > 0, "x holds no token")
    require(x.dtype == np.float32, f"x must be f32, got {x.dtype}")
    require_profile(profile)
    router = layer.router
    require(router.dtype == np.float32, f"router weight must be f32, got {router.dtype}")
    require(router.shape == (E, D), f"router weight must have shape [{E}, {D}], got {list(router.shape)}")
    require(1 <= A <= E, f"top_k must be 1 to the {E} experts, got {A}")
    for name, w, n, k in (("gate", layer.gate, F, D), ("up", layer.up, F, D), ("down", layer.down, D, F)):
        require(
            w.data.shape[:-1] == (E, n) and w.k == k,
            f"{name} experts of {E} x {n} x {k} {w.type_name} do not fit bytes of shape {list(w.data.shape)}",
        )
    if routing is not None:
        shapes = routing.weight.shape, routing.expert.shape
        require(shapes == ((len(x), A),) * 2, f"routing must have shape [{len(x)}, {A}], got {shapes}")
        require_experts(routing.expert, E)
