"""What a result says of where it comes from: versions, device, numerics."""

import platform
from pathlib import Path

CONTRACT = Path(__file__).resolve().parent.parent / "contracts" / "numerics-v1.yaml"


def versions() -> dict[str, str]:
    """Of Python and of the packages that compute."""
    import numpy as np
    import torch
    import triton

    modules = {"torch": torch, "triton": triton, "numpy": np}
    return {name: str(module.__version__) for name, module in modules.items()} | {"python": platform.python_version()}


def device_name(device: str) -> str:
    """What `device`, as the commands take it, is on this machine."""
    import torch

    from exactmoe.kernels.launch import interpreting, resolve_device

    place = resolve_device(device)
    return "Triton interpreter on the CPU" if interpreting() else torch.cuda.get_device_name(place)


def numerics_version() -> str:
    """Id and version of the numerics contract, as it states them: `numerics-v1 1.0.0`."""
    import yaml

    metadata = yaml.safe_load(CONTRACT.read_text(encoding="utf-8"))["metadata"]
    return f"{metadata['id']} {metadata['version']}"
