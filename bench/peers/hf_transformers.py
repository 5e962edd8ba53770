"""Hugging Face transformers: its Qwen3-MoE layer in bf16."""

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from exactmoe.bench.cases import A
from exactmoe.bench.peers.layer import Layer, rows_of
from exactmoe.bench.peers.rows import Absent, PeerRow

PEER = "transformers"


def installed() -> str:
    """Its version. Raises Absent where it is not there."""
    try:
        return f"transformers {version('transformers')}"
    except PackageNotFoundError:
        raise Absent("transformers is not installed") from None


def block(layer: Layer, top_k: int, experts: str) -> Callable[[Tensor], Tensor]:
    """The block of transformers on the weights of `layer`, its experts run in the way named `experts`.

    Raises Absent where this version's block is not put together as is known here."""
    installed()
    try:
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    except ImportError as error:
        raise Absent(f"it has no Qwen3-MoE: {error}") from error
    e, f, d = layer.gate.shape
    config = Qwen3MoeConfig(
        hidden_size=d, moe_intermediate_size=f, num_experts=e, num_experts_per_tok=top_k, norm_topk_prob=True
    )
    config._experts_implementation = experts  # noqa: SLF001 - the library's own switch, which has no public name
    with torch.device("meta"):
        module: Any = Qwen3MoeSparseMoeBlock(config)
    wanted = {
        "gate.weight": layer.router.bfloat16(),
        "experts.gate_up_proj": torch.cat([layer.gate, layer.up], 1),
        "experts.down_proj": layer.down,
    }
    if {name: tuple(value.shape) for name, value in module.state_dict().items()} != {
        name: tuple(value.shape) for name, value in wanted.items()
    }:
        raise Absent(f"{installed()} keeps the layer's weights in another form")
    module.load_state_dict(wanted, assign=True)

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            made = module(x[None])
        out: Tensor = (made[0] if isinstance(made, tuple) else made).reshape(x.shape)
        return out

    return call


def layer_rows(device: torch.device, chunks: Sequence[int]) -> Iterator[PeerRow]:
    """The layer of so many tokens each, in each way of running experts that can be captured."""
    for experts in ("grouped_mm", "batched_mm"):

        def prepare(layer: Layer, experts: str = experts) -> Callable[[Tensor], Tensor]:
            return block(layer._replace(router=layer.router.bfloat16().float()), A, experts)

        try:
            yield from rows_of(f"{PEER} {experts}", installed(), "bf16", device, prepare, chunks)
        except Absent:
            raise
        except Exception as error:  # a way that this version lacks, or that cannot be captured
            yield PeerRow(f"{PEER} {experts}", "moe-layer", absent=f"{type(error).__name__}: {error}".splitlines()[0])
