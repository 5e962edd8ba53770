"""Weights of a model on a device: quantised bytes as the file holds them, norms in f32, routers in fixed point."""

import warnings
from dataclasses import dataclass
from os import PathLike
from typing import NamedTuple

import torch
from torch import Tensor

from exactmoe.kernels.errors import require
from exactmoe.kernels.formats import executable_format
from exactmoe.kernels.tensors import QuantMatrix, quant_matrix, slices
from exactmoe.model.config import Config, check_model
from exactmoe.model.gguf.reader import GGUFFile, open_gguf
from exactmoe.model.moe import MoeWeights, moe_weights


class Layer(NamedTuple):
    """One transformer layer."""

    attn_norm: Tensor  # [D] f32
    q: QuantMatrix  # [H*C, D]
    k: QuantMatrix  # [G*C, D]
    v: QuantMatrix  # [G*C, D]
    q_norm: Tensor  # [C] f32
    k_norm: Tensor  # [C] f32
    attn_output: QuantMatrix  # [D, H*C]
    ffn_norm: Tensor  # [D] f32
    moe: MoeWeights


@dataclass(frozen=True)
class Model:
    """A model ready to run: what it is, how activations are quantised, and its weights."""

    config: Config
    profile: str  # activation profile, q8_k or q16_k
    device: torch.device
    embedding: QuantMatrix  # [V, D]
    layers: tuple[Layer, ...]
    output_norm: Tensor  # [D] f32
    output: QuantMatrix  # [V, D]

    @property
    def eps(self) -> float:
        """The RMSNorm epsilon, exactly the f32 in the file."""
        return float(self.config.eps)


def load_model(source: GGUFFile | str | PathLike[str], device: torch.device, activations: str = "q8_k") -> Model:
    """Check the whole file, then load it onto `device`. Raises `InvalidInput` before anything is allocated."""
    slices(activations)
    file = source if isinstance(source, GGUFFile) else open_gguf(source)
    config = Config.from_gguf(file)
    check_model(file, config)

    def floats(name: str) -> Tensor:
        return _to_device(file, name, device)

    def matrix(name: str) -> QuantMatrix:
        return quant_matrix(_to_device(file, name, device), executable_format(file.tensors[name].type_name, name), name)

    def layer(i: int) -> Layer:
        b = f"blk.{i}."
        return Layer(
            attn_norm=floats(b + "attn_norm.weight"),
            q=matrix(b + "attn_q.weight"),
            k=matrix(b + "attn_k.weight"),
            v=matrix(b + "attn_v.weight"),
            q_norm=floats(b + "attn_q_norm.weight"),
            k_norm=floats(b + "attn_k_norm.weight"),
            attn_output=matrix(b + "attn_output.weight"),
            ffn_norm=floats(b + "ffn_norm.weight"),
            moe=moe_weights(
                floats(b + "ffn_gate_inp.weight"),
                matrix(b + "ffn_gate_exps.weight"),
                matrix(b + "ffn_up_exps.weight"),
                matrix(b + "ffn_down_exps.weight"),
            ),
        )

    return Model(
        config=config,
        profile=activations,
        device=device,
        embedding=matrix("token_embd.weight"),
        layers=tuple(layer(i) for i in range(config.n_layers)),
        output_norm=floats("output_norm.weight"),
        output=matrix("output.weight"),
    )


def _to_device(file: GGUFFile, name: str, device: torch.device) -> Tensor:
    require(name in file.tensors, f"{file.path}: tensor {name} is missing")
    with warnings.catch_warnings():
        # The map is read-only and torch has no read-only tensors; nothing here writes to weights.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(file.tensor(name)).to(device)
