"""The decode step of production: one token of one sequence, on a GPU one CUDA graph.

A layer is six launches while attention has one tile of keys, and eight beyond; a small tile is faster than a large one,
so there are three graphs at most. Token and position live on the device: a step chooses the next token and moves on by
itself."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from exactmoe.kernels.argmax import choose
from exactmoe.kernels.cursor import place
from exactmoe.kernels.decode_attention import decode_attention, keys_of_one_launch
from exactmoe.kernels.decode_experts import experts_down, experts_up
from exactmoe.kernels.decode_router import NextLayer, decode_router
from exactmoe.kernels.embedding import embed
from exactmoe.kernels.errors import require
from exactmoe.kernels.guess import Guess
from exactmoe.kernels.matvec import Norm, matvec
from exactmoe.kernels.packed import PackedMatrix
from exactmoe.kernels.prefetch import Past
from exactmoe.kernels.router import RouterWeight

if TYPE_CHECKING:
    from exactmoe.model.cache import KVCache
    from exactmoe.model.weights import Model


_KEYS_AHEAD = 4224  # 4.3 MB of 4 kv heads of 128: what the memory delivers while q, k and v are computed


class Stepped(NamedTuple):
    """A layer's outcome."""

    x: Tensor  # [D] f32
    guess: Tensor | None  # [E] f32, a guess of the next layer's router logits


class Decoder:
    """Steps of one sequence. `logits` and `token` are those of the last step, overwritten by the next."""

    def __init__(self, model: "Model", cache: "KVCache") -> None:
        self._model, self._cache = model, cache
        self.token = torch.zeros(1, dtype=torch.int32, device=model.device)
        self._position = torch.zeros(1, dtype=torch.int32, device=model.device)
        self._at = 0  # what `_position` holds
        self.logits = torch.zeros(model.config.vocab, dtype=torch.float32, device=model.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # and its logits, by the positions it serves

    def step(self, token: Tensor | None = None) -> None:
        """Run `token` [1] i32 on the device, or the one chosen last, after those in the cache, which grows by one."""
        cache = self._cache
        require(cache.length < cache.capacity, f"the cache is full: {cache.capacity} positions")
        one = keys_of_one_launch(cache.layer(0))
        most = next((keys for keys in (one // 2, one) if cache.length < keys < cache.capacity), cache.capacity)
        if most not in self._graphs and self._model.device.type == "cuda":
            self._graphs[most] = self._capture(most)
        if self._at != cache.length or token is not None:
            place(self.token, self._position, cache.length, token)
        if most in self._graphs:
            graph, self.logits = self._graphs[most]
            graph.replay()
        else:
            self._run(most)
        cache.length += 1
        self._at = cache.length

    def _run(self, most: int) -> None:
        """A step at a position below `most`."""
        model, weights = self._model, self._model.packed
        x = embed(model.embedding, self.token)[0]  # [D]
        guess: Tensor | None = None
        for i in range(len(weights.layers)):
            x, guess = self._layer(i, x, guess, most)
        self.logits = matvec([weights.output], x, model.profile, weights.output_norm)
        choose(self.logits, self.token, self._position)

    def _layer(self, i: int, x: Tensor, guess: Tensor | None, most: int) -> Stepped:
        """Layer `i`, and a guess of the next one's router logits, as `guess` is of this one's.

        While attention leaves the memory idle, what comes later is fetched."""
        model, cache, layers = self._model, self._cache, self._model.packed.layers
        layer, top_k = layers[i], model.config.n_active
        kv = cache.layer(i)
        # Many keys keep the memory busy: what is asked for ahead would hold them up.
        few = most <= keys_of_one_launch(kv)
        soon = [part[:most] for part in kv] if few else []
        past = None if few else Past(kv.k, self._position, _KEYS_AHEAD)
        qkv = matvec(layer.qkv, x, model.profile, layer.attn_norm, later=soon, past=past)
        later = (*layer.attn_output.tensors, layer.router.q)
        heads, operand = decode_attention(
            qkv, layer.q_norm, layer.k_norm, cache.rope, kv, self._position, model.profile, later, most
        )
        guessed = (layer.gate, layer.up, layer.down) if few else (layer.gate, layer.up)
        ahead = None if guess is None or operand is None else Guess(guess, guessed, top_k)
        row = heads if operand is None else operand
        x = matvec([layer.attn_output], row, model.profile, residual=x, guess=ahead)
        after = NextLayer(layers[i + 1].ffn_norm, layers[i + 1].router) if i + 1 < len(layers) else None
        return moe_step(x, layer.ffn_norm, layer.router, layer.gate, layer.up, layer.down, top_k, model.profile, after)

    def _capture(self, most: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The step at a position below `most` as a graph, and the logits that it makes.

        Kernels are compiled by a run beforehand, whose every effect the first step repeats."""
        token = self.token.clone()
        place(self.token, self._position, self._cache.length)
        self._run(most)
        self.token.copy_(token)
        self._at = -1
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with collection_deferred(), torch.cuda.graph(graph):
            self._run(most)
        return graph, self.logits


@contextmanager
def collection_deferred() -> Iterator[None]:
    """No garbage collection meanwhile: it may find another decoder's graph, and a graph that is destroyed while one is
    captured ends the capture."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def moe_step(
    x: Tensor, norm: Norm, router: RouterWeight, gate: PackedMatrix, up: PackedMatrix, down: PackedMatrix,
    top_k: int, profile: str, after: NextLayer | None = None,
) -> Stepped:  # fmt: skip
    """x [D] plus the MoE layer of its norm; and a guess for the layer `after` it, if that is given.

    Bit-equal to parity.reference.decode.moe_step."""
    routed = decode_router(x, norm, router, profile, after)
    return Stepped(experts_down(experts_up(routed, gate, up, top_k), down, x, profile), routed.guess)
