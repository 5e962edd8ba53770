"""Whether a model and the cache of a sequence fit a device, said before anything is loaded."""

from typing import TYPE_CHECKING, NamedTuple

from exactmoe.kernels.errors import MissingEnvironment
from exactmoe.model.config import Config
from exactmoe.model.gguf.reader import GGUFFile

if TYPE_CHECKING:
    import torch

WORKSPACE = 512 * 2**20
"""Bytes for what a chunk of 512 tokens holds between kernels, and for packing a tensor while it is loaded."""
_GIB = 2**30


class Capacity(NamedTuple):
    """Bytes on the device, by what they are for."""

    file: int  # every tensor, as the file holds it
    planes: int  # Q6_K matrices once more, in the planes that a decode step reads
    routers: int  # a scale for every expert of every layer
    cache: int  # keys, values, their scales and the rope table, for all positions
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in self._asdict().items() if size)
        return f"{self.total / _GIB:.2f} GiB ({parts})"


def kv_bytes(config: Config) -> int:
    """Bytes of one position's keys and values in all layers: i16, with a scale for each head."""
    return config.n_layers * 2 * config.n_kv_heads * (2 * config.head_dim + 4)


def needed(file: GGUFFile, config: Config, positions: int = 0) -> Capacity:
    """What `file` and a cache of `positions` take. `file` must have passed `check_model`."""
    return Capacity(
        file=sum(info.nbytes for info in file.tensors.values()),
        planes=sum(
            info.nbytes
            for info in file.tensors.values()
            if info.type_name == "Q6_K" and info.name != "token_embd.weight"
        ),
        routers=4 * config.n_layers * config.n_experts,
        cache=positions * (kv_bytes(config) + 4 * config.head_dim),
        workspace=WORKSPACE,
    )


def require_capacity(capacity: Capacity, device: "torch.device", what: str) -> None:
    """Raise MissingEnvironment, with the arithmetic, where `what` does not fit the free memory of a CUDA device."""
    import torch

    if device.type != "cuda":
        return
    free, whole = torch.cuda.mem_get_info(device)
    if capacity.total > free:
        raise MissingEnvironment(
            f"{what} needs {capacity}; the device has {free / _GIB:.2f} of {whole / _GIB:.2f} GiB free"
        )
