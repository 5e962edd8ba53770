"""Which type each tensor of a Qwen3-MoE file has under Q4_K_M: llama.cpp's mix (`llama_tensor_get_type`).

Most matrices are Q4_K. `output` is Q6_K, and so are `attn_v` and `ffn_down_exps` in the layers that the use-more-bits
rule picks: the first eighth, the last eighth, and every third layer between. Norms and the router stay F32."""

import re

from exactmoe.kernels.errors import InvalidInput, require

_DENSE = {"token_embd.weight": "Q4_K", "output.weight": "Q6_K", "output_norm.weight": "F32"}
_LAYER = {
    "attn_norm": "F32",
    "attn_q": "Q4_K",
    "attn_k": "Q4_K",
    "attn_v": "more",
    "attn_output": "Q4_K",
    "attn_q_norm": "F32",
    "attn_k_norm": "F32",
    "ffn_norm": "F32",
    "ffn_gate_inp": "F32",
    "ffn_gate_exps": "Q4_K",
    "ffn_up_exps": "Q4_K",
    "ffn_down_exps": "more",
}
_NAME = re.compile(r"blk\.(0|[1-9][0-9]*)\.([a-z_]+)\.weight")


def use_more_bits(layer: int, n_layers: int) -> bool:
    """Whether `layer` of `n_layers` gets Q6_K for attn_v and ffn_down_exps; all divisions are integer divisions."""
    require(0 <= layer < n_layers, f"layer {layer} is not one of {n_layers} layers")
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def q4_k_m(tensor: str, n_layers: int) -> str:
    """The type of the tensor called `tensor`: "Q4_K", "Q6_K" or "F32"; an unknown name raises `InvalidInput`."""
    if tensor in _DENSE:
        return _DENSE[tensor]
    match = _NAME.fullmatch(tensor)
    if match is None or match[2] not in _LAYER:
        raise InvalidInput(f"{tensor}: not a tensor of a Qwen3-MoE model")
    more = use_more_bits(int(match[1]), n_layers)
    kind = _LAYER[match[2]]
    if kind == "more":
        return "Q6_K" if more else "Q4_K"
    return kind
