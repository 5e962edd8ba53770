"""Where kernels run: on a CUDA device, or in Triton's interpreter on the CPU.

Triton reads TRITON_INTERPRET when a kernel module is imported, so `resolve_device` must be called before the first one
is. A process is in one mode for life."""

import os
import sys

import torch

from exactmoe.kernels.errors import InvalidInput, MissingEnvironment
from exactmoe.kernels.interpreter import quicken

FAITHFUL = {"enable_fp_fusion": False}
"""Launch options of every kernel: without them Triton contracts a*b+c into one rounding."""

_DEVICES = ("auto", "cuda", "interpret")


def interpreting() -> bool:
    """Whether kernels of this process run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def resolve_device(device: str = "auto") -> torch.device:
    """Settle where this process runs kernels: `auto` takes CUDA where there is one, else the interpreter.

    Raises InvalidInput for an unknown name, MissingEnvironment when CUDA is demanded and absent, or when kernels were
    already imported for the other mode."""
    if device not in _DEVICES:
        raise InvalidInput(f"device must be one of {', '.join(_DEVICES)}, got {device!r}")
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise MissingEnvironment("a CUDA device was demanded and torch finds none")
    want_interpreter = device == "interpret" or (device == "auto" and (interpreting() or not cuda))
    if want_interpreter != interpreting() and "exactmoe.kernels.numerics" in sys.modules:
        raise MissingEnvironment(f"kernels are already loaded for the other mode; cannot switch to {device} in-process")
    if want_interpreter:
        os.environ["TRITON_INTERPRET"] = "1"
        quicken()
        return torch.device("cpu")
    os.environ.pop("TRITON_INTERPRET", None)
    return torch.device("cuda", torch.cuda.current_device())


if interpreting():
    quicken()
