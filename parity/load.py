"""Hand a GGUF file's bytes to the numpy reference."""

from dataclasses import asdict

from exactmoe.model.config import Config, check_model
from exactmoe.model.gguf.reader import GGUFFile
from exactmoe.parity.reference.weights import Dims, LayerWeights, QuantMatrix, Weights


def reference_weights(file: GGUFFile) -> Weights:
    """The model in `file` as views of its memory map, nothing expanded. Raises `InvalidInput` as the loader does."""
    config = Config.from_gguf(file)
    check_model(file, config)

    def matrix(name: str) -> QuantMatrix:
        return QuantMatrix(file.tensor(name), file.tensors[name].type_name)

    def layer(i: int) -> LayerWeights:
        b = f"blk.{i}."
        return LayerWeights(
            attn_norm=file.tensor(b + "attn_norm.weight"),
            q=matrix(b + "attn_q.weight"),
            k=matrix(b + "attn_k.weight"),
            v=matrix(b + "attn_v.weight"),
            q_norm=file.tensor(b + "attn_q_norm.weight"),
            k_norm=file.tensor(b + "attn_k_norm.weight"),
            attn_output=matrix(b + "attn_output.weight"),
            ffn_norm=file.tensor(b + "ffn_norm.weight"),
            router=file.tensor(b + "ffn_gate_inp.weight"),
            gate=matrix(b + "ffn_gate_exps.weight"),
            up=matrix(b + "ffn_up_exps.weight"),
            down=matrix(b + "ffn_down_exps.weight"),
        )

    return Weights(
        dims=Dims(**asdict(config)),
        embedding=matrix("token_embd.weight"),
        layers=tuple(layer(i) for i in range(config.n_layers)),
        output_norm=file.tensor("output_norm.weight"),
        output=matrix("output.weight"),
    )
