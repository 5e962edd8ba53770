"""The MoE layer as one benchmark, from the router to the combine, through the very functions that production calls.

MoeStep     one token: model.decode.moe_step, norm and residual included, against parity.reference.decode
MoeChunk    T tokens: model.moe.moe_ffn on normed rows, against parity.reference.moe"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from exactmoe.parity.cases import EPS, F32, Case, Generator, blocks, floats, tensors
from exactmoe.parity.reference.matvec import Norm
from exactmoe.parity.reference.router import prepare_router
from exactmoe.parity.reference.weights import QuantMatrix

if TYPE_CHECKING:
    import torch


class _Dims(NamedTuple):
    """The dims of parity.reference.weights that the layer has."""

    hidden: int
    n_experts: int
    n_active: int
    expert_width: int


class _Weights(NamedTuple):
    """The weights of a reference layer that the MoE layer reads."""

    router: F32  # [E, D]
    gate: QuantMatrix  # [E, F, D]
    up: QuantMatrix  # [E, F, D]
    down: QuantMatrix  # [E, D, F]


@dataclass(frozen=True)
class MoeLayer(Case):
    """Sizes of a layer; gate and up of `format`, down of `second`."""

    T: int
    E: int
    A: int
    F: int
    D: int
    format: str
    second: str
    profile: str

    def router(self, rng: Generator) -> F32:
        """Weights whose logits lie near enough to each other for every chosen expert to count."""
        return floats(rng, (self.E, self.D), "normal") / np.float32(np.sqrt(self.D))

    def experts(self, rng: Generator) -> tuple[QuantMatrix, QuantMatrix, QuantMatrix]:
        """gate, up and down."""
        gate, up = (blocks(rng, (self.E, self.F), self.D, self.format, "normal") for _ in range(2))
        return gate, up, blocks(rng, (self.E, self.D), self.F, self.second, "normal")


@dataclass(frozen=True)
class MoeStep(MoeLayer):
    """A decode step's; T is 1."""

    package, module, op = "model", "decode", "moe_step"
    packed = True

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        norm = Norm(floats(rng, (self.D,), "normal"), np.float32(EPS))
        router = prepare_router(self.router(rng))
        return floats(rng, (1, self.D), "normal")[0], norm, router, *self.experts(rng), self.A, self.profile


@dataclass(frozen=True)
class MoeChunk(MoeLayer):
    """A chunk's."""

    package, module, op = "model", "moe", "moe_ffn"

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        weights = _Weights(self.router(rng), *self.experts(rng))
        dims = _Dims(self.D, self.E, self.A, self.F)
        return floats(rng, (self.T, self.D), "normal"), weights, dims, self.profile

    def on(self, device: "torch.device", arguments: tuple[Any, ...] | None = None) -> tuple[Any, ...]:
        """As `moe_ffn` of the model takes them: the router in fixed point, once, as at load."""
        from exactmoe.model.moe import moe_weights

        x, weights, dims, profile = self.arguments() if arguments is None else arguments
        x, *parts = tensors((x, *weights), device)
        return x, moe_weights(*parts), dims.n_active, profile
