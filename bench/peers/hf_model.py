"""Hugging Face transformers decoding the weights of the same file, which it computes with in bf16.

Its own way from a GGUF file expands every weight to f32 on the host: 114 GiB and many minutes for 30 B. So its model is
made empty, and its weights are expanded on the device, tensor by tensor. That they are where they belong is judged by
its logits, which must be close to ours."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exactmoe.bench.clock import Times, elapsed
from exactmoe.bench.peers.hf_transformers import PEER, installed
from exactmoe.bench.peers.layer import distance
from exactmoe.bench.peers.rows import Absent, PeerRow, no_memory
from exactmoe.bench.whole import prompt_of
from exactmoe.kernels.embedding import embed
from exactmoe.kernels.formats import executable_format
from exactmoe.kernels.tensors import quant_matrix
from exactmoe.model.cache import KVCache
from exactmoe.model.config import Config
from exactmoe.model.forward import prefill
from exactmoe.model.gguf.reader import GGUFFile
from exactmoe.model.weights import Model, from_file

TOKENS, RUNS = 32, 5  # a step takes the host so long that its position makes no difference
NEAR_LOGITS = 0.12  # of the norm: bf16, and our activations of 8 bits, make half of that in 48 layers; a mistake more
_NAMES = {  # of a layer, as the file has them
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip


class Logits(NamedTuple):
    """What our model says to a prompt: what a peer that decodes the same file is judged by."""

    tokens: Sequence[int]  # T
    logits: Tensor  # [T, V] on the host

    @staticmethod
    def of(model: Model, tokens: int = 8) -> "Logits":
        """To a prompt of so many tokens."""
        prompt, cache = prompt_of(model, tokens), KVCache.allocate(model, tokens)
        return Logits(prompt, prefill(model, cache, prompt, all_positions=True).cpu())


def rows(
    file: GGUFFile, config: Config, device: torch.device, contexts: Sequence[int], ours: Logits
) -> Iterator[PeerRow]:
    """Greedy decoding after each context. Raises Absent where it does not fit, or is put together in another way."""
    version = installed()
    free = torch.cuda.mem_get_info(device)[0]
    need = 2 * sum(math.prod(info.shape) for info in file.tensors.values())
    if need > free:
        raise Absent(f"its weights are bf16: {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free")
    try:
        model = load(file, config, device)
        error = far(model, ours, device)
    except Absent:
        raise
    except Exception as problem:
        raise Absent(f"it does not run {file.path}: {type(problem).__name__}: {problem}".splitlines()[0]) from problem
    for context in contexts:
        row = PeerRow(PEER, f"decode-{context}", "bf16", version=version, error=error, near=NEAR_LOGITS)
        try:
            yield row if row.wrong else row.timed(Times.of(time_steps(model, config, device, context)))
        except torch.OutOfMemoryError as problem:
            yield row.without(no_memory(problem))


def load(file: GGUFFile, config: Config, device: torch.device) -> Any:
    """Its model with the file's weights in bf16, on `device`."""
    try:
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM, Qwen3MoeRotaryEmbedding
    except ImportError as error:
        raise Absent(f"it has no Qwen3-MoE: {error}") from error
    described = Qwen3MoeConfig(
        vocab_size=config.vocab, hidden_size=config.hidden, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim,
        moe_intermediate_size=config.expert_width, num_experts=config.n_experts, num_experts_per_tok=config.n_active,
        norm_topk_prob=True, rms_norm_eps=float(config.eps), rope_theta=float(config.rope_base),
        max_position_embeddings=config.context_length, tie_word_embeddings=False, attention_bias=False,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = Qwen3MoeForCausalLM(described)
    model.model.rotary_emb = Qwen3MoeRotaryEmbedding(described).to(device)  # no weight: it is computed
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for part in weights(file, config, device):
        if any(wanted.pop(name, None) != tuple(value.shape) for name, value in part.items()):
            raise Absent(f"{installed()} keeps the model's weights in another form: {', '.join(part)}")
        model.load_state_dict(part, strict=False, assign=True)
    if wanted:
        raise Absent(f"{installed()} has weights that the file has not: {', '.join(wanted)}")
    return model.eval()


def weights(file: GGUFFile, config: Config, device: torch.device) -> Iterator[Mapping[str, Tensor]]:
    """The file's weights in bf16 by its names, some at a time."""

    def bf16(name: str) -> Tensor:
        return expanded(file, name, device).bfloat16()

    yield {"model.embed_tokens.weight": bf16("token_embd.weight")}
    for i in range(config.n_layers):
        ours, its = f"blk.{i}.", f"model.layers.{i}."
        yield {f"{its}{name}.weight": bf16(f"{ours}{source}.weight") for name, source in _NAMES.items()}
        gate_up = torch.cat([bf16(f"{ours}ffn_gate_exps.weight"), bf16(f"{ours}ffn_up_exps.weight")], 1)
        yield {f"{its}mlp.experts.gate_up_proj": gate_up}  # [E, 2 F, D]
        yield {f"{its}mlp.experts.down_proj": bf16(f"{ours}ffn_down_exps.weight")}
    yield {"model.norm.weight": bf16("output_norm.weight"), "lm_head.weight": bf16("output.weight")}


def expanded(file: GGUFFile, name: str, device: torch.device) -> Tensor:
    """A tensor of the file as f32 on `device`."""
    held = from_file(file, name).to(device)
    info = file.tensors[name]
    if info.type_name == "F32":
        return held
    matrix = quant_matrix(held.flatten(0, -2), executable_format(info.type_name, name), name)
    return embed(matrix, torch.arange(matrix.n, dtype=torch.int32, device=device)).view(info.shape)


def far(model: Any, ours: Logits, device: torch.device) -> float:
    """Median over the prompt's tokens of the distance of its logits from ours: a near tie of two experts may fall out
    otherwise in bf16, and one token with it."""
    with torch.no_grad():
        logits = model(torch.tensor([ours.tokens], device=device)).logits[0].cpu()
    return statistics.median(distance(its, our.double()) for its, our in zip(logits, ours.logits, strict=True))


def time_steps(model: Any, config: Config, device: torch.device, context: int) -> list[float]:
    """Microseconds a token of some runs of `TOKENS`; what the prompt takes is taken out."""
    prompt = torch.arange(max(context, 1), device=device)[None] % config.vocab

    def generate(tokens: int) -> float:
        return elapsed(lambda: model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False))

    generate(TOKENS)
    return [(generate(TOKENS) - generate(1)) / (TOKENS - 1) for _ in range(RUNS)]
