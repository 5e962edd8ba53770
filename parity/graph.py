"""What each stage is made of: the stages it reads, the op that makes it, the weights that op uses.

The chain is the one model.traced and parity.reference.traced spell; a test holds each step against their stages."""

from collections.abc import Callable
from typing import NamedTuple

from exactmoe.kernels.errors import InvalidInput
from exactmoe.model.stages import STAGES, WHOLE_MODEL, Key, keys

RESIDUAL = "residual"
"""Stands for the stream that enters a layer: the embedding, or the layer before's post_ffn_residual."""


class Node(NamedTuple):
    """How one stage comes to be."""

    op: str  # the name it has in kernels/ and parity/reference/
    reads: tuple[str, ...]  # stages of the same layer, or RESIDUAL
    tensor: str | None = None  # its weights in the file, without "blk.N."; None for an op that has none
    quantised: str | None = None  # the input that is quantised in blocks of 256 and multiplied with those weights


_KV = ("k_post_rope", "v")

NODES: dict[str, Node] = {
    "embedding": Node("embed", (), "token_embd.weight"),
    "attn_norm": Node("rms_norm", (RESIDUAL,), "attn_norm.weight"),
    "q": Node("matmul", ("attn_norm",), "attn_q.weight", "attn_norm"),
    "k": Node("matmul", ("attn_norm",), "attn_k.weight", "attn_norm"),
    "v": Node("matmul", ("attn_norm",), "attn_v.weight", "attn_norm"),
    "q_post_rope": Node("qk_norm_rope", ("q",), "attn_q_norm.weight"),
    "k_post_rope": Node("qk_norm_rope", ("k",), "attn_k_norm.weight"),
    "attn_scores": Node("attention_scores", ("q_post_rope", *_KV)),
    "attn_softmax": Node("attention_softmax", ("q_post_rope", *_KV)),
    "attention": Node("attend", ("q_post_rope", *_KV)),
    "attn_out": Node("matmul", ("attention",), "attn_output.weight", "attention"),
    "post_attn_residual": Node("add", (RESIDUAL, "attn_out")),
    "ffn_norm": Node("rms_norm", ("post_attn_residual",), "ffn_norm.weight"),
    "moe_router_logits": Node("router_logits", ("ffn_norm",), "ffn_gate_inp.weight"),
    "moe_router": Node("route", ("moe_router_logits",)),
    "moe_router_indices": Node("route", ("moe_router_logits",)),
    "moe_expert_gate": Node("grouped_matmul", ("ffn_norm", "moe_router_indices"), "ffn_gate_exps.weight", "ffn_norm"),
    "moe_expert_up": Node("grouped_matmul", ("ffn_norm", "moe_router_indices"), "ffn_up_exps.weight", "ffn_norm"),
    "moe_expert_swigl": Node("swiglu", ("moe_expert_gate", "moe_expert_up")),
    "moe_expert_out": Node(
        "grouped_matmul", ("moe_expert_swigl", "moe_router_indices"), "ffn_down_exps.weight", "moe_expert_swigl"
    ),
    "moe_ffn_out": Node("combine", ("moe_expert_out", "moe_router")),
    "post_ffn_residual": Node("add", ("post_attn_residual", "moe_ffn_out")),
    "final_norm": Node("rms_norm", (RESIDUAL,), "output_norm.weight"),
    "lm_head": Node("matmul", ("final_norm",), "output.weight", "final_norm"),
}

OPS = tuple(dict.fromkeys(["quantize", "append", "dispatch", *(n.op for n in NODES.values())]))
"""Every op of the traced forward pass of the kernels; each can be put under suspicion alone."""


def inputs(stage: str, layer: int, n_layers: int) -> list[Key]:
    """The (stage, layer) pairs that `stage` of `layer` reads, in the order of its op's arguments."""

    def source(name: str) -> Key:
        if name != RESIDUAL:
            return name, layer
        before = n_layers - 1 if layer == WHOLE_MODEL else layer - 1
        return ("post_ffn_residual", before) if before >= 0 else ("embedding", WHOLE_MODEL)

    return [source(name) for name in NODES[stage].reads]


def tensor_name(stage: str, layer: int) -> str | None:
    """Name in the file of the weights that make `stage` of `layer`; None where its op has none."""
    tensor = NODES[stage].tensor
    return tensor if tensor is None or layer == WHOLE_MODEL else f"blk.{layer}.{tensor}"


def parse_stage(text: str, n_layers: int) -> Key:
    """The (stage, layer) that `STAGE@LAYER` names, or STAGE alone for one of the whole model."""
    name, at, number = text.partition("@")
    stage = next((s for s in STAGES if s.name == name.strip().lower()), None)
    if stage is None:
        raise InvalidInput(f"unknown stage {name!r}; stages: {', '.join(s.name for s in STAGES)}")
    if not stage.per_layer:
        if at:
            raise InvalidInput(f"stage {stage.name} belongs to the whole model, not to layer {number!r}")
        return stage.name, WHOLE_MODEL
    if not (number.isascii() and number.isdigit() and int(number) < n_layers):
        raise InvalidInput(f"stage {stage.name} needs a layer 0 to {n_layers - 1}, as {stage.name}@0; got {text!r}")
    return stage.name, int(number)


def order(n_layers: int) -> list[Key]:
    """Every (stage, layer), in an order in which each comes after all that it reads."""
    return keys(n_layers)


class Graph(NamedTuple):
    """Stages and what each reads: what a bisection walks over."""

    order: Callable[[int], list[Key]]  # of n_layers
    inputs: Callable[[str, int, int], list[Key]]  # of stage, layer, n_layers
    blocks: bool  # whether a stage of weights can be made from one block of them


TRACED = Graph(order, inputs, blocks=True)
"""Every stage of a traced pass."""
