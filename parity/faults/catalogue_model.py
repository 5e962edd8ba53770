"""Plausible mistakes in a whole forward pass, each with the place where a bisection must find it.

Most are faults of one line planted in one layer of the reference; the rest are weights that are wrong in memory. Every
entry says the first stage that must be named, and the expert or block where the fault is of one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from exactmoe.kernels.errors import InvalidInput, require
from exactmoe.model.stages import WHOLE_MODEL, Key
from exactmoe.parity.bits import Array
from exactmoe.parity.faults.catalogue import FAULTS
from exactmoe.parity.faults.plant import Fault, planted
from exactmoe.parity.load import reference_weights
from exactmoe.parity.reference.weights import BLOCK_BYTES, LayerWeights, QuantMatrix, Weights
from exactmoe.parity.steps import ReferenceSteps, Wants

if TYPE_CHECKING:
    from exactmoe.model.gguf.reader import GGUFFile

MIDDLE, LAST, WHOLE = "middle", "last", "whole"
"""Where a fault is planted: a layer whose matrices are Q4_K, the last one, with Q6_K in it, or outside layers."""


class Spot(NamedTuple):
    """One block of 256 weights of one expert's matrix."""

    expert: int
    row: int
    block: int


Spoil = Callable[[LayerWeights, Spot], LayerWeights]
"""Weights of a layer with a mistake in them; at the spot, where the mistake is of one block."""


@dataclass(frozen=True)
class ModelFault:
    """A mistake in a forward pass, and what a bisection must say of it."""

    name: str
    stage: str  # the first wrong one
    where: str  # MIDDLE, LAST or WHOLE
    plant: Fault | Spoil
    expert: bool = False  # the fault is of one expert: the spot's, or the last expert for a planted line
    block: str | None = None  # the fault is of one block: "spot", or "last" of each row
    twins: bool = False  # two experts are given equal router rows first, on both sides, so that ties occur
    reason: str = ""

    def __str__(self) -> str:
        return self.name

    def layer(self, n_layers: int) -> int:
        """The layer it is planted in; WHOLE_MODEL outside layers."""
        return {MIDDLE: (n_layers - 1) // 2, LAST: n_layers - 1, WHOLE: WHOLE_MODEL}[self.where]


class Pair(NamedTuple):
    """The two sides of a bisection, and what it must find."""

    reference: ReferenceSteps
    suspect: ReferenceSteps
    key: Key
    spot: Spot  # of which expert and block are judged where the fault says so


def _line(name: str) -> Fault:
    return next(fault for fault in FAULTS if fault.name == name)


def _matrix(part: str, change: Callable[[Array, str, Spot], None]) -> Spoil:
    """Change the bytes of one expert matrix of a layer, in a copy."""

    def spoil(layer: LayerWeights, spot: Spot) -> LayerWeights:
        matrix: QuantMatrix = getattr(layer, part)
        data = matrix.data.copy()
        change(data, matrix.type_name, spot)
        changed: Any = {part: QuantMatrix(data, matrix.type_name)}
        return layer._replace(**changed)

    return spoil


def _at(data: Array, type_name: str, spot: Spot) -> Array:
    """View of the bytes of the spot's block; dense matrices have no expert."""
    size = BLOCK_BYTES[type_name]
    rows = data[spot.expert] if data.ndim == 3 else data
    block: Array = rows[spot.row, spot.block * size : (spot.block + 1) * size]
    return block


def _sub_scale(data: Array, type_name: str, spot: Spot) -> None:
    block = _at(data, type_name, spot)
    at = {"Q4_K": 4, "Q6_K": 192}[type_name]
    block[at : at + 4] ^= 9  # of the first four sub-blocks


def _not_a_number(data: Array, type_name: str, spot: Spot) -> None:
    at = {"Q4_K": 0, "Q6_K": 208}[type_name]
    _at(data, type_name, spot)[at : at + 2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)


def _codes(data: Array, type_name: str, spot: Spot) -> None:
    at = {"Q4_K": 16, "Q6_K": 0}[type_name]
    _at(data, type_name, spot)[at : at + 16] ^= 0x51


def _scale_zero(data: Array, type_name: str, spot: Spot) -> None:
    _at(data, type_name, spot)[0:4] = 0


def _experts_turned(layer: LayerWeights, _: Spot) -> LayerWeights:
    def turned(matrix: QuantMatrix) -> QuantMatrix:
        return QuantMatrix(np.roll(matrix.data, 1, axis=0), matrix.type_name)

    return layer._replace(gate=turned(layer.gate), up=turned(layer.up), down=turned(layer.down))


def _gate_is_up(layer: LayerWeights, _: Spot) -> LayerWeights:
    return layer._replace(gate=layer.up, up=layer.gate)


def _norms_exchanged(layer: LayerWeights, _: Spot) -> LayerWeights:
    return layer._replace(q_norm=layer.k_norm, k_norm=layer.q_norm)


_SEEN = "np.arange(S) <= np.arange(start, S)[:, None]"
_TURN = "    cos, sin = table.cos[start : start + T, None], table.sin[start : start + T, None]"
_ROUTED = "return Routing(np.where(bad, NAN, weight), expert)"

MODEL_FAULTS: tuple[ModelFault, ...] = (
    ModelFault("embedding-min-forgotten", "embedding", WHOLE, _line("embed-min-forgotten")),
    ModelFault("eps-outside-the-root", "attn_norm", MIDDLE, _line("norm-eps-outside-root")),
    ModelFault("norm-float-sum", "attn_norm", MIDDLE, _line("norm-float-sum")),
    ModelFault("norm-weight-first", "attn_norm", MIDDLE, _line("norm-weight-first")),
    ModelFault("final-norm-divides", "final_norm", WHOLE, _line("norm-divides")),
    ModelFault("activations-truncated", "q", MIDDLE, _line("quantise-truncates")),
    ModelFault("activation-scale-by-division", "q", MIDDLE, _line("quantise-scale-by-division")),
    ModelFault("scale-and-min-swapped", "q", MIDDLE, _line("matmul-scale-and-min-swapped")),
    ModelFault("scale-high-bits-lost", "q", MIDDLE, _line("matmul-scale-high-bits-lost")),
    ModelFault("nibbles-interleaved", "q", MIDDLE, _line("matmul-nibbles-interleaved")),
    ModelFault("min-of-next-sub-block", "q", MIDDLE, _line("matmul-min-of-next-sub-block")),
    ModelFault("k-tail-dropped", "q", MIDDLE, _line("matmul-tail-dropped"), block="last"),
    # Two blocks add up to the same bits in either order; the first stage with more is attn_out.
    ModelFault("sum-order-changed", "attn_out", MIDDLE, _line("matmul-folds-right-to-left")),
    ModelFault("fma-contraction", "q", MIDDLE, _line("matmul-contracted")),
    ModelFault("q6-high-bits-dropped", "v", LAST, _line("matmul-q6-high-bits-dropped")),
    ModelFault("q6-scales-unsigned", "v", LAST, _line("matmul-q6-scales-unsigned")),
    ModelFault("q6-read-as-q4", "v", LAST, Fault(
        "q6-read-as-q4", "matmul", "matmul",
        'if type_name == "Q4_K":\n        b = decode_q4_k(block)',
        "if True:\n        b = decode_q4_k(block[..., :144])",
        "one tensor's type is not looked at",
    )),
    ModelFault("lm-head-scales-distributed", "lm_head", WHOLE, _line("matmul-scale-distributed")),
    ModelFault("rope-unpaired-halves", "q_post_rope", MIDDLE, _line("rope-interleaved-pairs")),
    ModelFault("rope-next-position", "q_post_rope", MIDDLE, Fault(
        "rope-next-position-wrapped", "qk_norm_rope", "rope",
        "table.cos[start : start + T, None], table.sin[start : start + T, None]",
        "np.roll(table.cos, -1, 0)[start : start + T, None], np.roll(table.sin, -1, 0)[start : start + T, None]",
        "positions counted from one",
    )),
    ModelFault("rope-default-base", "q_post_rope", MIDDLE, Fault(
        "rope-default-base", "qk_norm_rope", "rope", _TURN,
        "    table = rope_table(P, C, 10000.0)\n" + _TURN,
        "the base most other models have, instead of the file's",
    )),
    ModelFault("qk-norm-missing", "q_post_rope", MIDDLE, Fault(
        "qk-norm-missing", "qk_norm_rope", "rope",
        "y = rms_norm(x.reshape(T, width // C, C), weight, eps)",
        "y = x.reshape(T, width // C, C)",
        "Qwen2 has none",
    )),
    ModelFault("qk-norms-exchanged", "q_post_rope", MIDDLE, _norms_exchanged, reason="two vectors of one shape"),
    ModelFault("stale-kv-row", "attn_scores", MIDDLE, Fault(
        "stale-kv-row", "append", "kv_cache",
        "kv.k[at], kv.k_scale[at] = quantize_15(k)",
        "kv.k[at], kv.k_scale[at] = quantize_15(np.concatenate([k[:1], k[:-1]]))",
        "the row of the token before is still there when attention reads",
    )),
    ModelFault("value-bit-lost", "attention", MIDDLE, _line("cache-value-bit-lost")),
    ModelFault("values-by-magnitude", "attention", MIDDLE, _line("cache-values-by-magnitude")),
    ModelFault("causal-mask-off-by-one", "attn_scores", MIDDLE, _line("attend-mask-off-by-one")),
    ModelFault("tail-rows-unmasked", "attn_scores", MIDDLE, Fault(
        "tail-rows-unmasked", "attend", "attention", _SEEN,
        "np.ones((T, S), bool)",
        "keys after the query's are in the cache already, and nothing hides them",
    )),
    ModelFault("wrong-kv-head", "attn_scores", MIDDLE, _line("attend-wrong-kv-head")),
    ModelFault("score-scales-joined", "attn_scores", MIDDLE, _line("scores-scales-joined")),
    ModelFault("softmax-float-denominator", "attn_softmax", MIDDLE, _line("attend-float-denominator")),
    ModelFault("approximate-exp", "attn_softmax", MIDDLE, _line("swiglu-library-exp")),
    ModelFault("value-scale-ignored", "attention", MIDDLE, _line("attend-value-scale-ignored")),
    ModelFault("attention-weights-truncated", "attention", MIDDLE, _line("attend-weights-truncated")),
    ModelFault("residual-in-half", "post_attn_residual", MIDDLE, _line("residual-in-half")),
    ModelFault("router-weights-truncated", "moe_router_logits", MIDDLE, _line("router-weights-truncated")),
    ModelFault("tie-to-the-larger-expert", "moe_router_indices", MIDDLE, _line("route-tie-to-larger-expert"),
               twins=True),
    ModelFault("weights-not-renormalised", "moe_router", MIDDLE, _line("route-not-renormalised")),
    ModelFault("uniform-weights", "moe_router", MIDDLE, Fault(
        "uniform-weights", "route", "router", _ROUTED,
        "return Routing(np.where(bad, NAN, np.full_like(weight, ONE / np.float32(top_k))), expert)",
        "the branch for a sum of zero is taken always",
    )),
    ModelFault("expert-id-plus-one", "moe_router_indices", MIDDLE, Fault(
        "expert-id-plus-one", "route", "router", _ROUTED,
        "return Routing(np.where(bad, NAN, weight), (expert + 1) % E)",
        "ids counted from one",
    )),
    ModelFault("ids-sorted", "moe_router", MIDDLE, _line("route-ids-sorted")),
    ModelFault("router-folds-from-the-worst", "moe_router", MIDDLE, _line("route-folds-from-the-worst")),
    ModelFault("wrong-activation-row", "moe_expert_gate", MIDDLE, _line("grouped-wrong-activation-row")),
    ModelFault("rows-left-sorted", "moe_expert_gate", MIDDLE, _line("grouped-rows-left-sorted")),
    ModelFault("scratch-not-written", "moe_expert_gate", MIDDLE, Fault(
        "scratch-not-written", "grouped_matmul", "matmul",
        "if len(rows):",
        "y[rows] = 1e30\n        if len(rows) and e < E - 1:",
        "the last expert's rows hold what the memory held before",
    ), expert=True),
    ModelFault("gate-and-up-swapped", "moe_expert_gate", MIDDLE, _gate_is_up, reason="two matrices of one shape"),
    ModelFault("experts-off-by-one", "moe_expert_gate", MIDDLE, _experts_turned, reason="a stride counted from one"),
    ModelFault("one-wrong-sub-scale", "moe_expert_up", MIDDLE, _matrix("up", _sub_scale), expert=True, block="spot",
               reason="one byte of one block read from the wrong place"),
    ModelFault("one-block-dropped", "moe_expert_gate", MIDDLE, _matrix("gate", _scale_zero), expert=True,
               block="spot", reason="a copy that ends early"),
    ModelFault("one-block-of-codes", "moe_expert_out", MIDDLE, _matrix("down", _codes), expert=True, block="spot",
               reason="sixteen bytes repacked wrongly"),
    ModelFault("nan-in-one-expert", "moe_expert_gate", MIDDLE, _matrix("gate", _not_a_number), expert=True,
               block="spot", reason="a scale of one block is not a number"),
    ModelFault("nan-in-one-q6-expert", "moe_expert_out", LAST, _matrix("down", _not_a_number), expert=True,
               block="spot", reason="a scale of one block is not a number"),
    ModelFault("one-wrong-q6-sub-scale", "moe_expert_out", LAST, _matrix("down", _sub_scale), expert=True,
               block="spot", reason="four scales of one block from the wrong place"),
    ModelFault("dense-codes-repacked-wrongly", "attn_out", MIDDLE, _matrix("attn_output", _codes), block="spot",
               reason="sixteen bytes of one row"),
    ModelFault("gate-and-up-exchanged-in-swiglu", "moe_expert_swigl", MIDDLE, _line("swiglu-gate-and-up-swapped")),
    ModelFault("swiglu-divides-once", "moe_expert_swigl", MIDDLE, _line("swiglu-divides-once")),
    ModelFault("top-expert-dropped", "moe_ffn_out", MIDDLE, Fault(
        "top-expert-dropped", "combine", "combine",
        "for k in range(A):",
        "for k in range(1, A):",
        "the first rank initialises the sum, and is overwritten",
    )),
    ModelFault("combine-from-the-last-rank", "moe_ffn_out", MIDDLE, _line("combine-from-the-last-rank")),
    ModelFault("combine-contracted", "moe_ffn_out", MIDDLE, _line("combine-contracted")),
)  # fmt: skip


def find(name: str) -> ModelFault:
    """The fault of that name. Raises InvalidInput with the names there are."""
    for fault in MODEL_FAULTS:
        if fault.name == name:
            return fault
    raise InvalidInput(f"there is no fault {name!r}; faults: {', '.join(f.name for f in MODEL_FAULTS)}")


class _Faulty(ReferenceSteps):
    """The reference with a line planted in one layer whenever it runs."""

    def __init__(self, weights: Weights, profile: str, fault: Fault, layer: int) -> None:
        super().__init__(weights, profile)
        self._fault, self._layer = fault, layer

    def trace(self, past: Sequence[int], tokens: Sequence[int], plan: Wants) -> dict[Key, Array]:
        with planted(self._fault, self._layer):
            return super().trace(past, tokens, plan)

    def step(self, key: Key, read: Mapping[Key, Array], past: Sequence[int], tokens: Sequence[int]) -> Array:
        with planted(self._fault, self._layer):
            return super().step(key, read, past, tokens)


@contextmanager
def prepared(
    fault: ModelFault,
    file: "GGUFFile",
    tokens: Sequence[int],
    profile: str,
    *,
    layer: int | None = None,
    control: bool = False,
) -> Iterator[Pair]:
    """Both sides of a bisection of `fault` over `tokens`; `control` plants everything but the mistake.

    It is planted in `layer` where that is given. Raises InvalidInput for a layer there is not, or that has no such
    stage."""
    weights = reference_weights(file)
    L = weights.dims.n_layers
    if layer is None:
        layer = fault.layer(L)
    require(
        layer == WHOLE_MODEL if fault.where == WHOLE else 0 <= layer < L,
        f"fault {fault.name} cannot be planted in layer {layer}: "
        + ("it belongs to no layer" if fault.where == WHOLE else f"layers are 0 to {L - 1}"),
    )
    if fault.twins:
        weights = _with_twins(weights, layer)
    reference = ReferenceSteps(weights, profile)
    key = (fault.stage, layer)
    if isinstance(fault.plant, Fault):
        line = fault.plant.control() if control else fault.plant
        last = Spot(weights.dims.n_experts - 1, -1, weights.dims.hidden // 256 - 1)
        yield Pair(reference, _Faulty(weights, profile, line, layer), key, last)
        return
    spot = _spot(reference, fault.stage, layer, tokens)
    spoilt = weights.layers[layer] if control else fault.plant(weights.layers[layer], spot)
    layers = (*weights.layers[:layer], spoilt, *weights.layers[layer + 1 :])
    yield Pair(reference, ReferenceSteps(weights._replace(layers=layers), profile), key, spot)


class _Routes:
    """A plan for the experts of one layer."""

    def __init__(self, layer: int) -> None:
        self._layer = layer

    def wants(self, stage: str, layer: int) -> bool:
        return stage == "moe_router_indices" and layer == self._layer


def _spot(reference: ReferenceSteps, stage: str, layer: int, tokens: Sequence[int]) -> Spot:
    """The last block of row 37 of the expert that the last token goes to second."""
    ids = reference.trace((), tokens, _Routes(layer))["moe_router_indices", layer]
    weights = reference.quant(stage, layer)
    blocks = weights.k // 256 if isinstance(weights, QuantMatrix) else 1
    return Spot(int(ids[-1, 1]), 37, blocks - 1)


def _with_twins(weights: Weights, layer: int) -> Weights:
    """Every router row of an odd expert becomes that of the expert before it, so that all probabilities tie."""
    of = weights.layers[layer]
    router = of.router.copy()
    router[1::2] = router[0 : len(router) // 2 * 2 : 2]
    layers = (*weights.layers[:layer], of._replace(router=router), *weights.layers[layer + 1 :])
    return weights._replace(layers=layers)
