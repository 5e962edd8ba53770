"""What the reference's tests share: rounding to binary32 by other means, a bitwise comparison, a small random model."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from exactmoe.parity.bits import compare
from exactmoe.parity.reference.weights import BLOCK_BYTES, Dims, LayerWeights, QuantMatrix, Weights

DIMS = Dims(
    hidden=512,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=128,
    n_experts=6,
    n_active=2,
    expert_width=256,
    vocab=96,
    context_length=40,
    eps=np.float32(1e-6),
    rope_base=1e6,
)


@pytest.fixture
def same() -> Callable[[Any, Any], None]:
    """Assert that two arrays are equal bit for bit, in shape and dtype too, and not empty."""

    def judge(left: Any, right: Any) -> None:
        found = compare("arrays", np.asarray(left), np.asarray(right))
        assert found.equal, str(found)

    return judge


def random_matrix(rng: np.random.Generator, shape: tuple[int, ...], k: int, type_name: str) -> QuantMatrix:
    """Blocks with every bit in use and factors that keep the products of order one."""
    raw = rng.integers(0, 256, (*shape, k // 256, BLOCK_BYTES[type_name]), dtype=np.uint8)
    at = slice(0, 4) if type_name == "Q4_K" else slice(208, 210)
    size = 1e-4 if type_name == "Q4_K" else 1e-5
    factors = rng.uniform(0.2, 1, (*shape, k // 256, (at.stop - at.start) // 2)) * size
    raw[..., at] = factors.astype(np.float16).view(np.uint8)
    return QuantMatrix(raw.reshape(*shape, -1), type_name)


@pytest.fixture(scope="session")
def matrix() -> Callable[..., QuantMatrix]:
    """`random_matrix`, for test modules."""
    return random_matrix


@pytest.fixture(scope="session")
def weights() -> Weights:
    """A small model of random weights, both formats among them."""
    rng = np.random.default_rng(20)
    D, C, E, F = DIMS.hidden, DIMS.head_dim, DIMS.n_experts, DIMS.expert_width
    Q, KV = DIMS.n_heads * C, DIMS.n_kv_heads * C

    def norm(width: int) -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(width)).astype(np.float32)

    def layer(i: int) -> LayerWeights:
        mixed = "Q6_K" if i == 1 else "Q4_K"
        return LayerWeights(
            attn_norm=norm(D),
            q=random_matrix(rng, (Q,), D, "Q4_K"),
            k=random_matrix(rng, (KV,), D, "Q4_K"),
            v=random_matrix(rng, (KV,), D, mixed),
            q_norm=norm(C),
            k_norm=norm(C),
            attn_output=random_matrix(rng, (D,), Q, "Q4_K"),
            ffn_norm=norm(D),
            router=(rng.standard_normal((E, D)) * 0.05).astype(np.float32),
            gate=random_matrix(rng, (E, F), D, "Q4_K"),
            up=random_matrix(rng, (E, F), D, "Q4_K"),
            down=random_matrix(rng, (E, D), F, mixed),
        )

    return Weights(
        DIMS,
        embedding=random_matrix(rng, (DIMS.vocab,), D, "Q4_K"),
        layers=tuple(layer(i) for i in range(DIMS.n_layers)),
        output_norm=norm(D),
        output=random_matrix(rng, (DIMS.vocab,), D, "Q6_K"),
    )
