"""What a GGUF file holds, what one decoded token costs in bytes read, and whether the file can run on this machine."""

import importlib.util
import os
import re
from dataclasses import dataclass

from exactmoe.kernels.errors import InvalidInput
from exactmoe.model.config import Config, check_model
from exactmoe.model.gguf.reader import GGUFFile, TensorInfo, open_gguf


@dataclass(frozen=True)
class TypeGroup:
    """The tensors that are stored as one type, of those that share a name but for the layer number."""

    name: str  # such as "attn_v" or "token_embd"
    type_name: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """The report on a file; what a refused file does not tell is None."""

    path: str
    file_bytes: int
    architecture: str | None
    config: Config | None
    groups: tuple[TypeGroup, ...]
    parameters: int
    active_parameters: int | None  # all but the experts that a token is not routed to
    bytes_per_token: int | None  # weights read for one decoded token, without the KV cache
    refusal: str | None  # why the loader refuses the file
    device: str | None  # "cuda: <name>", "interpreter", or None without torch and triton

    @property
    def runs(self) -> bool:
        """Whether the file is accepted and this machine has something to run it on."""
        return self.refusal is None and self.device is not None


def inspect_model(path: str | os.PathLike[str]) -> Inspection:
    """Read the header of `path`, judge the file as the loader does, and look for a device.

    Raises `GGUFError` when there is no readable header; any later refusal is in the report."""
    file = open_gguf(path)
    config, refusal = None, None
    try:
        config = Config.from_gguf(file)
        check_model(file, config)
    except InvalidInput as error:
        refusal = str(error)
    active, per_token = None, None
    if config is not None and refusal is None:
        active, per_token = active_parameters(file, config), bytes_per_token(file, config)
    architecture = file.metadata.get("general.architecture")
    return Inspection(
        path=file.path,
        file_bytes=file.nbytes,
        architecture=architecture if isinstance(architecture, str) else None,
        config=config,
        groups=_groups(file),
        parameters=sum(_parameters(info) for info in file.tensors.values()),
        active_parameters=active,
        bytes_per_token=per_token,
        refusal=refusal,
        device=_device(),
    )


def bytes_per_token(file: GGUFFile, config: Config) -> int:
    """Bytes of weights that decoding one token reads: A of E experts of each layer, one embedding row, all else whole.

    `file` must have passed `check_model`. The KV cache is not counted: it grows with the context."""
    total = 0
    for info in file.tensors.values():
        if _is_expert(info):
            total += info.nbytes // config.n_experts * config.n_active
        elif info.name == "token_embd.weight":
            total += info.nbytes // config.vocab
        else:
            total += info.nbytes
    return total


def active_parameters(file: GGUFFile, config: Config) -> int:
    """Parameters that a token is routed through: all but the experts not chosen. `file` as for `bytes_per_token`."""
    parameters = 0
    for info in file.tensors.values():
        count = _parameters(info)
        parameters += count // config.n_experts * config.n_active if _is_expert(info) else count
    return parameters


def _is_expert(info: TensorInfo) -> bool:
    return info.name.endswith("_exps.weight")


def _parameters(info: TensorInfo) -> int:
    count = 1
    for dim in info.shape:
        count *= dim
    return count


def _groups(file: GGUFFile) -> tuple[TypeGroup, ...]:
    members: dict[str, dict[str, list[TensorInfo]]] = {}
    for info in file.tensors.values():
        name = re.sub(r"^blk\.\d+\.", "", info.name).removesuffix(".weight")
        members.setdefault(name, {}).setdefault(info.type_name, []).append(info)
    return tuple(
        TypeGroup(name, type_name, len(infos), sum(map(_parameters, infos)), sum(info.nbytes for info in infos))
        for name, by_type in members.items()
        for type_name, infos in by_type.items()
    )


def _device() -> str | None:
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("triton") is None:
        return None
    import torch  # seconds to import, so only here

    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    return "interpreter"
