"""The MoE layer: router, dispatch, experts, combine.      x [T, D] f32, normed -> y [T, D] f32"""

from typing import NamedTuple

import numpy as np

from exactmoe.parity.reference.combine import combine
from exactmoe.parity.reference.dispatch import dispatch
from exactmoe.parity.reference.matmul import grouped_matmul
from exactmoe.parity.reference.numerics import F32, I32, require
from exactmoe.parity.reference.quantize import quantize
from exactmoe.parity.reference.router import Routing, prepare_router, route, router_logits
from exactmoe.parity.reference.swiglu import swiglu
from exactmoe.parity.reference.weights import Dims, LayerWeights


class MoeOutput(NamedTuple):
    """The layer's output with the routing that led to it."""

    y: F32  # [T, D]
    weight: F32  # [T, A]
    expert: I32  # [T, A]


class MoeTrace(NamedTuple):
    """Every intermediate of the layer."""

    logits: F32  # [T, E]
    routing: Routing
    gate: F32  # [T, A, F]
    up: F32  # [T, A, F]
    swiglu: F32  # [T, A, F]
    out: F32  # [T, A, D]
    y: F32  # [T, D]


def moe_ffn(x: F32, layer: LayerWeights, dims: Dims, profile: str, routing: Routing | None = None) -> F32:
    """Output y [T, D] of the layer for normed rows x; `routing` replaces the router's choice."""
    return moe_ffn_traced(x, layer, dims, profile, routing).y


def moe_ffn_with_router(
    x: F32, layer: LayerWeights, dims: Dims, profile: str, routing: Routing | None = None
) -> MoeOutput:
    """As `moe_ffn`, with routing weights [T, A] and expert ids [T, A]."""
    trace = moe_ffn_traced(x, layer, dims, profile, routing)
    return MoeOutput(trace.y, *trace.routing)


def moe_ffn_traced(x: F32, layer: LayerWeights, dims: Dims, profile: str, routing: Routing | None = None) -> MoeTrace:
    """The layer with every intermediate named. Raises ValueError for arguments it cannot take."""
    _require_moe(x, layer, dims, routing)
    T, A = x.shape[0], dims.n_active
    logits = router_logits(x, prepare_router(layer.router))
    routing = routing or route(logits, A)
    rows = dispatch(routing.expert, dims.n_experts)
    u = quantize(x, profile)
    gate = grouped_matmul(layer.gate, u, rows, A)
    up = grouped_matmul(layer.up, u, rows, A)
    h = swiglu(gate, up)
    out = grouped_matmul(layer.down, quantize(h, profile), rows, 1)
    y = combine(out, routing.weight)
    return MoeTrace(logits, routing, *(a.reshape(T, A, -1) for a in (gate, up, h, out)), y)


def _require_moe(x: F32, layer: LayerWeights, dims: Dims, routing: Routing | None) -> None:
    D, E, F, A = dims.hidden, dims.n_experts, dims.expert_width, dims.n_active
    require(x.ndim == 2 and x.shape[1] == D, f"x must have shape [T, {D}], got {list(x.shape)}: wrong hidden width")
    require(x.shape[0] > 0, "x holds no token")
    require(x.dtype == np.float32, f"x must be f32, got {x.dtype}")
    require(layer.router.dtype == np.float32, f"router weight must be f32, got {layer.router.dtype}")
    require(layer.router.shape == (E, D), f"router weight must have shape [{E}, {D}], got {list(layer.router.shape)}")
    require(1 <= A <= E, f"top_k must be 1 to the {E} experts, got {A}")
    for name, w, n, k in (("gate", layer.gate, F, D), ("up", layer.up, F, D), ("down", layer.down, D, F)):
        require(
            w.data.ndim == 3 and w.data.shape[:2] == (E, n) and w.k == k,
            f"{name} experts of {E} x {n} x {k} {w.type_name} do not fit {list(w.data.shape)} bytes",
        )
    if routing is not None:
        low, high = int(routing.expert.min()), int(routing.expert.max())
        require(0 <= low and high < E, f"expert ids must be 0 to {E - 1}, got {low} to {high}")
