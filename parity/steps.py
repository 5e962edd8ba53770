"""One stage at a time: any stage of a forward pass made from given inputs, by the reference or by the kernels.

Both sides name their ops alike, so one chain serves both. Ops are looked up in the module of the traced forward pass
when they are called: a fault planted there, or an op of a user put there, acts here as it does in the whole pass."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from exactmoe.kernels.errors import require
from exactmoe.model.stages import WHOLE_MODEL, Key
from exactmoe.parity.bits import Array
from exactmoe.parity.faults.plant import in_layer
from exactmoe.parity.graph import NODES, inputs

if TYPE_CHECKING:
    from exactmoe.model.gguf.reader import GGUFFile
    from exactmoe.model.weights import Model
    from exactmoe.parity.reference.weights import Weights


class Wants(Protocol):
    """Which stages a traced pass is to keep."""

    def wants(self, stage: str, layer: int) -> bool:
        """Whether to keep `stage` of `layer`."""
        ...


class Hashed(NamedTuple):
    """A stage by its hashes."""

    dtype: str  # numpy's name
    shape: tuple[int, ...]
    tokens: Array  # [T] i64


class Steps(Protocol):
    """One implementation of the forward pass, whole or stage by stage; numpy in, numpy out."""

    n_layers: int
    n_active: int

    def production(self, tokens: Sequence[int]) -> Array:
        """Logits f32 [V] of the last of `tokens`, by the production path."""
        ...

    def trace(self, past: Sequence[int], tokens: Sequence[int], plan: Wants) -> dict[Key, Array]:
        """Run `past`, then `tokens` traced; the stages of the latter that `plan` wants."""
        ...

    def digests(self, past: Sequence[int], tokens: Sequence[int], plan: Wants) -> dict[Key, Hashed]:
        """As `trace`, with a hash of each token's row in place of the values, computed where the values lie."""
        ...

    def step(self, key: Key, read: Mapping[Key, Array], past: Sequence[int], tokens: Sequence[int]) -> Array:
        """Stage `key` from the stages it reads; `past` are the tokens whose keys and values lie in the cache."""
        ...

    def resident(self, tensor: str) -> Array | None:
        """The bytes of a quantised tensor as this side holds them, [..., N, row bytes]; None for one it does not."""
        ...


class _Chain:
    """What both sides share: the chain itself."""

    def __init__(self, module: ModuleType, n_layers: int, n_active: int, n_experts: int, profile: str) -> None:
        self.ops: Any = module
        self.n_layers, self.n_active, self._experts, self._profile = n_layers, n_active, n_experts, profile
        self._caches: dict[tuple[int, ...], Any] = {}

    def trace(self, past: Sequence[int], tokens: Sequence[int], plan: Wants) -> dict[Key, Array]:
        return {key: self.array(value) for key, value in self._stages(past, tokens, plan).items()}

    def digests(self, past: Sequence[int], tokens: Sequence[int], plan: Wants) -> dict[Key, Hashed]:
        return {key: self.hashed(value) for key, value in self._stages(past, tokens, plan).items()}

    def _stages(self, past: Sequence[int], tokens: Sequence[int], plan: Wants) -> dict[Key, Any]:
        cache = self.new_cache(len(past) + len(tokens))
        if past:
            self.forward(cache, past, _Nothing())
        return self.forward(cache, tokens, plan)

    def step(self, key: Key, read: Mapping[Key, Array], past: Sequence[int], tokens: Sequence[int]) -> Array:
        stage, layer = key
        given = [self.value(read[k]) for k in inputs(stage, layer, self.n_layers)]
        with in_layer(layer):
            return self.array(self._make(stage, layer, given, past, tokens))

    def _make(self, stage: str, layer: int, given: list[Any], past: Sequence[int], tokens: Sequence[int]) -> Any:
        o, op = self.ops, NODES[stage].op
        if op == "embed":
            return o.embed(self.quant(stage, layer), self.value(np.array(tokens, np.int32)))
        if op == "rms_norm":
            return o.rms_norm(given[0], self.floats(stage, layer), self.eps())
        if op == "matmul":
            return o.matmul(self.quant(stage, layer), o.quantize(given[0], self._profile))
        if op == "qk_norm_rope":
            return o.qk_norm_rope(
                given[0], self.floats(stage, layer), self.eps(), self.cache(past, tokens).rope, len(past)
            )
        if op in ("attention_scores", "attention_softmax", "attend"):
            q, k, v = given
            kv = self.cache(past, tokens).layer(layer)
            o.append(k, v, kv, len(past))
            return getattr(o, op)(q, kv, len(past))
        if op == "router_logits":
            return o.router_logits(given[0], self.router(layer))
        if op == "route":
            routing = o.route(given[0], self.n_active)
            return routing.weight if stage == "moe_router" else routing.expert
        if op == "grouped_matmul":
            return self._experts_matmul(stage, layer, *given)
        if op == "combine":
            out, weight = given
            return o.combine(out.reshape(-1, out.shape[-1]), weight)
        if op == "swiglu":
            gate, up = (x.reshape(-1, x.shape[-1]) for x in given)
            return o.swiglu(gate, up).reshape(given[0].shape)
        return o.add(*given)

    def _experts_matmul(self, stage: str, layer: int, x: Any, expert: Any) -> Any:
        o, T = self.ops, expert.shape[0]
        rows = o.dispatch(expert, self._experts)
        each = 1 if stage == "moe_expert_out" else self.n_active
        flat = x.reshape(-1, x.shape[-1])
        y = o.grouped_matmul(self.quant(stage, layer), o.quantize(flat, self._profile), rows, each)
        return y.reshape(T, self.n_active, -1)

    def cache(self, past: Sequence[int], tokens: Sequence[int]) -> Any:
        """A cache that holds `past`, with room for `tokens`; kept, as only positions after `past` are written."""
        key = (len(tokens), *past)
        if key not in self._caches:
            cache = self.new_cache(len(past) + len(tokens))
            if past:
                self.forward(cache, past, _Nothing())
            self._caches = {key: cache}
        return self._caches[key]

    def new_cache(self, capacity: int) -> Any:
        raise NotImplementedError

    def forward(self, cache: Any, tokens: Sequence[int], plan: Wants) -> dict[Key, Any]:
        raise NotImplementedError

    def value(self, array: Array) -> Any:
        raise NotImplementedError

    def array(self, value: Any) -> Array:
        raise NotImplementedError

    def hashed(self, value: Any) -> Hashed:
        raise NotImplementedError

    def quant(self, stage: str, layer: int) -> Any:
        raise NotImplementedError

    def floats(self, stage: str, layer: int) -> Any:
        raise NotImplementedError

    def router(self, layer: int) -> Any:
        raise NotImplementedError

    def eps(self) -> Any:
        raise NotImplementedError


class _Nothing:
    """A plan that keeps no stage."""

    def wants(self, stage: str, layer: int) -> bool:  # noqa: ARG002 - the plan's face
        return False


class ReferenceSteps(_Chain):
    """The numpy reference with weights of its own."""

    def __init__(self, weights: "Weights", profile: str) -> None:
        from exactmoe.parity.reference import traced

        dims = weights.dims
        super().__init__(traced, dims.n_layers, dims.n_active, dims.n_experts, profile)
        self.weights = weights

    def new_cache(self, capacity: int) -> Any:
        from exactmoe.parity.reference.kv_cache import KVCache

        return KVCache.allocate(self.weights.dims, capacity)

    def forward(self, cache: Any, tokens: Sequence[int], plan: Wants) -> dict[Key, Any]:
        stages: dict[Key, Any] = self.ops.forward_traced(self.weights, cache, tokens, self._profile, plan).stages
        return stages

    def production(self, tokens: Sequence[int]) -> Array:
        from exactmoe.parity.reference.forward import forward

        logits: Array = forward(self.weights, self.new_cache(len(tokens)), tokens, self._profile)
        return logits

    def value(self, array: Array) -> Any:
        return array

    def array(self, value: Any) -> Array:
        array: Array = value
        return array

    def hashed(self, value: Any) -> Hashed:
        from exactmoe.parity.reference.stage_digest import stage_digest

        return Hashed(value.dtype.name, value.shape, stage_digest(value))

    def quant(self, stage: str, layer: int) -> Any:
        return _part(self.weights if layer == WHOLE_MODEL else self.weights.layers[layer], stage)

    floats = quant

    def router(self, layer: int) -> Any:
        return self.ops.prepare_router(self.weights.layers[layer].router)

    def eps(self) -> Any:
        return self.weights.dims.eps

    def resident(self, tensor: str) -> Array | None:
        part = _by_tensor(self.weights, self.weights.layers, tensor)
        return None if part is None or not hasattr(part, "data") or not hasattr(part, "type_name") else part.data


class TritonSteps(_Chain):
    """The Triton kernels, on the device of `model`."""

    def __init__(self, model: "Model") -> None:
        from exactmoe.model import traced

        config = model.config
        super().__init__(traced, config.n_layers, config.n_active, config.n_experts, model.profile)
        self.model = model

    def new_cache(self, capacity: int) -> Any:
        from exactmoe.model.cache import KVCache

        return KVCache.allocate(self.model, capacity)

    def forward(self, cache: Any, tokens: Sequence[int], plan: Wants) -> dict[Key, Any]:
        stages: dict[Key, Any] = self.ops.forward_traced(self.model, cache, tokens, plan).stages
        return stages

    def production(self, tokens: Sequence[int]) -> Array:
        from exactmoe.model.forward import forward

        return self.array(forward(self.model, self.new_cache(len(tokens)), tokens))

    def value(self, array: Array) -> Any:
        import torch

        return torch.from_numpy(np.ascontiguousarray(array)).to(self.model.device)

    def array(self, value: Any) -> Array:
        array: Array = value.detach().cpu().numpy()
        return array

    def hashed(self, value: Any) -> Hashed:
        from exactmoe.kernels.stage_digest import stage_digest

        dtype = str(value.dtype).removeprefix("torch.")
        return Hashed(dtype, tuple(value.shape), self.array(stage_digest(value.contiguous())))

    def quant(self, stage: str, layer: int) -> Any:
        if layer == WHOLE_MODEL:
            return _part(self.model, stage)
        of = self.model.layers[layer]
        return _part(of.moe if stage.startswith("moe_") else of, stage)

    floats = quant

    def router(self, layer: int) -> Any:
        return self.model.layers[layer].moe.router

    def eps(self) -> Any:
        return self.model.eps

    def resident(self, tensor: str) -> Array | None:
        parts = [(layer, layer.moe) for layer in self.model.layers]
        part = _by_tensor(self.model, parts, tensor)
        return None if part is None or not hasattr(part, "format") else self.array(part.as_in_file())


def load_steps(file: "GGUFFile", backend: str, profile: str, device: str) -> "Steps":
    """The reference or the kernels, loaded. Raises InvalidInput for another backend."""
    require(backend in ("reference", "triton"), f"backend must be reference or triton, got {backend!r}")
    if backend == "reference":
        from exactmoe.parity.load import reference_weights

        return ReferenceSteps(reference_weights(file), profile)
    from exactmoe.kernels.launch import resolve_device

    place = resolve_device(device)
    from exactmoe.model.weights import load_model

    return TritonSteps(load_model(file, place, profile))


_PARTS = {  # stage -> field of a layer's weights, or of the model's; the same on both sides
    "embedding": "embedding",
    "attn_norm": "attn_norm",
    "q": "q",
    "k": "k",
    "v": "v",
    "q_post_rope": "q_norm",
    "k_post_rope": "k_norm",
    "attn_out": "attn_output",
    "ffn_norm": "ffn_norm",
    "moe_expert_gate": "gate",
    "moe_expert_up": "up",
    "moe_expert_out": "down",
    "final_norm": "output_norm",
    "lm_head": "output",
}


def _part(owner: Any, stage: str) -> Any:
    return getattr(owner, _PARTS[stage])


def _by_tensor(model: Any, layers: Sequence[Any], tensor: str) -> Any:
    """The part of `model` that holds `tensor`; None where no stage uses it."""
    if not tensor.startswith("blk."):
        stage = next((s for s, n in NODES.items() if n.tensor == tensor), None)
        return None if stage is None else _part(model, stage)
    _, number, name = tensor.split(".", 2)
    stage = next((s for s, n in NODES.items() if n.tensor == name), None)
    if stage is None or stage not in _PARTS:
        return None
    owners = layers[int(number)]
    for owner in owners if type(owners) is tuple else (owners,):
        if hasattr(owner, _PARTS[stage]):
            return _part(owner, stage)
    return None


@contextmanager
def replaced(module: ModuleType, name: str, function: Any) -> Iterator[None]:
    """Put `function` in the place of the op `name` of `module`."""
    before = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, before)
