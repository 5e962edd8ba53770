"""The MoE layer: router, dispatch, experts, combine.      x [T, D] f32, normed -> y [T, D] f32

Two forms of one body: `moe_ffn` gives the output, `moe_ffn_with_router` the routing beside it."""

from typing import NamedTuple

from torch import Tensor

from exactmoe.kernels.combine import combine
from exactmoe.kernels.dispatch import dispatch
from exactmoe.kernels.errors import require
from exactmoe.kernels.matmul import grouped_matmul
from exactmoe.kernels.quantize import quantize
from exactmoe.kernels.router import RouterWeight, Routing, prepare_router, route, router_logits
from exactmoe.kernels.swiglu import swiglu_quantize
from exactmoe.kernels.tensors import QuantMatrix, require_f32, require_shape, slices


class MoeWeights(NamedTuple):
    """Weights of one MoE layer; made by `moe_weights`, which checks that they belong together."""

    router: RouterWeight
    gate: QuantMatrix  # [E, F, D]
    up: QuantMatrix  # [E, F, D]
    down: QuantMatrix  # [E, D, F]


class MoeOutput(NamedTuple):
    """The layer's output with the routing that led to it."""

    y: Tensor  # [T, D] f32
    weight: Tensor  # [T, A] f32, best first
    expert: Tensor  # [T, A] i32


def moe_weights(router: Tensor, gate: QuantMatrix, up: QuantMatrix, down: QuantMatrix) -> MoeWeights:
    """Check and join the weights of a layer: router F32 [E, D], experts quantised. Raises `InvalidInput`."""
    require_f32(router, "router weight", None, None)
    E, D = router.shape
    F = gate.n
    for name, w, n, k in (("gate", gate, F, D), ("up", up, F, D), ("down", down, D, F)):
        found = (*w.data.shape[:-1], w.k)
        require(
            found == (E, n, k) and w.n == n,
            f"{name} experts must be {E} x {n} x {k} of {w.format.name}, got {' x '.join(map(str, found))}",
        )
    return MoeWeights(prepare_router(router), gate, up, down)


def moe_ffn(x: Tensor, weights: MoeWeights, top_k: int, profile: str, routing: Routing | None = None) -> Tensor:
    """Output y [T, D] of the layer for normed rows x; bit-equal to parity.reference.moe.moe_ffn.

    `routing` replaces the router's choice; its ids are checked on the host. Raises `InvalidInput`."""
    return moe_ffn_with_router(x, weights, top_k, profile, routing).y


def moe_ffn_with_router(
    x: Tensor, weights: MoeWeights, top_k: int, profile: str, routing: Routing | None = None
) -> MoeOutput:
    """As `moe_ffn`, with the routing weights [T, A] and expert ids [T, A] beside the output."""
    require_moe(x, weights, top_k, profile, routing)
    routing = routing or route(router_logits(x, weights.router), top_k)
    rows = dispatch(routing.expert, weights.gate.data.shape[0])
    u = quantize(x, profile)
    gate = grouped_matmul(weights.gate, u, rows, top_k)  # [R, F]
    up = grouped_matmul(weights.up, u, rows, top_k)  # [R, F]
    out = grouped_matmul(weights.down, swiglu_quantize(gate, up, profile), rows, 1)  # [R, D]
    return MoeOutput(combine(out, routing.weight), *routing)


def require_moe(x: Tensor, weights: MoeWeights, top_k: int, profile: str, routing: Routing | None) -> None:
    """Refuse arguments the MoE layer cannot take; every form of it asks here first."""
    E, D = weights.router.q.shape
    require(x.ndim == 2 and x.shape[1] == D, f"x must have shape [T, {D}], got {list(x.shape)}: wrong hidden width")
    require(x.shape[0] > 0, "x holds no token")
    require_f32(x, "x", None, D)
    require(1 <= top_k <= E, f"top_k must be 1 to the {E} experts, got {top_k}")
    slices(profile)
    if routing is not None:
        require_f32(routing.weight, "routing weight", x.shape[0], top_k)
        require_shape(routing.expert, "expert ids", x.shape[0], top_k)
        low, high = int(routing.expert.min()), int(routing.expert.max())
        require(0 <= low and high < E, f"expert ids must be 0 to {E - 1}, got {low} to {high}")
