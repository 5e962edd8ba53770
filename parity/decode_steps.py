"""The decode step of production under bisection: the stages that its fused kernels give, and each kernel made alone.

What is traced is the step that is served: its ops are listened to while it runs, and none is called otherwise. A kernel
alone, and its twin in the reference, make a stage from those that the chain below says it reads."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from exactmoe.kernels.errors import require
from exactmoe.model.stages import WHOLE_MODEL, Key
from exactmoe.parity.bits import Array
from exactmoe.parity.graph import RESIDUAL, Graph
from exactmoe.parity.steps import ReferenceSteps, TritonSteps, Wants, replaced

if TYPE_CHECKING:
    from exactmoe.model.gguf.reader import GGUFFile
    from exactmoe.model.weights import Model

OPS = ("embed", "matvec", "decode_attention", "decode_router", "experts_up", "experts_down")
"""Ops of the decode step, by the names they have in model.decode."""

READS: dict[str, tuple[str, ...]] = {
    "q": (RESIDUAL,),
    "k": (RESIDUAL,),
    "v": (RESIDUAL,),
    "attention": ("q", "k", "v"),
    "post_attn_residual": (RESIDUAL, "attention"),
    "moe_router_logits": ("post_attn_residual",),
    "moe_expert_swigl": ("post_attn_residual", "moe_router_logits"),
    "post_ffn_residual": ("post_attn_residual", "moe_router_logits", "moe_expert_swigl"),
}
"""The stages that the kernels of a layer give, in order, and what each reads."""


def _order(n_layers: int) -> list[Key]:
    inside = [(stage, layer) for layer in range(n_layers) for stage in READS]
    return [("embedding", WHOLE_MODEL), *inside, ("lm_head", WHOLE_MODEL)]


def _inputs(stage: str, layer: int, n_layers: int) -> list[Key]:
    def source(name: str) -> Key:
        if name != RESIDUAL:
            return name, layer
        before = n_layers - 1 if layer == WHOLE_MODEL else layer - 1
        return ("post_ffn_residual", before) if before >= 0 else ("embedding", WHOLE_MODEL)

    reads = {"embedding": (), "lm_head": (RESIDUAL,), **READS}[stage]
    return [source(name) for name in reads]


GRAPH = Graph(_order, _inputs, blocks=False)
"""What is searched: a fused kernel cannot be asked for one block of its weights."""


class _Layer(NamedTuple):
    """A layer's weights as the fused ops of one side take them."""

    attn_norm: Any
    qkv: Any
    q_norm: Any
    k_norm: Any
    attn_output: Any
    ffn_norm: Any
    router: Any
    gate: Any
    up: Any
    down: Any


class _Fused:
    """Stages made by the fused ops of one side; mixed into the side's `Steps`."""

    fused: Any  # the namespace of the ops
    n_active: int
    n_layers: int

    def step(self, key: Key, read: Mapping[Key, Array], past: Sequence[int], tokens: Sequence[int]) -> Array:
        """Stage `key` of the single token from the stages it reads."""
        stage, layer = key
        given = [self.value(read[k][0]) for k in _inputs(stage, layer, self.n_layers)]  # type: ignore[attr-defined]
        made = self._make(stage, layer, given, past, tokens)
        array: Array = self.array(made)  # type: ignore[attr-defined]
        return array if stage == "embedding" else array[None]

    def _make(self, stage: str, layer: int, given: list[Any], past: Sequence[int], tokens: Sequence[int]) -> Any:
        o, profile = self.fused, self._profile  # type: ignore[attr-defined]
        if stage == "embedding":
            return o.embed(self.quant(stage, layer), self.value(np.array(tokens, np.int32)))  # type: ignore[attr-defined]
        if stage == "lm_head":
            weights, norm = self.head()
            return o.matvec(weights, given[0], profile, norm)
        w = self.fused_layer(layer)
        if stage in ("q", "k", "v"):
            return self.split(o.matvec(w.qkv, given[0], profile, w.attn_norm))[stage]
        if stage == "attention":
            cache = self.cache(past, tokens)  # type: ignore[attr-defined]
            at = self.value(np.array([len(past)], np.int32))  # type: ignore[attr-defined]
            read = self.join(given), w.q_norm, w.k_norm, cache.rope, cache.layer(layer), at, profile
            return o.decode_attention(*read).heads
        if stage == "post_ffn_residual":
            x, logits, h = given
            return o.experts_down(self.activated(h, logits), w.down, x, profile)
        if stage == "post_attn_residual":
            return o.matvec(w.attn_output, given[1], profile, residual=given[0])
        routed = o.decode_router(given[0], w.ffn_norm, w.router, profile)
        if stage == "moe_router_logits":
            return routed.logits
        return o.experts_up(routed._replace(logits=given[1]), w.gate, w.up, self.n_active).h

    def split(self, qkv: Any) -> dict[str, Any]:
        """The projections of q, k and v."""
        heads, kv = self.widths()
        return {"q": qkv[:heads], "k": qkv[heads : heads + kv], "v": qkv[heads + kv :]}

    def widths(self) -> tuple[int, int]:
        raise NotImplementedError

    def join(self, parts: list[Any]) -> Any:
        raise NotImplementedError

    def head(self) -> tuple[Any, Any]:
        raise NotImplementedError

    def fused_layer(self, layer: int) -> _Layer:
        raise NotImplementedError

    def activated(self, h: Any, logits: Any) -> Any:
        """What `experts_down` takes."""
        raise NotImplementedError


class DecodeReference(_Fused, ReferenceSteps):
    """The reference: its traced pass, and the numpy twins of the fused kernels."""

    @property
    def fused(self) -> Any:
        """The twins."""
        from types import SimpleNamespace

        from exactmoe.parity.reference.decode_attention import decode_attention
        from exactmoe.parity.reference.decode_experts import experts_down, experts_up
        from exactmoe.parity.reference.decode_router import decode_router
        from exactmoe.parity.reference.embedding import embed
        from exactmoe.parity.reference.matvec import matvec

        return SimpleNamespace(
            embed=embed, matvec=matvec, decode_attention=decode_attention, decode_router=decode_router,
            experts_up=experts_up, experts_down=experts_down,
        )  # fmt: skip

    def widths(self) -> tuple[int, int]:
        d = self.weights.dims
        return d.n_heads * d.head_dim, d.n_kv_heads * d.head_dim

    def join(self, parts: list[Any]) -> Any:
        return np.concatenate(parts)

    def _norm(self, weight: Any) -> Any:
        from exactmoe.parity.reference.matvec import Norm

        return Norm(weight, self.weights.dims.eps)

    def head(self) -> tuple[Any, Any]:
        return [self.weights.output], self._norm(self.weights.output_norm)

    def fused_layer(self, layer: int) -> _Layer:
        w = self.weights.layers[layer]
        norms = (self._norm(x) for x in (w.attn_norm, w.q_norm, w.k_norm, w.ffn_norm))
        attn, q, k, ffn = norms
        return _Layer(attn, [w.q, w.k, w.v], q, k, [w.attn_output], ffn, self.router(layer), w.gate, w.up, w.down)

    def activated(self, h: Any, logits: Any) -> Any:
        from exactmoe.parity.reference.decode_experts import Activated

        return Activated(h, logits)


class DecodeSteps(_Fused, TritonSteps):
    """The decode step of production, on the device of `model`."""

    def __init__(self, model: "Model") -> None:
        from exactmoe.model import decode

        super().__init__(model)
        self.fused = decode

    def trace(self, past: Sequence[int], tokens: Sequence[int], plan: Wants) -> dict[Key, Array]:
        """Run `past` as a prompt, then the one token of `tokens` as a decode step; the stages that `plan` wants."""
        require(len(tokens) == 1, f"a decode step is of one token, got {len(tokens)}")
        from exactmoe.model.decode import Decoder
        from exactmoe.model.forward import prefill

        cache = self.new_cache(len(past) + 1)
        if past:
            prefill(self.model, cache, past)
        decoder = Decoder(self.model, cache)
        decoder.token.fill_(tokens[0])
        decoder._position.fill_(cache.length)  # noqa: SLF001 - where `step` places it; its graph hides what it computes
        with self._heard() as heard:
            decoder._run(cache.capacity)  # noqa: SLF001
        return {key: value for key, value in self._stages_of(heard).items() if plan.wants(*key)}

    @contextmanager
    def _heard(self) -> Iterator[list[Any]]:
        """What the ops of the step return, in order."""
        heard: list[Any] = []

        def listening(op: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                heard.append(op(*args, **kwargs))
                return heard[-1]

            return call

        with ExitStack() as stack:
            for name in OPS:
                stack.enter_context(replaced(self.fused, name, listening(getattr(self.fused, name))))
            yield heard

    def _stages_of(self, heard: list[Any]) -> dict[Key, Array]:
        wanted = 2 + 6 * self.n_layers
        require(len(heard) == wanted, f"the step called {len(heard)} ops, not {wanted}: its chain is another one")
        stages: dict[Key, Array] = {("embedding", WHOLE_MODEL): self.array(heard[0])}
        for layer in range(self.n_layers):
            qkv, attention, middle, routed, activated, x = heard[1 + 6 * layer :][:6]
            parts = {
                **self.split(qkv), "attention": attention.heads, "post_attn_residual": middle,
                "moe_router_logits": routed.logits, "moe_expert_swigl": activated.h, "post_ffn_residual": x,
            }  # fmt: skip
            stages |= {(name, layer): self.array(part)[None] for name, part in parts.items()}
        return stages | {("lm_head", WHOLE_MODEL): self.array(heard[-1])[None]}

    def widths(self) -> tuple[int, int]:
        c = self.model.config
        return c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim

    def join(self, parts: list[Any]) -> Any:
        import torch

        return torch.cat(parts)

    def head(self) -> tuple[Any, Any]:
        return [self.model.packed.output], self.model.packed.output_norm

    def fused_layer(self, layer: int) -> _Layer:
        w = self.model.packed.layers[layer]
        return _Layer(*w)._replace(attn_output=[w.attn_output])

    def activated(self, h: Any, logits: Any) -> Any:
        from exactmoe.kernels.decode_experts import Activated

        return Activated(h, logits)


@contextmanager
def decode_sides(file: "GGUFFile", profile: str, device: Any, op: tuple[str, Any] | None) -> Iterator[tuple[Any, Any]]:
    """The reference and production's decode step, with the op of a user in the place of ours if there is one."""
    from exactmoe.model.weights import load_model
    from exactmoe.parity.load import reference_weights

    suspect = DecodeSteps(load_model(file, device, profile))
    with ExitStack() as stack:
        if op is not None:
            stack.enter_context(replaced(suspect.fused, *op))
        yield DecodeReference(reference_weights(file), profile), suspect
