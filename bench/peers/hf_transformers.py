"""Hugging Face transformers: its Qwen3-MoE layer in bf16, or its decoding of the same file."""

from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from exactmoe.bench.cases import A
from exactmoe.bench.clock import Times, elapsed
from exactmoe.bench.peers.layer import Layer, rows_of
from exactmoe.bench.peers.rows import Absent, PeerRow

if TYPE_CHECKING:
    from exactmoe.model.config import Config

PEER = "transformers"
_TOKENS, _RUNS = 128, 5


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


def layer_rows(device: torch.device) -> Iterator[PeerRow]:
    """The layer, in each way of running experts that can be captured."""
    for experts in ("grouped_mm", "batched_mm"):

        def prepare(layer: Layer, experts: str = experts) -> Callable[[Tensor], Tensor]:
            return block(layer._replace(router=layer.router.bfloat16().float()), A, experts)

        try:
            yield from rows_of(f"{PEER} {experts}", installed(), "bf16", device, prepare)
        except Absent:
            raise
        except Exception as error:  # a way that this version lacks, or that cannot be captured
            yield PeerRow(f"{PEER} {experts}", "moe-layer", absent=f"{type(error).__name__}: {error}".splitlines()[0])


def model_rows(path: Path, config: "Config", device: torch.device, context: int) -> Iterable[PeerRow]:
    """Greedy decoding of the file, whose weights it makes bf16. Raises Absent where they do not fit."""
    name = installed()
    free = torch.cuda.mem_get_info(device)[0]
    need = 2 * _parameters(config)
    if need > free:
        raise Absent(f"it makes the weights bf16: {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free")
    try:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.bfloat16
        ).to(device)
    except Exception as error:
        raise Absent(f"it does not load {path.name}: {type(error).__name__}: {error}".splitlines()[0]) from error
    prompt = torch.arange(max(context, 1), device=device)[None] % config.vocab

    def generate(tokens: int) -> float:
        return elapsed(lambda: model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False))

    generate(_TOKENS)
    # What the prompt takes is in both.
    samples = [(generate(_TOKENS) - generate(1)) / (_TOKENS - 1) for _ in range(_RUNS)]
    return [PeerRow(PEER, f"decode-{context}", "bf16", Times.of(samples), version=name)]


def _parameters(config: "Config") -> int:
    moe = config.n_experts * 3 * config.hidden * config.expert_width
    attention = 2 * config.hidden * (config.n_heads + config.n_kv_heads) * config.head_dim
    return config.n_layers * (moe + attention) + 2 * config.vocab * config.hidden
