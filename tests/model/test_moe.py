"""The MoE layer: two forms of one body, the reference's bits, and refusals before anything runs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from exactmoe.kernels.errors import InvalidInput
from exactmoe.kernels.formats import Q4_K, Q6_K, QuantFormat
from exactmoe.kernels.router import Routing
from exactmoe.kernels.tensors import QuantMatrix, quant_matrix
from exactmoe.model.moe import MoeWeights, moe_ffn, moe_ffn_with_router, moe_weights
from exactmoe.parity.bits import compare
from exactmoe.parity.reference import moe as reference
from exactmoe.parity.reference import router as reference_router
from exactmoe.parity.reference import weights as reference_weights

D, F, E, A, T = 256, 256, 5, 2, 3


def blocks(rng: np.random.Generator, fmt: QuantFormat, n: int, k: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Random blocks [E, n, row_bytes] with small finite scales."""
    data = rng.integers(0, 256, (E, n, k // 256, fmt.block_bytes), dtype=np.uint8)
    for at in (0, 2) if fmt is Q4_K else (208,):
        scale = rng.uniform(1e-4, 1e-3, (E, n, k // 256, 1)).astype(np.float16)
        data[..., at : at + 2] = scale.view(np.uint8)
    return data.reshape(E, n, -1)


@pytest.fixture
def layer(rng: np.random.Generator) -> dict[str, Any]:
    """Raw weights of one small layer."""
    return {
        "router": rng.standard_normal((E, D)).astype(np.float32),
        "gate": blocks(rng, Q4_K, F, D),
        "up": blocks(rng, Q4_K, F, D),
        "down": blocks(rng, Q6_K, D, F),
    }


def matrix(data: Any, fmt: QuantFormat, device: torch.device) -> QuantMatrix:
    return quant_matrix(torch.from_numpy(data).to(device), fmt, "experts")


@pytest.fixture
def weights(layer: dict[str, Any], device: torch.device) -> MoeWeights:
    return moe_weights(
        torch.from_numpy(layer["router"]).to(device),
        matrix(layer["gate"], Q4_K, device),
        matrix(layer["up"], Q4_K, device),
        matrix(layer["down"], Q6_K, device),
    )


@pytest.fixture
def x(rng: np.random.Generator, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal((T, D)).astype(np.float32)).to(device)


def twin(layer: dict[str, Any]) -> tuple[reference_weights.LayerWeights, reference_weights.Dims]:
    """The same layer for the reference; only the fields the MoE layer reads are filled."""
    q = reference_weights.QuantMatrix
    dims = reference_weights.Dims(D, 1, 1, 1, D, E, A, F, 1, 1, np.float32(1e-6), 1e4)
    none = np.zeros(0, np.float32)
    unused = q(np.zeros((1, 144), np.uint8), "Q4_K")
    return reference_weights.LayerWeights(
        none, unused, unused, unused, none, none, unused, none,
        layer["router"], q(layer["gate"], "Q4_K"), q(layer["up"], "Q4_K"), q(layer["down"], "Q6_K"),
    ), dims  # fmt: skip


@pytest.mark.parametrize("profile", ["q8_k", "q16_k"])
def test_both_forms_give_the_reference_output_and_routing(
    layer: dict[str, Any], weights: MoeWeights, x: torch.Tensor, profile: str
) -> None:
    expected = reference.moe_ffn_with_router(x.cpu().numpy(), *twin(layer), profile)
    got = moe_ffn_with_router(x, weights, A, profile)
    for name in ("y", "weight", "expert"):
        verdict = compare(name, getattr(expected, name), getattr(got, name).cpu().numpy())
        assert verdict.equal, f"{name}: {verdict}"
    alone = compare("y", moe_ffn(x, weights, A, profile).cpu().numpy(), got.y.cpu().numpy())
    assert alone.equal, str(alone)


def test_a_given_routing_replaces_the_router_on_both_sides(
    layer: dict[str, Any], weights: MoeWeights, x: torch.Tensor, device: torch.device
) -> None:
    weight = np.full((T, A), 0.5, np.float32)
    expert = np.array([[4, 0], [0, 4], [2, 2]], np.int32)
    routing = Routing(torch.from_numpy(weight).to(device), torch.from_numpy(expert).to(device))
    got = moe_ffn(x, weights, A, "q8_k", routing)
    expected = reference.moe_ffn(x.cpu().numpy(), *twin(layer), "q8_k", reference_router.Routing(weight, expert))
    verdict = compare("y", expected, got.cpu().numpy())
    assert verdict.equal, str(verdict)
    free = compare("y", expected, moe_ffn(x, weights, A, "q8_k").cpu().numpy())
    assert not free.equal, "the given routing made no difference"


Form = Callable[..., object]


@pytest.mark.parametrize("form", [moe_ffn, moe_ffn_with_router])
def test_both_forms_refuse_the_same_arguments_in_the_same_words(
    form: Form, weights: MoeWeights, x: torch.Tensor, device: torch.device
) -> None:
    ids = torch.full((T, A), E, dtype=torch.int32, device=device)
    outside = Routing(torch.full((T, A), 0.5, device=device), ids)
    with pytest.raises(InvalidInput, match=r"x must have shape \[T, 256\], got \[3, 255\]: wrong hidden width"):
        form(x[:, :255], weights, A, "q8_k")
    with pytest.raises(InvalidInput, match="x holds no token"):
        form(x[:0], weights, A, "q8_k")
    with pytest.raises(InvalidInput, match=r"x must be f32, got torch\.float64"):
        form(x.double(), weights, A, "q8_k")
    with pytest.raises(InvalidInput, match="top_k must be 1 to the 5 experts, got 6"):
        form(x, weights, 6, "q8_k")
    with pytest.raises(InvalidInput, match="expert ids must be 0 to 4, got 5 to 5"):
        form(x, weights, A, "q8_k", outside)
    with pytest.raises(InvalidInput, match="activation profile must be one of q8_k, q16_k, got 'bf16'"):
        form(x, weights, A, "bf16")


def test_a_router_that_is_not_f32_and_bytes_that_do_not_fit_are_refused(
    layer: dict[str, Any], device: torch.device
) -> None:
    router = torch.from_numpy(layer["router"]).to(device)
    gate, down = matrix(layer["gate"], Q4_K, device), matrix(layer["down"], Q6_K, device)
    with pytest.raises(InvalidInput, match=r"router weight must be f32, got torch\.float16"):
        moe_weights(router.half(), gate, gate, down)
    with pytest.raises(InvalidInput, match="up experts must be 5 x 256 x 256 of Q4_K, got 4 x 256 x 256"):
        moe_weights(router, gate, matrix(layer["up"][:4].copy(), Q4_K, device), down)
    with pytest.raises(InvalidInput, match="down experts must be 5 x 256 x 256 of Q6_K, got"):
        moe_weights(router, gate, gate, matrix(layer["down"][:, :255].copy(), Q6_K, device))
    with pytest.raises(InvalidInput, match="a row of 143 bytes is not a whole number of Q4_K blocks of 144 bytes"):
        matrix(layer["gate"][..., :143].copy(), Q4_K, device)
