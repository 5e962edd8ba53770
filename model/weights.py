"""Weights of a model on a device: quantised as kernels.tensors holds them, norms in f32, routers in fixed point."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from os import PathLike
from typing import NamedTuple

import torch
from torch import Tensor

from exactmoe.kernels.errors import require
from exactmoe.kernels.formats import executable_format
from exactmoe.kernels.matvec import Norm
from exactmoe.kernels.packed import pack
from exactmoe.kernels.tensors import QuantMatrix, quant_matrix, slices
from exactmoe.model.capacity import needed, require_capacity
from exactmoe.model.config import Config, check_model
from exactmoe.model.gguf.reader import GGUFFile, open_gguf
from exactmoe.model.moe import MoeWeights, moe_weights
from exactmoe.model.packed import PackedLayer, PackedWeights


class Layer(NamedTuple):
    """One transformer layer."""

    attn_norm: Tensor  # [D] f32
    q: QuantMatrix  # [H*C, D]
    k: QuantMatrix  # [G*C, D]
    v: QuantMatrix  # [G*C, D]; these three share the memory of one stack where their formats are the same
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
    packed: PackedWeights  # of the decode step

    @property
    def eps(self) -> float:
        """The RMSNorm epsilon, exactly the f32 in the file."""
        return float(self.config.eps)


def load_model(
    source: GGUFFile | str | PathLike[str],
    device: torch.device,
    activations: str = "q8_k",
    positions: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Check the whole file, then load it onto `device`; `progress` is told the bytes loaded, and of how many.

    Before anything is allocated it raises `InvalidInput` for a file that is not accepted, and `MissingEnvironment`
    where the model and a cache of `positions` do not fit the device."""
    slices(activations)
    file = source if isinstance(source, GGUFFile) else open_gguf(source)
    config = Config.from_gguf(file)
    check_model(file, config)
    require_capacity(needed(file, config, positions), device, f"{file.path} with {positions} positions")
    total = sum(info.nbytes for info in file.tensors.values())
    done = 0

    def on_host(name: str) -> Tensor:
        nonlocal done
        done += file.tensors[name].nbytes
        if progress is not None:
            progress(done, total)
        return from_file(file, name)

    def on_device(name: str) -> Tensor:
        return on_host(name).to(device)

    def matrix(name: str) -> QuantMatrix:
        return quant_matrix(on_device(name), executable_format(file.tensors[name].type_name, name), name)

    def stack(*names: str) -> list[QuantMatrix]:
        """Matrices of one width, those of one format one below the other in memory; the stacks, then the matrices."""
        types = [file.tensors[name].type_name for name in names]
        runs = [list(run) for _, run in groupby(range(len(names)), key=types.__getitem__)]
        stacks, parts = [], []
        for run in runs:
            rows = [on_device(names[i]) for i in run]
            fmt = executable_format(types[run[0]], names[run[0]])
            stacks.append(quant_matrix(torch.cat(rows), fmt, " and ".join(names[i] for i in run)))
            first = 0
            for found in rows:
                parts.append(stacks[-1].rows(first, len(found)))
                first += len(found)
        return [*parts, *stacks]

    def layer(i: int) -> tuple[Layer, PackedLayer]:
        b = f"blk.{i}."
        q, k, v, *stacks = stack(b + "attn_q.weight", b + "attn_k.weight", b + "attn_v.weight")
        found = Layer(
            attn_norm=on_device(b + "attn_norm.weight"),
            q=q,
            k=k,
            v=v,
            q_norm=on_device(b + "attn_q_norm.weight"),
            k_norm=on_device(b + "attn_k_norm.weight"),
            attn_output=matrix(b + "attn_output.weight"),
            ffn_norm=on_device(b + "ffn_norm.weight"),
            moe=moe_weights(
                on_device(b + "ffn_gate_inp.weight"),
                matrix(b + "ffn_gate_exps.weight"),
                matrix(b + "ffn_up_exps.weight"),
                matrix(b + "ffn_down_exps.weight"),
            ),
        )
        return found, PackedLayer(
            attn_norm=Norm(found.attn_norm, eps),
            qkv=tuple(pack(stacked) for stacked in stacks),
            q_norm=Norm(found.q_norm, eps),
            k_norm=Norm(found.k_norm, eps),
            attn_output=pack(found.attn_output),
            ffn_norm=Norm(found.ffn_norm, eps),
            router=found.moe.router,
            gate=pack(found.moe.gate),
            up=pack(found.moe.up),
            down=pack(found.moe.down),
        )

    eps = float(config.eps)
    layers = [layer(i) for i in range(config.n_layers)]
    output_norm, output = on_device("output_norm.weight"), matrix("output.weight")
    embedding = matrix("token_embd.weight")
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what only the packing needed goes back to the device
    return Model(
        config=config,
        profile=activations,
        device=device,
        embedding=embedding,
        layers=tuple(found for found, _ in layers),
        output_norm=output_norm,
        output=output,
        packed=PackedWeights(tuple(packed for _, packed in layers), Norm(output_norm, eps), pack(output)),
    )


def from_file(file: GGUFFile, name: str) -> Tensor:
    """A tensor of `file` as its memory map has it."""
    require(name in file.tensors, f"{file.path}: tensor {name} is missing")
    with warnings.catch_warnings():
        # The map is read-only and torch has no read-only tensors; nothing here writes to weights.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(file.tensor(name))
