"""A trace in memory, as the comparison of traces needs it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from exactmoe.model import stages

T, A, E, D = 5, 2, 4, 6
N_LAYERS = 2


@dataclass(frozen=True)
class FakeManifest:
    model: str = "small.gguf"
    model_sha256: str = "ab" * 32
    numerics: str = "numerics-v1 1.0.0"
    activations: str = "q8_k"
    backend: str = "reference"
    device: str = "cpu"
    versions: Mapping[str, str] = field(default_factory=lambda: {"numpy": "2"})
    tokens: tuple[int, ...] = (3, 1, 4, 1, 5)
    n_layers: int = N_LAYERS


@dataclass
class FakeTrace:
    arrays: dict[tuple[str, int], np.ndarray]
    manifest: FakeManifest = field(default_factory=FakeManifest)
    positions: np.ndarray = field(default_factory=lambda: np.arange(T))
    kept: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    margins: dict[int, np.ndarray] = field(default_factory=dict)

    def keys(self) -> list[tuple[str, int]]:
        return list(self.arrays)

    def read(self, stage: str, layer: int) -> np.ndarray:
        return self.arrays[stage, layer]

    def rows(self, stage: str, layer: int) -> np.ndarray | None:
        return self.kept.get((stage, layer))

    def margin_ulp(self, layer: int) -> np.ndarray | None:
        return self.margins.get(layer)

    def but(self, **manifest: Any) -> "FakeTrace":
        """The same trace, stating something else of its run."""
        return replace(self, manifest=replace(self.manifest, **manifest))


def arrays() -> dict[tuple[str, int], np.ndarray]:
    made = {}
    for n, (stage, layer) in enumerate(stages.keys(N_LAYERS)):
        rng = np.random.default_rng(n)
        inner = {"moe_router_logits": (E,), "moe_router": (A,), "q_post_rope": (2, 3)}.get(stage, (D,))
        inner = (A, D) if stage.startswith("moe_expert") else inner
        made[stage, layer] = rng.standard_normal((T, *inner)).astype(np.float32)
        if stage == "moe_router_indices":
            made[stage, layer] = np.argsort(-made["moe_router_logits", layer], axis=1)[:, :A].astype(np.int32)
    return made


@pytest.fixture
def trace() -> Callable[[], FakeTrace]:
    """Makes traces of equal bits, each with its own arrays."""
    return lambda: FakeTrace(arrays())
