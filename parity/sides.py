"""The two implementations that parity compares, behind one face: numpy in, numpy out.

A `Side` runs tokens through a cache, in production or traced, and shows what it holds. `run_parity` knows no more."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from exactmoe.kernels.errors import require
from exactmoe.model.stages import Key
from exactmoe.parity.bits import Array

if TYPE_CHECKING:
    from exactmoe.model.gguf.reader import GGUFFile
    from exactmoe.model.weights import Model

KV_ARRAYS = ("k", "k_scale", "v", "v_scale")


class Trace(NamedTuple):
    """A traced pass. A stage becomes an array when `Side.array` is asked for it, one at a time."""

    logits: Array  # [T, V] f32
    stages: Mapping[Key, Any]


class Side(Protocol):
    """One implementation of the forward pass. A cache belongs to the side that made it."""

    name: str

    def cache(self, capacity: int) -> Any:
        """An empty cache for `capacity` positions."""
        ...

    def run(self, cache: Any, tokens: Sequence[int], chunk: int, all_positions: bool) -> Array:
        """Production: append `tokens` to `cache`, `chunk` at a time; logits f32 [V] of the last, or [T, V]."""
        ...

    def trace(self, cache: Any, tokens: Sequence[int]) -> Trace:
        """Traced: append `tokens` to `cache` and keep every stage."""
        ...

    def array(self, value: Any) -> Array:
        """A traced value as a numpy array."""
        ...

    def kv(self, cache: Any, name: str, layer: int) -> Array:
        """One of KV_ARRAYS of `layer`, positions 0..length-1."""
        ...

    def argmax(self, logits: Array) -> Array:
        """Ids i32 [T] chosen by logits f32 [T, V]."""
        ...

    def rope(self, n_positions: int) -> tuple[Array, Array]:
        """cos and sin f32 [n_positions, C/2] of the rope table."""
        ...


class ReferenceSide:
    """The numpy reference."""

    name = "reference"

    def __init__(self, file: "GGUFFile", profile: str) -> None:
        from exactmoe.parity.load import reference_weights

        self._weights = reference_weights(file)
        self._profile = profile

    def cache(self, capacity: int) -> Any:
        from exactmoe.parity.reference.kv_cache import KVCache

        return KVCache.allocate(self._weights.dims, capacity)

    def run(self, cache: Any, tokens: Sequence[int], chunk: int, all_positions: bool) -> Array:
        from exactmoe.parity.reference.forward import forward

        require(chunk >= len(tokens), f"the reference runs a prompt in one chunk, not in chunks of {chunk}")
        logits: Array = forward(self._weights, cache, tokens, self._profile, all_positions)
        return logits

    def trace(self, cache: Any, tokens: Sequence[int]) -> Trace:
        from exactmoe.parity.reference.traced import forward_traced

        return Trace(*forward_traced(self._weights, cache, tokens, self._profile))

    def array(self, value: Any) -> Array:
        array: Array = value
        return array

    def kv(self, cache: Any, name: str, layer: int) -> Array:
        array: Array = getattr(cache, name)[layer, : cache.length]
        return array

    def argmax(self, logits: Array) -> Array:
        from exactmoe.parity.reference.argmax import argmax

        ids: Array = argmax(logits)
        return ids

    def rope(self, n_positions: int) -> tuple[Array, Array]:
        from exactmoe.parity.reference.rope import rope_table

        dims = self._weights.dims
        cos, sin = rope_table(n_positions, dims.head_dim, dims.rope_base)
        return cos, sin


class TritonSide:
    """The Triton kernels, on the device of `model`."""

    name = "triton"

    def __init__(self, model: "Model") -> None:
        self._model = model

    def cache(self, capacity: int) -> Any:
        from exactmoe.model.cache import KVCache

        return KVCache.allocate(self._model, capacity)

    def run(self, cache: Any, tokens: Sequence[int], chunk: int, all_positions: bool) -> Array:
        from exactmoe.model.forward import prefill

        return self.array(prefill(self._model, cache, tokens, chunk, all_positions))

    def trace(self, cache: Any, tokens: Sequence[int]) -> Trace:
        from exactmoe.model.traced import forward_traced

        traced = forward_traced(self._model, cache, tokens)
        return Trace(self.array(traced.logits), traced.stages)

    def array(self, value: Any) -> Array:
        array: Array = value.detach().cpu().numpy()
        return array

    def kv(self, cache: Any, name: str, layer: int) -> Array:
        return self.array(getattr(cache.layer(layer), name)[: cache.length])

    def argmax(self, logits: Array) -> Array:
        import torch

        from exactmoe.kernels.argmax import argmax

        return self.array(argmax(torch.from_numpy(logits.copy()).to(self._model.device)))

    def rope(self, n_positions: int) -> tuple[Array, Array]:
        from exactmoe.kernels.rope import rope_table

        config = self._model.config
        cos, sin = rope_table(n_positions, config.head_dim, config.rope_base, self._model.device)
        return self.array(cos), self.array(sin)
